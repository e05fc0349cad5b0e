"""What becomes of the memory of tensors that are let go of."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_freed_memory_back"]

_M_MMAP_THRESHOLD = -3  # of mallopt
_LARGE = 1 << 20


def give_freed_memory_back() -> None:
    """Let the memory of large tensors go back to the system as soon as they are freed, in this process.

    glibc learns to keep up to 32 MB of each for the next one, in pieces that fit none: blocks that come and go would
    leave a fifth more resident memory. Other systems' libraries are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
