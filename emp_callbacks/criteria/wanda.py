"""Score = |W_ij| * ||x_j||_2."""

from typing import final

from torch import Tensor, nn

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, WeightLayer
from emp_callbacks.targets.forward_site import runs_hooks
from emp_callbacks.targets.matrices import is_conv1d


@final
class Wanda(Criterion):
    """Weight times the l2 norm of the input that it multiplies (Sun et al., arXiv:2306.11695).

    The norm runs over all samples, tokens and pixels of the gathered batches. The paper compares within an output
    unit: that is `scope="row"`. A convolution's norm is that of the whole input channel.
    """

    targets = ("weights",)
    needs = "inputs"
    zero_scores_zero = True
    certificate = "output_error"

    def check(self, layer: Layer) -> None:
        if not layer.sites:
            raise ValueError(
                "criterion 'wanda' needs the inputs of a Linear, Conv1D or Conv layer that the model calls, and "
                f"{layer.name!r} belongs to none; exclude it, or use criterion 'magnitude' or 'taylor'"
            )

    def score(self, layer: WeightLayer) -> Tensor:
        norms = self.evidence(layer)
        weight = layer.effective
        return weight * norms if weight.element_size() > 4 else weight.float() * norms.float()


def is_observable(module: nn.Module) -> bool:
    """Return whether a module multiplies its input with its weight as this criterion assumes."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (isinstance(module, plain) or is_conv1d(module)) and runs_hooks(module)
