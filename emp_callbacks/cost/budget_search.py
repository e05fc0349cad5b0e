"""N_eff as a budget made safe: the smallest beta whose measured loss stays within a tolerance of the dense one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.backends import detect_backend
from emp_callbacks.config import EMPConfig, settled
from emp_callbacks.core.effective_number import check_beta
from emp_callbacks.core.masked_values import zero_pruned
from emp_callbacks.core.packing import pack_bits
from emp_callbacks.core.random_numbers import random_numbers_kept
from emp_callbacks.cost.bracket import Bracket, End, Tried
from emp_callbacks.cost.curvature import mean_loss
from emp_callbacks.cost.unchanged import unchanged
from emp_callbacks.layer.mask_mode import Observe
from emp_callbacks.pruning.refresh import Selection
from emp_callbacks.pruning.refresher import Refresher

__all__ = ["BOUNDS", "LOSS_FLOOR", "BudgetSearch", "Tried", "check_search", "search_result", "smallest_budget"]

LossFunction = Callable[[Any, Any], Tensor]
"""Takes the model and a batch, returns the loss, shape ()."""

BOUNDS = (1 / 64, 256.0)
LOSS_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class BudgetSearch:
    """What `smallest_budget` found.

    Attributes:
        beta: The smallest factor on N_eff from which upwards every budget that was measured is within the tolerance;
            it was measured itself. None: no budget is.
        density: Kept share of all scored components there, in [0, 1]; None without a beta.
        loss: Measured there, mean over the batches; None without a beta.
        dense_loss: Of the model as it was given, on the same batches.
        limit: Largest loss within the tolerance.
        loss_tolerance: As given.
        loss_floor: As given.
        end: "between": two neighbouring betas are known, one within the tolerance and one not. "lowest": the lowest
            beta is still within it. "highest": the highest is not. "everything": not even a budget that keeps
            everything is. "evaluations": they were used up before a budget of the other kind was found.
        tried: Every budget that was measured, by rising beta; those that keep the same were measured once.
        settings: What was pruned, how it was scored and where scores competed.
    """

    beta: float | None
    density: float | None
    loss: float | None
    dense_loss: float
    limit: float
    loss_tolerance: float
    loss_floor: float
    end: End
    tried: tuple[Tried, ...]
    settings: EMPConfig

    @property
    def config(self) -> EMPConfig:
        """Settings for an `EMPPruner` that prunes the finished model once by this budget.

        Raises:
            ValueError: No budget is within the tolerance; the message says why.
        """
        if self.beta is None:
            raise ValueError(self.says)
        return self.settings.once(beta=self.beta)

    @property
    def is_monotone(self) -> bool:
        """Whether, of the budgets that were measured, none that is within the tolerance lies below one that is not."""
        within = [one.within for one in self.tried]
        return within == sorted(within)

    @property
    def says(self) -> str:
        """What a reader must know, in one line."""
        last, limit = self.tried[-1], f"{self.limit:.6g}"
        told = {
            "between": f"beta = {self.beta or 0:.4g} keeps {self.density or 0:.1%} at a loss of {self.loss or 0:.6g}, "
            f"dense {self.dense_loss:.6g}",
            "lowest": f"beta = {self.beta or 0:.4g}, the lowest bound, is still within the tolerance, so the loss "
            "hardly depends on what is pruned: lower bounds, or look at the criterion",
            "highest": f"beta = {last.beta:.4g}, the highest bound, keeps {last.density:.1%} and has a loss of "
            f"{last.loss:.6g} > {limit}: raise bounds, or tolerate more",
            "everything": f"keeping everything has a loss of {last.loss:.6g} > {limit}, so the loss differs from call "
            "to call: give a loss_fn that does not",
            "evaluations": f"{len(self.tried)} evaluations were used up before the loss crossed {limit}: allow more, "
            "or narrow bounds",
        }
        parts = [told[self.end]]
        if not self.is_monotone:
            parts.append("the loss is not monotone in beta: a budget passed below one that failed, and was not taken")
        if abs(self.dense_loss) < self.loss_floor:
            parts.append(
                f"the dense loss is near 0 ({self.dense_loss:.3g}), so the tolerance is relative to loss_floor="
                f"{self.loss_floor:g}"
            )
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return everything as plain JSON types; of the settings what was pruned, how, and where scores competed."""
        names = ("target", "scope", "include", "exclude", "min_density", "min_units")
        settings = {name: getattr(self.settings, name) for name in names}
        found = {name: value for name, value in vars(self).items() if name not in ("settings", "tried")}
        tried = [one._asdict() for one in self.tried]
        return {**found, "tried": tried, **settings, "criterion": self.settings.criterion_name, "says": self.says}


