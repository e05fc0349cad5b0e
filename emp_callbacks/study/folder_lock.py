"""What running commands work on in a folder, so that a second command does not destroy it.

Each command writes a claim, OUT/.locks/NAME.json: who it is, and on which parts it works. A claim ends with its
command, however that ends. On one host, and on most shared disks, the kernel says so: a living command has the lock on
its claim. Where a lock does not reach from host to host, the file's time says it: a living command touches its claim
every few seconds. No clock of two hosts is compared: whoever doubts a claim watches whether its time changes.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import secrets
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from emp_callbacks.checkpoint.whole_output import appearing
from emp_callbacks.file_lock import try_lock, wait_for_lock

__all__ = ["LOCKS", "BusyError", "FolderLock"]

LOCKS = ".locks"
"""The folder of the claims."""

_BEAT = 10.0  # seconds between two touches of a claim
_PATIENCE = 60.0  # a claim of another host that was not touched for so long ended without a word


class BusyError(OSError):
    """Another command works on the same."""


class FolderLock:
    """A claim on some parts of a folder, or on all of it, held until `release`, at the latest until the process ends.

    A claim of a command that was killed is taken over, with a warning. Where it is another host's, and the disk has no
    lock that reaches so far, that is known after a minute without a sign of life.

    Args:
        folder: The folder; it exists.
        parts: Names of what the command works on; other commands may work on other parts. None: on everything.
        busy: What to say where another command works on it: "{owner}" stands for who that is.

    Raises:
        BusyError: Another command works on one of the parts.
        OSError: The claim cannot be written.
    """

    def __init__(self, folder: Path, parts: Collection[str] | None, busy: str) -> None:
        self._folder = folder / LOCKS
        self._folder.mkdir(exist_ok=True)
        self._parts = None if parts is None else sorted(parts)
        self._path = self._folder / f"{platform.node()}-{os.getpid()}-{secrets.token_hex(8)}.json"
        self._file: IO[bytes] | None = None
        self._ended = threading.Event()
        try:
            with _one_at_a_time(self._folder):
                self._write()
                doubtful = [claim for claim in self._others() if self._is_held(claim, busy)]
            for claim in doubtful:
                self._watch(claim, busy)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Let others have it. Twice is once."""
        self._ended.set()
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    # ---- our own claim --------------------------------------------------------------------------------------------

    def _write(self) -> None:
        claim = {**_myself(), "parts": self._parts}
        with appearing(self._path, folder=False) as partial:
            self._file = partial.open("wb")
            self._file.write(json.dumps(claim, indent=1).encode())
            self._file.flush()
            try_lock(self._file.fileno())  # before others can see the file

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                if not self._ended.is_set():
                    warnings.warn(
                        f"{self._path} is gone: another command may work in {self._folder.parent}", stacklevel=1
                    )
                return
            except OSError:
                continue  # a disk that is away for a while

    # ---- those of others ------------------------------------------------------------------------------------------

    def _others(self) -> Iterator[Path]:
        """Yield the claims of other commands that do not go with ours."""
        for path in sorted(self._folder.glob("*.json")):
            parts = _read(path).get("parts")
            if path != self._path and (self._parts is None or parts is None or set(parts) & set(self._parts)):
                yield path

    def _is_held(self, claim: Path, busy: str) -> bool:
        """Return whether a claim may still be a living command's; it is removed where that is known to have ended.

        Raises:
            BusyError: It is.
        """
        try:
            with claim.open("rb") as file:
                free = try_lock(file.fileno())
        except FileNotFoundError:
            return False
        if not free:
            raise BusyError(busy.replace("{owner}", _told(claim)))
        if _read(claim).get("host") != platform.node():
            return True
        self._take_over(claim)
        return False

    def _watch(self, claim: Path, busy: str) -> None:
        """Wait until a claim of another host shows a sign of life, or has shown none for long enough.

        Raises:
            BusyError: Its command lives.
        """
        first, until = _touched(claim), time.monotonic() + _PATIENCE
        while (now := _touched(claim)) is not None:
            if now != first:
                raise BusyError(busy.replace("{owner}", _told(claim)))
            if time.monotonic() > until:
                self._take_over(claim)
                return
            time.sleep(_BEAT / 10)

    def _take_over(self, claim: Path) -> None:
        owner = _told(claim)
        claim.unlink(missing_ok=True)
        warnings.warn(f"in {self._folder.parent} going on for {owner}, which ended without a word", stacklevel=5)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let commands that start together look at each other's claims in turn; where no lock is known, two may refuse."""
    with (folder / "turn").open("ab") as file:
        wait_for_lock(file.fileno())
        yield


def _myself() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": platform.node(), "process": os.getpid(), "user": user, "since": since, "command": command}


def _told(claim: Path) -> str:
    """Return who wrote a claim, in words."""
    told = _read(claim)
    names = ("user", "host", "process", "since")
    user, host, process, since = (told.get(name, "unknown") for name in names)
    return f"{told.get('command', 'a command')!s:.200} ({user} on {host}, process {process}, since {since})"


def _read(claim: Path) -> dict[str, Any]:
    """Return what a claim says; {}, an unknown command on everything, where it is none of ours or gone."""
    with suppress(OSError, ValueError):
        found = json.loads(claim.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _touched(claim: Path) -> int | None:
    """Return when a claim was touched, in ns of the disk's clock; None where it is gone."""
    try:
        with claim.open("rb") as file:  # opened, so that a network disk asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
