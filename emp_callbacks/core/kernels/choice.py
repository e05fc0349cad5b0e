"""The one place that chooses: a Triton kernel over all tensors, or torch's own kernels, one tensor after another."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable

from torch import Tensor

from emp_callbacks.core.device import on_host


def kernels_serve(tensors: Iterable[Tensor]) -> bool:
    """Return whether the kernels of this room serve these tensors: CUDA (and ROCm) devices where Triton is there.

    `EMP_TRITON=0` says no; with `TRITON_INTERPRET=1` a CPU's tensors that are worked on as an accelerator's are served,
    too.
    """
    kinds = {tensor.device for tensor in tensors}
    if len(kinds) != 1 or not _has_triton() or os.environ.get("EMP_TRITON") == "0":
        return False
    (device,) = kinds
    return device.type == "cuda" or (not on_host(device) and is_interpreted())


def is_interpreted() -> bool:
    """Return whether Triton runs kernels step by step on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
