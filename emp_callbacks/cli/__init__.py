"""The `emp` command."""
