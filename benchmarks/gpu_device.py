"""The device that bench_gpu.py measures on: its clock and memory, what it is asked to do, and how often one waits."""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CALLS = {
    "launches": re.compile(r"cu(da)?LaunchKernel(Ex|ExC)?"),
    "copies": re.compile(r"cuda(Memcpy|Memset)Async"),
    # Not cudaDeviceSynchronize, with which the profiler itself ends.
    "waits": re.compile(r"cuda(StreamSynchronize|EventSynchronize|Memcpy)"),
}


def profiled(work: Callable[[], Any], activities: list[ProfilerActivity]) -> dict[str, int]:
    """Return how many calls of each kind a profiler sees."""
    with profile(activities=activities) as seen:
        work()
    names = [event.name for event in seen.events()]
    return {kind: sum(pattern.fullmatch(name) is not None for name in names) for kind, pattern in CALLS.items()}


class Gpu:
    """The CUDA device at hand."""

    where = "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a call until the device is done with it."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def busy(self, work: Callable[[], Any]) -> float:
        """Return the seconds that the device's kernels and copies take of a call: a slow host does not show in them."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        ours = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.device_time for event in ours) / 1e6

    def wait(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes that tensors hold."""
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self, work: Callable[[], Any]) -> int:
        """Return the most bytes that tensors hold during a call above those before it."""
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        torch.cuda.empty_cache()

    def calls(self, work: Callable[[], Any]) -> dict[str, int]:
        """Return how many kernels, copies and waits a call asks the driver for.

        Raises:
            RuntimeError: The profiler saw nothing.
        """
        torch.cuda.synchronize()
        counted = profiled(work, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
        if not counted["launches"]:
            raise RuntimeError("the profiler saw no launch of a kernel")
        return counted

    def waits(self, work: Callable[[], Any]) -> int:
        """Return how often torch waits for the device in a call, by its own account."""
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


class Rehearsal(Gpu):
    """The CPU in its place: the same calls are made, and what only a GPU tells is 0."""

    where = "cpu"
    name = "rehearsal on a CPU"

    def seconds(self, work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def busy(self, work: Callable[[], Any]) -> float:
        return self.seconds(work)

    def wait(self) -> None:
        """There is nothing to wait for."""

    def allocated(self) -> int:
        return 0

    def peak(self, work: Callable[[], Any]) -> int:
        work()
        return 0

    def release(self) -> None:
        gc.collect()

    def calls(self, work: Callable[[], Any]) -> dict[str, int]:
        return profiled(work, [ProfilerActivity.CPU])

    def waits(self, work: Callable[[], Any]) -> int:
        work()
        return 0
