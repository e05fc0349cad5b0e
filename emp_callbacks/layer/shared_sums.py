"""Sums over ranks that many layers ask for, sent together: their number does not grow with the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from emp_callbacks.core.device import on_host
from emp_callbacks.core.kernels.tables import to_device

Parts = Mapping[str, Tensor]
Found = TypeVar("Found")
AT_ONCE = 1 << 24  # numbers that are copied into one tensor to be sent: 128 MiB of float64


class Ranks(Protocol):
    """What a decision needs to know of the processes that train the model; every backend offers it."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks. Collective."""

    def all_min(self, value: Tensor) -> Tensor:
        """Return the lowest `value` of any rank, element by element. Collective."""

    def from_all(self, value: Tensor) -> Tensor:
        """Return the `value` of every rank, shape (world_size, *value.shape). Collective."""


def sum_together(parts: Sequence[Parts], ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return the sums over ranks of what each rank has, on the CPU. Collective.

    Args:
        parts: Tensors by name, of the same names, shapes and dtypes on every rank.
        ranks: The processes. Tensors of one dtype travel as one, or as few where they are very large.
    """
    if ranks.world_size == 1 and all(on_host(value) for each in parts for value in each.values()):
        return [dict(each) for each in parts]
    found: list[dict[str, Tensor]] = [{} for _ in parts]
    asked = [(i, key, value) for i, each in enumerate(parts) for key, value in sorted(each.items())]
    for some in _few_at_a_time(asked):
        values = [value for *_, value in some]
        device = next((value.device for value in values if not on_host(value)), values[0].device)
        flat = torch.cat([to_device(value, device).reshape(-1) for value in values])
        # Copied to the host once: an accelerator is not waited for as often as there are layers.
        total_flat = (flat if ranks.world_size == 1 else ranks.all_sum(flat)).cpu()
        sums = torch.split(total_flat, [value.numel() for value in values])
        for (i, key, value), total in zip(some, sums, strict=True):
            found[i][key] = total.view(value.shape)
    return found


def _few_at_a_time(asked: Sequence[tuple[int, str, Tensor]]) -> Iterator[list[tuple[int, str, Tensor]]]:
    """Yield those of one dtype together, as long as they are not too large for one tensor."""
    for dtype in dict.fromkeys(value.dtype for *_, value in asked):
        some: list[tuple[int, str, Tensor]] = []
        size = 0
        for one in asked:
            if one[2].dtype != dtype:
                continue
            if some and size + one[2].numel() > AT_ONCE:
                yield some
                some, size = [], 0
            some.append(one)
            size += one[2].numel()
        yield some


class Asking:
    """How the work on one layer asks for sums over ranks: at once, or within `together` with the work on others.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._answers: Iterator[dict[str, Tensor]] | None = None

    def sums(self, parts: Callable[[], Parts]) -> dict[str, Tensor]:
        """Return the sums over ranks, on the CPU, of what `parts` computes, as `sum_together` does. Collective."""
        if self._answers is None:
            return sum_together([parts()], self._ranks)[0]
        answer = next(self._answers, None)
        if answer is None:
            raise _Unanswered(parts())
        return answer

    def go_on(self, work: Callable[[], Found], answers: Sequence[dict[str, Tensor]]) -> Found:
        """Return what some work finds that is given these answers in turn; raise `_Unanswered` where it asks on."""
        self._answers = iter(answers)
        try:
            return work()
        finally:
            self._answers = None


class _Unanswered(BaseException):
    """Work asks for sums that are not there yet."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts


def together(askers: Sequence[Asking], work: Callable[[int], Found], ranks: Ranks) -> list[Found]:
    """Return `work(i)` for each of some layers, whose first sums travel together, then their second ones. Collective.

    Work that asks for sums is left there, and begun anew once they have come: up to there it must do the same again.

    Args:
        askers: What the work on each layer asks by, in the same order on every rank.
        work: What is done on the i-th layer.
        ranks: The processes.
    """
    answers: list[list[dict[str, Tensor]]] = [[] for _ in askers]
    found: dict[int, Found] = {}
    while len(found) < len(askers):
        asked: dict[int, Parts] = {}
        for i in range(len(askers)):
            if i in found:
                continue
            try:
                found[i] = askers[i].go_on(lambda i=i: work(i), answers[i])  # type: ignore[misc]
            except _Unanswered as question:
                asked[i] = question.parts
        for i, sums in zip(asked, sum_together(list(asked.values()), ranks), strict=True):
            answers[i].append(sums)
    return [found[i] for i in range(len(askers))]
