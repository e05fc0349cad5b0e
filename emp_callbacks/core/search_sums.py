"""The sums over ranks that a search for thresholds makes, known before it begins: each with its bytes, in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from emp_callbacks.core.cut_rows import SPREAD
from emp_callbacks.core.effective_number import key_dtype
from emp_callbacks.core.kernels.tables import EMPTY_BITS, LEAST_SAMPLE, SAMPLE, TILE_BINS
from emp_callbacks.core.row_search import INTERPOLATIONS, TIE_DIGIT
from emp_callbacks.core.threshold import DIGIT_BITS, MANY_GROUPS, NARROW_DIGIT_BITS, TIE_BITS, is_large

__all__ = ["WORD", "Sum", "cut_row_sums", "exactly", "kernel_sums", "torch_sums"]

WORD = 8  # bytes of an int64 or float64, in which nearly everything is summed


class Sum(NamedTuple):
    """One sum over ranks.

    Attributes:
        what: What is summed.
        least: Fewest bytes that each rank gives.
        most: Most; math.inf where nobody knows.
        certain: Whether it is made in any case. Others depend on the scores: equal ones must be told apart, say.
    """

    what: str
    least: int
    most: float
    certain: bool = True


def exactly(what: str, words: int) -> Sum:
    """Return a sum of so many numbers of 8 bytes."""
    return Sum(what, WORD * words, WORD * words)


def torch_sums(groups: Sequence[int], dtype: torch.dtype) -> Iterator[Sum]:
    """Yield what `threshold.find_thresholds` sums.

    Args:
        groups: Sizes of the groups, over all ranks.
        dtype: Of the scores.
    """
    large = sum(map(is_large, groups))
    if large:
        yield exactly("sizes of samples", large)
        yield from _digits("digits of brackets", large, 2, dtype)
        yield exactly("scores around brackets", 3 * large)
    yield from _digits("digits of lowest kept scores", len(groups), 1, dtype)
    yield from _places(groups, fewest=1)


def kernel_sums(groups: Sequence[int], dtype: torch.dtype) -> tuple[list[Sum], list[Sum]]:
    """Return what `kernels.search.DeviceSearch` sums: before the moments are known, and after; see `torch_sums`."""
    count, bits, empty = len(groups), _key_bits(dtype), EMPTY_BITS.get(dtype, 0)
    digit_bits = NARROW_DIGIT_BITS if count > MANY_GROUPS else DIGIT_BITS
    bin_bits = TILE_BINS.bit_length() - 1 if empty else digit_bits
    brackets = [size >= 2 * max(LEAST_SAMPLE, SAMPLE // count) for size in groups]
    sampled = []
    if any(brackets):
        sampled = [exactly("powers of samples", 5 * count)]
        sampled += [exactly("digits of brackets", 2 * count << width) for width in _widths(bits, digit_bits)]
    passes = 1 + math.ceil((bits - bin_bits - empty) / bin_bits)  # of a group without a bracket
    one = exactly("scores in and above windows", count * (1 + (1 << bin_bits)))
    searched = [one._replace(certain=not i or not all(brackets)) for i in range(passes)]
    return sampled, [*searched, *_places(groups, fewest=count)]


def cut_row_sums(rows: int, longest: int, dtype: torch.dtype, *, certain: bool) -> Iterator[Sum]:
    """Yield what `cut_rows.search_cut_rows` sums at most: how often depends on the scores.

    Args:
        rows: Rows of which ranks hold pieces, at most.
        longest: Scores in the longest of them.
        dtype: Of the scores.
        certain: Whether there are such rows in any case.
    """
    for i in range(INTERPOLATIONS + 1):
        yield Sum("counts of cut rows", 0, rows * WORD, certain and not i)
    for _ in range(math.ceil(_key_bits(dtype) / SPREAD.bit_length())):
        yield Sum("counts of cut rows", 0, SPREAD * rows * WORD, certain=False)
    for _ in range(math.ceil((longest - 1).bit_length() / TIE_DIGIT)):
        yield Sum("places of equal scores in cut rows", 0, (rows << TIE_DIGIT) * WORD, certain=False)


def _digits(what: str, groups: int, targets: int, dtype: torch.dtype) -> Iterator[Sum]:
    """Yield what is summed to find `targets` ranks of each group: a histogram of each digit."""
    count = groups * targets
    most = NARROW_DIGIT_BITS if count > MANY_GROUPS else DIGIT_BITS
    for width in _widths(_key_bits(dtype), most):
        yield exactly(what, count << width)


def _widths(bits: int, most: int) -> list[int]:
    return [min(most, bits - done) for done in range(0, bits, most)]


def _places(groups: Sequence[int], fewest: int) -> Iterator[Sum]:
    """Yield what is summed where not all of the scores equal to a lowest kept one stay, of `fewest` groups or more."""
    asked = ((1 << TIE_BITS) - 1) * WORD
    for _ in range(math.ceil((max(groups) - 1).bit_length() / TIE_BITS)):
        yield Sum("places of equal scores", fewest * asked, len(groups) * asked, certain=False)


def _key_bits(dtype: torch.dtype) -> int:
    return 63 if key_dtype([dtype]) == torch.float64 else 31  # the sign bit is 0
