"""Says in one line that a file does not hold what a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emp_callbacks.blame import raised_by_us
from emp_callbacks.trajectory import Trajectory

__all__ = ["check_runs", "read_rows", "showing"]

# Of a value of the wrong kind, wherever it is first counted with, compared or written out.
_WRONG_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextmanager
def showing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong while a file's contents are shown into one line that names the file.

    The reports read a hundred names of plain data; where one is missing or of another type, the file is not as emp
    wrote it. Errors of our own only get the file's name.

    Raises:
        ValueError: Something went wrong; the cause is chained.
    """
    try:
        yield
    except _WRONG_SHAPE as error:
        if raised_by_us(error):
            if str(path) in str(error):
                raise
            raise ValueError(f"{path}, {error}") from error
        what = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not as emp wrote it ({what}); {remedy}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a trajectory file.

    Raises:
        ValueError: A row is not one of a trajectory, or holds values of another kind.
    """
    with showing(path, _REMEDY):
        rows = Trajectory.read(path).records()
        for number, row in enumerate(rows, start=1):
            _check_row(row, f"line {number}", _REMEDY)
    return rows


def check_runs(results: Mapping[str, Any], remedy: str) -> None:
    """Raise ValueError unless the rows in the runs of a study hold values of the right kinds."""
    for run in results["runs"]:
        for number, row in enumerate(run.get("trajectory") or ()):
            _check_row(row, f"{run['arm']}, seed {run['seed']}, row {number} of the trajectory", remedy)


_REMEDY = "remove the damaged row"
_TEXTS = ("group", "mode", "criterion", "scope", "note", "name")
_OPTIONAL = ("beta", "mass_bound", "tight_mass_bound", "first_token")


def _check_row(row: Mapping[str, Any], place: str, remedy: str) -> None:
    for part in (row, *(row.get("layers") or ())):
        for name, value in part.items():
            if name in ("layers", "certificate", "gates") or (value is None and name in _OPTIONAL):
                continue
            kind: Any = str if name in _TEXTS else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "a text" if name in _TEXTS else "a number"
                raise ValueError(f"{place}: {name} must be {wanted}, got {value!r:.60}; {remedy}")
