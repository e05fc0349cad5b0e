"""`emp inspect --data`: a finished model is pruned once in memory; what that costs, and what is guaranteed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from emp_callbacks.cost.pruning_cost import PruningCost, prune_and_measure
from emp_callbacks.cost.training_loss import show_batches, training_loss
from emp_callbacks.criteria import make_criterion
from emp_callbacks.finished.finished_model import open_model
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.pruning.signatures import signatures_of
from emp_callbacks.study.recipe.parts import open_recipe
from emp_callbacks.terminal import FittedTable
from emp_callbacks.trajectory import certified_loss_change

__all__ = ["Certified", "certified_json", "certify_source", "cost_table"]

_SAYS = {
    "distance": "(1 - rho) / (2 N rho) Tr(H) d^2, the lemma solved for the loss",
    "norm": "the same, with d^2 from N_eff and ||theta||_1",
    "curvature": "Tr(H) d^2 / 2, the worst direction of a quadratic loss",
    "asymptotic": "equation 5 of the paper, N to infinity",
    "inverse_trace": "the same with Tr(H) in the denominator (a misprint)",
}


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A finished model after one refresh, in memory only.

    Attributes:
        cost: What it costs in loss.
        batches: Number of batches that criterion, loss and Hessian saw.
        notes: What a reader must know.
        settings: What was pruned and how.
    """

    cost: PruningCost
    batches: int
    notes: tuple[str, ...]
    settings: Mapping[str, Any]


def certify_source(
    source: str, recipe_path: str, settings: Mapping[str, Any], *, batches: int = 8, probes: int = 16
) -> Certified:
    """Prune a finished model once, in memory, and measure it on training batches of a recipe; no file is changed.

    Args:
        source: A checkpoint file, a Hugging Face folder, or timm:NAME.
        recipe_path: Builds the model and the data. Its EMPCallback's settings are the defaults.
        settings: Fields of EMPConfig to replace.
        batches: Training batches for criterion, loss and Hessian, >= 1; the model is in evaluation mode.
        probes: Random vectors for Tr(H), >= 2: about 2 * probes training steps per batch.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A setting is invalid, or the weights do not fit the recipe's model.
    """
    if batches < 1:
        raise ValueError(f"--batches must be at least 1, got {batches}")
    if probes < 2:
        raise ValueError(f"--probes must be at least 2, for an interval of Tr(H), got {probes}")
    recipe = open_recipe(recipe_path)
    config = recipe.config.once(**settings)
    config = config.once(certify=config.can_certify)
    criterion = make_criterion(config.criterion, config.target)
    model = open_model(source, recipe=recipe)
    shown = list(islice(recipe.data.train_dataloader(), batches))
    pruner = EMPPruner(model.module, config=config)
    recipe.module.zero_grad()
    if criterion.needs:
        show_batches(pruner, recipe.module, shown, gradients=criterion.needs == "gradients")

    def losses() -> Iterator[Tensor]:
        return (training_loss(recipe.module, batch, index) for index, batch in enumerate(shown))

    cost = prune_and_measure(pruner, model.module, losses, probes=probes)
    pruner.finalize()
    notes = (
        *model.notes,
        *(event.note for event in cost.events if event.note),
        *signatures_of(cost.events).values(),
    )
    told = {name: getattr(config, name) for name in ("target", "scope", "beta", "density", "include", "exclude")}
    told = {**told, "criterion": config.criterion_name, "source": source, "data": recipe_path}
    return Certified(cost=cost, batches=len(shown), notes=notes, settings=told)


def cost_table(certified: Certified) -> FittedTable:
    """Return the loss before and after, and each bound beside the measured change."""
    cost = certified.cost
    table = FittedTable(f"loss on {certified.batches} training batches, in evaluation mode")
    table.add_column("what")
    table.add_column("value")
    table.add_column("", words=True)
    table.add_row("dense", f"{cost.loss_before:.6g}", "")
    table.add_row("pruned", f"{cost.loss_after:.6g}", "")
    table.add_row("change", f"{cost.change:+.4g}", "")
    table.add_row("change to first order, g d", f"{cost.first_order:+.4g}", "")
    table.add_row("change to second order, g d + d H d / 2", f"{cost.quadratic:+.4g}", "")
    trace = cost.trace
    table.add_row(
        "Tr(H)",
        f"{trace.mean:.4g}",
        f"[{trace.low:.4g}, {trace.high:.4g}], {trace.confidence:.0%}, {trace.probes} probes",
    )
    table.add_section()
    for name, value in cost.bounds().items():
        table.add_row(f"{name}: {_SAYS[name]}", "-" if value is None else f"{value:.4g}", _verdict(cost.change, value))
    table.add_section()
    for label, key in (("paper's bound", "mass_bound"), ("tight bound", "tight_mass_bound")):
        for event in cost.events[:1] if len(cost.events) == 1 else ():
            bound = getattr(event, key)
            shown = "-" if bound is None else f"{bound:.4f}"
            table.add_row(f"preserved mass, {label}", shown, f"measured {event.preserved_mass:.4f}")
    if (bound := certified_loss_change(cost.events)) is not None:
        table.add_row("first-order change, certified", f"{bound:.4g}", _verdict(cost.first_order, bound))
    return table


def _verdict(change: float, bound: float | None) -> str:
    if bound is None:
        return "Tr(H) <= 0: the bound assumes H >= 0"
    return "VIOLATED" if abs(change) > bound * (1 + 1e-5) else "holds"


def certified_json(certified: Certified) -> str:
    """Return everything as JSON text."""
    cost = certified.cost
    told = {
        **{key: value for key, value in asdict(cost).items() if key not in ("events", "trace")},
        "change": cost.change,
        "quadratic": cost.quadratic,
        "alignment": cost.alignment,
        "trace": asdict(cost.trace),
        "bounds": cost.bounds(),
        "events": [event.record() for event in cost.events],
    }
    return (
        json.dumps({**certified.settings, "batches": certified.batches, **told, "notes": certified.notes}, indent=1)
        + "\n"
    )
