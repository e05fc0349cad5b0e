"""What watches how much each head adds to the residual stream."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from emp_callbacks.layer.observers import Observer
from emp_callbacks.targets.head_norms import added_norms, check_has_columns
from emp_callbacks.targets.head_outputs import HeadOutputs


@final
class HeadNorms(Observer):
    """Sum of ||o_h W_h||_2 of each head over all samples, tokens and pixels; see `targets.head_norms.added_norms`.

    Args:
        outputs: Where the heads' outputs pass by.

    Raises:
        ValueError: The output projection is no matrix that multiplies each position.
    """

    def __init__(self, outputs: HeadOutputs) -> None:
        check_has_columns(outputs)
        super().__init__(outputs.name, outputs.projection, outputs.units)
        self.outputs = outputs

    def _register(self) -> list[RemovableHandle]:
        return self.outputs.register(self._shown)

    def _see(self, values: Tensor, positions: Tensor | None) -> None:
        super()._see(added_norms(self.outputs, values), positions)

    def _total(self, values: Tensor) -> Tensor:
        return values.flatten(0, -2).sum(0, dtype=torch.float64)
