"""The part that adapters of PEFT have in units: what they read of a pruned unit, or write into it, is masked too."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from emp_callbacks.targets.unit_search import UnitSearch, own
from emp_callbacks.targets.units import MemberTarget

# Of the adapters that add a product of matrices: all their parts, and those that read inputs and write outputs.
_PRODUCTS = (
    ({"lora_A", "lora_B", "lora_E", "ranknum", "lora_magnitude_vector"}, "lora_A", "lora_B"),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, "hada_w1_b", "hada_w1_a"),
)
_SCALES = {"ia3_l"}  # these scale what the base makes of its inputs
_NORMALISES = "lora_magnitude_vector"  # DoRA divides by the norm of each row


def adapter_columns(search: UnitSearch, layer: nn.Module, unit_of: Tensor) -> Iterator[MemberTarget]:
    """Yield what the adapters of a layer read of units, masked; `unit_of` is of each of the layer's inputs."""
    for adapter in search.adapters_of(layer):
        yield from _members(search, layer, adapter, unit_of, writes=False)


def adapter_rows(search: UnitSearch, layer: nn.Module, unit_of: Tensor) -> Iterator[MemberTarget]:
    """Yield what the adapters of a layer write into units, masked; `unit_of` is of each of the layer's outputs."""
    for adapter in search.adapters_of(layer):
        yield from _members(search, layer, adapter, unit_of, writes=True)


def _members(
    search: UnitSearch, layer: nn.Module, adapter: nn.Module, unit_of: Tensor, *, writes: bool
) -> Iterator[MemberTarget]:
    parts = _parts(adapter)
    if parts.keys() <= _SCALES:
        return
    known = next((product for product in _PRODUCTS if parts.keys() <= product[0]), None)
    if known is None or (writes and _NORMALISES in parts):
        _refuse(search, layer, adapter)
        return
    _, reader, writer = known
    dim = 0 if writes else 1
    for parameter in parts.get(writer if writes else reader, ()):
        shape = search.shape(parameter)
        if len(shape) == 1 and writes:  # the bias of lora_B
            yield search.member(parameter, 0, unit_of, "adapter", masked=True, scored=False)
        elif len(shape) > 1 and shape[dim] == len(unit_of):
            yield search.member(parameter, dim, unit_of, "adapter", masked=True, scored=False)
        else:
            _refuse(search, layer, adapter)


def _parts(adapter: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each of an adapter's parts that has any, by its name."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        part = name.partition(".")[0]
        if part != "base_layer":
            found.setdefault(part, []).append(parameter)
    return found


def _refuse(search: UnitSearch, layer: nn.Module, adapter: nn.Module) -> None:
    kind = f"{type(adapter).__module__}.{type(adapter).__name__}"
    search.refuse(
        own(layer, "weight"),
        f"the adapter of {search.name(layer)!r} ({kind}) brings back what a mask takes out of its base, or divides by "
        "the norm of a row that is 0: prune after merge_and_unload(), use LoRA, LoHa or IA3 there, or leave the layer "
        "out of target_modules",
    )
