"""Hidden units of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from emp_callbacks.targets.unit_search import UnitSearch, has, own
from emp_callbacks.targets.units import MemberTarget, Role, UnitTarget

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def recurrent_layers(search: UnitSearch, module: nn.Module) -> Iterator[UnitTarget]:
    """Yield the layers of an LSTM, GRU or RNN, or of a cell of one, with their hidden units; each direction by itself.

    A pruned unit's rows of all gates, weights and biases, are zero: its state, if it begins at zero, stays exactly zero
    (an LSTM's cell takes in tanh(0), a GRU's state moves towards tanh(0)); any other beginning is halved at every step
    by an LSTM or GRU. With `proj_size` the states that others read are projected ones: such layers are no units.
    """
    if not isinstance(module, RECURRENT) or (isinstance(module, nn.RNNBase) and module.proj_size):
        return
    suffixes = [name.removeprefix("weight_hh") for name in module._parameters if name.startswith("weight_hh")]
    for suffix in suffixes:
        if not has(module, f"weight_ih{suffix}", f"weight_hh{suffix}"):
            continue
        name = search.name(module) if len(suffixes) == 1 else f"{search.name(module)}.{suffix.removeprefix('_')}"
        yield UnitTarget(name, int(module.hidden_size), tuple(_members(search, module, suffix)), None)


def _members(search: UnitSearch, module: nn.Module, suffix: str) -> Iterator[MemberTarget]:
    units = int(module.hidden_size)  # type: ignore[arg-type]
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if has(module, f"{kind}{suffix}"):
            parameter = own(module, f"{kind}{suffix}")
            unit_of = torch.arange(search.shape(parameter)[0], device="cpu") % units  # gate after gate
            is_weight = kind.startswith("weight")
            role: Role = "weight" if is_weight else "bias"
            yield search.member(parameter, 0, unit_of, role, masked=True, scored=is_weight)
