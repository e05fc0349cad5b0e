"""What else of a state may be damaged: what would be taken up without an error, or fail when half of it is in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from emp_callbacks.schedule import Clock


def check_clock_complete(clock: Mapping[str, Any]) -> None:
    """Raise ValueError where the record of a clock lacks an entry: the run would go on from 0."""
    if missing := [field.name for field in fields(Clock) if field.name not in clock]:
        raise _damaged(f"its clock says nothing of {', '.join(missing)}")


def check_stash(stash: Mapping[str, Tensor]) -> None:
    """Raise ValueError where dense values are no floating-point numbers. NaN and Inf a run may have behind a mask."""
    for name, values in stash.items():
        if not values.is_floating_point():
            raise _damaged(f"the dense values behind the mask of {name!r} are {values.dtype}, not floating-point")


def check_averages(averages: Any) -> None:
    """Raise ValueError unless these are the dense values of averages: for each the tensors by name."""
    if not isinstance(averages, (list, tuple)) or not all(isinstance(held, Mapping) for held in averages):
        raise _damaged(f"its averages are {type(averages).__name__}, not a list of tensors by name")
    for held in averages:
        for name, values in held.items():
            if not isinstance(values, Tensor) or not values.is_floating_point():
                raise _damaged(f"what an average holds of {name!r} is no tensor of floating-point numbers")


def _damaged(what: str) -> ValueError:
    return ValueError(f"the checkpoint is damaged: {what}; go back to an older one")
