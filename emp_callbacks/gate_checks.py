"""Checks of the settings of learned gates, of an EMPConfig: each names the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emp_callbacks.layer.head_gates import KINDS
from emp_callbacks.schedule import Ramp, check_count
from emp_callbacks.setting_checks import check_choice

GATES_ALONE: dict[str, Any] = {"gates": None, "init": "emp", "gate_lr": 0.1, "gate_warmup": 100}
"""The settings that mean nothing without gates, as they are then."""


def check_gates(config: Any) -> None:
    """Raise ValueError where the settings of gates are invalid, or something else means nothing beside them."""
    if config.gates is None:
        given = [f"{name}={value!r}" for name in GATES_ALONE if (value := getattr(config, name)) != GATES_ALONE[name]]
        if given:
            raise ValueError(f"{', '.join(given)}: of learned gates; set gates='hard_concrete' or 'top_k', or drop it")
        return
    check_choice("gates", config.gates, KINDS)
    _check_beside(config)
    if not (isinstance(config.gate_lr, (int, float)) and 0 < config.gate_lr < math.inf):
        raise ValueError(f"gate_lr must be a number > 0, got {config.gate_lr!r}")
    check_count("gate_warmup", config.gate_warmup, least=0)
    _check_init(config.init)
    schedule = config.schedule
    if schedule.unit is not None and schedule.next_after(schedule.first) is None:
        raise ValueError(
            f"gates begin at the first refresh and become masks at the last, and {schedule.told} is one alone: raise "
            "stop, or drop it: they then learn until training ends"
        )


def _check_beside(config: Any) -> None:
    if config.target != "heads":
        raise ValueError(
            f"gates={config.gates!r} are those of attention heads: target={config.target!r} must be 'heads'"
        )
    for name, value in {"dynamic": False, "observe_only": False, "certify": False, "min_density": 0.0}.items():
        if (given := getattr(config, name)) != value:
            raise ValueError(f"{name}={given!r} means nothing beside gates={config.gates!r}, which learn: drop one")
    for name in ("beta", "density"):
        if isinstance(getattr(config, name), Ramp):
            raise ValueError(f"{name} is a Ramp, and gates count by a warm-up of their own: give a number; gate_warmup")


def _check_init(init: Any) -> None:
    if not isinstance(init, Mapping):
        check_choice("init", init, ("emp", "open"))
        return
    for name, values in init.items():
        numbers = isinstance(values, Sequence) and not isinstance(values, str) and all(map(_is_inside, values))
        if not numbers:
            raise ValueError(f"init[{name!r}] must be P(open) of each head, numbers in (0, 1), got {values!r}")


def _is_inside(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 1
