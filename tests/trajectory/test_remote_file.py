"""Trajectories behind URLs: written whole, read back, never mixed within a process."""

import fsspec
import pytest

from emp_callbacks import Trajectory
from emp_callbacks.trajectory import places, trajectory_file
from tests.trajectory.rows_of import row, steps_in


@pytest.fixture
def url(request):
    yield f"memory://{request.node.name}/rows.jsonl"
    fsspec.filesystem("memory").store.clear()


def names():
    return sorted(path.rpartition("/")[2] for path in fsspec.filesystem("memory").store)


def test_rows_go_to_the_url_and_are_read_from_it(url):
    rows = Trajectory(url)
    assert rows.path == url
    for step in (1, 2):
        rows.extend([row(step)])
        assert list(Trajectory.read(url)) == list(rows)
    assert names() == ["rows.jsonl"]


def test_a_resumed_run_goes_on_in_its_own_file_and_a_new_one_sets_it_aside(url):
    first = Trajectory(url)
    first.extend([row(1)])
    state = first.state()
    first.extend([row(2)])
    first.close()
    assert state["path"] == url
    second = Trajectory(url)
    assert second.restore(state) == ""
    second.extend([row(3)])
    second.close()
    assert (steps_in(url), steps_in(f"{url}.1")) == ([1, 3], [1, 2])
    third = Trajectory(url)
    third.extend([row(4)])
    assert (steps_in(url), steps_in(f"{url}.2")) == ([4], [1, 3])


def test_two_live_runs_of_a_process_have_a_file_each(url):
    first = Trajectory(url)
    with pytest.warns(UserWarning, match=r"rows.jsonl is being written by another run .*rows-2.jsonl"):
        second = Trajectory(url)
    first.extend([row(1)])
    second.extend([row(2)])
    assert (steps_in(first.path), steps_in(second.path)) == ([1], [2])


def test_a_store_that_fails_ends_no_training(url, monkeypatch):
    rows = Trajectory(url)
    rows.extend([row(1)])

    def broken(self, *_, **__):
        raise RuntimeError("503 slow down")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "pipe_file", broken)
        with pytest.warns(UserWarning, match=r"cannot be written \(memory:.*503 slow down"):
            rows.extend([row(2)])
    rows.extend([row(3)])
    assert steps_in(url) == [1, 2, 3]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("memory://run", "memory://run/emp.jsonl"),
        ("s3://bucket/run/", "s3://bucket/run/emp.jsonl"),
        ("file:///data/run", places.Path("/data/run/emp.jsonl")),
        ("runs/a", places.Path("runs/a/emp.jsonl")),
        (places.Path("/runs"), places.Path("/runs/emp.jsonl")),
    ],
)
def test_a_file_in_a_folder_of_either_kind(folder, expected):
    file = trajectory_file(folder, "emp.jsonl")
    assert (file, type(file) is str) == (expected, type(expected) is str)


def test_what_is_missing_or_unknown_is_said_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"no trajectory can be kept in nothing://x/y \(.*; name a local folder$"):
        Trajectory("nothing://x/y")
    monkeypatch.setattr(places, "is_installed", lambda _: False)
    with pytest.raises(ImportError, match=r"s3://x/y needs fsspec, which is not installed: pip install fsspec$"):
        Trajectory("s3://x/y")
