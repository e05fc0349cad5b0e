"""Whether a tensor's values can be read at once, or whoever reads them has to wait for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = {"cpu"}


def on_host(where: Tensor | torch.device) -> bool:
    """Return whether values are read without waiting: on a CPU, where numpy reads them too.

    The one place that tells devices apart: with another answer the path of accelerators runs on a CPU's tensors.
    """
    return (where.device if isinstance(where, Tensor) else where).type in _AT_ONCE


def is_captured() -> bool:
    """Return whether what runs now is recorded into a CUDA graph, whose replays run no Python."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()
