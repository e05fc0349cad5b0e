"""Parameters that are two objects over one memory: masks of both would hide and count the same values twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emp_callbacks.targets import WeightTarget


def check_apart(targets: Sequence[WeightTarget]) -> None:
    """Raise ValueError, which names both, where two parameters hold an element in common.

    Neighbours in one flat buffer, and views of it that interleave, are apart.
    """
    for together in _within_reach(targets):
        found = _first_two([target.parameter for target in together])
        if found is not None:
            first, second = (together[i].name for i in found)
            raise ValueError(
                f"{first!r} and {second!r} are two parameters over one memory, so each would hide and count the "
                f"other's values: make them one parameter ({second} = {first}), or exclude one and let one optimizer "
                "update both"
            )


def _within_reach(targets: Sequence[WeightTarget]) -> Iterator[list[WeightTarget]]:
    """Yield the parameters whose ranges of memory reach into each other, two or more at a time, by address."""
    once = {id(target.parameter): target for target in targets if _has_memory(target.parameter)}
    ordered = sorted(once.values(), key=lambda target: (str(target.parameter.device), _range(target.parameter)))
    together: list[WeightTarget] = []
    end = 0
    for target in ordered:
        low, high = _range(target.parameter)
        if together and (low >= end or target.parameter.device != together[0].parameter.device):
            if len(together) > 1:
                yield together
            together, end = [], 0
        together.append(target)
        end = max(end, high)
    if len(together) > 1:
        yield together


def _first_two(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return which two of some tensors near each other hold an element in common; None if all are apart."""
    ranges = [_range(values) for values in tensors]
    start, end = min(low for low, _ in ranges), max(high for _, high in ranges)
    unit = math.gcd(*(values.element_size() for values in tensors), *(low - start for low, _ in ranges))
    taken_by = torch.zeros((end - start) // unit, dtype=torch.int32)
    for i, (values, (low, _)) in enumerate(zip(tensors, ranges, strict=True)):
        width = values.element_size() // unit
        # of what expand() repeats, which cannot be written as a whole, one
        shape = [size if stride else 1 for size, stride in zip(values.shape, values.stride(), strict=True)]
        strides = [stride * width for stride in values.stride()]
        own = taken_by.as_strided((*shape, width), (*strides, 1), (low - start) // unit)
        if before := int(own.max()):
            return before - 1, i
        own.fill_(i + 1)
    return None


def _has_memory(values: Tensor) -> bool:
    return values.layout == torch.strided and not values.is_meta and values.numel() > 0 and values.data_ptr() != 0


def _range(values: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the one after its last."""
    spans = (stride * (size - 1) for stride, size in zip(values.stride(), values.shape, strict=True))
    return values.data_ptr(), values.data_ptr() + (sum(spans) + 1) * values.element_size()
