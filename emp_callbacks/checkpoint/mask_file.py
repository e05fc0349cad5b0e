"""Portable masks on disk: written by each rank for its part, read back by any number of ranks under any strategy.

A folder holds one file per rank that saved (`mask_part`) and the index `emp_masks.json`, which holds everything else.
File names are new at every save and the index is replaced last, in one step: a kill at any moment leaves the old
checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from emp_callbacks.backends.base import Backend
from emp_callbacks.checkpoint.evidence import check_evidence
from emp_callbacks.checkpoint.mask_part import read_evidence, read_parts, sha256, write_part
from emp_callbacks.checkpoint.state import (
    Found,
    FoundMask,
    check_fits,
    check_format,
    check_masked,
    fit_masks,
    masked_weights,
    read_seed,
)
from emp_callbacks.checkpoint.whole_output import PARTIAL, appearing
from emp_callbacks.config import EMPConfig
from emp_callbacks.layer import Layer
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.schedule import Clock
from emp_callbacks.targets.forward_site import ForwardSite

INDEX = "emp_masks.json"
_PREFIX = "emp_masks-"
_MESSAGE_BYTES = 2048
_PATIENCE = 10.0  # seconds
Result = TypeVar("Result")


def save_masks(
    folder: str | os.PathLike[str],
    state: dict[str, Any],
    weights: Sequence[MaskedWeight],
    backend: Backend,
    evidence: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write masks, the values behind them, `state` (of `describe`) and evidence into a folder. Collective.

    Raises:
        OSError: A rank could not write its part, or wrote it where rank 0 does not see it; what the folder held before
            is still whole.
    """
    folder, rank, ranks = Path(folder), backend.rank, backend.world_size
    # Drawn by rank 0; other ranks may be seeded alike or not, and none of torch's generators is touched.
    token = int(backend.all_sum(torch.tensor([secrets.randbits(60) if rank == 0 else 0]))[0])
    names = [f"{_PREFIX}{token:015x}-{i:05d}-of-{ranks:05d}.safetensors" for i in range(ranks)]

    def undo() -> None:
        _remove(folder / names[rank])

    size, digest = on_all(backend, lambda: write_part(folder / names[rank], weights, evidence), undo)
    words = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]
    table = backend.from_all(torch.tensor([size, *words]))
    files = [
        {"name": name, "bytes": row[0], "sha256": b"".join(w.to_bytes(8, "big", signed=True) for w in row[1:]).hex()}
        for name, row in zip(names, table.tolist(), strict=True)
    ]
    masked = [weight.name for weight in weights if weight.mask is not None]  # the same on all ranks
    index = {**state, "masked": masked, "world_size": ranks, "files": files}
    on_all(backend, lambda: _write_index(folder, index) if rank == 0 else None, undo)
    if rank == 0:
        for path in (*folder.glob(f"{_PREFIX}*.safetensors"), *folder.glob(f"{INDEX}.*{PARTIAL}")):
            if path.name not in names:  # of older saves, also of those that were killed
                _remove(path)


def read_masks(
    folder: str | os.PathLike[str],
    config: EMPConfig,
    mode: MaskMode,
    layers: Sequence[Layer],
    sites: Sequence[ForwardSite],
    backend: Backend,
) -> Found:
    """Return what `save_masks` wrote, all of it read and checked; changes nothing. Collective.

    Raises:
        FileNotFoundError: The folder holds no finished save, or a file of it is missing.
        ValueError: A file is damaged, or belongs to another mode, scope or model. On whichever rank it was found, all
            ranks raise.
    """
    folder = Path(folder)
    weights = masked_weights(layers)

    def read() -> tuple[int, Found]:
        digest, index, clock = _read_index(folder, config, mode, layers)
        masked = [weight for weight in weights if weight.name in index["masked"]]
        paths = _checked_files(folder, index, backend)
        try:
            parts = iter(read_parts(paths, masked, dense=mode.name == "feedback"))
            names = {*index["masked"]}
            found: list[FoundMask] = [next(parts) if w.name in names else (None, None) for w in weights]
            fitting = fit_masks(mode, weights, found)
            batches, evidence = check_evidence(index.get("batches"), read_evidence(paths, layers), layers, sites)
            seed = read_seed(index)
        except ValueError as error:
            raise ValueError(f"{folder / INDEX}: {error}") from error
        return digest, Found(
            clock=clock,
            masks=fitting,
            units=index["units"],
            trajectory=index["trajectory"],
            batches=batches,
            evidence=evidence,
            seed=seed,
            gates=index.get("gates"),
        )

    digest, everything = on_all(backend, read)
    _check_same(folder / INDEX, digest, backend)
    return everything


# ---- ranks --------------------------------------------------------------------------------------------------------


