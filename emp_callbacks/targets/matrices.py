"""Which parameters are matrices and kernels that inputs are multiplied with, and how their outputs lie in them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from emp_callbacks.targets.experts import stacked_experts
from emp_callbacks.targets.multiplied import uses
from emp_callbacks.targets.shapes import FullShape

__all__ = ["A_FUNCTION", "NOT_A_WEIGHT", "VECTOR", "is_conv1d", "no_matrix", "outputs_of"]

NOT_A_WEIGHT = "nothing says that it is a matrix of weights"
A_FUNCTION = "its layer multiplies by a function of it that need not be 0 where it is"
VECTOR = "a vector: bias, norm or scale"

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_MULTIPLYING = (nn.Linear, _ConvNd, nn.Bilinear)
_OTHER = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
# Of what a forward pass does with a parameter: the dimension of its outputs, from the end.
_OUTPUTS = {"linear": -2, "matmul": -1}

Owned = list[tuple[str, nn.Module]]
"""Every name of a parameter, and the module that holds it under that name."""


def no_matrix(parameter: nn.Parameter, owned: Owned, full_shape: FullShape) -> str | None:
    """Return why a parameter is no matrix or kernel that inputs are multiplied with; None if it is one."""
    shape = full_shape(parameter)
    if len(shape) < 2:
        return VECTOR
    if any(isinstance(module, _OTHER) for _, module in owned):
        return "a norm or an embedding, or tied to one"
    reasons = {_no_matrix_of(module, name.rpartition(".")[2], parameter, full_shape) for name, module in owned}
    return None if None in reasons else reasons.pop()


def _no_matrix_of(module: nn.Module, name: str, parameter: nn.Parameter, full_shape: FullShape) -> str | None:
    if _is_standard(module, name):
        return A_FUNCTION if uses(module).get(name) == "other" else None
    if sum(size > 1 for size in full_shape(parameter)) < 2:
        return VECTOR
    if isinstance(module, nn.MultiheadAttention):
        return None
    if (experts := stacked_experts(module, full_shape)) is not None:
        return None if experts.holds(parameter) else VECTOR
    use = uses(module).get(name)
    if use is None:  # the pass cannot be followed: nothing is left but what its author calls it
        return None if "weight" in name else NOT_A_WEIGHT
    return NOT_A_WEIGHT if use == "other" else None


def _is_standard(module: nn.Module, name: str) -> bool:
    """Return whether this is the weight of a layer of torch's, or of a class derived from one."""
    if isinstance(module, _RECURRENT):
        return name.startswith("weight")
    return name == "weight" and (isinstance(module, _MULTIPLYING) or is_conv1d(module))


def outputs_of(module: nn.Module, name: str, parameter: nn.Parameter, full_shape: FullShape) -> tuple[int, bool]:
    """Return the dimension of a matrix or kernel that counts outputs, and whether matrices are stacked before it.

    Args:
        module: Computes with it.
        name: Under which the module holds it.
        parameter: The matrix.
        full_shape: Gives the shape that a parameter has in the unsharded model.
    """
    if (experts := stacked_experts(module, full_shape)) is not None and experts.holds(parameter):
        return (2 if experts.transposed else 1), True
    if is_conv1d(module) or isinstance(module, _ConvTransposeNd):
        return 1, False
    if isinstance(module, (*_MULTIPLYING, *_RECURRENT)):
        return 0, False
    use, dims = uses(module).get(name), len(full_shape(parameter))
    if use in _OUTPUTS and 2 <= dims <= 3:
        return dims + _OUTPUTS[use], dims == 3
    return (1 if use == "conv_transpose" else 0), False


def is_conv1d(module: nn.Module | None) -> bool:
    """Return whether a module is transformers' Conv1D, a dense layer of weight (inputs, outputs), sharded or not."""
    # Copies of it bear its name and its attribute; a convolution may bear the name, too.
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # fully_shard makes a class of its own
    return named and hasattr(module, "nf") and not isinstance(module, _ConvNd)
