"""How to score: one file is one formula and one small class."""

from emp_callbacks.criteria.activation import Activation
from emp_callbacks.criteria.attention import AttentionLogit, AttentionWeight
from emp_callbacks.criteria.base import Criterion, ScoreFunction, UserCriterion
from emp_callbacks.criteria.bn_scale import BnScale
from emp_callbacks.criteria.magnitude import Magnitude
from emp_callbacks.criteria.output_norm import OutputNorm
from emp_callbacks.criteria.random import Random
from emp_callbacks.criteria.reap import Reap
from emp_callbacks.criteria.saliency import Saliency
from emp_callbacks.criteria.spline import Spline
from emp_callbacks.criteria.taylor import Taylor
from emp_callbacks.criteria.wanda import Wanda
from emp_callbacks.criteria.weight_norm import WeightNorm
from emp_callbacks.targets.dotted_path import function_at

CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": Magnitude,
    "weight_norm": WeightNorm,
    "taylor": Taylor,
    "saliency": Saliency,
    "wanda": Wanda,
    "activation": Activation,
    "output_norm": OutputNorm,
    "bn_scale": BnScale,
    "reap": Reap,
    "spline": Spline,
    "attention_weight": AttentionWeight,
    "attention_logit": AttentionLogit,
    "random": Random,
}

DEFAULT_CRITERIA = {
    "weights": "magnitude",
    "heads": "weight_norm",
    "neurons": "weight_norm",
    "experts": "reap",
    "kan_nodes": "spline",
    "features": "activation",
    "attention_edges": "attention_weight",
}


def fitting_criteria(target: str) -> tuple[str, ...]:
    """Return the names of the criteria that can score a target."""
    return tuple(name for name, criterion in CRITERIA.items() if target in criterion.targets)


def make_criterion(criterion: str | ScoreFunction | None, target: str) -> Criterion:
    """Return the criterion of a name, of "module.function", of a function or an instance; None: the target's default.

    Raises:
        ValueError: It is unknown, or does not fit the target; the message lists those that do.
        TypeError: It is neither a name nor a function.
    """
    chosen = DEFAULT_CRITERIA[target] if criterion is None else criterion
    if isinstance(chosen, str) and chosen not in CRITERIA and "." in chosen:
        chosen = function_at(chosen, "criterion")
    if isinstance(chosen, str):
        found = CRITERIA.get(chosen)
        if found is None or target not in found.targets:
            problem = "is unknown" if found is None else f"does not fit target {target!r}"
            raise ValueError(
                f"criterion {chosen!r} {problem}; criteria for {target}: {', '.join(fitting_criteria(target))}, or a "
                "function of your own (in a recipe 'module.function')"
            )
        return found()
    if isinstance(chosen, type):
        raise TypeError(
            f"criterion is the class {chosen.__name__}: give an instance, {chosen.__name__}(), or a function"
        )
    made = chosen if isinstance(chosen, Criterion) else UserCriterion(chosen) if callable(chosen) else None
    if made is None:
        raise TypeError(f"criterion must be a name or a function, got {type(chosen).__name__}")
    if target not in made.targets:
        raise ValueError(
            f"{type(made).__name__} fits {', '.join(made.targets)}, not target {target!r}; criteria for {target}: "
            f"{', '.join(fitting_criteria(target))}"
        )
    return made


def criterion_name(criterion: str | ScoreFunction | None, target: str) -> str:
    """Return the name under which a criterion is logged and checkpointed."""
    if criterion is None:
        return DEFAULT_CRITERIA[target]
    if isinstance(criterion, str):
        return criterion
    named = type(criterion) if isinstance(criterion, Criterion) else criterion
    return str(getattr(named, "__qualname__", type(criterion).__name__))


__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERIA",
    "Criterion",
    "ScoreFunction",
    "UserCriterion",
    "criterion_name",
    "fitting_criteria",
    "make_criterion",
]