def on_all(backend: Backend, work: Callable[[], Result], undo: Callable[[], None] = lambda: None) -> Result:
    """Return what this rank's `work` returns; if it fails on one rank, undo and raise on all. Collective."""
    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is: a rank that leaves here alone would hang the others
        problem = error
    failed = backend.from_all(torch.tensor(int(problem is not None)))
    if not bool(failed.any()):
        return result
    undo()
    first = int(failed.nonzero()[0])
    message = torch.zeros(1 + _MESSAGE_BYTES, dtype=torch.int64)
    if backend.rank == first:
        letters = str(problem).encode()[:_MESSAGE_BYTES]
        message[0] = isinstance(problem, OSError) + isinstance(problem, FileNotFoundError)
        message[1 : 1 + len(letters)] = torch.tensor(list(letters))
    kind, *codes = backend.all_sum(message).tolist()
    if problem is not None:
        raise problem
    text = bytes(codes).rstrip(b"\0").decode(errors="replace")
    raise (ValueError, OSError, FileNotFoundError)[kind](f"rank {first}: {text}")


def _check_same(path: Path, digest: int, backend: Backend) -> None:
    """Check that all ranks read the same index. Collective."""
    seen = backend.from_all(torch.tensor(digest))
    if bool((seen != seen[0]).any()):
        differ = (seen != seen[0]).nonzero().flatten().tolist()
        raise ValueError(f"{path}: ranks {differ} see another file than rank 0; use a folder that all ranks share")


# ---- files --------------------------------------------------------------------------------------------------------


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    for rank, file in enumerate(index["files"]):
        _check_seen(folder / file["name"], rank)
    with appearing(folder / INDEX, folder=False) as partial, partial.open("wb") as out:
        out.write(_signed(index))
        out.flush()
        os.fsync(out.fileno())


def _check_seen(path: Path, rank: int) -> None:
    """Raise FileNotFoundError where a part went to a disk of another host; a shared disk may be slow to show it."""
    until = time.monotonic() + _PATIENCE
    while not path.is_file():
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"{path} is missing, which rank {rank} wrote: its host has another folder of this name. Save to a "
                "folder that all hosts share"
            )
        time.sleep(_PATIENCE / 100)


def _signed(index: dict[str, Any]) -> bytes:
    """Return the index as the bytes of its file, with the sha256 of everything else in it."""
    digest = hashlib.sha256(_canonical(index)).hexdigest()
    return _canonical({**index, "sha256": digest})


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _check_signature(index: dict[str, Any], text: bytes) -> None:
    unsigned = {key: value for key, value in index.items() if key != "sha256"}
    if _signed(unsigned) != text:
        raise ValueError(
            "it is damaged or was edited (its sha256 is not the one of the save); copy the folder again, as a whole, "
            "or go back to an older checkpoint"
        )


def _remove(path: Path) -> None:
    with suppress(OSError):  # a file that no index names does no harm
        path.unlink()


def _read_index(
    folder: Path, config: EMPConfig, mode: MaskMode, layers: Sequence[Layer]
) -> tuple[int, dict[str, Any], Clock]:
    path = folder / INDEX
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path} is missing: {folder} holds no finished save of EMP masks; pass the folder that was given to "
            "save(), as every rank sees it"
        ) from error
    try:
        index = _parsed(text)
        check_format(index)
        _check_signature(index, text)
        clock = check_fits(index, config, mode, layers)
        masked = index.get("masked")
        if not isinstance(masked, list) or not all(isinstance(name, str) for name in masked):
            raise ValueError("it does not say what is masked; go back to an older checkpoint")
        check_masked(masked, index["units"], layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return zlib.crc32(text), index, clock


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is damaged ({error}); go back to an older checkpoint") from error


def _checked_files(folder: Path, index: dict[str, Any], backend: Backend) -> list[Path]:
    """Return the checkpoint's files; each is read through by one rank, all ranks together read all."""
    try:
        files = [(folder / Path(file["name"]).name, int(file["bytes"]), file["sha256"]) for file in index["files"]]
        if len(files) != index["world_size"]:
            raise ValueError(f"{len(files)} files of {index['world_size']} ranks")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / INDEX}: no valid list of files ({error}); go back to an older checkpoint"
        ) from error
    remedy = "copy the folder again, as a whole, or go back to an older checkpoint"
    for i, (path, size, digest) in enumerate(files):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, of {len(files)} files of the checkpoint; {remedy}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is truncated or foreign: {path.stat().st_size} bytes, not {size}; {remedy}")
        if i % backend.world_size == backend.rank and sha256(path).hex() != digest:
            raise ValueError(f"{path} is damaged (its sha256 is not the one of the save); {remedy}")
    return [path for path, _, _ in files]
