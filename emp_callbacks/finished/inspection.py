"""`emp inspect`: what EMP would keep of weights in a file or of a timm model, without training anything."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from emp_callbacks.backends import detect_backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.checkpoint.reading import (
    as_module,
    callback_states,
    prunable_by_name,
    read_checkpoint,
    scored_weights,
)
from emp_callbacks.checkpoint.state_dicts import find_weights
from emp_callbacks.config import EMPConfig
from emp_callbacks.extras import needs
from emp_callbacks.finished.transformers_folder import built_from, can_be_built
from emp_callbacks.layer import WeightLayer
from emp_callbacks.layer.mask_mode import Observe
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.pruning.readings import surprising
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.streamed_refresh import Observed, StreamedLayer, observe_streamed
from emp_callbacks.terminal import FittedTable

__all__ = [
    "LoadedModel",
    "Read",
    "WeightReport",
    "chosen_by_name",
    "inspect_model",
    "load_model",
    "report_json",
    "report_table",
]

_BOUNDS = {"mass_bound": "paper's bound", "tight_mass_bound": "tight bound"}  # on the mass kept

Read = Callable[[nn.Parameter], Tensor]
"""Returns the values of a parameter, which itself may hold none."""


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """What EMP finds in one tensor, or in all of them together.

    Attributes:
        name: Parameter name, or "all".
        shape: Shape of the tensor; empty for the total.
        n: Components.
        density: Share of components that are not zero now, in [0, 1].
        n_eff: Effective number, in components (scope row: summed over rows).
        n_eff_fraction: n_eff / n.
        keep: Components that EMP would keep.
        preserved_mass: Share of the score mass in the kept components, in [0, 1].
        mass_bound: The paper's lower bound on it where that holds, else None.
        tight_mass_bound: The lower bound that N_eff itself gives, else None.
    """

    name: str
    shape: tuple[int, ...]
    n: int
    density: float
    n_eff: float
    n_eff_fraction: float
    keep: int
    preserved_mass: float
    mass_bound: float | None
    tight_mass_bound: float | None


class LoadedModel(NamedTuple):
    """Weights to inspect, the names to look at (None: the rule of training) and what a reader must know."""

    module: nn.Module
    include: list[str] | None
    notes: list[str]


def _itself(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def _unheard(i: int, count: int) -> None:
    pass


def inspect_model(
    module: nn.Module,
    *,
    beta: float = 1.0,
    scope: str = "global",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    read: Read = _itself,
    on_read: Callable[[int, int], None] = _unheard,
) -> list[WeightReport]:
    """Return one row per scored tensor and a last row "all"; nothing is changed.

    One tensor is looked at at a time, with scope "global" each of them several times.

    Args:
        module: Any module.
        beta: Factor on N_eff, > 0.
        scope: "global", "tensor" or "row"; with "global" the tensors compete and `keep` is each one's part.
        include: Glob patterns on parameter names that replace the default choice.
        exclude: Glob patterns on parameter names to leave out.
        read: Returns the values of a parameter of `module`, see `stream_model`; default: what it holds.
        on_read: Told before each read which scored tensor it is, from 0, and how many there are.

    Raises:
        ValueError: An option is invalid, or no parameter is left.
        FloatingPointError: A weight is NaN or Inf.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0, 0.0, 0.0]]))
        >>> [(row.name, row.n_eff, row.keep, row.density) for row in inspect_model(layer)]
        [('weight', 1.6, 1, 0.5), ('all', 1.6, 1, 0.5)]
    """
    config = EMPConfig(observe_only=True, beta=beta, scope=scope, include=include, exclude=exclude)
    backend = detect_backend(module, None)
    refresher = Refresher(config, Observe(), backend)
    if told := surprising(refresher.left_out, sum(parameter.numel() for parameter in module.parameters())):
        warn_the_user(told)
    scored = [layer for layer in refresher.layers if isinstance(layer, WeightLayer)]

    def streamed(i: int, layer: WeightLayer) -> StreamedLayer:
        def make() -> Tensor:
            on_read(i, len(scored))
            return _scores(layer, read)

        return StreamedLayer(layer.span, layer.segment.owner.dtype, make)

    layers = [streamed(i, layer) for i, layer in enumerate(scored)]
    rule = KeepRule(beta=config.beta_at(0))
    common = {
        "step": 0,
        "epoch": 0,
        "mode": "observe",
        "criterion": config.criterion_name,
        "scope": scope,
        "beta": beta,
    }
    found = observe_streamed(layers, rule, backend, common)
    refresher.warn_once([group.event for group in found])
    shapes = {layer.span.name: tuple(layer.span.shape) for layer in layers}
    rows = [_row(group, i, shapes) for group in found for i in range(len(group.sums))]
    return [*rows, _total(rows, found)]


def _scores(layer: WeightLayer, read: Read) -> Tensor:
    """Return the weights whose magnitudes are the scores of a layer."""
    owner, normed = layer.segment.owner, layer.normed
    assert isinstance(owner, nn.Parameter)
    values = read(owner)
    if normed is None:
        return values
    gain, direction = (nn.Parameter(one, requires_grad=False) for one in (read(normed.gain), values))
    return values * normed._replace(gain=gain, direction=direction).factor()


def load_model(source: str, *, pretrained: bool = False) -> LoadedModel:
    """Return the weights behind `source`: a checkpoint file, a Hugging Face folder, or timm:NAME.

    Files are read as tensors only; code in them never runs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds no weights or needs code, or timm has no such model.
    """
    if source.startswith("timm:"):
        return _load_timm(source.removeprefix("timm:"), pretrained)
    if pretrained:
        raise ValueError(f"--pretrained goes with timm:NAME; {source} already holds its weights")
    notes = []
    if can_be_built(source):
        try:
            return LoadedModel(built_from(source), None, [])
        except ValueError as error:
            notes = [str(error)]
    checkpoint = read_checkpoint(Path(source))
    state, found = find_weights(checkpoint, source)
    include, told = chosen_by_name(state, source, callback_states(checkpoint), notes)
    return LoadedModel(as_module(state), include, [*found, *told])


def chosen_by_name(
    state: Mapping[str, Tensor], source: str, runs: Iterable[Mapping[str, Any]] = (), notes: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return patterns of the weights to look at where there are no modules, and what a reader must know.

    Args:
        state: The weights, or tensors of their shapes.
        source: Where they are from.
        runs: States of the EMPCallbacks in a Lightning checkpoint.
        notes: Why there are no modules.

    Raises:
        ValueError: No name is that of a weight matrix.
    """
    if scored := scored_weights(state, runs):
        return [glob.escape(name) for name in scored], []
    names = prunable_by_name(state)
    if not names:
        raise ValueError(f"{source} holds no weight matrices by name; choose some with --include 'PATTERN'")
    why = notes or ["no modules in the file"]
    return [glob.escape(name) for name in names], [f"{why[0]}: embeddings and norms were told apart by their names"]


