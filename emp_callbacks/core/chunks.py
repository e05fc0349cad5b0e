"""Scores in pieces that stay in a core's cache: a pass over them costs one read of memory, whatever it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.device import on_host

# On a CPU: 2 MiB of float32, which two cores share. On an accelerator: few kernels, yet little scratch.
CHUNK = 1 << 19
ACCELERATOR_CHUNK = 1 << 24
ONE_THREAD = 1 << 15  # torch works on no more elements without a second thread
FEW = 16  # one in so many is few enough to be taken out


def chunk_length(device: torch.device) -> int:
    """Return the number of elements to be worked on at a time."""
    return CHUNK if on_host(device) else ACCELERATOR_CHUNK


def chunks(scores_n: Tensor) -> Iterator[slice]:
    """Yield consecutive slices that cover a flat tensor."""
    size, length = scores_n.numel(), chunk_length(scores_n.device)
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


_free: dict[int, list[Tensor]] = {4: [], 8: []}  # by bytes per element


@contextmanager
def scratch(length: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend memory for what a pass computes of a chunk, shape (length,), not initialised.

    On a CPU the memory of a few chunks is kept for the next pass: fresh memory costs more than what is computed in it.
    Flags are best kept as floats: on a CPU torch compares into floats three times as fast as into bool.
    """
    size, width = length * dtype.itemsize, max(4, dtype.itemsize)
    if not on_host(device) or length > CHUNK:
        yield torch.empty(length, dtype=dtype, device=device)
        return
    try:
        memory = _free[width].pop()
    except IndexError:
        memory = torch.empty(0, dtype=torch.uint8, device=device)
    if memory.numel() < size:
        with torch.inference_mode(mode=False):  # memory born in inference mode could not be written outside of it
            memory = torch.empty(CHUNK * width, dtype=torch.uint8, device=device)
    try:
        yield memory[:size].view(dtype)
    finally:
        _free[width].append(memory)


def magnitudes(scores_n: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices that cover a flat tensor and, for each, |scores| as `dtype`, in memory that the next one reuses."""
    scores_n = scores_n.detach()
    with scratch(longest_chunk(scores_n), dtype, scores_n.device) as buffer:
        for at in chunks(scores_n):
            out = buffer[: at.stop - at.start]
            if scores_n.dtype == dtype:
                yield at, torch.abs(scores_n[at], out=out)
            else:
                yield at, out.copy_(scores_n[at]).abs_()


def longest_chunk(scores_n: Tensor) -> int:
    """Return the number of elements of the longest chunk of a flat tensor."""
    return min(chunk_length(scores_n.device), scores_n.numel())


def take(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the positive values whose flag in `chosen` is not 0, flat; on an accelerator as `accelerator_take`."""
    if on_host(values):  # numpy is four times as fast as masked_select
        return torch.from_numpy(values.numpy()[chosen.bool().numpy()])
    return accelerator_take(values, chosen, most=min(len(values), len(values) // FEW + CHUNK // FEW))


def accelerator_take(values: Tensor, chosen: Tensor, most: int) -> Tensor:
    """Return `most` of the positive values whose flag is not 0, shape (most,), zeros where there are fewer.

    Their number is not asked for: that would wait for the accelerator.
    """
    at = torch.nonzero_static(chosen, size=most, fill_value=-1).squeeze(1)
    return values[at].masked_fill_(at < 0, 0)


def count_true(mask: Tensor) -> Tensor:
    """Return how many entries of a bool tensor are True, shape (), int64, on its device."""
    if on_host(mask):  # numpy is three times as fast
        return torch.tensor(np.count_nonzero(mask.numpy()))
    return torch.count_nonzero(mask)


def gather_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return small tensors of one shape stacked, on the CPU: an accelerator is waited for once."""
    if not rows:
        return torch.zeros(0)
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return flat tensors one after the other, on the device of the first; empty on the CPU if there are none."""
    return torch.cat([values.to(tensors[0].device) for values in tensors]) if tensors else torch.zeros(0)


def in_fewer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return flat tensors with small neighbours joined, in order: each tensor costs more than few elements in it."""
    joined: list[list[Tensor]] = []
    size = 0
    for values in tensors:
        size += values.numel()
        if joined and size <= ONE_THREAD:
            joined[-1].append(values)
        else:
            joined.append([values])
            size = values.numel()
    return [some[0] if len(some) == 1 else join(some) for some in joined]
