"""`emp export` and `emp prune`: masked weights as a plain file; one-shot EMP on a finished model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from emp_callbacks.checkpoint.reading import trajectory_rows
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.cost.training_loss import show_batches
from emp_callbacks.criteria import make_criterion
from emp_callbacks.finished.budget import find_budget
from emp_callbacks.finished.finished_model import FinishedModel, open_model
from emp_callbacks.finished.weights_file import ExportReport, check_free, write_weights
from emp_callbacks.folders.plan import without_output_embedding
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.shrinking import ShrinkReport, pruned_units, shrink
from emp_callbacks.targets.names import few
from emp_callbacks.targets.weights import prunable_weights

if TYPE_CHECKING:
    from emp_callbacks.cost.budget_search import Tried
    from emp_callbacks.study.recipe.parts import RecipeParts

__all__ = ["Source", "export", "prune"]


class Source(NamedTuple):
    """Where a finished model comes from.

    Attributes:
        name: What `emp inspect` reads: a checkpoint file, a Hugging Face folder, or timm:NAME.
        config: Recipe whose model the weights belong to; None: the source says enough.
        prefix: Start of the names that the written file leaves out; None: see `open_model`.
        pretrained: Load timm's weights.
        input_size: Size of an example, without the batch; None: the data's or the model's own.
    """

    name: str
    config: str | None = None
    prefix: str | None = None
    pretrained: bool = False
    input_size: Sequence[int] | None = None

    def open_recipe(self) -> RecipeParts | None:
        """Return what the recipe builds, if there is one."""
        if not self.config:
            return None
        from emp_callbacks.study.recipe.parts import open_recipe  # needs what a file of weights does without

        return open_recipe(self.config)


def export(
    source: Source,
    out: str | os.PathLike[str],
    *,
    shrink_units: bool = False,
    uniform: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write the masked weights of a finished model as plain safetensors, by the names of the user's own model.

    Args:
        source: The model.
        out: The file; written as a whole or not at all.
        shrink_units: Whether heads, neurons and channels that are zero are removed; `load_shrunk` reads such a file.
        uniform: Whether all layers of a kind keep as many, see `shrink`.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: There is no such source, or no such folder for `out`.
        ValueError: The source is damaged, or its modules are needed and not known.
        NotImplementedError: The model cannot be shrunk.
        ArithmeticError: The shrunk model's outputs would differ.
    """
    check_free(out, overwrite)
    recipe = source.open_recipe()
    model = _opened(source, recipe, needs_modules=shrink_units)
    shrunk = None
    if shrink_units:
        _check_modules(model, source.name, "--shrink")
        shrunk = _shrunk(model, pruned_units(model.inner), uniform=uniform)
    return write_weights(model, out, _described(model.runs), shrunk)


def prune(
    source: Source,
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    batches: int = 32,
    loss_tolerance: float | None = None,
    on_tried: Callable[[Tried], None] | None = None,
    shrink_units: bool = False,
    uniform: bool = False,
    overwrite: bool = False,
) -> tuple[EMPPruner, ExportReport]:
    """Prune a finished model once by EMP and write its weights, as `export` does.

    Args:
        source: The model. With a recipe its EMPCallback's settings are the defaults.
        out: The file; written as a whole or not at all.
        settings: Fields of EMPConfig that say what is pruned and how; the rest keeps its default.
        batches: Training batches of the recipe's data for criteria that read data, >= 1. The model is in evaluation
            mode for them: without dropout, and with the batch norms' running statistics.
        loss_tolerance: Look for the smallest beta that raises the loss on these batches by this share at most, >= 0,
            see `smallest_budget`; what was tried is in the report and in the file's metadata ("budget_search").
        on_tried: Called after each budget that is measured for that.
        shrink_units: Whether pruned heads, neurons and channels are removed.
        uniform: Whether all layers of a kind keep as many, see `shrink`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The pruner (masks, trajectory) and what was written.

    Raises:
        FileExistsError: `out` exists.
        ValueError: A setting is invalid, or it needs modules or data that the source does not have.
        NotImplementedError: The target is masked in the forward pass, or the model cannot be shrunk.
    """
    check_free(out, overwrite)
    recipe = source.open_recipe()
    looked_for = {} if loss_tolerance is None else {"beta": 1.0}  # in place of what the recipe says of beta or density
    config = _one_shot(recipe.config if recipe else EMPConfig(), {**looked_for, **settings})
    needs = make_criterion(config.criterion, config.target).needs
    _check_data(config, needs, recipe, batches, loss_tolerance)
    # Modules say which dimension is that of the inputs: GPT-2 has it first.
    by_module = config.target != "weights" or config.pattern is not None
    model = _opened(source, recipe, needs_modules=by_module or shrink_units)
    if config.target != "weights":
        _check_modules(model, source.name, f"target {config.target!r}")
    if shrink_units:
        _check_modules(model, source.name, "--shrink")
    notes: list[str] = []
    if model.weights and not config.include:
        named, notes = _in_groups(model, model.weights, config.pattern)
        config = replace(config, include=[escape(name) for name in named])
    elif recipe is None and config.target == "weights" and not config.include:
        targets = prunable_weights(model.module, None, config.exclude)
        chosen, notes = without_output_embedding(model.inner, targets)
        apart = [escape(target.name) for target in targets if target not in chosen]
        config = replace(config, exclude=[*(config.exclude or ()), *apart] or None)
    shown, found = _training_batches(recipe, batches) if needs or looked_for else [], None
    if recipe and loss_tolerance is not None:
        found = find_budget(recipe, config, shown, loss_tolerance, on_tried)
        config = found.config
    pruner = EMPPruner(model.module, config=config)
    if recipe and needs:
        recipe.module.zero_grad()
        show_batches(pruner, recipe.module, shown, gradients=needs == "gradients")
    pruner.refresh()
    pruner.finalize()
    shrunk = _shrunk(model, _kept(pruner, model), uniform=uniform) if shrink_units else None
    described = _described([_run_of(pruner)]) | ({"budget_search": json.dumps(found.record())} if found else {})
    if config.target == "experts" and not shrink_units:
        notes.append("routers still send tokens to pruned experts, which add nothing to them; --shrink takes them out")
    report = write_weights(model, out, described, shrunk)
    return pruner, replace(report, budget=found, notes=(*report.notes, *notes))


