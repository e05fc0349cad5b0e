"""The perplexity of a model in a folder, a block at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emp_callbacks.folders.perplexity import perplexity_of
from emp_callbacks.folders.progress import Progress, Silent
from emp_callbacks.folders.units import find_units
from emp_callbacks.folders.walk import BlockWalk

if TYPE_CHECKING:
    from emp_callbacks.folders.perplexity import Scored
    from emp_callbacks.folders.skeleton import Skeleton

__all__ = ["Measured", "measure_perplexity"]

_ROOM = 1 << 30  # bytes of what blocks return, for all windows that are in memory together
_WIDTHS = ("hidden_size", "d_model", "n_embd")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's perplexity on a text.

    Attributes:
        value: exp of the mean negative log-likelihood of a token, >= 1.
        kind: "perplexity" or "masked perplexity".
        tokens: That were scored.
        windows: In which they lay.
        seconds: That it took.
        notes: What a reader must know.
    """

    value: float
    kind: str
    tokens: int
    windows: int
    seconds: float
    notes: tuple[str, ...]


def measure_perplexity(skeleton: Skeleton, scored: Scored, progress: Progress | None = None) -> Measured:
    """Return the perplexity of a model; only one block's weights are in memory.

    What blocks return for all windows takes 1 GiB at most: where it would be more, the weights are read several times.

    Args:
        skeleton: The model, empty.
        scored: The windows.
        progress: Is told how far it is.

    Raises:
        FloatingPointError: A loss is NaN or infinite.
        NotImplementedError: The model cannot be followed block by block.
    """
    begun, told = time.monotonic(), progress or Silent()
    walk = BlockWalk(skeleton, find_units(skeleton.model), scored.inputs[0])
    together = max(1, _ROOM // _bytes_of_a_window(skeleton, scored))
    told.begin(f"measuring {scored.kind}", len(walk.order) * len(scored.inputs))
    total, tokens = 0.0, 0

    def score(i: int, output: Any) -> None:
        nonlocal total, tokens
        loss, count = scored.loss(start + i, output.logits)
        total, tokens = total + loss, tokens + count

    for start in range(0, len(scored.inputs), together):
        windows = scored.inputs[start : start + together]
        for visit in walk.visits(windows, on_run=told.advance, on_output=score):
            visit.run(keep=True)
    return Measured(
        value=perplexity_of(total, tokens),
        kind=scored.kind,
        tokens=tokens,
        windows=len(scored.inputs),
        seconds=time.monotonic() - begun,
        notes=scored.notes,
    )


def _bytes_of_a_window(skeleton: Skeleton, scored: Scored) -> int:
    """Return about how much the blocks of a model return that is kept at a time, twice for an encoder's beside them."""
    width = max(getattr(skeleton.config, name, 0) or 0 for name in _WIDTHS) or 1024
    length = sum(
        value.shape[1] for value in scored.inputs[0].values() if value.dim() == 2 and not value.is_floating_point()
    )
    return max(1, length) * width * skeleton.dtype.itemsize
