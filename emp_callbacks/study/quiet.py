"""Hides what Lightning tells of every run, where a study makes many."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emp_callbacks.pruning.signatures import SAID_OF_A_REFRESH

__all__ = ["SRUN", "one_of_many", "quiet"]

SRUN = "The `srun` command is available"
"""How the hint of Lightning begins that every Trainer gives where Slurm is: of use to one training, not to a study."""

_LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
# Advice of Lightning's on speed and logging that a comparison of small runs need not repeat per run.
_NOISE = (
    r".*does not have many workers",
    r".*The number of training batches \(.*smaller than the logging interval",
    r".*isinstance\(treespec, LeafSpec\)",
    r".*`?isinstance.treespec, LeafSpec.",
    r".*GPU available but not used",
    SRUN,
    SAID_OF_A_REFRESH,  # the report has the figures
)


def one_of_many() -> None:
    """Set this process up as one beside others: one CPU thread, and none of that hint."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=SRUN)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's notices and its advice on speed; other warnings stay."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
