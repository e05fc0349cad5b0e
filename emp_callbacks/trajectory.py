"""The rows of a run: one PruneEvent per refresh and group, in memory and as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What pruning can have changed at most, proved from the data of the evidence window (`certify=True`).

    Attributes:
        kind: "output_error": l2 norm of the change of a layer's outputs over all gathered tokens, samples and pixels,
            given the layer's inputs. "loss_change": change of the loss to first order, mean over the gathered batches.
        bound: The guarantee, in units of the layer's outputs or of the loss, >= 0.
        measured: What it bounds, on the same data: |measured| <= bound, a change of the loss with its sign. None where
            what it takes was not gathered.
        scale: Of "output_error" the l2 norm of the unpruned outputs, where it was measured: bound / scale is relative.
        tightness: Of "output_error" the largest measured / bound of one output unit, in [0, 1] up to rounding.

    Source: triangle inequality, docs/certificates.md.
    """

    kind: str
    bound: float
    measured: float | None = None
    scale: float | None = None
    tightness: float | None = None

    @property
    def says(self) -> str:
        """What is bounded, in words."""
        return {"output_error": "output error", "loss_change": "loss change"}[self.kind]

    @property
    def relative(self) -> tuple[float, float | None]:
        """Bound and measured, where a scale is known as fractions of it."""
        scale = self.scale or 1.0
        return self.bound / scale, None if self.measured is None else self.measured / scale


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """One layer at one refresh. Where every sample (or query row) has its own mask: means over them.

    Attributes:
        name: Name of the parameter, or of the module whose heads, neurons, nodes, features or edges are scored.
        n: Components.
        n_eff: The layer's own N_eff, in components.
        keep: Components kept.
        density: keep / n.
        preserved_mass: Share of the layer's score mass that is kept, in [0, 1].
        first_token: Of attention edges: the softmax weight of the first key before pruning, averaged over the queries
            that can read another one (an attention sink takes much of it); else None.
        certificate: With `certify=True`, what pruning the layer can have changed; else None.
    """

    name: str
    n: int
    n_eff: float
    keep: int
    density: float
    preserved_mass: float
    first_token: float | None = None
    certificate: Certificate | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> LayerStats:
        """Return the layer of a row that `PruneEvent.record()` wrote."""
        return cls(**{**record, "certificate": _certificate(record)})


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One refresh of one group: a row of the trajectory.

    Attributes:
        step: Optimizer steps finished.
        epoch: Epoch that the step belongs to, from 0.
        group: "global" or the layer's name.
        mode: "feedback", "project", "freeze", or "observe" (measured, not pruned).
        criterion: How components were scored.
        scope: "global", "tensor" or "row"; "sample" where every sample or query row has its own mask: the numbers are
            then means since the last refresh, and `threshold` is 0.
        beta: Factor on N_eff at this refresh; None where a fixed density decided.
        n: Components of the group.
        n_eff: Effective number, in components; with scope "row" the sum over rows.
        n_eff_fraction: n_eff / n.
        keep: Components kept.
        threshold: Lowest kept score.
        density: keep / n.
        preserved_mass: s_eff, share of the score mass that is kept, in [0, 1].
        mass_bound: The paper's lower bound on it where that holds (beta = 1, 2 <= keep <= n - 1), else None.
        tight_mass_bound: The lower bound that N_eff itself gives, for every beta; scope "row": mean over rows, weighted
            by their mass. None where other than the highest scores are kept (`min_units`), or each sample has its mask.
        churn: Share of mask bits that flipped since the last refresh (before the first all are kept).
        regrown: Components that were pruned and are kept again.
        seconds: Wall time of the refresh (shared by the groups of one refresh).
        note: What was out of the ordinary; empty if nothing.
        layers: Every layer of the group.
        certificate: With `certify=True` and a criterion that speaks of the loss: of the whole group; else None.
    """

    step: int
    epoch: int
    group: str
    mode: str
    criterion: str
    scope: str
    beta: float | None
    n: int
    n_eff: float
    n_eff_fraction: float
    keep: int
    threshold: float
    density: float
    preserved_mass: float
    mass_bound: float | None
    churn: float
    regrown: int
    seconds: float
    note: str
    layers: tuple[LayerStats, ...]
    tight_mass_bound: float | None = None
    certificate: Certificate | None = None

    def record(self) -> dict[str, Any]:
        """Return the row as plain JSON types."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PruneEvent:
        """Return the row that `record()` wrote."""
        layers = tuple(LayerStats.from_record(layer) for layer in record["layers"])
        return cls(**{**record, "layers": layers, "certificate": _certificate(record)})


def _certificate(record: dict[str, Any]) -> Certificate | None:
    found = record.get("certificate")
    return None if found is None else Certificate(**found)


