"""Tasks, arms, comparison, statistics and reports of a pruning study."""
