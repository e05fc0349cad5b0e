"""A model that is evaluated, masked and scored, and afterwards is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emp_callbacks.core.random_numbers import random_numbers_kept

__all__ = ["unchanged"]


@contextmanager
def unchanged(model: nn.Module, owners: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside the block the model is in evaluation mode and has no gradients; what the block changes is undone.

    That is: the mode of every module, buffers, gradients, random numbers (Python, numpy, torch) and the given
    parameters. Costs a copy of these and of the buffers.

    Args:
        model: Any module.
        owners: Parameters that the block writes.

    Yields:
        Their values, in this order.
    """
    was_training, modes = model.training, [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with random_numbers_kept():
        model.eval()  # before the copies, and left after they are put back: some modules write their weights in it
        values = [owner.detach().clone() for owner in owners]
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        held = [(buffer, buffer.clone()) for _, own in buffers for buffer in own.values() if buffer is not None]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield values
        finally:
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for tensor, value in [*zip(owners, values, strict=True), *held]:
                    tensor.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            model.train(was_training)
            for module, mode in modes:
                module.training = mode
