"""Studies that prune trained models once."""
