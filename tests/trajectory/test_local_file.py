"""One file per run: locked while the run lives, whole whatever happens to the disk, never mixed with another run's."""

import copy
import errno
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest

from emp_callbacks import Trajectory
from emp_callbacks.trajectory import local_file
from emp_callbacks.trajectory.held_rows import as_line
from tests.trajectory.rows_of import row, steps_in

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "rows.jsonl"


def full_disk(monkeypatch, room):
    """Let `room` more bytes be written and then no more."""
    write = os.write

    def limited(descriptor, text):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(text[:room]))
        room -= written
        return written

    monkeypatch.setattr(local_file.os, "write", limited)


# ---- a disk that fails --------------------------------------------------------------------------------------------


def test_rows_of_a_full_disk_wait_in_memory_and_are_written_later(path, monkeypatch):
    rows = Trajectory(path)
    rows.extend([row(1)])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        full_disk(patch, room=200)
        with pytest.warns(UserWarning, match=r"rows.jsonl cannot be written \(.*No space left.*stay in memory"):
            rows.extend([row(2)])
        rows.extend([row(3)])  # said once: a second warning is an error here
        assert path.read_bytes() == before
        assert [event.step for event in rows] == [1, 2, 3]
    rows.extend([row(4)])
    assert steps_in(path) == [1, 2, 3, 4]
    assert path.read_text() == "".join(map(as_line, rows))
    assert sorted(p.name for p in path.parent.iterdir()) == ["rows.jsonl"]


def test_a_torn_row_that_cannot_be_taken_back_is_never_glued_to_the_next(path, monkeypatch):
    rows = Trajectory(path)
    rows.extend([row(1)])
    with monkeypatch.context() as patch:
        full_disk(patch, room=200)
        patch.setattr(local_file.os, "ftruncate", refuse)
        with pytest.warns(UserWarning, match="cannot be written"):
            rows.extend([row(2)])
    assert not path.read_bytes().endswith(b"\n")
    rows.extend([row(3)])
    assert steps_in(path) == [1, 2, 3]
    assert not path.with_name("rows.jsonl.1").exists()


def refuse(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_what_is_never_written_is_said_at_the_end(path, monkeypatch):
    rows = Trajectory(path)
    full_disk(monkeypatch, room=0)
    with pytest.warns(UserWarning, match="cannot be written"):
        rows.extend([row(1), row(2)])
    with pytest.warns(UserWarning, match="2 rows could not be written to .*memory only"):
        rows.close()
    rows.close()  # said once


def test_a_warning_that_is_an_error_loses_no_row(path, monkeypatch):
    rows = Trajectory(path)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        full_disk(patch, room=0)
        with pytest.raises(UserWarning):
            rows.extend([row(1)])
    rows.extend([row(2)])
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize("what", ["file", "folder", "rotated", "cut", "other", "junk"])
def test_a_file_that_others_change_while_training_gets_all_rows_again(what, path):
    rows = Trajectory(path)
    rows.extend([row(1)])
    if what == "file":
        path.unlink()
    elif what == "folder":
        shutil.rmtree(path.parent)
    elif what == "rotated":
        path.rename(path.with_name("rows.old"))
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif what == "other":
        path.unlink()
        path.write_text("mine\n")
    else:
        with path.open("a") as file:
            file.write("junk")
    rows.extend([row(2)])
    assert steps_in(path) == [1, 2]
    aside = path.with_name("rows.jsonl.1")
    assert aside.exists() == (what in ("other", "junk")), "what is not ours is set aside"
    rows.extend([row(3)])
    assert steps_in(path) == [1, 2, 3]


def test_a_row_torn_by_a_kill_is_never_glued_to_a_row_of_the_resumed_run(path):
    first = Trajectory(path)
    first.extend([row(1), row(2)])
    state = first.state()
    first.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "ep')
    resumed = Trajectory(path)
    resumed.restore(state)
    resumed.extend([row(3)])
    assert steps_in(path) == [1, 2, 3]


def test_only_a_regular_file_will_do(tmp_path):
    with pytest.raises(OSError, match="/dev/null is no regular file"):
        Trajectory("/dev/null")


# ---- one file per run ---------------------------------------------------------------------------------------------


def test_two_live_runs_never_share_a_file(path):
    first = Trajectory(path)
    with pytest.warns(UserWarning, match=r"rows.jsonl is being written by another run .* are in .*rows-2.jsonl"):
        second = Trajectory(path)
    with pytest.warns(UserWarning, match=r"rows-3.jsonl"):
        third = Trajectory(str(path))
    for step in range(1, 4):
        for number, run in enumerate((first, second, third)):
            run.extend([row(10 * number + step)])
    assert [run.path.name for run in (first, second, third)] == ["rows.jsonl", "rows-2.jsonl", "rows-3.jsonl"]
    assert [steps_in(run.path) for run in (first, second, third)] == [[1, 2, 3], [11, 12, 13], [21, 22, 23]]
    assert len(list(path.parent.iterdir())) == 3


def test_a_second_run_that_restores_before_the_first_one_ends_leaves_its_file_alone(path):
    first = Trajectory(path)
    first.extend([row(1)])
    with pytest.warns(UserWarning, match="rows-2"):
        second = Trajectory(path)
    second.restore(first.state())
    second.extend([row(5)])
    first.extend([row(2)])
    assert (steps_in(path), steps_in(second.path)) == ([1, 2], [1, 5])


def test_a_run_that_is_closed_leaves_the_file_to_the_next_and_may_still_go_on(path):
    first = Trajectory(path)
    first.extend([row(1)])
    first.close()
    first.close()
    first.extend([row(2)])
    first.close()
    second = Trajectory(path)  # without a warning
    second.restore(first.state())
    second.extend([row(3)])
    assert steps_in(path) == [1, 2, 3]
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]
    with pytest.warns(UserWarning, match="rows-2"):
        first.extend([row(9)])
    assert (steps_in(path), steps_in(first.path)) == ([1, 2, 3], [1, 2, 9])


