"""What a file or a folder is, told by its first bytes or by what it holds; a suffix says little."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["SAFETENSORS", "file_format", "no_weights", "refuse_quantized"]

SAFETENSORS, _TORCH = "safetensors", "PyTorch"
_HEAD = 4096  # bytes

_ARRAYS = "save its arrays by name: torch.save({name: torch.from_numpy(array)}, 'weights.pt')"
_MADE_FROM = "name the PyTorch model that it was made from"
_AGAIN = "download it again, and look at the address"
_TENSORFLOW = f"{_ARRAYS}; of a Hugging Face model, transformers 4 has from_pretrained(FOLDER, from_tf=True)"
_FLAX = f"{_ARRAYS}; of a Hugging Face model, transformers 4 has from_pretrained(FOLDER, from_flax=True)"


class _Format(NamedTuple):
    """How a kind of file is recognised.

    Attributes:
        looks: Regular expression on what `_seen` returns, or on the names in a folder, one a line.
        what: It is.
        remedy: What to do instead; empty where emp reads it.
        name: Regular expression on the name of a file, for what has no mark of its own.
    """

    looks: bytes
    what: str
    remedy: str = ""
    name: str = ""


# The first that fits counts. What begins like PyTorch's and safetensors' own files may still be damaged.
_FILES = (
    _Format(rb"\A.{6}\0\0\s*\{", SAFETENSORS),
    _Format(rb"\A\Z", "empty", "copy or save it again"),
    _Format(rb"\A\0{64}", "full of zeros, as a copy that was cut off leaves", "copy it again"),
    _Format(
        rb"\A(\x80.\x8a\x0al\xfc|PK\x03\x04.*/data\.pkl)",
        "a file of PyTorch's by the name of safetensors",
        "rename it to .pt",
        name=r"\.safetensors$",
    ),
    _Format(rb"\A\x80.\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", _TORCH),  # before torch.save wrote zip archives
    _Format(
        rb"\APK\x03\x04.*/code/", "TorchScript, a program", "torch.save what torch.jit.load(FILE).state_dict() gives"
    ),
    _Format(
        rb"\APK\x03\x04.*\n([^\n]*/)?(archive_format|serialized_exported_program|data/weights/)",
        "a program of torch.export",
        "torch.save what torch.export.load(FILE).state_dict gives",
    ),
    _Format(rb"\APK\x03\x04.*/data\.pkl", _TORCH),
    _Format(rb"\APK\x03\x04.*model\.weights\.h5", "a Keras model", _ARRAYS),
    _Format(rb"\APK\x03\x04.*\.npy\n", "an archive of NumPy arrays", _ARRAYS),
    _Format(rb"\APK\x03\x04.*\n", "a zip archive without weights of PyTorch's", "unpack it and name what it holds"),
    _Format(rb"\APK\x03\x04", _TORCH),  # an archive that is cut off has no list of its files
    _Format(
        rb"\A\x80[\0-\x05]",
        "a plain pickle, and emp never runs code from a file",
        "load it where it was made and save its weights as tensors: torch.save(state_dict, 'weights.pt')",
    ),
    _Format(rb"\A\x89HDF\r\n\x1a\n", "HDF5, as Keras writes it", _TENSORFLOW),
    _Format(rb"\A\x93NUMPY", "a NumPy array", _ARRAYS),
    _Format(rb"\A(GGUF|lmgg|fmgg|tjgg)", "a GGUF or GGML file of llama.cpp", _MADE_FROM),
    _Format(rb"\A.{4}TFL3", "a TensorFlow Lite model", _MADE_FROM),
    _Format(rb"\A(\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf)", "compressed", "unpack it first"),
    _Format(rb"\A.{257}ustar", "a tar archive", "unpack it and name the file of weights in it"),
    _Format(rb"\Aversion https://git-lfs", "a pointer of Git LFS, not the weights", "fetch them with git lfs pull"),
    _Format(rb"(?i)\A\s*<(!doctype html|html)", "a web page, as a download that failed leaves", _AGAIN),
    _Format(rb"\A\s*<\?xml", "XML, as a download that failed leaves", _AGAIN),
    _Format(rb'\A\s*\{.*"weight_map"', "the index of a folder's shards", "name the folder itself"),
    _Format(rb"\A\s*[\[{]\s*[\"\]\[{}\d]", "JSON, which holds no weights", "name the file of weights, or its folder"),
    _Format(rb"\A[\x01-\x1f]\0{3}.\0[A-Z]\w+\0", "a model of CTranslate2", _MADE_FROM),
    _Format(rb"\A\x08\x01\x12", "a SavedModel of TensorFlow", _TENSORFLOW),
    _Format(rb"\A\x08[\x02-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX model", _MADE_FROM),
    _Format(rb"\A\n[\x80-\xff]*[\0-\x7f]\n[\x01-\x7f][ -~]", "a graph of TensorFlow", _TENSORFLOW),
    _Format(rb"\A\n[\x01-\x7f][ -~]+[\x12\x1a\x22\x32\x42\xa2]", "a model of Caffe", f"read it there and {_ARRAYS}"),
    _Format(rb"\x57\xfb\x80\x8b\x24\x75\x47\xdb\Z", "the index of a checkpoint of TensorFlow", _TENSORFLOW),
    _Format(rb"\A[\x80-\x8f\xde\xdf].*[\xa1-\xbf\xd9]\w+[\x80-\x8f\xde\xdf\xc7-\xc9]", "Flax, in msgpack", _FLAX),
    _Format(rb"\A[\t\n\r -~]+\Z", "text, which holds no weights", "name a checkpoint"),
    _Format(rb"", "the values of a checkpoint of TensorFlow", _TENSORFLOW, name=r"\.data-\d+-of-\d+$"),
)

_FOLDERS = (
    _Format(
        rb"(?m)^(model|pytorch_model)\.(\w+)\.(safetensors|bin)$",
        "holds a variant of the weights alone (fp16, say)",
        "name that file, or rename it to model.safetensors",
    ),
    _Format(rb"(?m)^adapter_model\.", "holds an adapter of PEFT's alone", "save the model with it: merge_and_unload()"),
    _Format(rb"(?m)^tf_model\.h5$", "holds the weights of TensorFlow alone", _TENSORFLOW),
    _Format(rb"(?m)^flax_model\.", "holds the weights of Flax alone", _FLAX),
    _Format(rb"(?m)^saved_model\.pb$", "is a SavedModel of TensorFlow", _TENSORFLOW),
    _Format(rb"(?m)^model\.bin$", "is a model of CTranslate2", _MADE_FROM),
    _Format(rb"(?m)\.onnx$", "holds an ONNX model", _MADE_FROM),
    _Format(rb"(?m)\.gguf$", "holds a GGUF file of llama.cpp", _MADE_FROM),
    _Format(rb"(?m)\.(index|data-\d+-of-\d+)$", "holds a checkpoint of TensorFlow", _TENSORFLOW),
    _Format(
        rb"(?m)^zero_to_fp32\.py$|^mp_rank_\d+_model_states\.pt$",
        "is a checkpoint of DeepSpeed",
        "python zero_to_fp32.py FOLDER weights.pt makes one file of it",
    ),
    _Format(
        rb"(?m)^\.metadata$|\.distcp$",
        "is a distributed checkpoint of PyTorch",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt makes one file of it",
    ),
    _Format(rb"(?m)^snapshots$", "is a folder of the hub's cache", "name the one below its snapshots"),
    _Format(rb"(?m)\.(safetensors|bin|pt|pth|ckpt)$", "holds weights by other names", "name one of its files"),
    _Format(rb"", "holds neither model.safetensors nor pytorch_model.bin, nor an index of such files", "name another"),
)


def file_format(path: Path) -> str:
    """Return what a file begins like: SAFETENSORS, or a file of PyTorch's.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else; the message says what, and the remedy.
    """
    seen = _seen(path)
    fitting = (one for one in _FILES if re.search(one.looks, seen, re.DOTALL) and re.search(one.name, path.name))
    found = next(fitting, None)
    if found is None:
        raise ValueError(
            f"{path} is damaged, or no file of PyTorch's or safetensors: it begins with {seen[:8]!r}; copy it again, "
            "or save its weights by name: torch.save(model.state_dict(), 'weights.pt')"
        )
    if found.remedy:
        raise ValueError(f"{path} is {found.what}; {found.remedy}")
    return found.what


def _seen(path: Path) -> bytes:
    """Return the first bytes of a file; of an archive also the names in it, one a line; and the last eight bytes."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        if len(head) < _HEAD:
            return head + _names_in(path, head)
        file.seek(-8, 2)
        return head + _names_in(path, head) + file.read()


