"""Where a trajectory lies: a path on this machine, or a URL that fsspec knows (`s3://...`, `memory://...`)."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from emp_callbacks.extras import is_installed

Place = Path | str
"""A local path, or a URL; a URL is never a Path, which would eat one of its slashes."""


def place_of(path: str | os.PathLike[str]) -> Place:
    """Return a Path, or the URL as it is; `file://` is a local path."""
    text = os.fspath(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def trajectory_file(folder: str | os.PathLike[str], name: str) -> Place:
    """Return the place of a file in a folder, which may be a URL.

    Examples:
        >>> trajectory_file("s3://bucket/run/", "emp_trajectory.jsonl")
        's3://bucket/run/emp_trajectory.jsonl'
    """
    place = place_of(folder)
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def numbered(place: Place, number: int) -> Place:
    """Return the place of the n-th live run: NAME.jsonl, NAME-2.jsonl, NAME-3.jsonl, ...

    Examples:
        >>> numbered("s3://bucket/rows.jsonl", 2)
        's3://bucket/rows-2.jsonl'
    """
    if number == 1:
        return place
    if isinstance(place, Path):
        return place.with_name(f"{place.stem}-{number}{place.suffix}")
    folder, _, name = place.rpartition("/")
    return f"{folder}/{numbered(Path(name), number)}"


def set_aside(place: Place) -> tuple[list[Place], Place]:
    """Return what was set aside of a file, NAME.1, NAME.2, ..., and the first such name that is free."""
    taken: list[Place] = []
    for number in count(1):
        aside = place.with_name(f"{place.name}.{number}") if isinstance(place, Path) else f"{place}.{number}"
        if not exists(aside):
            return taken, aside
        taken.append(aside)
    raise AssertionError("unreachable")


def exists(place: Place) -> bool:
    """Return whether there is such a file."""
    if isinstance(place, Path):
        return place.exists()
    system, inside = file_system(place)
    return bool(system.exists(inside))


def read_bytes(place: Place) -> bytes:
    """Return what a file holds.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    system, inside = file_system(place)
    content: bytes = system.cat_file(inside)
    return content


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path inside it.

    Raises:
        ImportError: fsspec, or what this kind of URL needs, is not installed.
        ValueError: fsspec does not know this kind of URL.
    """
    if not is_installed("fsspec"):
        raise ImportError(f"a trajectory in {url} needs fsspec, which is not installed: pip install fsspec")
    from fsspec.core import url_to_fs

    try:
        system, inside = url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"a trajectory in {url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ValueError(f"no trajectory can be kept in {url} ({error}); name a local folder") from error
    return system, inside
