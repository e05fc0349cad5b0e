"""Prunes units as the members of their targets say."""

from collections.abc import Collection

import torch

from emp_callbacks.targets.units import UnitTarget


@torch.no_grad()
def prune(target: UnitTarget, units: Collection[int]) -> None:
    """Zero the masked slices of these units in place."""
    for member in target.members:
        assert member.unit_of.dtype == torch.int64
        assert member.unit_of.shape == (member.weight.parameter.shape[member.dims[0]],)
        if member.masked:
            slices = member.weight.parameter.data.transpose(0, member.dims[0])
            for index, unit in enumerate(member.unit_of.tolist()):
                if unit in units:
                    slices[index] = 0.0
