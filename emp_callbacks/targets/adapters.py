"""Adapters (PEFT's LoRA and its kin): which parameters are theirs, and what they add to the layer they stand around.

Known by what PEFT's layers say of themselves; PEFT is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

ADAPTER = "part of an adapter"
_MULTIPLIERS = ("ia3", "ln_tuning")  # what they multiply by makes no zero something else


def is_tuner(module: nn.Module) -> bool:
    """Return whether a module stands around a layer, which is its `base_layer`, and adds to it."""
    return isinstance(getattr(module, "adapter_layer_names", None), tuple) and "base_layer" in module._modules


def adapter_parts(model: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the modules and parameters of a model that are trained in place of it: adapters, prompts, copied heads."""
    for module in model.modules():
        if is_tuner(module):
            names: tuple[str, ...] = module.adapter_layer_names  # type: ignore[assignment]
            yield from (part for name in names if (part := getattr(module, name, None)) is not None)
        if hasattr(module, "peft_config") and "prompt_encoder" in module._modules:
            yield module.get_submodule("prompt_encoder")
        if "original_module" in module._modules and "modules_to_save" in module._modules:
            yield module.get_submodule("modules_to_save")


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Return every module inside the adapters of a model."""
    return {inner for part in adapter_parts(model) if isinstance(part, nn.Module) for inner in part.modules()}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return every parameter of the adapters of a model."""
    found: set[nn.Parameter] = set()
    for part in adapter_parts(model):
        found.update(part.parameters() if isinstance(part, nn.Module) else [part])
    return found


def is_adapters_name(name: str) -> bool:
    """Return whether a parameter of this name is one of a low-rank adapter, which a merge takes into its layer."""
    return ".lora_A." in name or ".lora_B." in name


def added_to(tuner: nn.Module, side: Literal["input", "output"]) -> list[tuple[nn.Parameter, int]]:
    """Return the adapters' parameters that read a layer's inputs or write its outputs, and the dimension of these.

    Args:
        tuner: What stands around the layer.
        side: Which of the two.

    Raises:
        NotImplementedError: What it adds to pruned units is not known.
    """
    kind = type(tuner).__module__.rpartition(".tuners.")[2].partition(".")[0]
    if kind in _MULTIPLIERS:
        return []
    low_rank = tuner._modules.get("lora_A" if side == "input" else "lora_B")
    is_dora = side == "output" and bool(getattr(tuner, "lora_magnitude_vector", None))
    if not isinstance(low_rank, nn.ModuleDict) or is_dora:
        why = "DoRA divides by the norm of rows, which is 0" if is_dora else f"what {kind} adds to them is not masked"
        raise NotImplementedError(
            f"units cannot be pruned behind an adapter ({why}): merge it first (merge_and_unload), or exclude them"
        )
    if side == "input":
        return [(own, 1) for adapter in low_rank.values() if (own := adapter._parameters["weight"]) is not None]
    return [(own, 0) for adapter in low_rank.values() for own in adapter._parameters.values() if own is not None]
