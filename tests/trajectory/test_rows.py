import io
import json

import pytest
from rich.console import Console
from torch import nn

from emp_callbacks import EMPPruner, Trajectory
from emp_callbacks.trajectory import layer_table


def some_rows(count=3):
    pruner = EMPPruner(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), scope="tensor", mode="project")
    for _ in range(count):
        pruner.refresh()
    return pruner


def test_read_returns_what_was_written(tmp_path):
    rows = some_rows().trajectory
    path = tmp_path / "rows.jsonl"
    Trajectory(path).extend(rows)
    assert list(Trajectory.read(path)) == list(rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows.records()


def test_a_trajectory_says_what_it_holds(tmp_path):
    assert repr(Trajectory()) == "Trajectory(0 rows; in memory)"
    rows = Trajectory(tmp_path / "rows.jsonl")
    rows.extend(some_rows(2).trajectory)
    assert repr(rows) == f"Trajectory(4 rows, last: {rows[-1].density:.3f} kept at step 0; {tmp_path / 'rows.jsonl'})"


@pytest.mark.parametrize("cut", [2, 40, 200])
def test_a_row_torn_by_a_kill_is_left_out(tmp_path, cut):
    rows = some_rows().trajectory
    path = tmp_path / "rows.jsonl"
    Trajectory(path).extend(rows)
    path.write_text(path.read_text()[:-cut])
    assert list(Trajectory.read(path)) == list(rows[:-1])


@pytest.mark.parametrize("line", ["not json", "{}", '{"step": 1}', "3"])
def test_a_foreign_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    Trajectory(path).extend(some_rows(1).trajectory)
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not a row of a trajectory"):
        Trajectory.read(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trajectory.read(tmp_path / "none.jsonl")


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        EMPPruner(nn.Linear(2, 2), trajectory_path=tmp_path / "file" / "rows.jsonl")
    with pytest.raises(OSError, match="directory"):
        EMPPruner(nn.Linear(2, 2), trajectory_path=tmp_path)


def test_layer_table():
    pruner = some_rows()
    out = io.StringIO()
    Console(file=out, width=100).print(layer_table(pruner.last_events))
    text = out.getvalue()
    for layer in pruner.layers:
        assert layer.name in text
        assert f"{layer.density:.3f}" in text
    assert f"{pruner.density:.3f}" in text
