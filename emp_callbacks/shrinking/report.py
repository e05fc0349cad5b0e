"""What removing units did to a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from emp_callbacks.shrinking.shrunk_file import surgery_metadata
from emp_callbacks.shrinking.surgery import Surgery

__all__ = ["FOR_EQUAL_SIZES", "ShrinkReport", "ShrunkLayer", "save_shrunk"]

FOR_EQUAL_SIZES = "kept as zeros, for equal sizes"  # a reason


class ShrunkLayer(NamedTuple):
    """One layer with pruned units; those that are pruned but not removed had to stay.

    A unit stays where what reads it is not zero without it: another layer is added to it that keeps the unit, or its
    zero becomes another value on the way (sigmoid, layer norm). A layer's last unit stays, too. `reason` says in
    plain words why units stayed; None where all went.
    """

    name: str
    units: int
    pruned: int
    removed: int
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShrinkReport:
    """What `shrink` did.

    Attributes:
        layers: Every layer that has pruned units.
        surgery: What is left of each module that was cut.
        parameters: Number of parameters before and after; tied ones count once.
        flops: Floating-point operations of the example before and after, as torch's FlopCounterMode counts them.
        difference: Largest |difference| of the outputs on the example, relative to their largest magnitude.
        rerouted: Largest relative difference that it makes of the outputs that a masked model's tokens go to other
            experts than the removed ones; `difference` is beside that.
        brought_back: Units that could have gone and stay as zeros, for equal sizes (`uniform`).
        repeated: Whether the model had been shrunk before, which `surgery` does not know.
    """

    layers: tuple[ShrunkLayer, ...]
    surgery: Surgery
    parameters: tuple[int, int]
    flops: tuple[int, int]
    difference: float
    rerouted: float = 0.0
    brought_back: int = 0
    repeated: bool = False

    def metadata(self) -> dict[str, str]:
        """Return what a safetensors file of the shrunk model must carry for `load_shrunk`."""
        return surgery_metadata(self.surgery)


def save_shrunk(model: nn.Module, report: ShrinkReport, file: str | os.PathLike[str]) -> None:
    """Write a model that `shrink` made smaller as a safetensors file that `load_shrunk` reads.

    Args:
        model: The shrunk model.
        report: What `shrink` returned.
        file: The file to write; one of that name is replaced.

    Raises:
        OSError: It cannot be written.
        ValueError: The model was shrunk before, so that the report knows a part of what was cut.
    """
    if report.repeated:
        raise ValueError(
            "this model was shrunk more than once, and the file must say all that was cut: cut a fresh masked model in "
            "one call, shrink(model, {**masks, **more_masks}, ...)"
        )
    from safetensors.torch import save

    # Safetensors holds no shared memory: a tied tensor is written under each of its names.
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }
    Path(file).write_bytes(save(tensors, report.metadata()))
