"""Where a training writes, whether it may, and whether other machines would see it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emp_callbacks.trajectory.places import place_of

__all__ = ["Folder", "file_system_of", "folder_of"]

# File systems that several machines mount; whatever else is there, a disk or memory, is one machine's own.
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "9p", "virtiofs", "afs", "panfs", "wekafs")


@dataclass(frozen=True)
class Folder:
    """A folder that something is written into.

    Attributes:
        what: What is written there.
        path: As the training will know it; a URL as it is.
        writable: Whether this user may write there, or make it; None of a URL, which is not asked.
        file_system: Of the folder, or of the nearest one that is there, such as "tmpfs"; "" where not known.
    """

    what: str
    path: str
    writable: bool | None
    file_system: str

    @property
    def is_of_one_machine(self) -> bool:
        """Whether other machines, as far as the file system's kind tells, do not see it."""
        return bool(self.file_system) and not self.file_system.startswith(_SHARED)


def folder_of(what: str, given: str | os.PathLike[str]) -> Folder:
    """Return what is known of a folder, whether it is there already or not."""
    place = place_of(given)
    if isinstance(place, str):
        return Folder(what, place, None, "")
    path = place.expanduser().resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Folder(what, str(path), writable, file_system_of(there))


def file_system_of(path: Path) -> str:
    """Return the kind of file system that a path lies on, as Linux says it; "" elsewhere."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.is_file():
        return ""
    found: Mapping[Path, str] = dict(map(_mount, mounts.read_text().splitlines()))  # the last one on a place is on top
    return next((found[parent] for parent in (path, *path.parents) if parent in found), "")


def _mount(line: str) -> tuple[Path, str]:
    """Return mount point and kind of file system; see proc_pid_mountinfo(5)."""
    before, _, after = line.partition(" - ")
    point = before.split(" ")[4]
    for written, meant in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(written, meant)
    return Path(point), after.split(" ")[0]
