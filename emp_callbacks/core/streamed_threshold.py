"""The lowest kept score of one group that does not fit memory: its tensors are made anew at each look.

As in `threshold`, bit patterns are counted from the leading bits on (radix select), here with digits so long that few
looks suffice. The first one, which also gives the moments, settles bfloat16; float16 and float32 take a second one,
float64 three more. Where scores equal to the lowest kept one are cut, one more ends at the last of them that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.chunks import magnitudes
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype, score_moments
from emp_callbacks.core.threshold import ALL_TIES, Threshold, count_digits

DIGIT_BITS = 16  # 65536 bins of int64 stay in a core's cache; bfloat16 has 15 bits besides the sign


@final
class StreamedScores:
    """One group of scores of which no more than one tensor is held at a time.

    Args:
        scores: Yields the group's tensors, of any shape and either sign, the same ones each time that it is iterated
            over. What it yields is let go of before the next is asked for. It is looked at once.
        dtype: float32 or float64, in which they are compared, see `key_dtype`.

    Attributes:
        moments: Of each tensor, shape (T,). NaN or Inf in a tensor makes its `total` non-finite; then there is no
            threshold.

    Raises:
        TypeError: `scores` can be iterated over only once, or a tensor is float64 where float32 are compared.

    Examples:
        >>> group = StreamedScores([torch.tensor([3.0, 1.0]), torch.tensor([[-3.0], [2.0]])], torch.float32)
        >>> group.moments.nonzero
        tensor([2., 2.], dtype=torch.float64)
        >>> threshold = group.threshold(3)
        >>> threshold.value, threshold.last_tie == ALL_TIES
        (2.0, True)
    """

    def __init__(self, scores: Iterable[Tensor], dtype: torch.dtype) -> None:
        if isinstance(scores, Iterator):
            raise TypeError(
                f"scores are looked at several times, and {type(scores).__name__} yields them once; give an object "
                "whose __iter__ begins anew"
            )
        self._scores, self._dtype = scores, dtype
        self._bits = 63 if dtype == torch.float64 else 31  # the sign bit is 0
        self._leading = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        self._is_settled = dtype == torch.float32
        # `map` lets go of a tensor before it asks for the next, as the variable of a loop would not.
        sums = [torch.zeros(0, 3, dtype=torch.float64), *map(self._look, scores)]
        self.moments = ScoreMoments.unstack(torch.cat(sums))

    def threshold(self, keep: int) -> Threshold:
        """Return the threshold that keeps exactly `keep` scores, between 1 and the number of those that are not 0.

        `Threshold.mask` of a flat tensor and the number of scores before it gives its mask.

        Raises:
            RuntimeError: The scores are not those of the first look.
        """
        prefix, missing, ties = _narrow(self._leading, 0, keep)
        done = self._bits - DIGIT_BITS
        while done and not self._is_settled:
            width = min(DIGIT_BITS, done)
            counts = torch.zeros(1 << width, dtype=torch.int64)
            for own in map(partial(self._count, prefix=prefix, done=done, width=width), self._scores):
                counts += own
            if int(counts.sum()) != ties:
                raise _changed()
            prefix, missing, ties = _narrow(counts, prefix, missing)
            done -= width
        threshold = Threshold(prefix << done, ALL_TIES, self._dtype)
        return threshold if missing == ties else self._cut(threshold, missing)

    def _look(self, scores: Tensor) -> Tensor:
        if key_dtype([scores.dtype, self._dtype]) != self._dtype:
            raise TypeError(f"scores of {scores.dtype} cannot be compared as {self._dtype}; give dtype=torch.float64")
        # As float32, the bits of a bfloat16 behind the first digit are 0.
        self._is_settled &= scores.dtype == torch.bfloat16
        self._leading += self._count(scores, 0, self._bits, DIGIT_BITS)
        return score_moments(scores.reshape(-1)[None]).stack().cpu()

    def _count(self, scores: Tensor, prefix: int, done: int, width: int) -> Tensor:
        return count_digits([scores.reshape(-1)], prefix, done, width, self._dtype)

    def _cut(self, threshold: Threshold, missing: int) -> Threshold:
        """Return a threshold that keeps only the first `missing` of the scores equal to the lowest kept one."""
        start, value = 0, threshold.value

        def last_kept(scores: Tensor) -> int | None:
            nonlocal start, missing
            for at, own in magnitudes(scores.reshape(-1), self._dtype):
                equal = torch.eq(own, value, out=own)
                count = int(equal.count_nonzero())
                if count >= missing:
                    return int(start + at.start + equal.nonzero()[missing - 1])
                missing -= count
            start += scores.numel()
            return None

        for position in map(last_kept, self._scores):
            if position is not None:
                return Threshold(threshold.key, position, threshold.dtype)
        raise _changed()


def _narrow(counts: Tensor, prefix: int, need: int) -> tuple[int, int, int]:
    """Return the leading bits of the `need`-th highest, how many with the same ones to keep, and how many there are.

    `counts` has how often each next digit follows `prefix`.
    """
    at_least = counts.flip(0).cumsum(0).flip(0)  # scores whose digit is >= the bin's
    digit = int((at_least >= need).sum()) - 1
    ties = int(counts[digit])
    return prefix * len(counts) + digit, need - int(at_least[digit]) + ties, ties


def _changed() -> RuntimeError:
    return RuntimeError("the scores are not the same at each look; leave what they are read from alone meanwhile")
