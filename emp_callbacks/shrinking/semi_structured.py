"""2:4 weights in the form that a GPU's sparse tensor cores multiply, by torch's own conversion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Conversion", "obeys_pattern", "to_semi_structured"]

_AMPERE = (8, 0)  # the first with sparse tensor cores
# In evaluation these give the weights of their Linear layers to kernels of their own, which know no such form.
_READ_OTHERWISE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Conversion(NamedTuple):
    """What became of the Linear layers of a model.

    Attributes:
        converted: Names of those whose weight is semi-structured now.
        left: Name -> why its weight is as it was.
    """

    converted: list[str]
    left: dict[str, str]


def obeys_pattern(weight: Tensor, keep: int = 2, size: int = 4) -> bool:
    """Return whether at most `keep` of every `size` neighbours along the last dimension are not 0.

    Args:
        weight: Shape (..., inputs), any dtype; anywhere.
        keep: N of N:M.
        size: M.
    """
    if weight.shape[-1] % size:
        return False
    return bool((weight.detach().reshape(-1, size) != 0).sum(-1).le(keep).all())


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> Conversion:
    """Give every Linear layer of a model whose weight is 2:4 torch's semi-structured form, in place, for inference.

    After training with `pattern="2:4"`, on a CUDA device of compute capability 8.0 or higher, in float16 or bfloat16
    (int8 also). A dense layer that is not 2:4, or of a shape or dtype that torch does not convert, stays as it is and
    is told.

    Args:
        model: On the GPU; what is converted trains no more and has no `state_dict` of plain tensors.

    Raises:
        RuntimeError: The model is not on such a GPU, or torch was built without this; nothing was changed.
        ValueError: None of its Linear layers is 2:4; nothing was changed.

    Source: Mishra et al., arXiv:2104.08378; `torch.sparse.to_sparse_semi_structured`.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check_device(layers)
    fit = {name: layer for name, layer in layers.items() if obeys_pattern(layer.weight)}
    if not fit:
        raise ValueError(
            f"none of the {len(layers)} Linear layers of {type(model).__name__} is 2:4: train or prune it with "
            "pattern='2:4' first"
        )
    converted, left = [], {name: "not 2:4" for name in layers if name not in fit}
    for name, layer in fit.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, _READ_OTHERWISE):
            left[name] = f"{type(owner).__name__} reads it in a kernel of its own"
            continue
        try:
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except (RuntimeError, NotImplementedError) as error:  # torch knows best which shapes and dtypes it can
            left[name] = str(error).partition("\n")[0]
            continue
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        converted.append(name)
    return Conversion(converted, left)


def _check_device(layers: dict[str, nn.Linear]) -> None:
    devices = {layer.weight.device for layer in layers.values()}
    remedy = "move the model to a CUDA device of compute capability 8.0 or higher (A100, H100, RTX 30 and later)"
    for device in devices:
        if device.type != "cuda":
            raise RuntimeError(f"semi-structured weights are for GPUs, and the model is on {device}: {remedy}")
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < _AMPERE:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise RuntimeError(f"{device} has compute capability {found}, without sparse tensor cores: {remedy}")
