"""Failure signatures: where N_eff is no good budget, and what to do about it. Each is one line "what: remedy"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from emp_callbacks.trajectory import PruneEvent

__all__ = [
    "NEARLY_ALL",
    "SAID_OF_A_REFRESH",
    "STARVED",
    "cliff_without_sparsity",
    "criteria_disagree",
    "emptied_layers",
    "nearly_all",
    "signatures_of",
    "starved_layers",
    "uniform_scores",
]

# With these words begin the signatures of one refresh: for a filter, where they are shown in another way.
SAID_OF_A_REFRESH = "N_eff is up to|(next to )?nothing is kept of"

# N_eff / N = 1 / (1 + cv^2), cv the scores' standard deviation over their mean: 0.95 is a cv of 0.23.
NEARLY_ALL = 0.95
DISAGREEMENT = 1.5  # factor between the N_eff of two criteria
LITTLE_SPARSITY = 0.1  # fraction pruned at beta = 1
# A layer's density over that of all layers. N_eff / N is 0.64 of Gaussian scores, 0.5 of Laplacian ones, and 0.05, a
# tenth of that, only where the scores' standard deviation is 4.4 times their mean: a few of them hold the mass.
STARVED = 0.1
_ENOUGH = 100  # components; of fewer one or two decide, and a tenth is no number of them


class Kept(Protocol):
    """What a refresh kept of one layer."""

    @property
    def name(self) -> str:
        """Of the layer."""

    @property
    def n(self) -> int:
        """Its components."""

    @property
    def keep(self) -> int:
        """Those that are kept."""


def signatures_of(events: Sequence[PruneEvent]) -> dict[str, str]:
    """Return what one refresh says of N_eff as a budget: kind -> one line. A fixed density needs no N_eff.

    Args:
        events: Rows of one refresh.
    """
    if not events:
        return {}
    first, layers = events[0], [layer for event in events for layer in event.layers]
    found = {
        "alike": uniform_scores(events) if first.beta is not None else [],
        "emptied": emptied_layers(layers, first.criterion),
        # A sharp row of attention is what attention is for.
        "starved": starved_layers(layers, first.scope) if first.scope != "sample" else [],
    }
    return {kind: lines[0] for kind, lines in found.items() if lines}


def uniform_scores(events: Sequence[PruneEvent], model: str = "") -> list[str]:
    """Return a warning if N_eff is close to N: scores nearly alike, among which N_eff finds nothing to prune.

    Args:
        events: Rows of one refresh.
        model: Name of the model and target, if several are spoken of.
    """
    groups = [(event.group, event.n, event.n_eff_fraction) for event in events]
    return nearly_all(groups, events[0].criterion, model) if events else []


def nearly_all(groups: Sequence[tuple[str, int, float]], criterion: str, model: str = "") -> list[str]:
    """Return the same warning for groups of known effective number.

    Args:
        groups: (name, N, N_eff / N) of each.
        criterion: How they were scored.
        model: Name of the model and target, if several are spoken of.
    """
    flat = [(name, fraction) for name, n, fraction in groups if n > 1 and fraction >= NEARLY_ALL]
    if not flat:
        return []
    fractions = [fraction for _, fraction in flat]
    spread = math.sqrt(max(0.0, 1 / min(fractions) - 1))
    names = ", ".join([model] * bool(model) + [name for name, _ in flat[:3]])
    names += f" and {len(flat) - 3} more" * (len(flat) > 3)
    return [
        f"N_eff is up to {max(fractions):.3f} of N in {names}, the scores of {criterion!r} deviate by {spread:.0%} of "
        "their mean at most, so this criterion does not discriminate here and beta = 1 prunes next to nothing: try "
        "another criterion (emp compare-criteria), or choose a density by the metric (emp sweep-beta)"
    ]


def emptied_layers(layers: Sequence[Kept], criterion: str) -> list[str]:
    """Return a warning if layers keep nothing: where scores of different layers are no common currency.

    Args:
        layers: All layers of one refresh.
        criterion: How they were scored.
    """
    empty = [layer.name for layer in layers if layer.n and not layer.keep]
    if not empty:
        return []
    names = ", ".join(empty[:3]) + f" and {len(empty) - 3} more" * (len(empty) > 3)
    return [
        f"nothing is kept of {names}, so nothing passes there but what goes round it: let the scores of "
        f"{criterion!r} compete within each layer (scope='tensor'), or use another criterion"
    ]


def starved_layers(layers: Sequence[Kept], scope: str) -> list[str]:
    """Return a warning if layers keep less than a tenth (STARVED) of what all layers together keep, but something.

    Layers of fewer than 100 components are left out.

    Args:
        layers: All layers of one refresh.
        scope: Where scores competed: "global", "tensor" or "row".
    """
    overall = sum(layer.keep for layer in layers) / (sum(layer.n for layer in layers) or 1)
    starved = [layer for layer in layers if layer.n >= _ENOUGH and 0 < layer.keep < STARVED * overall * layer.n]
    if not starved:
        return []
    starved.sort(key=lambda layer: layer.keep / layer.n)
    names = ", ".join(f"{layer.name} ({_percent(layer.keep / layer.n)})" for layer in starved[:3])
    names += f" and {len(starved) - 3} more" * (len(starved) > 3)
    # min_density holds for a group: of "global" that is the whole model.
    remedy = (
        "let scores compete within each layer (scope='tensor')"
        if scope == "global"
        else f"keep some of every {'layer' if scope == 'tensor' else 'row'} (min_density={overall / 2:.1g})"
    )
    return [
        f"next to nothing is kept of {names}, where all layers together keep {_percent(overall)}, so hardly "
        f"anything passes there: {remedy}, leave it out (exclude=[{starved[0].name!r}]), or keep more (a "
        "larger beta; emp prune --tolerance finds one by the measured loss)"
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def cliff_without_sparsity(name: str, sparsity: float, harm_at_one: float, harm_below: float, unit: str) -> list[str]:
    """Return a warning if little is pruned at beta = 1, and much is lost just below.

    Args:
        name: Of the model and what is pruned.
        sparsity: Pruned fraction at beta = 1.
        harm_at_one: What the metric loses at beta = 1, in `unit`, positive where it gets worse.
        harm_below: The same at the next lower beta.
        unit: "points" or "%".
    """
    if sparsity >= LITTLE_SPARSITY or harm_below < 5 * max(harm_at_one, 0.0) + 1.0:
        return []
    return [
        f"{name} prunes {sparsity:.1%} at beta = 1 and loses {harm_below:.1f} {unit} just below, so N_eff marks a "
        "cliff without giving sparsity: keep beta >= 1, use another criterion, or train behind the mask (EMPCallback)"
    ]


def criteria_disagree(name: str, fractions: Mapping[str, float]) -> list[str]:
    """Return a warning if criteria find very different effective numbers in one model.

    Args:
        name: Of the model and what is pruned.
        fractions: Criterion -> N_eff / N; random scores left out.
    """
    known = {criterion: value for criterion, value in fractions.items() if value > 0}
    if len(known) < 2:
        return []
    low, high = min(known, key=lambda c: known[c]), max(known, key=lambda c: known[c])
    if known[high] < DISAGREEMENT * known[low]:
        return []
    return [
        f"{name} has N_eff / N = {known[low]:.3f} by {low!r} and {known[high]:.3f} by {high!r}, so how much is "
        "redundant depends on the criterion: compare their metrics at one density first (emp compare-criteria)"
    ]
