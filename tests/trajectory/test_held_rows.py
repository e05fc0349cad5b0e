"""A checkpoint holds the last refreshes; the older rows come from where they are."""

import pytest

from emp_callbacks import Trajectory
from emp_callbacks.trajectory.held_rows import REFRESHES, HeldRows, last_refreshes
from tests.trajectory.rows_of import row, steps_in

LONG = [row(step) for step in range(1, 41)]


def test_a_refresh_is_a_step_with_each_group_once():
    rows = [row(step, group) for step in (1, 2, 2, 3) for group in ("a", "b", "c")]
    assert [event.step for event in last_refreshes(rows, 1)] == [3] * 3
    assert [event.step for event in last_refreshes(rows, 2)] == [2] * 3 + [3] * 3
    assert last_refreshes(rows, 3) == rows[3:], "two refreshes by hand at one step are two"
    assert last_refreshes(rows, 9) == rows
    assert last_refreshes([], 9) == []


def test_the_state_holds_sixteen_refreshes_however_long_the_run(tmp_path):
    rows = Trajectory(tmp_path / "rows.jsonl")
    for step in range(1, 41):
        rows.extend([row(step, "a"), row(step, "b")])
        held = rows.state()
        assert len(held["rows"]) == 2 * min(step, REFRESHES)
        assert held["rows"][-1] == rows[-1].record()
        assert held["total"] == 2 * step
    assert held["path"] == str(tmp_path / "rows.jsonl")


def long_run(path):
    rows = Trajectory(path)
    rows.extend(LONG)
    state = rows.state()
    rows.extend([row(99)])  # beyond the checkpoint
    rows.close()
    return state


def test_in_the_same_file_older_rows_stay_and_newer_ones_are_set_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    state = long_run(path)
    resumed = Trajectory(path)
    assert resumed.restore(state) == ""
    assert list(resumed) == LONG
    resumed.extend([row(41)])
    assert steps_in(path) == [*range(1, 42)]
    assert steps_in(tmp_path / "rows.jsonl.1") == [*range(1, 41), 99]


def test_in_another_file_the_whole_trajectory_is_written(tmp_path):
    state = long_run(tmp_path / "version_0" / "rows.jsonl")
    path = tmp_path / "version_1" / "rows.jsonl"
    resumed = Trajectory(path)
    assert resumed.restore(state) == ""
    assert list(resumed) == LONG
    assert steps_in(path) == [*range(1, 41)]
    assert steps_in(tmp_path / "version_0" / "rows.jsonl") == [*range(1, 41), 99], "the old run's file is left alone"
    assert resumed.state()["path"] == str(path)


def test_a_folder_that_was_moved_as_a_whole_is_found(tmp_path):
    state = long_run(tmp_path / "old" / "rows.jsonl")
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = Trajectory(tmp_path / "new" / "rows.jsonl")
    assert resumed.restore(state) == ""
    assert list(resumed) == LONG


def test_rows_that_another_run_set_aside_are_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    state = long_run(path)
    other = Trajectory(path)
    other.extend([row(1, note="another run")])
    other.close()
    resumed = Trajectory(path)
    assert resumed.restore(state) == ""
    assert list(resumed) == LONG


def test_memory_alone_is_enough_within_a_process():
    rows = Trajectory()
    rows.extend(LONG)
    state = rows.state()
    rows.extend([row(99)])
    assert rows.restore(state) == ""
    assert list(rows) == LONG


@pytest.mark.parametrize("loss", ["gone", "other", "shorter", "torn"])
def test_older_rows_that_are_nowhere_are_said_and_the_trajectory_goes_on(loss, tmp_path):
    path = tmp_path / "old.jsonl"
    state = long_run(path)
    lines = path.read_text().splitlines(keepends=True)
    if loss == "gone":
        path.unlink()
    else:
        changed = {"other": [lines[0], *lines], "shorter": lines[:30], "torn": ["{\n", *lines[1:]]}[loss]
        path.write_text("".join(changed))
    resumed = Trajectory(tmp_path / "new.jsonl")
    lost = resumed.restore(state)
    assert lost.startswith("the checkpoint holds the last 16 of 40 rows of its trajectory, and the 24 older ones are")
    assert lost.endswith(f"not in {path} any more: this trajectory begins at step 25")
    resumed.extend([row(41)])
    assert steps_in(tmp_path / "new.jsonl") == [*range(25, 42)]
    assert resumed.state()["total"] == 17


def test_the_rows_of_a_run_without_a_file_are_said_to_have_none():
    rows = Trajectory()
    rows.extend(LONG)
    assert "the 24 older ones had no file" in Trajectory().restore(rows.state())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": "10"}, "n is '10'"),
        ({"n": True}, "n is True"),
        ({"beta": None}, None),
        ({"n_eff": 4}, None),
        ({"note": None}, "note is None"),
        ({"layers": [{**row(1).record()["layers"][0], "keep": 0.5}]}, "keep is 0.5"),
        ({"certificate": {"kind": "loss_change", "bound": "x"}}, "bound is 'x'"),
        ({"layers": None}, "NoneType"),
    ],
    ids=str,
)
def test_numbers_of_rows_are_numbers_and_words_are_words(change, match):
    state = {"rows": [{**row(1).record(), **change}], "total": 1, "path": None}
    if match is None:
        assert HeldRows.of(state).rows == (row(1, **change),)
    else:
        with pytest.raises(TypeError, match=match):
            HeldRows.of(state)


@pytest.mark.parametrize(
    "change",
    [{"total": 3}, {"total": "40"}, {"total": True}, {"rows": []}, {"path": 7}, {"rows": [{}]}, {"rows": None}],
    ids=str,
)
def test_what_is_no_state_of_a_trajectory_is_refused(change):
    rows = Trajectory()
    rows.extend(LONG)
    with pytest.raises((ValueError, TypeError, KeyError)):
        HeldRows.of({**rows.state(), **change})
