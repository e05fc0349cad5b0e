"""Effective Model Pruning during training: N_eff, masks and their life in a training loop.

Source: Wang, Guralnik, Akbari, Dixon, "Effective Model Pruning", arXiv:2509.25606.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emp_callbacks.config import EMPConfig
    from emp_callbacks.core.bounds import mass_bound, tight_mass_bound
    from emp_callbacks.core.effective_number import effective_number, keep_count
    from emp_callbacks.core.selection import emp_mask, preserved_mass
    from emp_callbacks.distillation import Distillation
    from emp_callbacks.integrations.deepspeed import EMPHook
    from emp_callbacks.integrations.huggingface import EMPTrainerCallback
    from emp_callbacks.integrations.lightning import EMPCallback
    from emp_callbacks.integrations.torchmetrics import EffectiveNumber
    from emp_callbacks.layer import MissingEvidence
    from emp_callbacks.layer.head_gates import HeadGates
    from emp_callbacks.pruning.pruner import EMPPruner
    from emp_callbacks.schedule import Ramp
    from emp_callbacks.shrinking import load_shrunk, pruned_units, save_shrunk, shrink
    from emp_callbacks.shrinking.semi_structured import to_semi_structured
    from emp_callbacks.targets import AttentionLayout, check_attention, register_attention
    from emp_callbacks.trajectory import PruneEvent, Trajectory

__version__ = "0.2.0"

# Imported at first use: torch and Lightning cost seconds that `emp --help` need not pay, nor a plain loop Lightning.
_HOMES = {
    "AttentionLayout": "targets",
    "Distillation": "distillation",
    "Ramp": "schedule",
    "EMPCallback": "integrations.lightning",
    "EMPConfig": "config",
    "EMPHook": "integrations.deepspeed",
    "EMPPruner": "pruning.pruner",
    "EMPTrainerCallback": "integrations.huggingface",
    "EffectiveNumber": "integrations.torchmetrics",
    "HeadGates": "layer.head_gates",
    "MissingEvidence": "layer",
    "PruneEvent": "trajectory",
    "Trajectory": "trajectory",
    "check_attention": "targets",
    "effective_number": "core.effective_number",
    "emp_mask": "core.selection",
    "keep_count": "core.effective_number",
    "load_shrunk": "shrinking",
    "mass_bound": "core.bounds",
    "preserved_mass": "core.selection",
    "pruned_units": "shrinking",
    "register_attention": "targets",
    "save_shrunk": "shrinking",
    "shrink": "shrinking",
    "tight_mass_bound": "core.bounds",
    "to_semi_structured": "shrinking.semi_structured",
}

__all__ = [
    "AttentionLayout",
    "Distillation",
    "EMPCallback",
    "EMPConfig",
    "EMPHook",
    "EMPPruner",
    "EMPTrainerCallback",
    "EffectiveNumber",
    "HeadGates",
    "MissingEvidence",
    "PruneEvent",
    "Ramp",
    "Trajectory",
    "check_attention",
    "effective_number",
    "emp_mask",
    "keep_count",
    "load_shrunk",
    "mass_bound",
    "preserved_mass",
    "pruned_units",
    "register_attention",
    "save_shrunk",
    "shrink",
    "tight_mass_bound",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
