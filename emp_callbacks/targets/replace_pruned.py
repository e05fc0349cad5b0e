"""Activations with the pruned ones replaced, the kept ones rescaled, in the forward pass and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits, from_bits
from emp_callbacks.core.kernels.choice import kernels_serve


def replace_pruned(viewed: Tensor, mask: Tensor, fill: Tensor | float) -> Tensor:
    """Return activations with the pruned ones replaced; never by a product, in which a pruned Inf becomes NaN."""
    if isinstance(fill, Tensor) or torch.compiler.is_compiling():
        return torch.where(mask, viewed, fill)
    zeroed: Tensor = _ZeroPruned.apply(viewed, mask)
    return zeroed


def rescale_kept(masked: Tensor, fill: Tensor | float, scores: Tensor, kept: Tensor) -> Tensor:
    """Return masked activations whose distances from what pruned ones became add up, in each sample, as before.

    Args:
        masked: Shape (B, ...), what `replace_pruned` returned.
        fill: What the pruned ones became; broadcasts over `masked`.
        scores: The distances before the mask, per feature, shape (B, F), floating, >= 0.
        kept: Shape (B, F), bool, True = kept. A sample whose scores are all 0, or not finite, stays as it is.
    """
    total, of_kept = scores.sum(1), scores.masked_fill(~kept, 0.0).sum(1)
    factor = (total / of_kept).masked_fill(~torch.isfinite(total) | (of_kept == 0), 1.0)
    wide = factor.to(torch.promote_types(masked.dtype, torch.float32)).view(-1, *[1] * (masked.dim() - 1))
    return (fill + (masked - fill) * wide).to(masked.dtype)


def straight_through(activation: Tensor, output: Tensor) -> Tensor:
    """Return `output`, of the same shape and dtype, whose whole gradient is the activation's (Bengio et al. 2013)."""
    passed: Tensor = _StraightThrough.apply(activation, output.detach())
    return passed


class _StraightThrough(torch.autograd.Function):
    """Not activation + (output - activation).detach(): rounding would change the output, and Inf makes it NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Tensor, output: Tensor) -> Tensor:  # noqa: ARG004
        return output.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


def _is_of_columns(viewed: Tensor, mask: Tensor) -> bool:
    """Whether the mask says the same of every row of the last dimension."""
    width = viewed.shape[-1] if viewed.dim() else 0
    return mask.numel() == width == mask.shape[-1] and mask.is_contiguous() and viewed.is_contiguous()


def _where_kept(viewed: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, viewed, 0.0)


class _ZeroPruned(torch.autograd.Function):
    """What torch.where(mask, activation, 0) is, forward and backward, in an eighth of its time on a CPU."""

    @staticmethod
    def forward(viewed: Tensor, mask: Tensor) -> Tensor:
        if _is_of_columns(viewed, mask) and kernels_serve([viewed]):
            from emp_callbacks.core.kernels.columns import mask_columns

            return mask_columns(viewed, mask)
        bits = as_bits(viewed)
        return from_bits(bits & mask.to(bits.dtype).neg(), viewed.dtype)  # -1 has all bits set

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ZeroPruned.apply(gradient, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], viewed: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        # torch up to 2.11 cannot view numbers as integers under torch.func.vmap, so no rule can be generated
        where = torch.func.vmap(_where_kept, in_dims, randomness=info.randomness)
        return where(viewed, mask), 0