def _in_groups(model: FinishedModel, weights: list[str], pattern: str | None) -> tuple[list[str], list[str]]:
    """Return which of a file's weights have groups of a pattern (all, if none has), and what is to be said of that."""
    if pattern is None:
        return weights, []
    size = GroupPattern.parse(pattern).size
    targets = prunable_weights(model.module, [escape(name) for name in weights])
    apart = [target.name for target in targets if target.parameter.shape[target.input_dim] % size]
    notes = [f"left out, as their inputs are no multiple of {size}: {few(apart)}"] if apart else []
    notes.append(
        "no modules in the file: each weight was taken as (outputs, inputs, ...); those of GPT-2 and of transposed "
        "convolutions are not, and need the recipe that builds them"
    )
    return [name for name in weights if name not in apart] or weights, notes


def _opened(source: Source, recipe: RecipeParts | None, *, needs_modules: bool) -> FinishedModel:
    return open_model(
        source.name,
        recipe=recipe,
        prefix=source.prefix,
        pretrained=source.pretrained,
        needs_modules=needs_modules,
        input_size=source.input_size,
    )


def _one_shot(config: EMPConfig, settings: Mapping[str, Any]) -> EMPConfig:
    """Return settings for one refresh of a finished model."""
    once = config.once(**settings)
    if once.masks_in_forward:
        what = f"target {once.target!r}" + " with dynamic=True" * (once.target == "heads")
        raise NotImplementedError(
            f"{what} is masked in the forward pass, which a file of weights cannot hold; prune weights, heads, neurons "
            "or kan_nodes, with dynamic=False"
        )
    return once


def _check_modules(model: FinishedModel, source: str, what: str) -> None:
    if not model.has_modules:
        raise ValueError(
            f"{what} needs the model, and {source} holds names and values alone; name the recipe that builds it with "
            "--config RECIPE, or use timm:NAME or a Hugging Face folder with config.json"
        )


def _check_data(
    config: EMPConfig, needs: str | None, recipe: RecipeParts | None, batches: int, loss_tolerance: float | None
) -> None:
    """Raise where data or a loss are asked for that are not there, or a budget that is given already."""
    if recipe is None and needs:
        raise ValueError(
            f"criterion {config.criterion_name!r} reads {needs} of data; name a recipe with --config RECIPE"
        )
    if recipe is None and loss_tolerance is not None:
        raise ValueError(
            "--beta auto (--tolerance) measures the loss of training steps on data; name a recipe with --config RECIPE"
        )
    if batches < 1 and (needs or loss_tolerance is not None):
        raise ValueError(f"--batches must be at least 1, got {batches}")
    for name in ("density", "pattern"):
        if loss_tolerance is not None and (value := getattr(config, name)) is not None:
            raise ValueError(f"{name}={value} says what is kept, and loss_tolerance looks for it; drop one")


def _training_batches(recipe: RecipeParts | None, count: int) -> list[Any]:
    return list(islice(recipe.data.train_dataloader(), count)) if recipe else []


def _kept(pruner: EMPPruner, model: FinishedModel) -> dict[str, Tensor]:
    """Return the kept units of the inner model."""
    if pruner.config.target not in ("heads", "neurons", "experts"):
        return pruned_units(model.inner)
    return {name.removeprefix(model.prefix): mask for name, mask in pruner.masks.items()}


def _shrunk(model: FinishedModel, kept: Mapping[str, Tensor], *, uniform: bool) -> ShrinkReport:
    if model.example is None:
        raise ValueError("no example input is known to compare the shrunk model on; give --input-size, such as 3 32 32")
    return shrink(model.inner, kept, model.example.args, model.example.kwargs, uniform=uniform)


def _run_of(pruner: EMPPruner) -> dict[str, Any]:
    config = pruner.config
    told = {"target": config.target, "criterion": config.criterion_name, "scope": config.scope, "mode": "one-shot"}
    return {**told, "trajectory": pruner.trajectory.records()}


def _described(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the metadata of a file: who wrote it, and how the weights were pruned, as far as that is known."""
    from emp_callbacks import __version__

    described = {"format": "pt", "emp_version": __version__}
    for key in ("target", "criterion", "scope", "mode"):
        if told := list(dict.fromkeys(str(run[key]) for run in runs if key in run)):
            described[key] = ", ".join(told)
    rows = trajectory_rows(runs[0]) if len(runs) == 1 else None  # two runs have no density in common
    if rows:
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        density = sum(row["keep"] for row in last) / sum(row["n"] for row in last)
        numbers = {"step": rows[-1]["step"], "beta": rows[-1]["beta"], "density": density}
        described |= {key: json.dumps(value) for key, value in numbers.items()}
    return described
