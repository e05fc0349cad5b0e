"""The runs of a study, one by one: what each needs of others, its training, and its pair at equal density."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from emp_callbacks.checkpoint.tensor_file import write_tensors
from emp_callbacks.config import EMPConfig
from emp_callbacks.study.arm_settings import Budget, arm_config, restarts_of
from emp_callbacks.study.arms import ARMS, Cell, TrainingJob, leading_arm, needed_cells
from emp_callbacks.study.horizon import Horizon, horizon_of
from emp_callbacks.study.ranks import Ranks
from emp_callbacks.study.recipe.check import RecipeError
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.small import narrower
from emp_callbacks.study.recipe.study_config import StudyConfig
from emp_callbacks.study.run_store import RunStore, digest
from emp_callbacks.study.training import Training, recipe_config
from emp_callbacks.study.training_record import OnStep

__all__ = ["CellRunner"]

Record = dict[str, Any]
# What a network that is pruned after training has in common with the training.
_OF_THE_TRAINING = ("steps", "curve", "init_digest", "batches_digest", "data")


class CellRunner:
    """Runs the cells of a study.

    Args:
        recipe: The recipe.
        study: Its study, with the arms that fit.
        store: Where weights and logs go.
        records: Of the cells that are finished; whoever finishes one puts it there.
        ranks: The processes that train a cell together; all do the same.
    """

    def __init__(
        self, recipe: Recipe, study: StudyConfig, store: RunStore, records: Mapping[Cell, Record], ranks: Ranks
    ) -> None:
        self.recipe, self._study, self._store, self._records, self._ranks = recipe, study, store, records, ranks
        self.leader = leading_arm(study.arms)
        self._dense: tuple[int, Training, dict[str, Tensor]] | None = None
        self._pairs: dict[tuple[int, int], Record] = {}

    @cached_property
    def horizon(self) -> Horizon:
        """How long each arm trains."""
        return horizon_of(self.recipe, self._study.healing)

    @cached_property
    def emp(self) -> EMPConfig:
        """The EMP settings of the recipe."""
        return recipe_config(self.recipe)

    def check(self) -> None:
        """Check, before anything runs, that the model has what the arms ask of it.

        Raises:
            ValueError: Its learning rate cannot begin anew, or nobody knows how to make it narrower.
        """
        model = self.recipe.resolved()["model"]
        for name in self._study.arms:
            if ARMS[name].restarts:
                try:
                    self.recipe.with_model(lr_restarts=[0.5])
                except RecipeError as error:
                    raise ValueError(
                        f"arm {name!r} needs a model whose learning rate can begin anew, and {model['class_path']} has "
                        "no argument lr_restarts; remove the arm from study.arms"
                    ) from error
            if ARMS[name].narrower:
                narrower(model["class_path"], model["init_args"], sys.maxsize)

    def fingerprint(self, cell: Cell) -> str:
        """Return a hash of everything that influences one run."""
        arm, leader = ARMS[cell.arm], self.leader_of(cell)
        parts = [dict(ARMS[name].settings) for name in (cell.arm, leader) if name]
        scheduled = self._study.healing if arm.density != "none" and not arm.shares_fit_of else None
        return digest([self._store.recipe_digest, cell.arm, cell.point, leader, parts, cell.seed, scheduled])

    # ---- how much is kept -----------------------------------------------------------------------------------------

    def needed(self, cell: Cell) -> list[Cell]:
        """Return the cells whose results decide how much this one keeps."""
        return needed_cells(cell, self._study.arms, self._study.points)

    def leader_of(self, cell: Cell) -> str | None:
        """Return the training arm that an arm follows; None where it follows none."""
        follows = ARMS[cell.arm].leads_mode or any(needed.arm == self.leader for needed in self.needed(cell))
        return self.leader if follows else None

    def budget(self, cell: Cell) -> Budget:
        """Return what decides how much a cell keeps."""
        found = {needed.arm: self._records[needed] for needed in self.needed(cell)}
        dense, leader = found.get("dense"), found.get(self.leader or "")
        density = cell.point
        if density is None and leader:
            density = leader["density"] if self.emp.target != "weights" else _exactly(leader["keep"], leader["n"])
        return Budget(
            point=cell.point,
            density=1.0 if density is None else density,
            n_eff_share=dense["n_eff"] / dense["n"] if dense else 1.0,
            shares=leader["layers"] if leader and ARMS[cell.arm].leads_shares else None,
        )

    # ---- one training ---------------------------------------------------------------------------------------------

    def run(self, job: TrainingJob, missing: Sequence[Cell], on_step: OnStep) -> Iterator[tuple[Cell, Record]]:
        """Train once, or take up what was trained, and yield the record of each missing cell.

        Raises:
            ValueError: An arm asks of the model what it does not have.
            KeyboardInterrupt: The user stopped it.
        """
        kept = self._store.weights(job.fit)
        if not (job.fit in self._records and self._ranks.from_first(kept.is_file)):
            training = self._train(job.fit, on_step)
            if job.fit.arm == "dense":
                self._dense = job.fit.seed, training, self._save(training, kept)
            if job.fit in missing:
                yield job.fit, self._completed(job.fit, training.record())
        for cell in missing:
            if cell != job.fit:
                config = arm_config(cell.arm, self.emp, self.leader, self.budget(cell))
                yield cell, self._pruned_once(cell, config, self._folder(cell))

    def _train(self, cell: Cell, on_step: OnStep) -> Training:
        # Before the recipe is built for this training: to know these it is built as well.
        budget, horizon, recipe = self.budget(cell), self.horizon, self._recipe_of(cell)

        def adapt(base: EMPConfig) -> EMPConfig:
            return arm_config(cell.arm, base, self.leader, budget, horizon)

        training = Training(
            recipe,
            cell.seed,
            adapt,
            self._folder(cell),
            on_step,
            rewinds=ARMS[cell.arm].rewinds,
            checkpoint=self._store.checkpoint(cell, self.fingerprint(cell)),
        )
        training.fit()
        return training

    def _folder(self, cell: Cell) -> Path:
        return self._ranks.from_first(lambda: self._store.folder(cell, self.fingerprint(cell)))

    def _save(self, training: Training, path: Path) -> dict[str, Tensor]:
        """Write the weights of a trained network to a file and return them."""
        state = training.model.state_dict().items()
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in state}
        self._ranks.from_first(lambda: write_tensors(weights, path))
        return weights

    def _recipe_of(self, cell: Cell) -> Recipe:
        """Return the recipe with what an arm changes of the model."""
        arm, model = ARMS[cell.arm], self.recipe.resolved()["model"]
        if arm.narrower:
            weights = int(self.budget(cell).density * self._records[Cell("dense", cell.seed)]["n"])
            return self.recipe.with_model(**narrower(model["class_path"], model["init_args"], weights))
        return self.recipe.with_model(lr_restarts=restarts_of(cell.arm, self.horizon)) if arm.restarts else self.recipe

    def _completed(self, cell: Cell, record: Record) -> Record:
        """Return a record with what only the study knows."""
        if ARMS[cell.arm].narrower:
            dense = self._records[Cell("dense", cell.seed)]
            whole = dense["n"]
            record = {**record, "n": whole, "density": record["n"] / whole, "keep": record["n"]}
            if record["flops"] and dense["flops"]:  # beside those of the network that it is narrower than
                of_dense = {name: dense["flops"][name] for name in ("dense", "dense_training")}
                record["flops"] = {**record["flops"], **of_dense}
        return {**record, "differs": list(ARMS[cell.arm].differs)}

    # ---- pruned once after training -------------------------------------------------------------------------------

    def _pruned_once(self, cell: Cell, config: EMPConfig, folder: Path | None) -> Record:
        """Prune the dense network of a seed, which stays as it was, and return the record."""
        training, weights = self._trained(cell.seed)
        training.take_up(weights)
        found = training.record(training.prune_once(config, folder))
        dense = self._records.get(Cell("dense", cell.seed), {})
        shared = {key: dense[key] for key in _OF_THE_TRAINING if key in dense}
        return {**found, **shared, "differs": list(ARMS[cell.arm].differs)}

    def _trained(self, seed: int) -> tuple[Training, dict[str, Tensor]]:
        """Return the training that ended in the dense network of a seed, and its weights."""
        if self._dense is None or self._dense[0] != seed:
            weights = load_file(self._store.weights(Cell("dense", seed)))
            training = Training(self.recipe, seed, lambda base: arm_config("dense", base), None, lambda *_: None)
            self._dense = seed, training, weights
        return self._dense[1:]

    # ---- at equal density -----------------------------------------------------------------------------------------

    def lacks_pair(self, cell: Cell) -> bool:
        """Whether a finished cell has yet to be compared with the dense network pruned once to the same density.

        Where the weights of that are gone it cannot be, and the report says which runs stand alone.
        """
        record, dense = self._records.get(cell), Cell("dense", cell.seed)
        if record is None or cell.arm in ("dense", "one_shot") or self.emp.target != "weights":
            return False
        return record.get("matched") is None and dense in self._records and self._store.weights(dense).is_file()

    def pair(self, cell: Cell) -> Record:
        """Return the record of a cell together with that of one-shot at exactly its density."""
        record = self._records[cell]
        key = cell.seed, record["keep"]
        for other, known in self._records.items():
            if other.arm == "one_shot" and (other.seed, known["keep"]) == key:
                self._pairs[key] = _as_pair(known)
        if key not in self._pairs:
            budget = Budget(point=_exactly(record["keep"], record["n"]))
            config = arm_config("one_shot", self.emp, self.leader, budget)
            found = self._pruned_once(Cell("one_shot", cell.seed, budget.point), config, None)
            self._pairs[key] = _as_pair(found)
        return {**record, "matched": self._pairs[key]}


def _as_pair(record: Record) -> Record:
    return {"arm": "one_shot", **{name: record[name] for name in ("density", "keep", "metrics")}}


def _exactly(keep: int, n: int) -> float:
    """Return the density that keeps so many of n: half a weight more, so that no rounding loses one."""
    return min(1.0, (keep + 0.5) / n)
