"""Score = mean ||o_h W_h||."""

from typing import Any, final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, UnitLayer


@final
class OutputNorm(Criterion):
    """Mean norm of what a head adds to the residual stream: its output times its columns of the output projection.

    Over the gathered samples, tokens and pixels; of a gated attention gate times norm. The norms of value vectors times
    the output projection are those of Kobayashi et al. 2020 (arXiv:2004.10102), here after the attention has weighed
    them. Dynamic heads are scored alike, each token by itself: see `targets.dynamic_heads`.
    """

    targets = ("heads",)
    needs = "activations"

    def check(self, layer: Layer) -> None:
        if isinstance(layer, UnitLayer) and any(member.role == "adapter" for member in layer.members):
            raise ValueError(
                f"the output projection of {layer.name!r} has adapters of PEFT, which read the heads beside it: merge "
                f"them (merge_and_unload), use criterion 'activation' or 'taylor', or exclude={[layer.name]!r}"
            )

    def score(self, layer: Layer) -> Tensor:
        return self.evidence(layer)


def check_unmasked(config: Any) -> None:
    """Raise ValueError where this criterion would score heads behind the masks of an EMPConfig."""
    masks = config.gates is None and not (config.dynamic or config.observe_only)
    if masks and config.mode == "feedback":
        raise ValueError(
            "criterion 'output_norm' reads what heads add, which is nothing behind a mask, so that mode='feedback' "
            "could bring none back: use mode='project' or 'freeze', dynamic=True, or another criterion"
        )
