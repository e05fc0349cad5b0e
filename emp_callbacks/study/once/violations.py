"""`emp violations`: the measured change of the loss beside every bound. Which are broken, where, and why?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.cost.curvature import TraceEstimate, hessian_trace
from emp_callbacks.cost.pruning_cost import PruningCost, masked_parameters, prune_and_measure
from emp_callbacks.cost.training_loss import training_loss
from emp_callbacks.criteria import make_criterion
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study.once.beta_sweep import BETAS
from emp_callbacks.study.once.dense_models import DenseModel, known_criteria
from emp_callbacks.study.once.results import Row, outcome
from emp_callbacks.study.once.study import OnCase, OnceStudy
from emp_callbacks.study.once.violation_findings import page
from emp_callbacks.trajectory import certified_loss_change

__all__ = ["CRITERIA", "score_shape", "violations"]

CRITERIA = ("magnitude", "wanda", "taylor", "saliency", "random")


def violations(
    *,
    criteria: Sequence[str] = CRITERIA,
    betas: Sequence[float] = BETAS,
    batches: int = 8,
    probes: int = 16,
    scope: str = "global",
) -> OnceStudy:
    """Return the study, on single weights.

    Args:
        criteria: Those of target "weights".
        betas: Factors on N_eff, each > 0.
        batches: Training batches for criteria, losses and the Hessian, >= 1: all of them see the same data.
        probes: Random vectors for Tr(H), >= 2.
        scope: Where scores compete.

    Raises:
        ValueError: An argument is invalid.
    """
    for beta in betas:
        EMPConfig(beta=beta, scope=scope, evidence_steps=batches)
    for criterion in criteria:
        make_criterion(criterion, "weights")
    if probes < 2:
        raise ValueError(f"probes must be >= 2, for an interval, got {probes}")
    settings = {"criteria": list(criteria), "betas": sorted(set(betas)), "batches": batches, "probes": probes}
    return OnceStudy(
        command="violations", settings={**settings, "scope": scope}, measure=measure, page=page, check=check
    )


def check(recipe: EMPConfig, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a recipe does not go with the criteria or the scope."""
    for criterion in settings["criteria"]:
        _config(recipe, criterion, 1.0, settings)


def measure(dense: DenseModel, settings: Mapping[str, Any], on_case: OnCase) -> list[Row]:
    """Return one row per criterion and beta."""
    criteria = known_criteria(dense, "weights", settings["criteria"])
    pairs = [(criterion, beta) for criterion in criteria for beta in settings["betas"]]
    module, rows = dense.training.model, []
    trace: TraceEstimate | None = None
    with dense.training.batches(settings["batches"]) as (lent, step_context):
        batches = list(lent)

        def losses() -> Any:
            for index, batch in enumerate(batches):
                with step_context():
                    yield training_loss(module, batch, index)

        for done, (criterion, beta) in enumerate(pairs):
            on_case(done, len(pairs))
            pruner = dense.pruner(_config(dense.training.recipe_config, criterion, beta, settings))
            if trace is None:
                trace = hessian_trace(
                    losses, [*masked_parameters(pruner, module).values()], probes=settings["probes"], seed=dense.seed
                )
            shape = score_shape(pruner.scores())
            cost = prune_and_measure(pruner, module, losses, trace=trace)
            pruner.finalize()
            rows.append({**outcome(cost.events, pruner.config), **_told(cost, pruner), **shape})
    return rows


def _config(recipe: EMPConfig, criterion: str, beta: float, settings: Mapping[str, Any]) -> EMPConfig:
    chosen = {"target": "weights", "criterion": criterion, "scope": settings["scope"], "beta": beta}
    config = recipe.once(evidence_steps=settings["batches"], **chosen)
    return config.once(certify=config.can_certify)


def _told(cost: PruningCost, pruner: EMPPruner) -> Row:
    """Return costs and bounds as plain data."""
    of_layers = [layer.certificate for event in cost.events for layer in event.layers if layer.certificate]
    errors = [c for c in of_layers if c.kind == "output_error" and c.measured is not None]
    worst = max((c.tightness for c in errors if c.tightness is not None), default=None)
    high = cost.trace.high if cost.trace.high is not None else cost.trace.mean
    return {
        "loss_before": cost.loss_before,
        "loss_after": cost.loss_after,
        "change": cost.change,
        "first_order": cost.first_order,
        "second_order": cost.second_order,
        "trace": cost.trace.mean,
        "trace_low": cost.trace.low,
        "trace_high": cost.trace.high,
        "distance_sq": cost.distance_sq,
        "l1_norm": cost.l1_norm,
        "alignment": cost.alignment,
        "bounds": {**cost.bounds(), "taylor": certified_loss_change(cost.events)},
        "bounds_at_high_trace": cost.bounds(high),
        "output_tightness": worst,
        "output_errors": [list(c.relative) for c in errors],
        "notes": sorted({event.note for event in cost.events if event.note}),
        "weights": len(pruner.weight_masks),
    }


def score_shape(scores: Mapping[str, Tensor], most: int = 1_000_000) -> Row:
    """Return what the distribution of all scores looks like, from a sample of at most `most`.

    Returns:
        "cv" (standard deviation over mean, so that N_eff / N = 1 / (1 + cv^2)), "kurtosis" (excess; 0 for a Gaussian),
        "gini" (0: all equal, 1: one holds everything) and "top_percent" (share of the mass in the highest 1 %).

    Examples:
        >>> score_shape({"layer": torch.ones(200)})["gini"]
        0.0
    """
    flat = torch.cat([values.reshape(-1).cpu() for values in scores.values()])
    every = max(1, math.ceil(len(flat) / most))
    values = np.sort(flat[::every].double().numpy())
    mean, n = float(values.mean()), len(values)
    if mean == 0:
        return {"cv": 0.0, "kurtosis": 0.0, "gini": 0.0, "top_percent": 0.0}
    ranks = np.arange(1, n + 1)
    spread = float(values.std())
    return {
        "cv": spread / mean,
        "kurtosis": float(stats.kurtosis(values)) if spread > 0 else 0.0,
        "gini": round(float((2 * ranks - n - 1) @ values / (n * n * mean)), 12),
        "top_percent": float(values[-max(1, n // 100) :].sum() / values.sum()),
    }
