"""The gradient of a masked output, shown to the site that masked it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_callbacks.targets.compiled_site import Watcher


class WatchGradient(torch.autograd.Function):
    """Passes the masked output on and shows its gradient to a site, with the activation that belongs to it."""

    # Saved like any activation, so checkpointing drops and recomputes it; a recomputed forward's own backward is
    # never run, so each gradient is seen once.
    @staticmethod
    def forward(ctx: Any, output: Tensor, activation: Tensor, site: Watcher, positions: Tensor | None) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.site, ctx.positions = site, positions
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.site.see_gradient(*ctx.saved_tensors, gradient, ctx.positions)
        return gradient, None, None, None
