"""Arguments with which a finished model can be called for a try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from emp_callbacks.cost.training_loss import training_loss

if TYPE_CHECKING:
    from emp_callbacks.study.recipe.parts import RecipeParts

__all__ = ["Example", "image_example", "model_example", "recorded_example"]

_EXAMPLES = 2  # of a batch


@dataclass(frozen=True)
class Example:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def image_example(size: Sequence[int] | None) -> Example | None:
    """Return noise of a size such as (3, 32, 32), as a batch of one; None for None."""
    return Example((torch.randn(1, *size, generator=torch.Generator().manual_seed(0)),)) if size else None


def model_example(module: nn.Module) -> Example | None:
    """Return the inputs that a transformers model offers for a try; images where it reads pixels."""
    config: Any = getattr(module, "config", None)
    reads = getattr(module, "main_input_name", "")
    if reads == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        image = image_example((getattr(config, "num_channels", 3), height, width))
        return None if image is None else Example((), {"pixel_values": image.args[0]})
    if reads != "input_ids":
        return None
    offered: Any = module.dummy_inputs
    without_cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return Example((), {**offered, **without_cache})


def recorded_example(recipe: RecipeParts, inner: nn.Module) -> Example | None:
    """Return the arguments with which a training step of the recipe calls the inner model, for a few examples."""
    calls: list[Example] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        calls.append(Example(args, kwargs))

    batch = next(iter(recipe.data.train_dataloader()))
    hook = inner.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            training_loss(recipe.module, batch, 0)
    finally:
        hook.remove()
    if not calls:
        return Example((batch,)) if inner is recipe.module else None
    return _few(calls[0])


def _few(example: Example) -> Example:
    """Return the first examples of the batch, if the first dimension of every tensor is the batch."""
    tensors = [leaf for leaf in tree_leaves(vars(example)) if isinstance(leaf, Tensor)]
    if len({len(tensor) if tensor.dim() else 0 for tensor in tensors}) != 1:
        return example
    return Example(**tree_map(lambda leaf: leaf[:_EXAMPLES] if isinstance(leaf, Tensor) else leaf, vars(example)))
