"""Checkpoints that Lightning is asked to go on from or to evaluate: what is wrong with one, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from emp_callbacks.checkpoint.reading import read_checkpoint

__all__ = ["check_resumable", "fitting_weights"]

_WORDS = ("last", "best", "hpc")  # which Lightning looks for itself, as what is in a registry or on a server


def check_resumable(path: str) -> None:
    """Raise before anything is built unless a path leads to a checkpoint of Lightning; its tensors stay on disk.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another file.
    """
    elsewhere = path in _WORDS or path.startswith("registry") or "://" in path
    if elsewhere or Path(path).is_dir():  # a folder holds shards, which the strategy reads
        return
    held = read_checkpoint(Path(path), mapped=True)
    if not (isinstance(held, Mapping) and {"state_dict", "pytorch-lightning_version"} <= held.keys()):
        raise ValueError(
            f"{path} is no checkpoint of Lightning (a .ckpt that emp fit wrote); name one, or leave out --ckpt_path"
        )


@contextmanager
def fitting_weights() -> Iterator[None]:
    """Turn PyTorch's list of the names that a checkpoint and a model do not share into one line.

    Raises:
        ValueError: They do not fit.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"Error\(s\) in loading state_dict for (\w+):", str(error))
        if found is None:
            raise
        told = " ".join(str(error)[found.end() :].split())
        raise ValueError(
            f"the checkpoint does not fit the recipe's {found[1]}: {told:.200}; name the recipe that trained it"
        ) from error
