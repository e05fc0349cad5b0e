"""The weights of a Hugging Face folder or of a file, one tensor at a time; in one or in shards, of both formats."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.checkpoint.file_formats import SAFETENSORS, file_format, no_weights
from emp_callbacks.checkpoint.safe_unpickling import load_inert

__all__ = ["DTYPE_NAMES", "FolderFiles", "TensorInfo", "is_weights_folder"]

# Of each format the file that holds all, and the index where there are several.
_FORMATS = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""How safetensors calls a dtype."""
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


class TensorInfo(NamedTuple):
    """Where a tensor is and what it looks like.

    Attributes:
        file: Name of the file in the folder.
        dtype: Of the values.
        shape: Of the tensor.
        offset: Of its first byte in the file; -1 in a file of PyTorch's.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def n(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.n * self.dtype.itemsize


def is_weights_folder(folder: Path) -> bool:
    """Return whether a folder holds weights as Hugging Face names them."""
    return any((folder / name).is_file() for single in _FORMATS for name in (single, f"{single}.index.json"))


class FolderFiles:
    """The tensors of a folder by name, in the order of its files; nothing is held or stays mapped.

    Args:
        folder: Holds model.safetensors or pytorch_model.bin, or several such files and their index; or one such file.

    Attributes:
        folder: Where the files are.
        files: The names of the files with weights.
        indexed: Whether an index names them.
        infos: Name -> where the tensor is.
        is_safetensors: Whether the files are safetensors.
        metadata: What the headers of safetensors files say besides.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is damaged, or is not what its index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.parent if folder.is_file() else folder
        self.files, told = ([folder.name], {}) if folder.is_file() else _files(folder)
        self.indexed = bool(told)
        self._loaded: tuple[str, Mapping[str, Tensor]] | None = None
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        # By their first bytes, which also say what a file is that holds no weights.
        self.is_safetensors = {file_format(self.folder / file) for file in self.files} == {SAFETENSORS}
        for file in self.files:
            self.infos |= self._safetensors(file) if self.is_safetensors else self._pickled(file)
        for name, file in told.items():
            if name not in self.infos or self.infos[name].file != file:
                raise ValueError(f"the index of {folder} says that {name} is in {file}, and it is not; copy it again")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self.infos)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of most values: what a configuration says is not always what the files hold."""
        counts = Counter[torch.dtype]()
        for info in self.infos.values():
            if info.dtype.is_floating_point:
                counts[info.dtype] += info.n
        return counts.most_common(1)[0][0] if counts else torch.float32

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in memory of its own."""
        info = self.infos[name]
        if not self.is_safetensors:
            held: Tensor = self._load(info.file)[name]
            return held.clone()
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with (self.folder / info.file).open("rb", buffering=0) as file:
            file.seek(info.offset)
            _read_into(file, raw.numpy().data)
        return raw.view(info.dtype).view(info.shape)

    def _safetensors(self, file: str) -> dict[str, TensorInfo]:
        path = self.folder / file
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            try:
                if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                    raise ValueError("its header has no length")
                header = json.loads(opened.read(length))
                self.metadata |= header.pop("__metadata__", None) or {}
                infos = {
                    name: TensorInfo(
                        file, _DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0]
                    )
                    for name, one in header.items()
                }
                if infos and max(info.offset + info.nbytes for info in infos.values()) > size:
                    raise ValueError("it is cut short")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error
        return dict(sorted(infos.items(), key=lambda pair: pair[1].offset))

    def _pickled(self, file: str) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(file, value.dtype, tuple(value.shape), -1)
            for name, value in self._load(file).items()
            if isinstance(value, Tensor)
        }

    def _load(self, file: str) -> Mapping[str, Any]:
        """Return what a file of PyTorch's holds: on disk until it is used, and else kept until the next file."""
        path = self.folder / file
        if self._loaded is not None and self._loaded[0] == file:
            return self._loaded[1]
        try:
            held = load_inert(path, mapped=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is damaged or no file of PyTorch's ({first}); copy it again") from error
        if not isinstance(held, Mapping):
            raise ValueError(f"{path} holds no tensors by name, but a {type(held).__name__}")
        if not zipfile.is_zipfile(path):
            self._loaded = file, held
        return held


def _read_into(file: Any, memory: memoryview) -> None:
    """Fill memory from a raw file, which may give less than is asked for at a time."""
    done = 0
    while done < len(memory):
        got = file.readinto(memory[done:])
        if not got:
            raise ValueError(f"{file.name} ended while it was read; copy it again")
        done += got


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of a folder's files of weights, and what their index says: name -> file."""
    for single in _FORMATS:
        if (folder / single).is_file():
            return [single], {}
        index = folder / f"{single}.index.json"
        if index.is_file():
            told = _weight_map(index)
            files = sorted({*told.values()})
            for file in files:
                if not (folder / file).is_file():
                    raise FileNotFoundError(
                        f"{folder / file} is missing, which {index.name} names; copy the folder again"
                    )
            return files, told
    raise no_weights(folder)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        if not found or not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError("weight_map names no files of this folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "weight_map is missing" if isinstance(error, (KeyError, AttributeError)) else error
        raise ValueError(f"{index} is no index of files with weights ({reason}); copy the folder again") from error
    return dict(found)