def smallest_budget(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    loss_tolerance: float = 0.01,
    loss_floor: float = LOSS_FLOOR,
    bounds: tuple[float, float] = BOUNDS,
    evaluations: int = 12,
    on_tried: Callable[[Tried], None] | None = None,
    config: EMPConfig | None = None,
    **settings: Any,
) -> BudgetSearch:
    """Return the smallest beta at which pruning a finished model once costs no more loss than is tolerated.

    Within the tolerance is a mean loss over the batches of at most

        dense_loss + loss_tolerance * max(|dense_loss|, loss_floor),

    which is (1 + loss_tolerance) * dense_loss where that is not near 0 or negative. beta = 1 is measured first, then
    twice or half as much until the loss crosses the limit, then the geometric mean of the two betas between which it
    does, down to 2 %. A loss need not rise steadily as beta falls: a budget a little above the result is measured, too,
    and where one fails, the search goes on above it. So the result was measured, and so was whatever is said of larger
    budgets: all of them in `tried` are within the tolerance. A small budget that passes below one that fails is no
    result: it passes by chance.

    The model is in evaluation mode meanwhile and is left as it was: weights, buffers, gradients, modes, random numbers;
    also after an error. Every evaluation sees the same random numbers. Scores are computed once. Costs a pass over the
    batches per evaluation and one for the dense loss; for criteria that read data one more, of gradients with backward.

    Args:
        model: The finished model, in one process.
        batches: As `loss_fn` takes them, >= 1; all are held in memory. Criteria that read data see the same batches.
            Best such as training did not see: on those a model that overfits has a loss near 0.
        loss_fn: Takes the model and a batch and returns the loss, shape (), the same at every call; differentiable
            where the criterion reads gradients.
        loss_tolerance: Relative rise of the loss that is tolerated, >= 0; 0.01 is one percent. Not `tolerance`, which
            is a number of units.
        loss_floor: A dense loss nearer to 0 than this counts as this, > 0, in units of the loss.
        bounds: Lowest and highest beta.
        evaluations: At most so many budgets are measured, >= 1.
        on_tried: Called with each budget after it was measured.
        config: What is pruned and how; its beta or density, schedule and mode do not matter.
        **settings: Fields of EMPConfig by name, put over `config`; neither beta nor density, nor tolerance.

    Raises:
        ValueError: An argument or a setting is invalid, there is no batch, the target is masked in the forward pass, or
            there are several processes.
        FloatingPointError: The dense loss or a score is NaN or Inf.
        MissingEvidence: The criterion reads data, and the batches show none of any layer.

    Examples:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 2.0, 1.0, 0.01]]))
        >>> batches = [(torch.eye(4), torch.tensor([[5.0], [2.0], [1.0], [0.01]]))]
        >>> found = smallest_budget(layer, batches, lambda layer, batch: (layer(batch[0]) - batch[1]).square().sum())
        >>> found.density, round(found.loss / found.dense_loss, 4)
        (0.75, 1.0001)
    """
    check_search(loss_tolerance, loss_floor, bounds, evaluations)
    _check_settings(settings)
    once = settled(config, settings).once(beta=1.0, certify=False)
    refresher = _refresher(model, once)
    shown, owners = list(batches), [weight.segment.owner for weight in refresher.weights]
    bracket = Bracket(*bounds, evaluations)
    with unchanged(model, owners) as dense_values, torch.no_grad():
        dense = _loss(model, shown, loss_fn)
        if not math.isfinite(dense):
            raise FloatingPointError(f"the dense loss is {dense}, so no budget can be measured against it")
        limit = dense + loss_tolerance * max(abs(dense), loss_floor)
        select = _selections(refresher, model, shown, loss_fn)
        while (beta := bracket.next()) is not None:
            chosen = select(beta)
            digest = _digest(chosen)
            if bracket.knows(digest, beta):
                continue
            everything = not _zero(refresher, chosen.masks)
            loss = _loss(model, shown, loss_fn)
            tried = Tried(beta, chosen.keep / chosen.n, loss, loss <= limit, everything)
            bracket.add(digest, tried)
            for owner, value in zip(owners, dense_values, strict=True):
                owner.copy_(value)
            if on_tried is not None:
                on_tried(tried)
    told = {"dense_loss": dense, "limit": limit, "loss_tolerance": loss_tolerance, "loss_floor": loss_floor}
    return search_result(bracket, settings=once, **told)


