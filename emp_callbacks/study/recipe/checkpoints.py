"""Checkpoints that Lightning is asked to go on from or to evaluate: what is wrong with one, in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from emp_callbacks.checkpoint.reading import read_checkpoint

__all__ = ["check_resumable", "fitting_weights", "goes_on_in", "newest_checkpoint", "settle_checkpoints"]

_WORDS = ("last", "best", "hpc")  # which Lightning looks for itself, as what is in a registry or on a server


def check_resumable(path: str) -> None:
    """Raise before anything is built unless a path leads to a checkpoint of Lightning; its tensors stay on disk.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another file.
    """
    if not path:
        raise ValueError("--ckpt_path is empty: name a checkpoint, or last; without the option training starts anew")
    elsewhere = path in _WORDS or path.startswith("registry") or "://" in path
    if elsewhere or Path(path).is_dir():  # a folder holds shards, which the strategy reads
        return
    if not Path(path).exists():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; --ckpt_path last takes the newest of the run's folder"
        )
    held = read_checkpoint(Path(path), mapped=True)
    if not (isinstance(held, Mapping) and {"state_dict", "pytorch-lightning_version"} <= held.keys()):
        raise ValueError(
            f"{path} is no checkpoint of Lightning (a .ckpt that emp fit wrote); name one, or leave out --ckpt_path"
        )


def goes_on_in(checkpoint: str | None, root: str) -> bool:
    """Whether a fit in folder `root` goes on with the one that was there: its checkpoint lies there, or is looked for.

    Args:
        checkpoint: As `--ckpt_path` has it; None: not given, but for one that Lightning saved before a requeue.
        root: The Trainer's default_root_dir.
    """
    if checkpoint is None:
        return SLURMEnvironment.detect() and any(Path(root).glob("hpc_ckpt_*.ckpt"))
    return checkpoint in ("last", "hpc") or Path(checkpoint).resolve().is_relative_to(Path(root).resolve())


def settle_checkpoints(callbacks: Iterable[pl.callbacks.Checkpoint], folder: str | None) -> None:
    """Give the checkpoints of a fit one place, ROOT/checkpoints with its last.ckpt, where `--ckpt_path last` looks.

    Left to itself Lightning puts them into the logger's folder of this start, version_0, version_1, ...: a start after
    a kill or a preemption finds none.

    Args:
        callbacks: Those of the Trainer.
        folder: ROOT, as the recipe or the command gives it; None: no place is known, all stays as it is.
    """
    for callback in callbacks:
        if folder is not None and isinstance(callback, pl.callbacks.ModelCheckpoint):
            callback.dirpath = callback.dirpath or os.path.join(folder, "checkpoints")
            callback.save_last = "link" if callback.save_last is None else callback.save_last


def newest_checkpoint(trainer: pl.Trainer) -> str | None:
    """Return what `--ckpt_path last` means where the logger has a folder for each start: the newest below them all."""
    root = getattr(trainer.logger, "root_dir", None) or trainer.default_root_dir
    found = [path for path in Path(root).rglob("*.ckpt") if path.is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


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
