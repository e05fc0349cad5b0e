"""How much each head adds to the residual stream: the norm of its output times its columns of the output projection.

Letters in shapes: N positions, H heads, D inputs of the output projection that belong to one head, E its outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.unit_search import units_dim


def check_has_columns(outputs: HeadOutputs) -> None:
    """Raise ValueError where a head's part of the output projection is no matrix that multiplies each position."""
    kernel = getattr(outputs.projection, "kernel_size", 1)
    taps = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel)
    if taps > 1 or getattr(outputs.projection, "groups", 1) > 1:
        raise ValueError(
            f"the output projection of {outputs.name!r} is a convolution of several pixels or groups, so that what a "
            f"head adds at one position is not its output there times its columns: exclude={[outputs.name]!r}"
        )


def added_norms(outputs: HeadOutputs, values: Tensor) -> Tensor:
    """Return the norm of what each head adds, ||o_h W_h||_2, of what heads hand to their output projection.

    s_h^2 = o_h (W_h W_h^T) o_h^T costs D / E of the projection itself. Of a gated attention o_h is the gated output,
    so that this is gate times norm (Qiu et al. 2025, arXiv:2505.06708). No gradient flows through it.

    Args:
        outputs: Where the heads' outputs pass by; the projection's weight is read now, as it is in this forward pass.
        values: What the heads hand on, channels as `outputs.channels` says.

    Returns:
        Shape of `values` with heads, the last dimension, for channels; float32 or wider.

    Raises:
        RuntimeError: The projection holds only a part of its weight, or none that can be multiplied with.
    """
    columns = _columns(outputs)
    values = values.detach().movedim(outputs.channels(values.ndim), -1)
    rows = values.reshape(-1, values.shape[-1])
    if not outputs.in_blocks:
        order = torch.argsort(outputs.unit_on(rows.device), stable=True)
        rows, columns = rows[:, order], columns[order.to(columns.device)]
    wide = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    heads_hnd = rows.to(wide).view(len(rows), outputs.units, -1).transpose(0, 1)
    columns_hde = columns.to(wide).reshape(outputs.units, -1, columns.shape[1])
    with torch.autocast(rows.device.type, enabled=False):
        gram_hdd = columns_hde @ columns_hde.mT
        squares_hn = ((heads_hnd @ gram_hdd) * heads_hnd).sum(-1)
    return squares_hn.clamp(min=0).sqrt().T.reshape(*values.shape[:-1], outputs.units)


def _columns(outputs: HeadOutputs) -> Tensor:
    """Return the projection's weight, shape (H * D, E)."""
    weight = outputs.projection.weight  # under FSDP1 no parameter, in the forward pass
    assert isinstance(weight, Tensor)
    is_part = hasattr(weight, "device_mesh") or not weight.numel()  # of tensor parallelism, FSDP2; of ZeRO-3
    if is_part or not weight.is_floating_point() or weight.dim() < 2:
        raise RuntimeError(
            f"the output projection of {outputs.name!r} holds {'a part of' if is_part else 'no matrix for'} its weight "
            f"while it runs ({type(weight).__name__}, {weight.dtype}), so that what a head adds is not known: shard by "
            f"blocks that are whole in their forward pass (fully_shard), or exclude={[outputs.name]!r}"
        )
    matrix = weight.detach().flatten(1)
    return matrix if units_dim(outputs.projection) else matrix.T
