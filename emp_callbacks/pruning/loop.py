"""Where a training loop stands, and the refreshes that the schedule asks of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from emp_callbacks.backends import Backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig
from emp_callbacks.layer import MissingEvidence
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.copies import Average, averages_in
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.weight_keeper import WeightKeeper
from emp_callbacks.schedule import Clock
from emp_callbacks.targets import canonical_name, few
from emp_callbacks.trajectory import PruneEvent, Trajectory

_CALLS_WITHOUT_A_STEP = 100
_SPARSE_ALREADY = 0.05
REMEDY = "Call pruner.step() after every optimizer step, and end_epoch() at an epoch's end; or refresh earlier (start)"


@final
class PruningLoop:
    """Counts steps and epochs, refreshes when one is due, and lets evidence be gathered when one is near.

    Args:
        config: The settings: schedule and evidence window.
        mode: What masks mean.
        backend: Tells of every optimizer step.
        refresher: Recomputes the masks.
        trajectory: Takes the rows.

    Attributes:
        clock: Where the run stands; `take_up` replaces it.
        keeper: The masked weights and the hooks around their updates.
    """

    def __init__(
        self, config: EMPConfig, mode: MaskMode, backend: Backend, refresher: Refresher, trajectory: Trajectory
    ) -> None:
        self._schedule, self._window, self._ramps_left = config.schedule, config.evidence_steps, config.ramps_left
        self._mode, self._backend, self._refresher, self._trajectory = mode, backend, refresher, trajectory
        self._evidence, self._gating = refresher.evidence, refresher.gating
        self._averages: list[Average] = []
        self._keeps_found = config.density == "found"
        self._found: list[PruneEvent] = []  # rows of the masks that were made of the zeros, until training begins
        self._hidden: list[dict[str, Tensor]] = []  # of averages that a checkpoint held and nobody added yet
        self._began, self._zeros = False, (0, 0)  # of how many weights how many were 0 at the first step
        self._told: set[str] = set()
        self._calls = 0  # of step() since the last optimizer step that was seen
        self.clock = Clock()
        self.keeper = WeightKeeper(refresher.weights, mode, backend, self._gradients_ready)

    # ---- the loop's calls -----------------------------------------------------------------------------------------

    def step(self, end_of_epoch: bool) -> list[PruneEvent]:
        """Count one call after an optimizer step; see `EMPPruner.step`. Collective when it refreshes."""
        self._record_found()
        if self.keeper.copied:
            self._tell(
                "this pruner is a copy, which sees no optimizer step: make a new one of the copied model and optimizer "
                "and give it the state, EMPPruner(...).load_state_dict(pruner.state_dict())",
                "copied",
            )
        self._count(self._backend.take_applied())
        self._gating.follow()
        if end_of_epoch:
            self.clock.end_epoch()
        return self._refresh(self.clock.epochs - end_of_epoch, due=self._is_due)

    @contextmanager
    def at_rest(self, *, in_folder: bool = False) -> Iterator[None]:
        """Inside the block weights are what forward sees, and a step of which `step()` was not told yet is counted."""
        if in_folder:
            self._say_what_folders_lack()
        self._count(self._backend.take_applied(), called=False)
        with self.keeper.settled():
            yield

    def end_epoch(self) -> list[PruneEvent]:
        """Count a finished epoch after its last `step()`; refresh if one is due. Collective when it refreshes."""
        self._count(self._backend.take_applied(), called=False)
        self.clock.end_epoch()
        return self._refresh(self.clock.epochs - 1, due=self._schedule.unit == "epoch" and self._is_due)

    def start_epoch(self, length: int | None) -> None:
        """Say how many optimizer steps the epoch that begins will have; None: as many as the last."""
        if length is not None:
            self.clock.epoch_length = length
        self._observe_if_near()

    def refresh(self) -> list[PruneEvent]:
        """Recompute the masks now. Collective."""
        return self._refresh(self.clock.epochs, due=True, by_hand=True)

    def close(self) -> list[PruneEvent]:
        """Project what grew back since the last refresh; see `EMPPruner.close`. Collective."""
        if self._gating.learns:
            return self._refresh(self.clock.epochs, due=True, by_hand=True, last=True)
        if self._refresher.criterion.needs is None:
            return self.refresh()
        self.keeper.install_again()
        self.clock.steps_at_refresh = self.clock.steps
        return []

    @property
    def needs_closing_refresh(self) -> bool:
        """Whether weights have moved away from the mask since the last refresh (only in `project`), or gates learn."""
        moved = self.clock.steps > self.clock.steps_at_refresh
        return self._gating.learns or (self._mode.name == "project" and bool(self._trajectory) and moved)

    # ---- beginning and end ----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on the optimizers, the gradients and the modules in place. Collective with density="found"."""
        self.keeper.attach()
        self._evidence.attach()
        self._gating.attach()
        if self._keeps_found:
            self._found = self._refresher.run(0, 0, self._position, self.keeper.dense_owners())
            self._say_what_is_found()
        self._observe_if_near()
        for module in averages_in(self._backend.module) if self._mode.name != "observe" else ():
            try:
                self.add_average(module)
            except NotImplementedError as error:
                self._tell(f"the {type(module).__name__} inside the model is not kept masked: {error}", "average")
            except ValueError:  # it averages something else than the pruned weights
                continue

    def detach(self) -> None:
        """Take every hook off. Twice is once."""
        self.keeper.detach()
        self._evidence.detach()
        self._gating.detach()
        for average in self._averages:
            average.detach()

    def start_at(self, steps: int, epochs: int, epoch_length: int | None) -> None:
        """Take over the position of a run that was begun without EMP; what lies before it is not caught up on."""
        self.clock = Clock(steps=steps, epochs=epochs, steps_at_epoch=steps, epoch_length=epoch_length)
        self.clock.last_position = self._position
        self._record_found()
        self._observe_if_near()

    def take_up(self, clock: Clock, averages: Sequence[dict[str, Tensor]] = ()) -> None:
        """Go on from a clock that a checkpoint brought back, together with masks, trajectory and averages."""
        self.clock = clock
        # torch makes a step to have states that it can load those of a checkpoint into.
        self._backend.take_applied()
        self._zeros = (0, 0)
        self._found = []  # the checkpoint's masks took the place of these
        self.keeper.restored()
        self._hidden = list(averages)
        for average in self._averages:
            average.restore(self._hidden.pop(0) if self._hidden else {})
        self._refresher.take_up(clock.last_position, pruned=bool(self._trajectory))
        if self.keeper.attached:
            self._gating.attach()
        self._observe_if_near()

    def take_masks(self) -> None:
        """Go on behind masks that a checkpoint brought back for the weights of then. Collective."""
        self.keeper.restored()
        if self._mode.name == "project":
            self.keeper.install_again()  # no refresh: these are the masks that the weights were measured behind
        self.clock.steps_at_refresh = self.clock.steps
        self._refresher.take_up(self.clock.last_position, pruned=bool(self._trajectory))

    def finish(self, remedy: str) -> None:
        """Take every hook off for good, with a warning where the schedule never asked or a Ramp goes on. Collective."""
        if self.needs_closing_refresh:
            self.close()
        self._say_what_is_unreached()
        forgotten = self.keeper.attached and self._backend.take_applied() and not self.clock.steps
        idle = self.keeper.attached and self._schedule.unit is not None and not self._trajectory
        self.detach()
        if idle and "late" not in self._told and (forgotten or self._calls or self.clock.steps):
            self._tell(
                f"the schedule ({self._schedule.told}) asked for no refresh in {self.clock.steps} steps and "
                f"{self.clock.epochs} finished epochs: nothing was pruned. {remedy}",
                "idle",
            )
        for left in self._ramps_left(self.clock.last_position) if self._trajectory else ():
            self._tell(left, left)

    # ---- averages -------------------------------------------------------------------------------------------------

    def add_average(self, model: nn.Module, updates: Sequence[tuple[Any, str]] = ()) -> Average:
        """Keep a model that averages this one masked; see `EMPPruner.add_average`."""
        for average in self._averages:
            if average.model is model:
                return average
        average = Average(model, self.keeper.weights, self.keeper.dense_owners, updates)
        self._averages.append(average)
        if self._hidden:
            average.restore(self._hidden.pop(0))
        return average

    def averaged_names(self) -> set[str]:
        """Return the names of the parameters that are in averages inside the model."""
        inside = {id(p) for average in self._averages for p in average.model.parameters()}
        return {canonical_name(name) for name, p in self._backend.module.named_parameters() if id(p) in inside}

    def averages_hidden(self) -> list[dict[str, Tensor]]:
        """Return the dense values behind the masks of each average, in the order of `add_average`."""
        return [average.hidden() for average in self._averages]

    def _say_what_folders_lack(self) -> None:
        """Say what a mask folder does not hold."""
        if any(average.hides for average in self._averages):
            self._tell(
                "the folder holds no dense values behind the masks of averages, so that these go on masked from there: "
                "keep pruner.state_dict() to go on exactly",
                "folder",
            )

    # ---- inside ---------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        """Where the run stands in the schedule's own unit."""
        return self.clock.epochs if self._schedule.unit == "epoch" else self.clock.steps

    @property
    def _is_due(self) -> bool:
        return self._schedule.is_due(self.clock.last_position, self._position)

    def _count(self, applied: bool, *, called: bool = True) -> None:
        """Count an optimizer step, if there was one; say once that there never is, where a schedule waits for it."""
        self.clock.steps += applied
        if applied:
            self._gating.wait()
        self._calls = 0 if applied else self._calls + called
        self._say_if_sparse_already()
        if self._calls != _CALLS_WITHOUT_A_STEP or self._schedule.unit is None:
            return
        if self.clock.steps:  # accumulated batches may be that many
            self._say_what_is_unreached()
        else:
            self._tell(
                f"step() was called {self._calls} times and no optimizer that updates the pruned weights has made a "
                "step, so nothing is refreshed. Give the pruner the optimizer whose step() runs",
                "steps",
            )

    def _say_what_is_unreached(self) -> None:
        """Warn where weights came into the model since the last refresh: no mask is on them."""
        found = self._refresher.unreached() if self._trajectory and self.keeper.attached else []
        if found:
            self._tell(
                f"no mask is on {few(found)}, which came into the model after the last refresh (thawed, a new head, "
                "load_state_dict(assign=True), another optimizer?): call refresh() while an optimizer that the pruner "
                "knows updates them, or make the pruner anew",
                "unreached",
            )

    def _refresh(self, epoch: int, *, due: bool, by_hand: bool = False, last: bool = False) -> list[PruneEvent]:
        events: list[PruneEvent] = []
        late: MissingEvidence | None = None
        if due:
            self._follow()
            dense = self.keeper.dense_owners()
            try:
                last = last or (self._schedule.unit is not None and self._schedule.next_after(self._position) is None)
                events = self._refresher.run(self.clock.steps, epoch, self._position, dense, last=last)
            except MissingEvidence as error:
                if by_hand:
                    raise
                late = error  # not lost: it stays due, and evidence is gathered until there is some
        if events:
            for average in self._averages:
                average.refreshed()
            # The rows last: where a warning of theirs is an error, the refresh is done all the same.
            self.clock.last_position, self.clock.steps_at_refresh = self._position, self.clock.steps
            self._evidence.release()
            self._trajectory.extend(events)
        self._observe_if_near()
        if late is not None:
            self._tell(f"the refresh due at step {self.clock.steps} is late: {late}", "late")
        if not self._keeps_found:
            self._refresher.warn_once(events)  # last: where warnings are errors, the refresh is done all the same
        return events

    def _follow(self) -> None:
        """Take in weights that are to be pruned since the last refresh, and leave out those that are not any more."""
        told = self._refresher.follow()
        if self.keeper.weights != self._refresher.weights:
            self.keeper.replace(self._refresher.weights)
            for average in self._averages:
                try:
                    average.pair(self._refresher.weights)
                except ValueError as error:  # a new head, of which the average still holds the old one
                    self._tell(f"an average does not follow the weights that came or went: {error}", "pair")
        if told:
            self._tell(told, told)

    def _tell(self, message: str, kind: str) -> None:
        """Warn on one rank, once of a kind."""
        if kind not in self._told and not self._backend.rank:
            self._told.add(kind)
            warn_the_user(message)

    def _observe_if_near(self) -> None:
        """Gather evidence from now on if a refresh is near, else gather none."""
        near = self.keeper.attached and (self._is_due or self.clock.is_near_refresh(self._schedule, self._window))
        near = near and self._gating.gates is None  # gates go by what they have learned
        self._evidence.observe(near, in_eval=self._schedule.unit is None)

    def _gradients_ready(self, owners: Collection[int], scale: Tensor | None) -> None:
        if not self._began:
            self._began = True
            self._record_found()
            unmasked = not self._trajectory or self._keeps_found
            if unmasked and self._mode.name != "observe" and not self._backend.rank:
                self._zeros = self.keeper.count_zeros()  # now, as the update fills them
        self._evidence.gradients_ready(owners, self.clock.steps, scale)

    def _record_found(self) -> None:
        """Let the rows of the masks that were made of the zeros be the first ones: no checkpoint replaced them."""
        rows, self._found = self._found, []
        self._trajectory.extend([replace(row, step=self.clock.steps, epoch=self.clock.epochs) for row in rows])

    def _say_what_is_found(self) -> None:
        """Warn where density="found" found no zeros, or a layer that holds nothing else."""
        if all(row.keep == row.n for row in self._found):
            self._tell("density='found' keeps a sparse model's zeros, and none of the weights to prune is 0", "found")
        empty = [layer.name for row in self._found for layer in row.layers if not layer.keep]
        if empty:
            self._tell(
                f"all weights are 0 in {few(empty)} and stay so with density='found': exclude what is to be trained",
                "empty",
            )

    def _say_if_sparse_already(self) -> None:
        """Warn where a model with zeros begins to train and no mask keeps them."""
        (zeros, total), self._zeros = self._zeros, (0, 0)
        if zeros < _SPARSE_ALREADY * total or not total:
            return
        remedy = " until the first refresh: to keep a sparse model's zeros, use density='found', mode='freeze'"
        if self._keeps_found:
            remedy = ": the sparse weights came after the pruner was made: call pruner.refresh() before the first step"
        self._tell(f"{zeros / total:.0%} of the weights to prune are 0 already and will train{remedy}", "sparse")
