"""What a study shows of its runs and of the time left."""

import io

import pytest
from rich.console import Console

from emp_callbacks.study.progress import StudyProgress


def test_the_time_left_counts_the_steps_of_the_run_at_hand(monkeypatch):
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=60, get_time=lambda: now[0])
    progress = StudyProgress(console, 4, "m")
    progress._bars.get_time = lambda: now[0]
    runs = progress._bars.tasks[0]
    runs.get_time = lambda: now[0]
    progress.reused(1)
    runs.start_time = 0.0
    for part in ((0.0, 0.5), (0.5, 1.0)):
        progress.begin("training_feedback seed 0", part=part)
        for step in range(1, 101):  # an hour each, so that the last seconds alone say nothing
            now[0] += 36.0
            progress.on_step(step, 100)
    assert runs.completed == pytest.approx(1.99)
    assert runs.time_remaining == pytest.approx(2.01 * 7200, rel=0.02)  # 2 more runs of 2 hours
    progress.advance("done")
    assert runs.completed == 2
