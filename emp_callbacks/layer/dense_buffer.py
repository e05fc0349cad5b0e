"""The dense values behind masks on an accelerator: a second tensor of the weight's shape, and nothing that waits.

While forward and backward run, the parameter's own memory holds the masked values. For an update the parameter is
given the dense tensor as its memory: no value is moved. Its own memory keeps its address at all other times, for
whoever holds it: captured graphs, views. Where the memory is shared with others (a flat buffer, a view, a sharded
tensor) the dense values are written into it and taken out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from emp_callbacks.core.masked_values import is_dense, no_sums, put_pruned

_OWN_HOLDS = 3  # of the parameter's memory: by itself, by the values we were given, by our look at the memory


@final
@dataclass(eq=False)
class DenseBuffer:
    """Dense values of one part of a tensor.

    Attributes:
        dense: Laid out like the part.
        sums: Check sums of what is shown, see `copy_masked`.
        aside: The parameter's own memory while `dense` stands in for it; else None.
    """

    dense: Tensor
    sums: Tensor
    aside: Tensor | None = None
    _alone_at: int | None = None

    @classmethod
    @torch.inference_mode(False)
    def like(cls, values: Tensor) -> DenseBuffer:
        """Return one laid out like these values, in memory of its own."""
        return cls(torch.empty_like(values), no_sums(values))

    def fits(self, values: Tensor) -> bool:
        """Whether the dense values are laid out like these, in other memory."""
        return _are_alike(self.dense, values) and self.dense.data_ptr() != values.data_ptr()

    def take_aside(self, values: Tensor) -> Tensor | None:
        """Return the parameter's own memory if other memory, that of the given values, stands in for it."""
        aside, self.aside = self.aside, None
        if aside is None or not _are_alike(aside, values) or aside.data_ptr() == values.data_ptr():
            return None
        return aside

    @torch.inference_mode(False)
    def put(self, values: Tensor, mask: Tensor, packed: Tensor) -> None:
        """Make the dense values these, with packed ones where the mask prunes. May wait."""
        self.dense.copy_(values)
        put_pruned(self.dense, mask, packed)

    def take_over(self, values: Tensor, mask: Tensor) -> None:
        """Take over what something else wrote over masked values; see `DenseStore.take_over`."""
        written = mask | (values != 0) | ~self.dense.isfinite() | ~values.any()
        self.dense = torch.where(written, values, self.dense)

    def stands_in(self, owner: Tensor, values: Tensor) -> bool:
        """Whether the dense values can be the parameter's memory for a while: nobody else holds its own."""
        at = values.data_ptr()
        if self._alone_at != at:  # a hold that is gone by the next step is no reason to copy at every step
            self._alone_at = at if _is_alone(owner, values) else None
        return self._alone_at == at


def _are_alike(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and one.shape == other.shape and one.stride() == other.stride()


def _is_alone(owner: Tensor, values: Tensor) -> bool:
    if type(owner) not in (Tensor, nn.Parameter) or owner.is_inference() or values.shape != owner.shape:
        return False
    storage = owner.untyped_storage()
    if storage.nbytes() != owner.numel() * owner.element_size() or not is_dense(owner):
        return False
    holds: int = torch._C._storage_Use_Count(storage._cdata)
    return holds <= _OWN_HOLDS
