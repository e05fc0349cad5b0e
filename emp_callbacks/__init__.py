"""Effective Model Pruning during training: N_eff, masks and their life in a training loop.

Source: Wang, Guralnik, Akbari, Dixon, "Effective Model Pruning", arXiv:2509.25606.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.bounds import mass_bound
from emp_callbacks.core.effective_number import effective_number, keep_count
from emp_callbacks.core.selection import emp_mask, preserved_mass
from emp_callbacks.pruner import EMPPruner
from emp_callbacks.schedule import BetaSchedule
from emp_callbacks.trajectory import PruneEvent, Trajectory

if TYPE_CHECKING:
    from emp_callbacks.integrations.lightning import EMPCallback
    from emp_callbacks.metrics import EffectiveNumber

__version__ = "0.1.0"

__all__ = [
    "BetaSchedule",
    "EMPCallback",
    "EMPConfig",
    "EMPPruner",
    "EffectiveNumber",
    "PruneEvent",
    "Trajectory",
    "effective_number",
    "emp_mask",
    "keep_count",
    "mass_bound",
    "preserved_mass",
]

# Importing Lightning or torchmetrics costs seconds: only those who ask for these names pay.
_LAZY = {"EMPCallback": "emp_callbacks.integrations.lightning", "EffectiveNumber": "emp_callbacks.metrics"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
