"""One rank's file of masks: which flat ranges of each parameter it holds, their bits, and the values behind them.

For every parameter of which the rank counts a part, the safetensors file holds `NAME.runs`, the flat ranges
[start, stop) of that part, shape (R, 2), int64, ascending; `NAME.bits`, their mask bits one after the other, packed;
and in `feedback` `NAME.dense`, the dense values of their pruned entries. What was gathered since the last refresh lies
under names that begin with `evidence/`: of single weights this rank's ranges, of all else the sums over ranks (rank 0).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emp_callbacks.checkpoint.state import FoundMask
from emp_callbacks.checkpoint.tensor_file import write_tensors
from emp_callbacks.core.packing import pack_bits, unpack_bits
from emp_callbacks.layer import Layer
from emp_callbacks.layer.masked_weight import MaskedWeight

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # bits set in a byte
_EVIDENCE = "evidence/"
Run = tuple[int, int]
Piece = tuple[int, Tensor, Tensor | None]
"""Offset in a segment, mask from there on, dense values behind it."""


def write_part(
    path: Path, weights: Sequence[MaskedWeight], evidence: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[int, bytes]:
    """Write this rank's file, whose folder may be new; return its size and sha256.

    Args:
        path: The file.
        weights: Whose masks it holds.
        evidence: What else it holds, as `evidence_part` returns it.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_EVIDENCE}{name}": value for name, value in evidence.items()}
    for weight in weights:
        tensors.update(_own_tensors(weight))
    try:
        write_tensors(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256(path)


def evidence_part(gathered: Mapping[str, Tensor], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return this rank's part of what `Evidence.tensors` returned: of single weights the ranges that it counts."""
    part = dict(gathered)
    for layer in layers:
        if (held := part.pop(f"weight:{layer.name}", None)) is not None:
            own = held.reshape(-1)[layer.span.counted]
            runs = _runs(layer.span.positions_of(layer.span.counted), own.numel())
            part[f"weight:{layer.name}"] = own.contiguous()
            part[f"runs:{layer.name}"] = torch.tensor(runs, dtype=torch.int64).view(-1, 2)
    return part


def read_evidence(paths: Sequence[Path], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return what `Evidence.tensors` returned on the ranks that saved, as this rank's segments lie now.

    Raises:
        ValueError: A file is damaged, or holds evidence of weights that are not there.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                _read_evidence_of(file, layers, found)
        except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); go back to an older checkpoint") from error
    return found


def _read_evidence_of(file: Any, layers: Sequence[Layer], found: dict[str, Tensor]) -> None:
    names = {name.removeprefix(_EVIDENCE) for name in file.keys() if name.startswith(_EVIDENCE)}  # noqa: SIM118
    weights = [layer for layer in layers if f"runs:{layer.name}" in names]
    for layer in weights:
        _copy_ranges(file, layer, found)
    # Of weights that this run does not score the name itself is kept, for whoever checks what was found.
    for name in names - {f"{kind}:{layer.name}" for layer in weights for kind in ("weight", "runs")}:
        found[name] = file.get_tensor(f"{_EVIDENCE}{name}")


def _copy_ranges(file: Any, layer: Layer, found: dict[str, Tensor]) -> None:
    """Put what one file holds of a layer's weights where this rank has them."""
    values = file.get_slice(f"{_EVIDENCE}weight:{layer.name}")
    held = file.get_tensor(f"{_EVIDENCE}runs:{layer.name}").tolist()
    name = f"weight:{layer.name}"
    for offset, at, length in _overlaps(_runs(layer.span.positions, layer.span.length), held):
        piece = values[at : at + length]
        if name not in found:
            found[name] = piece.new_zeros(layer.mask_or_ones.shape)
        found[name].view(-1)[offset : offset + length] = piece


def sha256(path: Path) -> bytes:
    """Return the digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def read_parts(paths: Sequence[Path], weights: Sequence[MaskedWeight], dense: bool) -> list[FoundMask]:
    """Return every weight's flat mask and the values behind it; reads only this rank's ranges.

    Args:
        paths: The files of all ranks that saved.
        weights: Where the masks will go.
        dense: Whether there are values behind the masks.

    Raises:
        ValueError: A file is damaged, or together they do not cover every parameter once.
    """
    wanted = [_runs(weight.segment.positions, weight.weight.numel()) for weight in weights]
    pieces: list[list[Piece]] = [[] for _ in weights]
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for i, weight in enumerate(weights):
                    if f"{weight.name}.runs" in names:
                        pieces[i].extend(_pieces(file, weight.name, wanted[i], dense))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); go back to an older checkpoint") from error
    return [_joined(weight, found, dense) for weight, found in zip(weights, pieces, strict=True)]


def _own_tensors(weight: MaskedWeight) -> dict[str, Tensor]:
    """Return what this rank writes of one parameter; empty if it counts nothing of it."""
    part = weight.segment.counted
    if weight.mask is None or not weight.mask.reshape(-1)[part].numel():
        return {}
    flat = weight.mask.reshape(-1)
    mask, before = flat[part], flat[: part.indices(flat.numel())[0]]
    tensors = {
        f"{weight.name}.runs": torch.tensor(_runs(weight.segment.positions_of(part), mask.numel())),
        f"{weight.name}.bits": pack_bits(mask),
    }
    if weight.stash is not None:
        start = int((~before).sum())
        tensors[f"{weight.name}.dense"] = weight.stash[start : start + int((~mask).sum())].cpu()
    return tensors


def _runs(positions: int | Tensor, size: int) -> list[Run]:
    """Return ascending positions as ranges [start, stop)."""
    if isinstance(positions, int):
        return [(positions, positions + size)] if size else []
    values = positions.cpu().numpy()
    cuts = np.flatnonzero(np.diff(values) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(values, cuts) if len(run)]


def _pieces(file: Any, name: str, wanted: Sequence[Run], dense: bool) -> Iterator[Piece]:
    """Yield what one file holds of the wanted ranges of one parameter."""
    overlaps = list(_overlaps(wanted, file.get_tensor(f"{name}.runs").tolist()))
    if not overlaps:
        return
    first, end = overlaps[0][1], overlaps[-1][1] + overlaps[-1][2]
    packed = file.get_slice(f"{name}.bits")[: (end + 7) // 8]
    skipped = first // 8
    bits = unpack_bits(packed[skipped:], end - 8 * skipped)
    start = 8 * skipped - int(_ONES[packed[:skipped].numpy()].sum(dtype=np.int64))
    start += int((~bits[: first - 8 * skipped]).sum())
    stop = start + int((~bits[first - 8 * skipped :]).sum())
    values = file.get_slice(f"{name}.dense")[start:stop] if dense and stop > start else None
    if values is not None and values.numel() != stop - start:
        raise ValueError(f"dense values behind the mask of {name!r} are missing")
    used, last = 0, first
    for offset, at, length in overlaps:
        used += int((~bits[last - 8 * skipped : at - 8 * skipped]).sum())
        mask = bits[at - 8 * skipped : at - 8 * skipped + length]
        pruned = int((~mask).sum())
        yield offset, mask, None if values is None else values[used : used + pruned]
        used, last = used + pruned, at + length


def _overlaps(wanted: Sequence[Run], held: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """Yield (offset in `wanted`, offset in `held`, length) of every range that lies in both; both ascend."""
    i = j = offset = at = 0
    while i < len(wanted) and j < len(held):
        (low, high), (start, stop) = wanted[i], held[j]
        first, end = max(low, start), min(high, stop)
        if first < end:
            yield offset + first - low, at + first - start, end - first
        if high <= stop:
            i, offset = i + 1, offset + high - low
        if stop <= high:
            j, at = j + 1, at + stop - start


def _joined(weight: MaskedWeight, pieces: list[Piece], dense: bool) -> FoundMask:
    """Return a weight's flat mask and the values behind it from pieces that cover it once."""
    pieces, covered = sorted(pieces, key=lambda piece: piece[0]), 0
    for offset, mask in [(offset, mask) for offset, mask, _ in pieces] + [(weight.weight.numel(), None)]:
        if offset != covered:
            problem = "no file covers" if offset > covered else "two files cover"
            position = weight.segment.positions_of(slice(min(offset, covered), None))
            where = position if isinstance(position, int) else int(position[0])
            raise ValueError(
                f"{problem} the mask of {weight.name!r} at flat index {where}; go back to an older checkpoint"
            )
        covered = offset + (0 if mask is None else mask.numel())
    nothing = torch.zeros(0, dtype=torch.bool)
    stash = [values for _, _, values in pieces if values is not None] or [weight.weight.new_zeros(0, device="cpu")]
    return torch.cat([nothing, *(mask for _, mask, _ in pieces)]), torch.cat(stash) if dense else None
