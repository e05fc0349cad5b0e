"""Fails a test that starts a process or compiles and is not marked so: by its marks `make test-quick` leaves it out."""

import functools
import multiprocessing.process
import os
import platform
import subprocess

import pytest
import torch


class ProcessGuard:
    """Wraps the ways out of a Python process; what they may do depends on the marks of the test that runs.

    A wrapper in place for the whole session, not a fixture: fixtures of a module run before those of a test.
    """

    def __init__(self):
        self._item = None
        self._original = []

    def pytest_sessionstart(self):
        platform.platform()  # asks `uname` for the processor, once per process
        for owner, name, mark in (
            (subprocess.Popen, "__init__", "processes"),
            (multiprocessing.process.BaseProcess, "start", "processes"),  # torch.multiprocessing starts its own by it
            (os, "fork", "processes"),
            (os, "system", "processes"),
            (torch, "compile", "compiler"),
        ):
            original = getattr(owner, name)
            self._original.append((owner, name, original))
            setattr(owner, name, self._watched(original, mark))

    def pytest_sessionfinish(self):
        for owner, name, original in self._original:
            setattr(owner, name, original)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self._item = item
        try:
            return (yield)
        finally:
            self._item = None

    def _watched(self, original, mark):
        @functools.wraps(original)
        def call(*args, **kwargs):
            # What is compiled may start processes: torch 2.7 starts workers already as it imports its compiler.
            enough = (mark, "compiler")
            if self._item is not None and not any(self._item.get_closest_marker(name) for name in enough):
                what = "compiles" if mark == "compiler" else "starts a process"
                # Not an Exception: what the code under test catches must not hide it.
                pytest.fail(f"{self._item.nodeid} {what} ({original.__qualname__}): mark it `{mark}`", pytrace=True)
            return original(*args, **kwargs)

        return call
