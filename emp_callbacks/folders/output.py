"""The folder that is written: a copy of the one that was read, in which pruned tensors are replaced one by one.

It grows beside its place as NAME.partial and is renamed when it is whole. What is finished is noted there after each
block, so that the same command goes on behind it after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.checkpoint.folder_files import DTYPE_NAMES, FolderFiles, TensorInfo
from emp_callbacks.checkpoint.whole_output import appearing, aside, has_content
from emp_callbacks.file_lock import try_lock

__all__ = ["RECORD", "FolderOutput"]

RECORD = "emp_prune.json"
"""Beside the weights: what was pruned and how."""

_PROGRESS = "emp_progress"
# What other frameworks read, and weights that would be the dense ones.
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".ot", ".index.json")
_WAIT = 0.2  # seconds between two looks at what other processes have done


class FolderOutput:
    """A folder of pruned weights that is being written, by one process or by several.

    Args:
        files: What was read.
        out: The folder; absent until `finish`.
        settings: What is done, as plain JSON types: only the same goes on where it was.
        rank: Number of this process.
        world_size: Number of processes, which write different tensors.
        overwrite: Whether a folder that is there may make way, see `aside`.
        on_copied: Called with the number of bytes after each file that was copied.

    Attributes:
        done: Block -> what was noted of it, of all processes when this one began.

    Raises:
        FileExistsError: `out` exists, or a half-written folder of another command.
        FileNotFoundError: There is no folder for `out`.
        BlockingIOError: Another command writes it now.
    """

    def __init__(
        self,
        files: FolderFiles,
        out: Path,
        settings: Mapping[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        overwrite: bool = False,
        on_copied: Callable[[int], None] = lambda _: None,
    ) -> None:
        check_out(out, overwrite=overwrite)
        self.out, self._rank, self._world_size = out, rank, world_size
        self._partial = out.with_name(f"{out.name}.partial")
        self._own = self._partial / f"{_PROGRESS}-{rank}.json"
        sizes = {file: (files.folder / file).stat() for file in files.files}
        told = {**settings, "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in sizes.items()}}
        self._settings: dict[str, Any] = json.loads(json.dumps(told))
        self._lock: Any = None
        if rank == 0:
            self._begin(files, on_copied)
        else:
            _wait_for(lambda: _settings_in(self._partial) == self._settings)
        self._written = FolderFiles(self._partial)
        self.done = self._all_done()
        self._noted: dict[str, Any] = _read(self._own).get("done", {})

    def _begin(self, files: FolderFiles, on_copied: Callable[[int], None]) -> None:
        """Make the half-written folder, or take it up."""
        found = _settings_in(self._partial)
        if self._partial.exists() and found is None:
            raise FileExistsError(f"{self._partial} exists and was not written by emp; move it away")
        if found is not None and found != self._settings:
            differ = ", ".join(key for key in self._settings if found.get(key) != self._settings[key])
            raise FileExistsError(
                f"{self._partial} is half written by another command (other {differ}); give that command again to go "
                "on, or delete the folder"
            )
        self._partial.mkdir(exist_ok=True)
        self._lock = (self._partial / f"{_PROGRESS}.lock").open("a+b")
        if not try_lock(self._lock.fileno()):
            self._lock.close()
            raise BlockingIOError(f"another command writes {self._partial} now; wait for it, or choose another --out")
        start = self._partial / f"{_PROGRESS}.json"
        if not _read(start).get("copied"):
            _write(start, {"settings": self._settings, "copied": False})
            copy_beside(files.folder, self._partial)
            copy_weights(files, self._partial, on_copied)
            _write(start, {"settings": self._settings, "copied": True})

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is written now."""
        return self._written.read(name)

    def write(self, name: str, value: Tensor) -> None:
        """Replace a tensor, which has the shape and dtype that it had."""
        info = self._written.infos[name]
        raw = value.detach().to("cpu", info.dtype).contiguous().view(-1)
        path = self._partial / info.file
        try:
            with path.open("r+b") as file:
                file.seek(info.offset)
                file.write(raw.view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error

    def note(self, block: str, told: Any) -> None:
        """Say that a block is finished, with what is to be known of it as plain JSON types."""
        self._noted[block] = told
        self.done[block] = told
        _write(self._own, {"done": self._noted})

    def wait_for(self, blocks: int) -> None:
        """Wait, in the first process, until all have finished so many blocks together."""
        _wait_for(lambda: len(self._all_done()) >= blocks)
        self.done = self._all_done()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Put the folder in its place, in the first process."""
        _write(self._partial / RECORD, record)
        if has_content(self.out):
            self.out.rename(aside(self.out))
        os.replace(self._partial, self.out)
        for left in self.out.glob(f"{_PROGRESS}*"):
            left.unlink()
        self._lock.close()

    def _all_done(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in sorted(self._partial.glob(f"{_PROGRESS}-*.json")):
            found |= _read(one).get("done", {})
        return found


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise unless a folder can be written there, or what is there can make way."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {out.absolute().parent} does not exist; make it first")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder, or a file that ends in .safetensors")
    if has_content(out) and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or add --overwrite to move it to {aside(out)}")


def copy_beside(source: Path, target: Path) -> None:
    """Copy what lies beside a folder's weights: configuration, tokenizer, generation config, code, cards."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name == RECORD:
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif not any(inner.name.endswith(_WEIGHTS) for inner in path.rglob("*")):
            for inner in (one for one in path.rglob("*") if one.is_file()):  # copytree would copy the folders' modes
                place = target / inner.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(inner, place)


def copy_weights(files: FolderFiles, target: Path, on_copied: Callable[[int], None]) -> None:
    """Copy a folder's weights; those in PyTorch's format become safetensors, tensor by tensor."""
    weight_map: dict[str, str] = {}
    for file in files.files:
        infos = {name: info for name, info in files.infos.items() if info.file == file}
        if files.is_safetensors:
            shutil.copyfile(files.folder / file, target / file)
            new = file
        else:
            new = file.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
            _write_safetensors(target / new, infos, files.read)
        weight_map |= dict.fromkeys(infos, new)
        on_copied(sum(info.nbytes for info in infos.values()))
    if files.indexed:
        total = sum(info.nbytes for info in files.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write(target / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file without holding more than one tensor, which its library cannot."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest elements first, so that each tensor starts at a multiple of its own.
    ordered = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    for name in ordered:
        info = infos[name]
        told = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        header[name], end = told, end + info.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)


def _settings_in(partial: Path) -> Any:
    """Return what a half-written folder is made by; None where it is none of ours."""
    return _read(partial / f"{_PROGRESS}.json").get("settings")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found


def _write(path: Path, told: Mapping[str, Any]) -> None:
    """Write JSON so that a reader, or a kill, meets the old text or the new."""
    with appearing(path, folder=False) as partial:
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _wait_for(met: Callable[[], bool]) -> None:
    while not met():
        time.sleep(_WAIT)
