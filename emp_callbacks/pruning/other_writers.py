"""Who else writes masked weights between two updates, and what becomes of what they wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from emp_callbacks.blame import warn_the_user
from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.device import on_host
from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight


@final
class OtherWriters:
    """A watch on everything but the optimizer: averages that are swapped in, `load_state_dict`, dtype changes.

    They are noticed before the dense values that are kept overwrite theirs: by the storage and version of each tensor
    at every update and refresh, by the values themselves at every evaluation, save and at the end.

    Args:
        mode: What the masks mean, and so what becomes of the values: see `MaskMode.notice`.
    """

    def __init__(self, mode: MaskMode) -> None:
        self._mode = mode
        self._lost_told = self._late_told = self._behind_told = False
        self._lost: dict[str, int] = {}
        self._behind: list[str] = []
        self._left: dict[MaskedWeight, tuple[torch.dtype, Tensor]] = {}
        self._turn = 0
        self._late: dict[str, Tensor] = {}
        self._lost_late: dict[str, Tensor] = {}

    def before_update(self, weights: Sequence[MaskedWeight], *, again: bool = False) -> None:
        """Notice what left a trace, without waiting for an accelerator.

        Told of all weights before the first is changed: parts of one flat buffer count their writes together.

        Args:
            weights: What is rewritten next.
            again: Whether the same step was begun by a closure before: values are not looked at twice.
        """
        if self._mode.keeps_zero:
            touched = [one for one in weights if one.store.is_touched(one.weight, sampled=not again)]
            self._obey([one for one in touched if on_host(one.weight)])
            self._obey_late([one for one in touched if not on_host(one.weight)])
            self._say_what_is_lost()
            self._say_what_stays_behind()
            self._suspect(weights)
        for weight in weights:
            weight.store.written.clear()

    @torch.no_grad()
    def notice(self, weights: Sequence[MaskedWeight], *, loaded: bool = False) -> None:
        """Notice by the values themselves.

        Args:
            weights: What is masked.
            loaded: Whether they come from a checkpoint, whose own masks may follow: nothing is lost yet.
        """
        self._say_what_came_late()
        late, self._lost_late = self._lost_late, {}
        self._lost |= {name: lost for name, count in late.items() if (lost := int(count))}
        for weight in weights if loaded else ():
            if weight.store.is_touched(weight.weight):  # else by another pruner's hook on the same load
                weight.store.written.clear()
        self._obey(weights)
        seal(weights)
        if loaded:
            self._behind = [weight.name for weight in weights if weight.store.keeps_older]
        else:
            self._say_what_is_lost()

    def restored(self) -> None:
        """A checkpoint's own masks took the place of those that its weights were hidden by."""
        self._lost.clear()
        self._behind.clear()

    @contextmanager
    def masked(self, weights: Sequence[MaskedWeight]) -> Iterator[None]:
        """Inside the block the weights obey the masks, for an evaluation, whoever wrote them.

        Values that are there for the evaluation only, as averages are, come back after it unless they were replaced; if
        they stay, they are noticed at the next update.
        """
        shown = []
        with torch.no_grad():
            for weight in weights if self._mode.keeps_zero else ():
                _follow_the_model(weight)
                if weight.mask is not None and bool((taken := take_pruned(weight.weight, weight.mask)).any()):
                    zero_pruned(weight.weight, weight.mask)
                    shown.append((weight, taken, weight.weight.clone()))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, taken, seen in shown:
                    # By value: a write through .data leaves no other trace.
                    if torch.equal(weight.weight, seen) and weight.mask is not None:
                        put_pruned(weight.weight, weight.mask, taken)

    @torch.no_grad()
    def leave(self, weights: Sequence[MaskedWeight]) -> None:
        """Remember the weights as they are when the hooks are taken off."""
        self._left = {weight: _fingerprint(weight.weight) for weight in weights if weight.segment.replicated}

    @torch.no_grad()
    def replaced(self, weights: Sequence[MaskedWeight]) -> list[str]:
        """Return the masked weights that are others than `leave` found; take over what hides behind them.

        For a pruner that is through, before its state is used again.
        """
        found = []
        for weight in weights:
            _follow_the_model(weight)
            if weight.mask is None:
                continue
            left, now = self._left.get(weight), weight.weight
            others = left is not None and left[0] == now.dtype and int(left[1]) != int(_fingerprint(now)[1])
            grown = self._mode.keeps_zero and bool(take_pruned(now, weight.mask).any())
            if others or grown:
                found.append(weight.name)
                weight.store.take_over(now)
        self.leave(weights)
        return found

    def _obey(self, weights: Iterable[MaskedWeight]) -> None:
        self._lost |= {weight.name: count for weight in weights if (count := self._notice_one(weight))}

    def _obey_late(self, weights: Iterable[MaskedWeight]) -> None:
        """Do the same with weights on an accelerator that something wrote; how many were lost is asked for later."""
        for weight in weights:
            _follow_the_model(weight)
            if (lost := self._mode.notice_late(weight)) is not None:
                self._lost_late.setdefault(weight.name, lost)  # what is said is how many the first time

    def _say_what_is_lost(self) -> None:
        lost, self._lost = self._lost, {}
        if lost and not self._lost_told:
            self._lost_told = True
            name, count = max(lost.items(), key=lambda item: item[1])
            warn_the_user(
                f"something other than the optimizer wrote {count} pruned entries of {name!r} (load_state_dict, an "
                f"average, another tool?); mode {self._mode.name!r} keeps them at 0. Use mode='feedback' to keep such "
                "values behind the mask"
            )

    def _say_what_stays_behind(self) -> None:
        behind, self._behind = self._behind, []
        if behind and not self._behind_told:
            self._behind_told = True
            warn_the_user(
                f"load_state_dict brought zeros for what is pruned of {behind[0]!r}, as a masked model has, so "
                "the dense values behind the mask are those of before. Load the pruner's own state with the model's, "
                "or call finalize() and make a new pruner to go on from the masked weights"
            )

    def _notice_one(self, weight: MaskedWeight) -> int:
        _follow_the_model(weight)
        return self._mode.notice(weight)

    def _suspect(self, weights: Sequence[MaskedWeight]) -> None:
        """On an accelerator, look at a few values of one weight, the next at each step; do not wait for the answer.

        In `feedback` every value that something else wrote becomes the dense one.
        """
        if not weights or on_host(weights[0].weight) or self._mode.takes_over:
            return
        self._turn += 1
        weight = weights[self._turn % len(weights)]
        if (count := weight.store.count_sampled(weight.weight)) is not None:
            self._late[weight.name] = count + self._late.get(weight.name, 0)

    def _say_what_came_late(self) -> None:
        """Say once if `_suspect` has seen values that something else wrote, and that the next update overwrote."""
        late, self._late = self._late, {}
        names = [name for name, count in late.items() if bool(count)]
        if names and not self._late_told:
            self._late_told = True
            warn_the_user(
                f"something other than the optimizer wrote {names[0]!r} through .data between two steps (weight "
                "clipping, an average?), and the next step put EMP's own values over the pruned entries: write the "
                "parameter itself, under torch.no_grad()"
            )


def _follow_the_model(weight: MaskedWeight) -> None:
    """Move the mask where the weight is: Lightning takes a model from the GPU to the CPU when a fit ends."""
    if weight.mask is not None and weight.mask.device != weight.weight.device:
        weight.mask = weight.mask.to(weight.weight.device)


def _fingerprint(values: Tensor) -> tuple[torch.dtype, Tensor]:
    """Return a number that other values hardly have, on their device: nothing waits for it."""
    return values.dtype, as_bits(values).sum(dtype=torch.int64)


def seal(weights: Iterable[MaskedWeight]) -> None:
    """Say that nobody but this package writes the weights from here on, until the next update."""
    for weight in weights:
        weight.seal()