def report_table(rows: Sequence[WeightReport], title: str) -> FittedTable:
    """Return the rows for a terminal, the total last; bounds that hold for the total alone stand below."""
    *tensors, total = rows
    bounds = [key for key in _BOUNDS if any(getattr(row, key) is not None for row in tensors)]
    below = [
        f">= {bound:.4f} ({_BOUNDS[key]})"
        for key in _BOUNDS
        if key not in bounds and (bound := getattr(total, key)) is not None
    ]
    caption = f"mass kept of all: {total.preserved_mass:.4f} {', '.join(below)}" if below else ""
    table = FittedTable(title, caption=caption, more="--json FILE writes all")
    for heading, worth in (("parameter", 0), ("shape", 5), ("N", 2), ("non-zero", 7 if total.density == 1 else 3)):
        table.add_column(heading, worth=worth)
    for heading, worth in (("N_eff", 6), ("N_eff/N", 0), ("keep", 0), ("mass kept", 1)):
        table.add_column(heading, worth=worth)
    for key in bounds:
        table.add_column(_BOUNDS[key], worth=4)
    for row in rows:
        if row is total:
            table.add_section()
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.n:,}",
            f"{row.density:.3f}",
            f"{row.n_eff:,.1f}",
            f"{row.n_eff_fraction:.3f}",
            f"{row.keep:,}",
            f"{row.preserved_mass:.4f}",
            *("-" if (bound := getattr(row, key)) is None else f"{bound:.4f}" for key in bounds),
        )
    return table


def report_json(rows: Iterable[WeightReport], **settings: Any) -> str:
    """Return settings and rows as JSON text."""
    return json.dumps({**settings, "tensors": [asdict(row) for row in rows]}, indent=1) + "\n"


def _row(found: Observed, i: int, shapes: Mapping[str, tuple[int, ...]]) -> WeightReport:
    event, layer = found.event, found.event.layers[i]
    n_eff = event.n_eff if event.scope == "row" else layer.n_eff
    return WeightReport(
        name=layer.name,
        shape=shapes[layer.name],
        n=layer.n,
        density=found.nonzero[i] / layer.n,
        n_eff=n_eff,
        n_eff_fraction=n_eff / layer.n,
        keep=layer.keep,
        preserved_mass=layer.preserved_mass,
        mass_bound=event.mass_bound if event.scope == "tensor" else None,
        tight_mass_bound=event.tight_mass_bound if event.scope != "global" else None,
    )


def _total(rows: Sequence[WeightReport], groups: Sequence[Observed]) -> WeightReport:
    n, keep = sum(row.n for row in rows), sum(row.keep for row in rows)
    events = [group.event for group in groups]
    n_eff = sum(event.n_eff for event in events)
    masses = [sums.mass for group in groups for sums in group.sums]
    kept = sum(row.preserved_mass * mass for row, mass in zip(rows, masses, strict=True))
    pooled = len(events) == 1
    return WeightReport(
        name="all",
        shape=(),
        n=n,
        density=sum(row.density * row.n for row in rows) / n,
        n_eff=n_eff,
        n_eff_fraction=n_eff / n,
        keep=keep,
        preserved_mass=events[0].preserved_mass if pooled else kept / (sum(masses) or 1.0),
        mass_bound=events[0].mass_bound if pooled else None,
        tight_mass_bound=events[0].tight_mass_bound if pooled else None,
    )


def _load_timm(name: str, pretrained: bool) -> LoadedModel:
    needs(f"timm:{name}", "study", "timm")
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"unknown timm model {name!r}; nearest names: {', '.join(near) or 'none'}")
    try:
        module = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm could not load {name!r} (pretrained={pretrained}): {error}") from error
    notes = [] if pretrained else ["the weights are randomly initialised; add --pretrained for timm's own"]
    return LoadedModel(module, None, notes)
