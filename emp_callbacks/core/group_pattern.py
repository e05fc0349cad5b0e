"""The N highest of every M scores, N:M: on the CPU and on an accelerator by comparisons alone, without a sort.

Letters in shapes: G groups of rows of groups, M scores of a group, I groups beside each other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length
from emp_callbacks.core.effective_number import key_dtype

_MOST = 64


class GroupPattern(NamedTuple):
    """Of every `size` scores `keep` stay."""

    keep: int
    size: int

    @classmethod
    def parse(cls, text: object) -> GroupPattern:
        """Return the pattern of a string such as "2:4".

        Raises:
            ValueError: It is none.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        keep, size = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= keep < size <= _MOST:
            raise ValueError(
                f"pattern must be 'N:M' with 1 <= N < M <= {_MOST}, such as '2:4' (2 of every 4 stay), got {text!r}"
            )
        return cls(keep, size)

    @property
    def density(self) -> float:
        """The kept share, in (0, 1)."""
        return self.keep / self.size


def group_mask(scores_gmi: Tensor, keep: int) -> Tensor:
    """Return the mask of the `keep` highest |scores| of each group, ties by lowest index, also among zeros.

    Args:
        scores_gmi: Shape (G, M, I), floating, either sign, no NaN.
        keep: N, in [1, M].

    Returns:
        The same shape, bool, True = kept: exactly N of each M.

    Examples:
        >>> group_mask(torch.tensor([[[1.0], [-3.0], [0.0], [3.0]]]), 2)[0, :, 0]
        tensor([False,  True, False,  True])
    """
    groups, size, beside = scores_gmi.shape
    kept = torch.empty(scores_gmi.shape, dtype=torch.bool, device=scores_gmi.device)
    step = max(1, chunk_length(scores_gmi.device) // max(1, size * beside))
    for start in range(0, groups, step):
        part = scores_gmi[start : start + step].detach()
        columns = part.to(key_dtype([part.dtype])).abs().unbind(1)
        for j, own in enumerate(columns):
            before = torch.zeros(own.shape, dtype=torch.int8, device=own.device)
            for k, other in enumerate(columns):
                if k != j:
                    before += torch.ge(other, own) if k < j else torch.gt(other, own)
            kept[start : start + step, j] = before < keep
    return kept


def lowest_kept(scores_gmi: Tensor, kept: Tensor) -> Tensor:
    """Return the lowest |score| that a mask keeps, shape (), float64; inf where it keeps none."""
    if not kept.numel():
        return torch.full((), torch.inf, dtype=torch.float64)
    return scores_gmi.detach().abs().double().masked_fill(~kept, torch.inf).min()
