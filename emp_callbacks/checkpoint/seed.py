"""The seed of a run's random scores, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def seed_entry(seed: int | None) -> dict[str, int]:
    """Return what a state holds of `Criterion.seed`: nothing where there is none."""
    return {} if seed is None else {"seed": seed}


def read_seed(state: Mapping[str, Any]) -> int | None:
    """Return what `seed_entry` put into a state; None where it put nothing, as in states of older versions.

    Raises:
        ValueError: It is no integer.
    """
    seed = state.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"the checkpoint is damaged: its seed is {seed!r}, not an integer; go back to an older one")
    return seed if "seed" in state else None