def _names_in(path: Path, head: bytes) -> bytes:
    if not head.startswith(b"PK\x03\x04"):
        return b""
    try:
        with zipfile.ZipFile(path) as archive:
            return "\n".join(["", *archive.namelist(), ""]).encode(errors="replace")
    except (zipfile.BadZipFile, NotImplementedError):
        return b""


def no_weights(folder: Path) -> FileNotFoundError:
    """Return the error that says what a folder without weights holds instead."""
    names = "\n".join(sorted(path.name for path in folder.iterdir())).encode(errors="replace")
    found = next(one for one in _FOLDERS if re.search(one.looks, names))
    return FileNotFoundError(f"{folder} {found.what}; {found.remedy}")


def refuse_quantized(folder: Path) -> None:
    """Raise where a folder's configuration says that its weights are packed.

    Raises:
        ValueError: They are; the message names the method.
    """
    told = _configuration(folder).get("quantization_config")
    if told:
        method = told.get("quant_method", "an unnamed method") if isinstance(told, dict) else told
        raise ValueError(
            f"{folder} holds weights quantized by {method} (quantization_config in config.json), which cannot be "
            "scored; take the folder that it was made from, or save model.dequantize()"
        )


def _configuration(folder: Path) -> dict[str, Any]:
    """Return config.json; nothing where there is none, or it says nothing by name."""
    try:
        told = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