def search_result(bracket: Bracket, **told: Any) -> BudgetSearch:
    """Return what a bracket that asks for no more has found; `told` are the fields that it does not know."""
    answer = bracket.answer
    return BudgetSearch(
        beta=answer and answer.beta,
        density=answer and answer.density,
        loss=answer and answer.loss,
        end=bracket.end,
        tried=bracket.measured,
        **told,
    )


def check_search(loss_tolerance: float, loss_floor: float, bounds: tuple[float, float], evaluations: int) -> None:
    """Raise ValueError where an argument of a search for a budget is invalid."""
    if not (loss_tolerance >= 0 and math.isfinite(loss_tolerance)):
        raise ValueError(f"loss_tolerance must be a relative rise of the loss >= 0, got {loss_tolerance!r}")
    if not (loss_floor > 0 and math.isfinite(loss_floor)):
        raise ValueError(f"loss_floor must be a loss > 0, got {loss_floor!r}")
    for bound in bounds:
        check_beta(bound)
    if bounds[0] >= bounds[1]:
        raise ValueError(f"bounds must be a lower and a higher beta, got {bounds!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations!r}")


def _check_settings(settings: Mapping[str, Any]) -> None:
    if "tolerance" in settings:  # it would be taken, and do next to nothing
        raise ValueError(
            "tolerance is a number of units in EMPConfig; the rise of the loss is loss_tolerance, and units go into "
            "config=EMPConfig(tolerance=...)"
        )
    for name in ("beta", "density", "pattern"):
        if settings.get(name) is not None:
            raise ValueError(f"{name}={settings[name]!r} is what smallest_budget looks for; leave it out")


def _refresher(model: nn.Module, once: EMPConfig) -> Refresher:
    if once.masks_in_forward:
        what = f"target {once.target!r}" + " with dynamic=True" * (once.target == "heads")
        raise ValueError(
            f"{what} is masked in the forward pass, and smallest_budget zeroes weights: use weights, "
            "heads, neurons or kan_nodes"
        )
    backend = detect_backend(model, None)
    if backend.world_size > 1:
        raise ValueError(
            f"smallest_budget runs in one process, and here are {backend.world_size}, whose losses differ: "
            "call it on a gathered checkpoint (emp prune --tolerance)"
        )
    return Refresher(once, Observe(), backend)


def _loss(model: nn.Module, shown: Sequence[Any], loss_fn: LossFunction) -> float:
    """Return the mean loss; every call draws the same random numbers."""
    with random_numbers_kept():
        return mean_loss(lambda: (loss_fn(model, batch) for batch in shown))


def _selections(
    refresher: Refresher, model: nn.Module, shown: Sequence[Any], loss_fn: LossFunction
) -> Callable[[float], Selection]:
    """Return what says what is kept at any beta, after showing the criterion what it reads of data."""
    needs, evidence = refresher.criterion.needs, refresher.evidence
    try:
        if needs:
            evidence.attach()
            evidence.observe(True, in_eval=True)
        with random_numbers_kept():
            for batch in shown if needs else ():
                with torch.set_grad_enabled(needs == "gradients"):
                    loss = loss_fn(model, batch)
                if needs == "gradients":
                    loss.backward()  # type: ignore[no-untyped-call]
                    refresher.collect({id(weight.segment.owner) for weight in refresher.weights})
                    model.zero_grad()
        return refresher.selections()
    finally:
        evidence.detach()


def _zero(refresher: Refresher, masks: Mapping[str, Tensor]) -> int:
    """Zero what the masks prune, and return how many values were not 0 before."""
    zeroed = 0
    for weight in refresher.weights:
        if weight.name in masks:
            values = weight.weight
            before = int(values.count_nonzero())
            zero_pruned(values, masks[weight.name])
            zeroed += before - int(values.count_nonzero())
    return zeroed


def _digest(chosen: Selection) -> bytes:
    """Return what tells masks apart: betas that keep the same need no second measurement."""
    digest = hashlib.blake2b()
    for mask in chosen.masks.values():
        digest.update(pack_bits(mask).numpy().tobytes())
    return digest.digest()