def test_a_run_that_nobody_refers_to_any_more_is_no_live_run(path):
    run = [Trajectory(path)]
    run.append(run)  # freed by the collector alone
    del run
    assert Trajectory(path).path == path


@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_a_copy_is_a_live_run_of_its_own(how, path):
    first = Trajectory(path)
    first.extend([row(1)])
    second = how(first)
    with pytest.warns(UserWarning, match="rows-2"):
        second.extend([row(2)])
    first.extend([row(3)])
    assert (steps_in(path), steps_in(second.path)) == ([1, 3], [1, 2])


OTHER = """
import sys
from emp_callbacks import Trajectory
from tests.trajectory.rows_of import row
run = Trajectory(sys.argv[1])
run.extend([row(7)])
print(run.path, flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_two_processes_never_share_a_file_and_a_dead_one_holds_none(path):
    def other():
        command = [sys.executable, "-W", "ignore", "-c", OTHER, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    first, taken = other()
    assert taken == str(path)
    second, taken = other()
    assert taken == str(path.with_name("rows-2.jsonl"))
    for process in (first, second):
        process.kill()
        process.communicate()
    rows = Trajectory(path)
    assert rows.path == path
    rows.extend([row(1)])
    assert steps_in(path) == [1]
    assert steps_in(path.with_name("rows.jsonl.1")) == [7]
    assert steps_in(path.with_name("rows-2.jsonl")) == [7]


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_neither_writes_into_the_file_nor_frees_it(path):
    rows = Trajectory(path)
    rows.extend([row(1)])
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")
            rows.extend([row(8)])
            rows.close()
            os._exit(0 if rows.path.name == "rows-2.jsonl" else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.warns(UserWarning, match="rows-2"):
        Trajectory(path)
    rows.extend([row(2)])
    assert steps_in(path) == [1, 2]


def test_where_the_file_system_knows_no_locks_a_run_goes_on_without(path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    rows = Trajectory(path)
    rows.extend([row(1)])
    assert steps_in(path) == [1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_file_has_the_mode_that_the_umask_gives(umask, mode, path):
    before = os.umask(umask)
    try:
        Trajectory(path).extend([row(1)])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
