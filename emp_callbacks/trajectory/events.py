"""What one refresh says of one group: a row, and its way to plain JSON types and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any


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
        """Return the layer of a row that `PruneEvent.record()` wrote.

        Raises:
            KeyError, TypeError: It is none.
        """
        return cls(**{**record, "certificate": _certificate(record)})


@dataclass(frozen=True, kw_only=True)
class GateStats:
    """How the learned gates of a group's heads stand.

    Attributes:
        open: Gates that are open rather than closed, P(open) > 1/2.
        expected: Expected number of open gates, the sum of P(open).
        target: How many are to be open by now.
        entropy: Mean over gates of how undecided they are, in bits: 0 where each is always open or never.
    """

    open: int
    expected: float
    target: float
    entropy: float


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One refresh of one group: a row of the trajectory.

    Attributes:
        step: Optimizer steps finished.
        epoch: Epoch that the step belongs to, from 0.
        group: "global" or the layer's name.
        mode: "feedback", "project", "freeze", "rewire", or "observe" (measured, not pruned).
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
        gates: With `gates`: how they stand; `keep` and `density` then count what is open when hardened. Else None.
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
    gates: GateStats | None = None

    def record(self) -> dict[str, Any]:
        """Return the row as plain JSON types."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PruneEvent:
        """Return the row that `record()` wrote.

        Raises:
            KeyError, TypeError: It is none.
        """
        layers = tuple(LayerStats.from_record(layer) for layer in record["layers"])
        gates = None if record.get("gates") is None else GateStats(**record["gates"])
        return cls(**{**record, "layers": layers, "certificate": _certificate(record), "gates": gates})


def _certificate(record: dict[str, Any]) -> Certificate | None:
    found = record.get("certificate")
    return None if found is None else Certificate(**found)


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "None": (NoneType,)}
_FIELDS: dict[type, list[tuple[str, tuple[type, ...]]]] = {}


def check_types(row: Certificate | GateStats | LayerStats | PruneEvent) -> None:
    """Raise TypeError unless a row's numbers are numbers and its words are words, down to its certificates."""
    if type(row) not in _FIELDS:
        kinds = [(f.name, [_KINDS.get(kind, (object,)) for kind in str(f.type).split(" | ")]) for f in fields(row)]
        _FIELDS[type(row)] = [(name, sum(allowed, ())) for name, allowed in kinds]
    for name, allowed in _FIELDS[type(row)]:
        value = getattr(row, name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and object not in allowed):
            raise TypeError(f"{name} is {value!r}")
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, (Certificate, GateStats, LayerStats)):
                check_types(part)
