"""The kernel's lock on an open file: it ends with the descriptor, at the latest with the process."""

from __future__ import annotations

import sys
from contextlib import suppress

if sys.platform != "win32":
    import fcntl


def try_lock(descriptor: int) -> bool:
    """Return whether nobody else has the lock, and take it; where the system or its disk knows none, nobody has.

    Args:
        descriptor: Of an open file.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take the lock as soon as nobody has it; at once where the system or its disk knows none."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def unlock(descriptor: int) -> None:
    """Give the lock up, also for the processes that were forked meanwhile."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
