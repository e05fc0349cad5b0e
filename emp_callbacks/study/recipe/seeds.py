"""Which numbers can seed a run."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_seed", "check_seeds"]

_LARGEST = 2**32 - 1  # numpy's limit, and so Lightning's
_MOST = 1000  # a range that was meant as one number would otherwise run for weeks


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError unless every library takes the seed."""
    if not 0 <= seed <= _LARGEST:
        raise ValueError(f"{name} must lie in [0, {_LARGEST}], got {seed}")


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Raise ValueError unless the seeds of a study are some different numbers in range.

    A seed that is named twice would count one run as two, and make the intervals too narrow.
    """
    if not seeds:
        raise ValueError(f"{name} is empty; name at least one seed, such as 0 1 2")
    if len(seeds) > _MOST:
        raise ValueError(f"{name} holds {len(seeds):,} seeds, and a study takes at most {_MOST:,}; name fewer")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"{name} must be different numbers, and {twice[0]} occurs twice in {list(seeds)}")
    for seed in seeds:
        check_seed(name, seed)
