"""What a test may not do without its mark: this file has none, and the guard that watches all tests watches it."""

import contextlib
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

WAYS = {
    "subprocess": (lambda: subprocess.run([sys.executable, "-c", ""]), "processes"),
    "shell": (lambda: os.system("true"), "processes"),
    "multiprocessing": (multiprocessing.get_context("spawn").Process(target=print).start, "processes"),
    "ranks": (lambda: torch.multiprocessing.spawn(print, nprocs=1), "processes"),
    "compile": (lambda: torch.compile(nn.Linear(1, 1)), "compiler"),
    "compiled-in-place": (lambda: nn.Linear(1, 1).compile(), "compiler"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_test_without_the_mark_fails(way):
    run, mark = WAYS[way]
    with pytest.raises(pytest.fail.Exception, match=f"mark it `{mark}`"):
        run()


def careless():
    with contextlib.suppress(Exception):
        os.system("true")


def test_code_that_catches_errors_does_not_hide_it():
    with pytest.raises(pytest.fail.Exception, match="mark it `processes`"):
        careless()


@pytest.mark.processes
@pytest.mark.compiler
def test_with_the_marks_all_is_as_ever():
    assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True).stdout == "1\n"
    assert torch.compile(nn.Identity(), backend="eager")(torch.ones(1)) == 1
