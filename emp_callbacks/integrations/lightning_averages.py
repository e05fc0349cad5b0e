"""Lightning's own averages of weights beside EMP: what is validated, saved and left at the end obeys the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn

from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.blame import warn_the_user
from emp_callbacks.pruning.copies import Average, MaskedCopy
from emp_callbacks.pruning.pruner import EMPPruner

_KNOWN = {"WeightAveraging", "StochasticWeightAveraging"}


@final
class LightningAverages:
    """The callbacks WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging (or heirs) of one Trainer.

    Their average is kept masked as any other, `EMPPruner.add_average`; what they do with the module's own weights
    happens while these are dense.

    Args:
        trainer: The Trainer, as its fit starts.
        pruner: The callback's pruner.
    """

    def __init__(self, trainer: Any, pruner: EMPPruner) -> None:
        self._pruner = pruner
        self._shown: MaskedCopy | None = None
        self._wrapped: list[Wrapped] = []
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if not isinstance(average, nn.Module):
                if _KNOWN & {kind.__name__ for kind in type(callback).__mro__}:
                    warn_the_user(
                        f"{type(callback).__name__} keeps its average in a way that EMP does not know, so what it "
                        "saves may not be masked: check with callback.pruner.audit(), and mask what you ship with "
                        "callback.pruner.mask(model)"
                    )
            elif callable(getattr(callback, "_swap_models", None)):
                follower = pruner.add_average(average)
                self._wrapped.append(Wrapped(callback, "_swap_models", self._swap(follower)))
            elif callable(getattr(callback, "transfer_weights", None)):
                follower = pruner.add_average(average, [(callback, "update_parameters")])
                self._wrapped.append(Wrapped(callback, "transfer_weights", self._transfer(follower)))

    def _swap(self, average: Average) -> Callable[..., Any]:
        """Return what stands around the exchange of average and module, before and after each validation."""

        def around(swap: Callable[..., Any], pl_module: Any) -> None:
            if self._shown is not None:
                self._shown.undo()
                self._shown = None
                average.update(swap, pl_module)
            else:
                average.update(swap, pl_module)
                self._shown = self._pruner.mask(pl_module)  # in `project` the module's own weights are not held at 0

        return around

    def _transfer(self, average: Average) -> Callable[..., Any]:
        def around(transfer: Callable[..., Any], source: Any, target: Any) -> None:
            average.update(transfer, source, target)
            self._pruner.mask(target)

        return around

    def detach(self) -> None:
        """Leave the callbacks as they were."""
        while self._wrapped:
            self._wrapped.pop().remove()
