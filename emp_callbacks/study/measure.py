"""How much of a trained model is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, score_moments
from emp_callbacks.targets.weights import prunable_weights
from emp_callbacks.trajectory import PruneEvent


def measure(model: nn.Module, config: EMPConfig, last: Sequence[PruneEvent] = ()) -> dict[str, float]:
    """Return `density`, `n`, `keep` and `n_eff` of what the config's target says.

    Of weights as they are: `keep` counts those that are not zero, `n_eff` is the effective number of these final
    weights (magnitude scores; summed over groups for the scopes tensor and row). Of everything else as the last
    refresh left it; with `observe_only`, and where masks act in training mode only, all are kept.

    Args:
        model: The trained model.
        config: What was pruned.
        last: Rows of the last refresh.

    Raises:
        ValueError: There was no refresh, and what is not a weight is known from there only.
    """
    if config.target == "weights":
        return _measure_weights(model, config)
    if not last:
        raise ValueError(
            f"the schedule asked for no refresh, so nothing is known of the {config.target}: lower every_n_epochs, "
            "every_n_steps or start, or train longer"
        )
    n, n_eff = sum(event.n for event in last), sum(event.n_eff for event in last)
    if not config.masks_evaluation:
        return {"density": 1.0, "n": n, "keep": n, "n_eff": n_eff}
    # Not keep / n: where each sample has its own mask, keep is a rounded mean.
    density = sum(event.density * event.n for event in last) / n
    return {"density": density, "n": n, "keep": sum(event.keep for event in last), "n_eff": n_eff}


def _measure_weights(model: nn.Module, config: EMPConfig) -> dict[str, float]:
    targets = prunable_weights(model, config.include, config.exclude)
    by_row = config.scope == "row"
    moments = []
    for target in targets:
        weight = target.parameter.detach()
        rows = weight.reshape(1, -1)
        if by_row:
            outputs = [0, target.output_dim] if target.stacked else [target.output_dim]
            rows = weight.movedim(outputs, [*range(len(outputs))]).flatten(len(outputs)).flatten(0, -2)
        moments.append(score_moments(rows).stack())
    groups = ScoreMoments.unstack(torch.cat(moments))
    n = sum(target.parameter.numel() for target in targets)
    keep = int(groups.nonzero.sum())
    n_eff = float(effective_numbers(groups.sum() if config.scope == "global" else groups).sum())
    return {"density": keep / n, "n": n, "keep": keep, "n_eff": n_eff}


def layer_densities(model: nn.Module, config: EMPConfig) -> dict[str, float]:
    """Return the share of each prunable weight that is not zero, by parameter name; {} where weights are not pruned."""
    if config.target != "weights":
        return {}
    targets = prunable_weights(model, config.include, config.exclude)
    return {t.name: int(t.parameter.detach().count_nonzero()) / t.parameter.numel() for t in targets}
