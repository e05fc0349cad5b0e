"""Seconds of several ways of doing one thing, taken in turn, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Row = dict[str, Any]


def nothing() -> None:
    """Prepare nothing."""


class Contestant(NamedTuple):
    """Work that is timed, and what must be in place before it, which is not."""

    work: Callable[[], Any]
    prepare: Callable[[], object] = nothing


def in_turn(contestants: Mapping[str, Contestant], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each contestant, `repeats` times after `warm_up`; who goes first changes every time.

    What the work returns is freed outside the time.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + repeats):
        for name in names if i % 2 else reversed(names):
            contestants[name].prepare()
            started = time.perf_counter()
            result = contestants[name].work()
            seconds[name].append(time.perf_counter() - started)
            del result
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return median / median and its 95 % percentile-bootstrap interval.

    The i-th times were taken beside each other and are drawn together: a slow moment of the machine is in both.
    """
    times = np.array([above, below])
    drawn = np.random.default_rng(0).integers(0, times.shape[1], (4000, times.shape[1]))
    upper, lower = np.median(times[:, drawn], axis=2)
    low, high = np.percentile(upper / lower, [2.5, 97.5])
    upper, lower = np.median(times, axis=1)
    return {"ratio": float(upper / lower), "low": float(low), "high": float(high)}


def row(what: str, value: float, target: float | None = None, *, at_least: bool = False, unit: str = "x") -> Row:
    """Return one figure beside its target."""
    met = None if target is None else value >= target if at_least else value <= target
    return {"what": what, "value": value, "unit": unit, "target": target, "at_least": at_least, "met": met}


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
