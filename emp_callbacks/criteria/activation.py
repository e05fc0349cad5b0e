"""Score = mean |a|."""

from typing import final

from torch import Tensor

from emp_callbacks.criteria.base import Criterion
from emp_callbacks.layer import Layer, UnitLayer


@final
class Activation(Criterion):
    """Mean absolute activation over the gathered samples, tokens and pixels.

    Of a head: its output, before the output projection. Of a neuron or channel: what its layer (its batch norm, if
    one follows) puts out; of an expert's neuron 0 for a token that the expert does not see. Of a feature: itself,
    before its mask; with `center="mean"` its standard deviation.
    """

    targets = ("heads", "neurons", "features")
    needs = "activations"

    def check(self, layer: Layer) -> None:
        if isinstance(layer, UnitLayer) and not layer.sites:
            raise ValueError(
                f"no module shows the activations of {layer.name!r} (nn.MultiheadAttention and recurrent layers "
                "compute them inside one function); use criterion 'taylor' or 'weight_norm', or exclude it"
            )

    def score(self, layer: Layer) -> Tensor:
        return self.evidence(layer)
