"""Which errors are the user's to put right, and so one line; anything else keeps its traceback."""

from __future__ import annotations

from emp_callbacks.blame import raised_by_us

__all__ = ["for_the_user"]


def for_the_user(error: BaseException) -> str | None:
    """Return the message of an error about what the user gave: a file, or a value our own checks refused."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # Lightning has a word for a recipe that it cannot run.
    if raised_by_us(error) or type(error).__name__ == "MisconfigurationException":
        return str(error)
    return None