class Trajectory(Sequence[PruneEvent]):
    """The rows of one run, oldest first; with a path, each is on disk before the next step.

    Args:
        path: JSON-lines file, or None for memory only. It is opened for appending at once, so that a folder that
            cannot be written is an error before training; rows of an older run in it are set aside as `NAME.1`,
            `NAME.2`, ... at the first row of this one.

    Raises:
        OSError: The file cannot be created or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._events: list[PruneEvent] = []
        self._owns_file = False
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()

    @overload
    def __getitem__(self, index: int) -> PruneEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[PruneEvent]: ...
    def __getitem__(self, index: int | slice) -> PruneEvent | list[PruneEvent]:
        return self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def records(self) -> list[dict[str, Any]]:
        """Return all rows as plain JSON types."""
        return [event.record() for event in self._events]

    def extend(self, events: Iterable[PruneEvent]) -> None:
        """Append rows; they are flushed to the file in one write, so a kill leaves whole rows and at most one torn."""
        new = list(events)
        if self.path is not None and new:
            self._own_file()
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(event) for event in new))
        self._events.extend(new)

    def restore(self, records: Iterable[dict[str, Any]]) -> None:
        """Become the trajectory that a checkpoint holds; rows that the file has beyond it are set aside."""
        events = [PruneEvent.from_record(record) for record in records]
        if self.path is not None:
            text = "".join(_line(event) for event in events)
            if self.path.read_text(encoding="utf-8") != text:
                self._own_file()
                partial = self.path.with_name(self.path.name + ".partial")
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, self.path)
            self._owns_file = True
        self._events = events  # last: a file that cannot be written changes nothing

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Return the rows of a JSON-lines file; a last row torn by a kill is left out.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A row other than the last is not a PruneEvent.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        trajectory = cls()
        for number, line in enumerate(lines, start=1):
            try:
                trajectory._events.append(PruneEvent.from_record(json.loads(line)))
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise ValueError(f"{path}, line {number}: not a row of a trajectory ({error})") from error
        return trajectory

    def _own_file(self) -> None:
        """Set aside what another run left in the file."""
        if self.path is None or self._owns_file:
            return
        if self.path.exists() and self.path.stat().st_size:
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            os.replace(self.path, aside)
        self._owns_file = True


def _line(event: PruneEvent) -> str:
    return json.dumps(event.record()) + "\n"


def layer_table(events: Sequence[PruneEvent]) -> Table:
    """Return the per-layer table of one refresh for a terminal: N, N_eff, kept, density, preserved mass."""
    first = events[0]
    title = f"EMP at step {first.step}: {first.criterion}, scope {first.scope}, mode {first.mode}"
    table = Table(title=title, title_justify="left", show_footer=True)
    n, keep = sum(event.n for event in events), sum(event.keep for event in events)
    table.add_column("layer", footer="all", overflow="fold")
    table.add_column("N", justify="right", footer=f"{n:,}")
    table.add_column("N_eff / N", justify="right", footer=f"{sum(event.n_eff for event in events) / n:.3f}")
    table.add_column("kept", justify="right", footer=f"{keep:,}")
    table.add_column("density", justify="right", footer=f"{keep / n:.3f}")
    table.add_column("mass kept", justify="right", footer=_mass_footer(events))
    if any(layer.first_token is not None for event in events for layer in event.layers):
        table.add_column("first token", justify="right")
    certificates = [layer.certificate for event in events for layer in event.layers if layer.certificate is not None]
    if certificates:
        total = certified_loss_change(events)
        table.add_column(f"{certificates[0].says} <=", justify="right", footer="" if total is None else f"{total:.4g}")
        table.add_column("measured", justify="right")
    for layer in (layer for event in events for layer in event.layers):
        sizes = (f"{layer.n:,}", f"{layer.n_eff / layer.n:.3f}", f"{layer.keep:,}", f"{layer.density:.3f}")
        sink = () if layer.first_token is None else (f"{layer.first_token:.3f}",)
        proved = certificate_cells(layer.certificate) if certificates else ()
        table.add_row(layer.name, *sizes, f"{layer.preserved_mass:.3f}", *sink, *proved)
    return table


def _mass_footer(events: Sequence[PruneEvent]) -> str:
    """Return the preserved mass of a single group and what is guaranteed of it."""
    bound = events[0].tight_mass_bound
    if len(events) > 1 or bound is None:
        return ""
    return f"{events[0].preserved_mass:.3f} >= {bound:.3f}"


def certificate_cells(certificate: Certificate | None) -> tuple[str, str]:
    """Return what is guaranteed and what was measured as text: errors of outputs relative, in percent."""
    if certificate is None:
        return "-", "-"
    form = ".1%" if certificate.scale else ".4g"
    bound, measured = certificate.relative
    return f"{bound:{form}}", "-" if measured is None else f"{measured:{form}}"


def certified_loss_change(events: Sequence[PruneEvent]) -> float | None:
    """Return the bound over the groups of one refresh; None if no certificate speaks of the loss."""
    found = [event.certificate.bound for event in events if event.certificate is not None]
    return sum(found) if found else None
