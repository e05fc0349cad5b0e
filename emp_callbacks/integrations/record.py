"""What hosts share of a callback's record: its name among others, its file, the numbers that loggers get."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets import LeftOut
from emp_callbacks.terminal import any_output, make_console
from emp_callbacks.trajectory import PruneEvent, layer_table

TRAJECTORY_FILE = "emp_trajectory.jsonl"


class HostCallback:
    """What a user reads of a callback, whatever host it stands in.

    Attributes:
        pruner: The EMPPruner of the current or last training; None before the first.
    """

    pruner: EMPPruner | None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask, True = kept, see `EMPPruner.masks`; empty before the first training."""
        return {} if self.pruner is None else self.pruner.masks

    @property
    def left_out(self) -> list[LeftOut]:
        """Every parameter that is not pruned: its name, why not, and its size; empty before the first training."""
        return [] if self.pruner is None else self.pruner.left_out

    def print_summary(self) -> None:
        """Print the table of the last refresh, and what is left out."""
        if self.pruner is None or not (events := self.pruner.last_events):
            return
        with any_output():
            console = make_console()
            console.print(layer_table(events))
            if told := self.pruner.left_out_line:
                console.print(told, highlight=False)


def check_record(trajectory_path: Any, summary: Any, name: Any) -> None:
    """Raise ValueError unless these say where a callback's rows and numbers go."""
    if trajectory_path is not None and not isinstance(trajectory_path, (str, os.PathLike)):
        raise ValueError(f"trajectory_path must be a path, a URL or None, got {trajectory_path!r}")
    if not isinstance(summary, bool):
        raise ValueError(f"summary must be True or False, got {summary!r}")
    if name is not None and (not isinstance(name, str) or "/" in name or "\\" in name):
        raise ValueError(f"name must be a string that can be part of a file's name (no slashes) or None, got {name!r}")


def own_name(callback: Any, callbacks: Sequence[Any]) -> str:
    """Return what tells a callback's file and numbers from those of others in the Trainer; "" where it is alone.

    Args:
        callback: The callback.
        callbacks: All EMPCallbacks of the Trainer, in order.
    """
    if callback.name is not None or len(callbacks) < 2:
        return callback.name or ""
    named = [other.name or other.config.target for other in callbacks]
    mine = next(i for i, other in enumerate(callbacks) if other is callback)
    before = named[:mine].count(named[mine])
    return named[mine] if not before else f"{named[mine]}-{before + 1}"


def file_name(name: str) -> str:
    """Return the name of the trajectory file of a callback of that name."""
    return TRAJECTORY_FILE if not name else TRAJECTORY_FILE.replace(".", f"_{name}.")


def log_values(events: Sequence[PruneEvent], name: str = "") -> dict[str, float]:
    """Return what loggers get of one refresh: `emp/density`, `emp/n_eff`, ... and per group `emp/density/NAME`.

    Args:
        events: Its rows.
        name: Of the callback, where several log: `emp/NAME/density`.
    """
    first = f"emp/{name}" if name else "emp"
    n, n_eff = sum(e.n for e in events), sum(e.n_eff for e in events)
    values = {
        f"{first}/density": density(events),
        f"{first}/n_eff": n_eff,
        f"{first}/n_eff_fraction": n_eff / n,
        f"{first}/keep": float(sum(e.keep for e in events)),
        f"{first}/churn": sum(e.churn * e.n for e in events) / n,
        f"{first}/regrown": float(sum(e.regrown for e in events)),
        f"{first}/seconds": events[0].seconds,
    }
    for e in events:
        suffix = "" if e.group == "global" else f"/{e.group}"
        measured = {
            "preserved_mass": e.preserved_mass,
            "threshold": e.threshold,
            "beta": e.beta,
            "mass_bound": e.mass_bound,
            "tight_mass_bound": e.tight_mass_bound,
            "certified_loss_change": e.certificate.bound if e.certificate else None,
        }
        if e.gates is not None:
            measured |= {f"gates_{key}": value for key, value in asdict(e.gates).items()}
        if suffix:
            measured |= {"density": e.density, "n_eff_fraction": e.n_eff_fraction}
        values |= {f"{first}/{key}{suffix}": value for key, value in measured.items() if value is not None}
        values |= {f"{first}/first_token/{x.name}": x.first_token for x in e.layers if x.first_token is not None}
        for layer in e.layers:
            if layer.certificate is not None and layer.certificate.scale:
                certified, found = layer.certificate.relative
                values |= {
                    f"{first}/certified_error/{layer.name}": certified,
                    f"{first}/measured_error/{layer.name}": found or 0.0,
                }
    return values


def density(events: Sequence[PruneEvent]) -> float:
    """Return the kept share of what one refresh scored."""
    return sum(e.keep for e in events) / sum(e.n for e in events)
