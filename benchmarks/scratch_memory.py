"""Peak memory of a refresh, each measured in a process of its own (Linux).

The kernel's own high-water mark (VmHWM) is set back right before the work and read right after it: no sampling. malloc
is told to hand freed pieces of 64 KiB and more back at once, so that resident memory is memory in use.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contestants import gpt2_like, paper_global
from torch import Tensor, nn

from emp_callbacks import EMPPruner

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_fresh_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `measure` returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with _environment(MALLOC), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def refresh_memory(size: int, threads: int) -> dict[str, float]:
    """Return the peaks of a first and a second refresh in `project`, in bytes per weight above the weights alone."""
    torch.set_num_threads(threads)
    EMPPruner(gpt2_like(100_000), mode="project").refresh()  # code that is loaded at its first use
    model = gpt2_like(size)
    pruner = EMPPruner(model, mode="project")
    weights = _weights(model)
    count = sum(weight.numel() for weight in weights)
    before = _settled()
    first = _peak(pruner.refresh) - before
    for weight in weights:
        weight.normal_(std=0.02)
    _settled()
    second = _peak(pruner.refresh) - before
    return {"weights": count, "first_peak": first / count, "second_peak": second / count}


def paper_memory(size: int, threads: int) -> dict[str, float]:
    """Return the peak of the paper's algorithm, in bytes per weight above the weights alone."""
    torch.set_num_threads(threads)
    paper_global(_weights(gpt2_like(100_000)))
    weights = _weights(gpt2_like(size))
    count = sum(weight.numel() for weight in weights)
    before = _settled()
    return {"weights": count, "peak": (_peak(lambda: paper_global(weights)) - before) / count}


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters() if parameter.ndim == 2]


def _peak(work: Callable[[], object]) -> int:
    """Return the highest resident memory while `work` runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    peak = _status("VmHWM")
    del result
    return peak


def _settled() -> int:
    """Return the resident memory when nothing is waiting to be freed, in bytes."""
    gc.collect()
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
