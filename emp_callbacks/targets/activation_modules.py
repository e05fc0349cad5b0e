"""Which modules are activation functions: where features are masked unless the user names other modules."""

from __future__ import annotations

from torch import nn

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink,
    nn.Threshold,
)  # fmt: skip
# Activations that timm and transformers write themselves; sigmoids are left out: they are gates.
_ACTIVATION_NAMES = (
    "GELU", "GELUTanh", "HardMish", "HardMishMe", "HardSwish", "HardSwishMe", "Mish", "MishMe", "QuickGELU", "Swish",
    "SwishMe", "Tanh",
)  # fmt: skip


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation function of torch, timm or transformers."""
    kind = type(module).__name__
    return (
        isinstance(module, _ACTIVATIONS)
        or kind in _ACTIVATION_NAMES
        or (kind.endswith("Activation") and kind != "LinearActivation")
    )
