"""Models that are trained already: inspected, pruned once, certified, exported."""
