"""Tasks, arms, comparison, statistics and reports of a pruning study."""

from emp_callbacks.extras import needs

needs("a recipe or a study (emp fit, validate, test, compare, report, sweep-beta, ..., --config, --data)", "study")
