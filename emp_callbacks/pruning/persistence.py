"""A pruner's state in memory and in files: what it gives away and what it takes back."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.checkpoint.mask_file import on_all, read_masks, save_masks
from emp_callbacks.checkpoint.mask_part import evidence_part
from emp_callbacks.checkpoint.renaming import under_our_names
from emp_callbacks.checkpoint.state import Found, describe, pack_state, put_back, read_state
from emp_callbacks.config import EMPConfig
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.schedule import Clock
from emp_callbacks.targets.forward_site import ForwardSite
from emp_callbacks.trajectory import Trajectory

# They ask every rank for its state and keep the answer of rank 0, which all ranks get back.
_KEEP_ONE_ANSWER = ("accelerate.", "lightning.fabric.", "lightning_fabric.")


@final
class Persistence:
    """Masks, the dense values behind them, evidence, the criterion's seed, trajectory and clock as one state.

    Args:
        config: The settings, some of which a state must share.
        mode: What the masks mean.
        refresher: Knows layers, masked weights, criterion and evidence.
        trajectory: The rows so far.
        backend: The parallel strategy.
    """

    def __init__(
        self, config: EMPConfig, mode: MaskMode, refresher: Refresher, trajectory: Trajectory, backend: Backend
    ) -> None:
        self._config, self._mode, self._trajectory, self._backend = config, mode, trajectory, backend
        self._layers, self._weights, self._evidence = refresher.layers, refresher.weights, refresher.evidence
        self._dynamic, self._gating = refresher.dynamic, refresher.gating
        # Both follow from torch's initial seed, so one number in a state is enough.
        self._drawing = [one for one in (refresher.criterion, refresher.growth) if one and one.seed is not None]

    @property
    def _sites(self) -> list[ForwardSite]:
        return [*(site for layer in self._layers for site in layer.sites), *self._dynamic]

    @property
    def _own(self) -> dict[str, Any]:
        """What the criterion's random numbers follow from, and the gates; {} where there are neither."""
        seeds = [one.seed for one in self._drawing if one.seed is not None]
        gates = self._gating.record()
        return {**({"seed": seeds[-1]} if seeds else {}), **({"gates": gates} if gates else {})}

    def state(self, clock: Clock, averages: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Return this rank's state, or where one rank's answer is kept for all, that of all; see `state_dict`."""
        for_all = self._backend.world_size > 1 and _keeps_one_answer()
        if for_all:
            self._evidence.share()
        state = pack_state(self._config, self._mode, self._layers, self._trajectory, clock)
        evidence = {"batches": [*self._evidence.batches], "tensors": self._evidence.tensors()}
        state = {**state, **self._own, "evidence": evidence, "averages": list(averages)}
        if self._is_whole:
            return state
        state["part"] = [self._backend.rank, self._backend.world_size]
        return {"format": state["format"], "parts": self._backend.gathered(state)} if for_all else state

    @property
    def _is_whole(self) -> bool:
        """Whether this rank holds all of every parameter."""
        return all(weight.segment.replicated for weight in self._weights)

    def own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a state.

        Raises:
            ValueError: The state is of other ranks.
        """
        here = [self._backend.rank, self._backend.world_size]
        parts = state.get("parts", [state]) if isinstance(state, dict) else [state]
        of_ranks = [part["part"] for part in parts if isinstance(part, dict) and "part" in part]
        if not of_ranks:
            return state  # of a model that is not sharded, or what no pruner wrote
        if here not in of_ranks:
            raise ValueError(
                f"the state is that of rank {of_ranks[0][0]} of {of_ranks[0][1]} ranks of a sharded model, and this is "
                f"rank {here[0]} of {here[1]}: resume with as many ranks, each with its own state_dict(); or carry the "
                "masks over with save(folder) and load(folder), which any number of ranks can read"
            )
        found: dict[str, Any] = parts[of_ranks.index(here)]
        return found

    def install(self, state: dict[str, Any]) -> Clock:
        """Put a state back and return its clock; see `EMPPruner.load_state_dict`."""
        state = under_our_names(state, self._layers)
        found = read_state(state, self._config, self._mode, self._layers, self._sites)
        self._gating.check(found.gates, self._layers)
        return self._put_back(found, self._trajectory.restore(found.trajectory))

    def save(self, folder: str | os.PathLike[str], clock: Clock) -> None:
        """Write the state of all ranks; see `EMPPruner.save`. Collective."""
        self._evidence.share()
        state = describe(self._config, self._mode, self._layers, self._trajectory, clock)
        evidence = evidence_part(self._evidence.tensors(), self._layers)
        state |= {**self._own, "batches": self._evidence.batches}
        save_masks(folder, state, self._weights, self._backend, evidence)

    def load(self, folder: str | os.PathLike[str], *, masks_only: bool = False) -> Clock:
        """Read what `save` wrote and return its clock; see `EMPPruner.load`. Collective."""
        found = read_masks(folder, self._config, self._mode, self._layers, self._sites, self._backend)
        self._gating.check(found.gates, self._layers)  # rank 0's index, which all have read
        if masks_only:
            return self._put_back(found, "")
        is_first = self._backend.rank == 0
        # Rank 0 first: it alone writes a file here, which can fail.
        lost = on_all(self._backend, lambda: self._trajectory.restore(found.trajectory) if is_first else "")
        if not is_first:
            self._trajectory.restore(found.trajectory)
        return self._put_back(found, lost)

    def _put_back(self, found: Found, lost: str) -> Clock:
        """Put in place what was read and checked as a whole, and say what of the trajectory is lost."""
        put_back(self._mode, self._layers, found.masks, found.units)
        if found.seed is not None:
            for one in self._drawing:
                one.seed = found.seed
        self._gating.restore(found.gates, self._layers)
        self._backend.refresh_copies()
        self._evidence.restore(found.batches, found.evidence)
        if lost and self._backend.rank == 0:
            warn_the_user(lost)
        return found.clock


def _keeps_one_answer() -> bool:
    """Return whether the state is asked for by a host that keeps one rank's for all; they say so in no other way."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("emp_callbacks.", "contextlib")):
        frame = frame.f_back
    return bool(frame.f_globals.get("__name__", "").startswith(_KEEP_ONE_ANSWER))
