"""Claims of commands on a folder: of living ones they hold, of those that were killed they are taken over."""

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest

from emp_callbacks.study import folder_lock, run_store
from emp_callbacks.study.arms import Cell
from emp_callbacks.study.folder_lock import LOCKS, BusyError, FolderLock
from emp_callbacks.study.run_store import RunStore

BUSY = "busy: {owner}"


def claim_of(folder):
    (path,) = (folder / LOCKS).glob("*.json")
    return path


def claim_of_another_host(folder):
    """Leave the claim of a command on a host whose locks do not reach here."""
    (folder / LOCKS).mkdir()
    path = folder / LOCKS / "elsewhere-1-0.json"
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "command": "emp compare", "parts": None}))
    return path


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(folder_lock, "_BEAT", 0.05)
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.5)


def test_a_claim_says_whose_it_is_and_ends_with_its_release(tmp_path):
    lock = FolderLock(tmp_path, ["a"], BUSY)
    told = json.loads(claim_of(tmp_path).read_text())
    assert (told["host"], told["process"], told["parts"]) == (platform.node(), os.getpid(), ["a"])
    FolderLock(tmp_path, ["b"], BUSY).release()
    for parts in (["a", "b"], None):
        with pytest.raises(BusyError, match=f"busy: .*on {platform.node()}, process {os.getpid()}, since "):
            FolderLock(tmp_path, parts, BUSY)
    lock.release()
    FolderLock(tmp_path, None, BUSY).release()
    assert not list((tmp_path / LOCKS).glob("*.json"))


@pytest.mark.processes
def test_the_claim_of_a_killed_command_is_taken_over_with_a_word(tmp_path):
    script = f"""
import pathlib, time
from emp_callbacks.study.folder_lock import FolderLock
lock = FolderLock(pathlib.Path({str(tmp_path)!r}), None, "busy")
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(BusyError, match=f"process {process.pid}"):
        FolderLock(tmp_path, None, BUSY)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    with pytest.warns(UserWarning, match=f"going on for .*process {process.pid}.*ended without a word"):
        FolderLock(tmp_path, None, BUSY).release()


@pytest.mark.usefixtures("hasty")
def test_a_claim_of_another_host_holds_while_it_is_touched(tmp_path):
    claim, ended = claim_of_another_host(tmp_path), threading.Event()

    def live():
        while not ended.wait(0.02):
            os.utime(claim)

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(BusyError, match=r"busy: emp compare \(unknown on elsewhere, process 1"):
            FolderLock(tmp_path, ["a"], BUSY)
    finally:
        ended.set()
        other.join()
    assert claim.exists()


@pytest.mark.usefixtures("hasty")
def test_a_claim_of_another_host_without_a_sign_of_life_is_taken_over(tmp_path):
    claim = claim_of_another_host(tmp_path)
    started = time.monotonic()
    with pytest.warns(UserWarning, match="going on for emp compare"):
        lock = FolderLock(tmp_path, ["a"], BUSY)
    assert time.monotonic() - started >= 0.5
    assert not claim.exists()
    mine = claim_of(tmp_path)
    before = mine.stat().st_mtime_ns
    time.sleep(0.2)
    assert mine.stat().st_mtime_ns > before, "a living command touches its claim"
    lock.release()


def test_cells_that_start_together_in_a_fresh_folder_all_get_in(tmp_path, monkeypatch):
    together, written, failed = threading.Barrier(4), run_store.write_atomically, []

    def slowly(path, text):
        written(path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial"), text)  # as half-written as it ever is
        time.sleep(0.05)
        written(path, text)

    def begin(number):
        store = RunStore(tmp_path / "out", "digest")
        together.wait()
        time.sleep(0.01 * number)
        try:
            store.open({}, only=[Cell("dense", number)])
        except OSError as error:
            failed.append(error)
        finally:
            store.close()

    monkeypatch.setattr(run_store, "write_atomically", slowly)
    cells = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
    for cell in cells:
        cell.start()
    for cell in cells:
        cell.join()
    assert not failed
