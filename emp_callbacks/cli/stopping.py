"""How a command ends that is told to stop: by Ctrl-C, or by a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["outlive_time_signal", "stopped_by", "terminable"]

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes that a shell gives a program which such a signal ended: schedulers take them for unfinished work."""


class _Terminated(SystemExit):
    """SIGTERM arrived, and no trainer is there to end its step first."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an exit that cleans up, as the first process of a container, too, where it would do nothing."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, _: FrameType | None) -> None:
    # Lightning's handler calls the one before it; it ends the training itself, when the step is done.
    if signal.getsignal(number) is _terminate:
        raise _Terminated(TERMINATED)


def outlive_time_signal() -> None:
    """In a Slurm job, outside of trainings: the signal before a time limit must not end what has nothing to save.

    Trainings answer it themselves; `emp fit` has just ended its own, and a study tests and compares between its own.
    """
    default = threading.current_thread() is threading.main_thread() and "SLURM_JOB_ID" in os.environ
    if default and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def stopped_by(error: BaseException) -> int | None:
    """Return the exit code of a command that a signal ended, or None if none did.

    Lightning turns Ctrl-C into an exit with code 1, and SIGTERM into one without a code: their causes tell.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(cause, _Terminated) or type(cause).__name__ == "SIGTERMException" for cause in chain):
        return TERMINATED
    return INTERRUPTED if any(isinstance(cause, KeyboardInterrupt) for cause in chain) else None
