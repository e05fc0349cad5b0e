"""A pruner's state in memory and in files: what it gives away and what it takes back."""

from __future__ import annotations

import os
from typing import Any, final

from emp_callbacks.backends import Backend
from emp_callbacks.checkpoint.mask_file import load_evidence, load_masks, save_masks
from emp_callbacks.checkpoint.mask_part import evidence_part
from emp_callbacks.checkpoint.state import describe, install_state, pack_state
from emp_callbacks.config import EMPConfig
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.schedule import Clock
from emp_callbacks.trajectory import Trajectory


@final
class Persistence:
    """Masks, the dense values behind them, evidence, trajectory and clock as one state.

    Args:
        config: The settings, some of which a state must share.
        mode: What the masks mean.
        refresher: Knows layers, masked weights and evidence.
        trajectory: The rows so far.
        backend: The parallel strategy.
    """

    def __init__(
        self, config: EMPConfig, mode: MaskMode, refresher: Refresher, trajectory: Trajectory, backend: Backend
    ) -> None:
        self._config, self._mode, self._trajectory, self._backend = config, mode, trajectory, backend
        self._layers, self._weights, self._evidence = refresher.layers, refresher.weights, refresher.evidence

    def state(self, clock: Clock) -> dict[str, Any]:
        """Return this rank's state; see `EMPPruner.state_dict`."""
        state = pack_state(self._config, self._mode, self._layers, self._trajectory, clock)
        return {**state, "evidence": {"batches": [*self._evidence.batches], "tensors": self._evidence.tensors()}}

    def install(self, state: dict[str, Any]) -> Clock:
        """Put a state back and return its clock; see `EMPPruner.load_state_dict`."""
        clock = install_state(state, self._config, self._mode, self._layers, self._trajectory)
        self._backend.refresh_copies()
        self._evidence.restore(**state["evidence"])
        return clock

    def save(self, folder: str | os.PathLike[str], clock: Clock) -> None:
        """Write the state of all ranks; see `EMPPruner.save`. Collective."""
        self._evidence.share()
        state = describe(self._config, self._mode, self._layers, self._trajectory, clock)
        evidence = evidence_part(self._evidence.tensors(), self._layers)
        save_masks(folder, {**state, "batches": self._evidence.batches}, self._weights, self._backend, evidence)

    def load(self, folder: str | os.PathLike[str]) -> Clock:
        """Read what `save` wrote and return its clock; see `EMPPruner.load`. Collective."""
        clock = load_masks(folder, self._config, self._mode, self._layers, self._trajectory, self._backend)
        self._evidence.restore(*load_evidence(folder, self._layers))
        return clock
