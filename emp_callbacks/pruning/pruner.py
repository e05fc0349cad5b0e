"""EMPPruner: Effective Model Pruning around any training loop, over collaborators that own one thing each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.backends import detect_backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig, settled
from emp_callbacks.layer.mask_mode import MASK_MODES, MaskMode, Observe
from emp_callbacks.pruning.copies import Average, MaskedCopy
from emp_callbacks.pruning.loop import REMEDY, PruningLoop
from emp_callbacks.pruning.persistence import Persistence
from emp_callbacks.pruning.readings import Readings, surprising
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.trajectory import PruneEvent, Trajectory


class EMPPruner(Readings):
    """Effective Model Pruning around any training loop.

    Call `step()` after each optimizer step, `finalize()` at the end. Every optimizer that updates the pruned weights is
    watched, so accumulated micro-batches and steps that a GradScaler skipped are not counted; a step is an iteration
    of the loop in which at least one of them made a step.

    By default what the given optimizers update is pruned, else what `include` names; `left_out` lists the rest. That is
    looked up again at each refresh: layers that were thawed, or given to the optimizer later, are followed.

    Args:
        model: The module to prune: plain, compiled, wrapped in DistributedDataParallel or FullyShardedDataParallel,
            sharded by `fully_shard`; or a DeepSpeed engine.
        optimizer: The optimizer (or optimizers) that update it; None to prune a finished model by hand, and for a
            DeepSpeed engine, which brings its own.
        config: All settings; default `EMPConfig()`: no schedule, `refresh()` by hand.
        trajectory_path: JSON-lines file for the trajectory; written by rank 0. Default: memory only.
        **settings: Fields of EMPConfig by name, put over `config`.

    Attributes:
        config: The settings.
        trajectory: One PruneEvent per refresh and group.
        remedy: What helps where the schedule asked for no refresh, in the words of whoever drives the loop.
        clock: Steps and epochs so far, and where the schedule stands.

    Raises:
        ValueError: A setting is invalid or selects no weights.
        TypeError: An argument has the wrong type, or a setting an unknown name.
        NotImplementedError: The model is sharded in a way that is not supported.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = EMPPruner(model, optimizer, every_n_steps=1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> [event.keep for event in pruner.step()] == [int(pruner.masks["weight"].sum())]
        True
        >>> pruner.finalize()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        config: EMPConfig | None = None,
        *,
        trajectory_path: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self.config = settled(config, settings)
        self._backend = detect_backend(model, optimizer)
        self._mode: MaskMode = Observe() if self.config.observe_only else MASK_MODES[self.config.mode]()
        self._refresher = Refresher(self.config, self._mode, self._backend)
        self.trajectory = Trajectory(trajectory_path if self._backend.rank == 0 else None)
        self._loop = PruningLoop(self.config, self._mode, self._backend, self._refresher, self.trajectory)
        self._keeper = self._loop.keeper
        self._persistence = Persistence(self.config, self._mode, self._refresher, self.trajectory, self._backend)
        self.remedy = REMEDY
        self._loop.attach()
        self._say_what_is_left_out()

    def _say_what_is_left_out(self) -> None:
        told = surprising(self.left_out, self._weights_in_all)
        if told and not self._backend.rank:
            warn_the_user(told)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def step(self, *, end_of_epoch: bool = False) -> list[PruneEvent]:
        """Count one optimizer step and refresh the masks if the schedule says so.

        Collective when it refreshes, and after every optimizer step while gates learn.

        Args:
            end_of_epoch: Whether this was the last step of an epoch; needed for `every_n_epochs`.

        Returns:
            The rows of the refresh; empty if none was due, or if no step was applied since the last call (a
            micro-batch, or a step skipped by loss-scale overflow: a refresh due there is late, not lost).

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
        """
        return self._loop.step(end_of_epoch)

    def refresh(self) -> list[PruneEvent]:
        """Recompute the masks now and return the rows. Collective.

        Raises:
            FloatingPointError: A score is NaN or Inf; no mask was changed.
            MissingEvidence: The criterion needs evidence (gradients, inputs, activations) and none was gathered of any
                layer. A scheduled refresh is then late, with a warning; a single such layer keeps its mask.
        """
        return self._loop.refresh()

    def end_epoch(self) -> list[PruneEvent]:
        """Count a finished epoch where the loop learns of it only after its last `step()`; refresh if one is due."""
        return self._loop.end_epoch()

    def collect(self) -> None:
        """Take the gradients that are there now as the evidence of one batch, where no optimizer step follows.

        For a finished model: `loss.backward(); pruner.collect(); model.zero_grad()` for some batches, then `refresh()`.
        Inputs and activations are gathered in forward by themselves.

        Raises:
            ValueError: The criterion reads no gradients.
        """
        self._refresher.collect(self._keeper.owners)

    def count_positions(self, mask: Tensor | None) -> None:
        """Let only some positions of the next batches be evidence, until the next call: those that are no padding.

        Args:
            mask: Shape (B, T), nonzero where a position counts, such as a batch's attention mask; None: all count.
        """
        self._refresher.evidence.count_positions(mask)

    @property
    def reads_positions(self) -> bool:
        """Whether what is gathered now depends on which positions of the batch count."""
        return self._refresher.evidence.reads_positions

    def mask_gradients(self) -> None:
        """Take the pruned entries out of the gradients now, in `freeze`: before a clip that reads their norm.

        Needed only under FSDP1; elsewhere they are masked as they arrive, or by DeepSpeed's step before it clips.
        """
        self._keeper.mask_gradients()

    def finalize(self) -> None:
        """Take every hook off; what was recorded stays here. Twice is once.

        Masked weights stay masked. Features, dynamic heads and attention edges are masked by hooks, so from now on
        only inside `masked_forward()`. In `project`, weights that grew back since the last refresh are projected by a
        closing refresh; gates that still learn become masks by one. Collective.
        """
        self._loop.finish(self.remedy)
        self.trajectory.close()

    def replaced_weights(self) -> list[str]:
        """Return the weights that something else replaced since `finalize()`; they become the dense values."""
        return self._keeper.replaced()

    def detach(self) -> None:
        """Take every hook off the optimizer, the parameters and the modules; the state stays."""
        self._loop.detach()
        self.trajectory.close()

    def close(self) -> list[PruneEvent]:
        """Project what grew back since the last refresh, or harden gates; return the rows, if any. Collective.

        A criterion that needs evidence has none outside its window: the last mask is put in place again.
        """
        return self._loop.close()

    @contextmanager
    def masked_forward(self) -> Iterator[None]:
        """Inside the block the model is the masked one: for an evaluation.

        Features, dynamic heads and attention edges are masked also after `finalize()`, except that apply="training"
        leaves features dense in evaluation mode. Weights that something else wrote since the last step (averages
        swapped in for the evaluation) are masked inside the block, and kept.
        """
        self._refresher.evidence.attach()
        try:
            with self._keeper.masked():
                yield
        finally:
            if not self._keeper.attached:
                self._refresher.evidence.detach()

    def dense_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with its dense weights; `feedback` hides the pruned ones after it.

        Collective where the parameters are sharded.
        """
        return self._keeper.dense_copies()

    # ---- other models of the same weights -------------------------------------------------------------------------

    def mask(self, model: nn.Module) -> MaskedCopy:
        """Mask another model of the same parameters now: an average, a merged adapter, an exported copy.

        Weights are matched by name, wrappers left out. Features, dynamic heads and attention edges get hooks. As a
        context manager, `with pruner.mask(model):`, it is masked inside the block only.

        Raises:
            ValueError: It lacks one of the masked weights, or has it in another shape; nothing was changed.
            NotImplementedError: The weights are sharded.
        """
        return MaskedCopy(model, self._weights, self._refresher.masking_sites(), optional=self._refresher.adapters)

    def add_average(self, model: nn.Module, updates: Sequence[tuple[Any, str]] = ()) -> Average:
        """Keep a model that averages this one masked, and its average one of dense values, in every mode.

        Before its first update: `ema = AveragedModel(model); pruner.add_average(ema)`, or timm's ModelEmaV3. Averages
        that are modules inside the model are found without being named.

        Args:
            model: The average.
            updates: Objects and names of their methods that update it, where it has no such method itself.

        Raises:
            ValueError: It is no average, or has none of the masked weights.
            NotImplementedError: The weights are sharded.
        """
        return self._loop.add_average(model, updates)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return masks (packed bits), the dense values behind them, schedule position and trajectory.

        Tensors, numbers, strings, lists and dicts only: it loads with `torch.load(..., weights_only=True)`.
        The weights themselves are in the model's own state_dict, masked. Between two refreshes it also holds the
        evidence gathered by this rank: where one rank saves for all, call `share_evidence()` on all ranks first.
        Accelerate and Fabric ask all ranks and keep one answer: it is that of all ranks there, and this collective.
        """
        with self._loop.at_rest():
            return self._persistence.state(self.clock, self._loop.averages_hidden())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state, bit for bit, together with the model's and optimizer's own states.

        Raises:
            ValueError: The state is of another mode, scope, model or rank; nothing was changed.
        """
        state = self._persistence.own_part(state)
        self._loop.take_up(self._persistence.install(state), state.get("averages", ()))

    def share_evidence(self) -> None:
        """Move the evidence that each rank has gathered to rank 0, whose state then stands for all. Collective."""
        self._refresher.evidence.share()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `state_dict()` returns into a folder from which any number of ranks can continue. Collective.

        Each rank writes the part that it counts, packed bits and, in `feedback`, the dense values behind them; a kill
        at any moment leaves the folder's old checkpoint or the new one.

        Args:
            folder: Shared by all ranks; made if missing, other files in it are left alone.

        Raises:
            OSError: A rank could not write; the folder's old checkpoint is still whole.
        """
        with self._loop.at_rest(in_folder=True):
            self._persistence.save(folder, self.clock)

    def load(self, folder: str | os.PathLike[str], *, masks_only: bool = False) -> None:
        """Continue from a folder that `save()` wrote, on any number of ranks and under any strategy. Collective.

        The model's weights and the optimizer's state come from their own checkpoint, loaded before this one.

        With `masks_only` clock and rows go on: for weights of an earlier checkpoint of the run, as the best at its end;
        they obey the masks at once, also in `project`.

        Raises:
            FileNotFoundError: The folder holds no finished save, or one of its files is missing.
            ValueError: A file is damaged, or of another mode, scope or model. All ranks raise; nothing was changed.
        """
        clock = self._persistence.load(folder, masks_only=masks_only)
        self._loop.take_masks() if masks_only else self._loop.take_up(clock)

    def start_epoch(self, length: int | None) -> None:
        """Say how many optimizer steps the epoch that begins will have; None, where it is not known: as the last.

        Criteria that gather evidence do so in an epoch's last steps; without this call they go by the last epoch's.
        """
        self._loop.start_epoch(length)

    def start_at(self, steps: int, epochs: int, epoch_length: int | None = None) -> None:
        """Take over the position of a run begun without EMP: optimizer steps, finished epochs, steps of an epoch."""
        self._loop.start_at(steps, epochs, epoch_length)
