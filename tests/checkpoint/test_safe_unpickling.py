import argparse
import enum
import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from emp_callbacks.checkpoint.reading import read_checkpoint

WEIGHT = torch.arange(6.0).view(2, 3)


class Colour(enum.Enum):
    RED = 1


class Loud(nn.Module):
    """A module that leaves a mark when it is made from a file."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def __setstate__(self, state):
        Path(state["mark"]).touch()


class Called:
    """Unpickles as a call."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def saved(file, value, **settings):
    held = {"state_dict": {"layer.weight": WEIGHT}, "hyper_parameters": {"value": value, "twice": [value, value]}}
    torch.save(held, file, **settings)
    return file


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1),
        Path("runs"),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        Colour.RED,
        functools.partial(max, 3),
        nn.GELU,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("mapped", [False, True])
def test_weights_beside_objects_are_read(value, mapped, tmp_path):
    read = read_checkpoint(saved(tmp_path / "last.ckpt", value), mapped=mapped)
    assert torch.equal(read["state_dict"]["layer.weight"], WEIGHT)
    assert read["hyper_parameters"]["value"] is not value


def test_no_object_in_a_file_runs_code(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "last.ckpt"
    for value in (Loud(str(mark)), Called(eval, f"open({str(mark)!r}, 'w')")):
        read_checkpoint(saved(file, value))
        assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # the file does have it in it


@pytest.mark.parametrize(
    "write",
    [
        lambda file, mark: torch.save(Loud(mark), file),
        lambda file, mark: saved(file, Called(os.mkdir, mark)),
        lambda file, mark: saved(file, Loud(mark), _use_new_zipfile_serialization=False),
    ],
    ids=["a module", "a blocked function", "the old format"],
)
def test_what_has_no_placeholder_is_refused_in_one_line(write, tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "weights.pt"
    write(file, str(mark))
    with pytest.raises(ValueError, match=r"holds Python objects besides tensors, and emp never runs code") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
