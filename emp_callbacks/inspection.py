"""`emp inspect`: what EMP would keep of weights in a file or of a timm model, without training anything."""

from __future__ import annotations

import difflib
import glob
import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from emp_callbacks.pruner import EMPPruner
from emp_callbacks.targets.names import canonical_name
from emp_callbacks.trajectory import PruneEvent

__all__ = ["LoadedModel", "WeightReport", "inspect_model", "load_model", "report_json", "report_table"]

# A bare state dict has no module types: these names of a weight's owner stand for embeddings and norms
# (the owner only: `patch_embed.proj.weight` is a convolution).
_EMBEDDING = re.compile(r"(emb|embed\w*|\w*_emb|\w*_?embeddings?|wte|wpe)", re.IGNORECASE)
_NORM = re.compile(r"(\w*norm\w*|ln_?\w*|bn\d*)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """What EMP finds in one tensor, or in all of them together.

    Attributes:
        name: Parameter name, or "total".
        shape: Shape of the tensor; empty for the total.
        n: Components.
        density: Share of components that are not zero now, in [0, 1].
        n_eff: Effective number, in components (scope row: summed over rows).
        n_eff_fraction: n_eff / n.
        keep: Components that EMP would keep.
        preserved_mass: Share of the score mass in the kept components, in [0, 1].
        mass_bound: Its guaranteed lower bound where one holds, else None.
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


class LoadedModel(NamedTuple):
    """Weights to inspect, the names to look at (None: the rule of training) and what a reader must know."""

    module: nn.Module
    include: list[str] | None
    notes: list[str]


def inspect_model(
    module: nn.Module,
    *,
    beta: float = 1.0,
    scope: str = "global",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[WeightReport]:
    """Return one row per scored tensor and a last row "total"; nothing is changed.

    Args:
        module: Any module.
        beta: Factor on N_eff, > 0.
        scope: "global", "tensor" or "row"; with "global" the tensors compete and `keep` is each one's part.
        include: Glob patterns on parameter names that replace the default choice.
        exclude: Glob patterns on parameter names to leave out.

    Raises:
        ValueError: An option is invalid, or no parameter is left.
        FloatingPointError: A weight is NaN or Inf.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0, 0.0, 0.0]]))
        >>> [(row.name, row.n_eff, row.keep, row.density) for row in inspect_model(layer)]
        [('weight', 1.6, 1, 0.5), ('total', 1.6, 1, 0.5)]
    """
    pruner = EMPPruner(module, observe_only=True, beta=beta, scope=scope, include=include, exclude=exclude)
    events = pruner.refresh()
    weights = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
    rows = [_row(event, index, weights) for event in events for index in range(len(event.layers))]
    return [*rows, _total(rows, events, weights)]


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
    checkpoint = _read_checkpoint(Path(source))
    state = _state_dict(checkpoint, source)
    masked = _names_in_callback_state(checkpoint)
    if masked and set(masked) <= {canonical_name(name) for name in state}:
        return LoadedModel(_as_module(state), [glob.escape(name) for name in masked], [])
    note = "no modules in the file: embeddings and norms were told apart by their names"
    names = _prunable_by_name(state)
    if not names:
        raise ValueError(f"{source} holds no weight matrices by name; choose some with --include 'PATTERN'")
    return LoadedModel(_as_module(state), [glob.escape(canonical_name(name)) for name in names], [note])


def report_table(rows: Iterable[WeightReport], title: str) -> Table:
    """Return the rows for a terminal, numbers right-aligned, the total last."""
    table = Table(title=title, title_justify="left")
    table.add_column("parameter", overflow="fold")
    for heading in ("shape", "N", "non-zero", "N_eff", "N_eff/N", "keep", "mass kept", "mass bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.name == "total":
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
            "-" if row.mass_bound is None else f"{row.mass_bound:.4f}",
        )
    return table


def report_json(rows: Iterable[WeightReport], **settings: Any) -> str:
    """Return settings and rows as JSON text."""
    return json.dumps({**settings, "tensors": [asdict(row) for row in rows]}, indent=1) + "\n"


def _row(event: PruneEvent, index: int, weights: Mapping[str, Tensor]) -> WeightReport:
    layer = event.layers[index]
    weight = weights[layer.name]
    return WeightReport(
        name=layer.name,
        shape=tuple(weight.shape),
        n=layer.n,
        density=int(weight.count_nonzero()) / layer.n,
        n_eff=event.n_eff if event.scope == "row" else layer.n_eff,
        n_eff_fraction=(event.n_eff if event.scope == "row" else layer.n_eff) / layer.n,
        keep=layer.keep,
        preserved_mass=layer.preserved_mass,
        mass_bound=event.mass_bound if event.scope == "tensor" else None,
    )


def _total(rows: Sequence[WeightReport], events: Sequence[PruneEvent], weights: Mapping[str, Tensor]) -> WeightReport:
    n, keep = sum(row.n for row in rows), sum(row.keep for row in rows)
    n_eff = sum(event.n_eff for event in events)
    mass = {row.name: float(weights[row.name].detach().double().abs().sum()) for row in rows}
    kept = sum(row.preserved_mass * mass[row.name] for row in rows)
    pooled = len(events) == 1
    return WeightReport(
        name="total",
        shape=(),
        n=n,
        density=sum(row.density * row.n for row in rows) / n,
        n_eff=n_eff,
        n_eff_fraction=n_eff / n,
        keep=keep,
        preserved_mass=events[0].preserved_mass if pooled else kept / (sum(mass.values()) or 1.0),
        mass_bound=events[0].mass_bound if pooled else None,
    )


def _load_timm(name: str, pretrained: bool) -> LoadedModel:
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


def _read_checkpoint(path: Path) -> Any:
    """Return what a file holds: tensors and plain values only."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; a timm model is written timm:NAME")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise _damaged(path, error) from error
        raise ValueError(
            f"{path} holds Python objects besides tensors, and emp inspect never runs code from a file;"
            " save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder, in one file or in shards."""
    if (single := folder / "model.safetensors").is_file():
        return _read_safetensors(single)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor its index; name a checkpoint file")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: value for shard in shards for name, value in _read_safetensors(folder / shard).items()}


def _damaged(path: Path, error: Exception) -> ValueError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} is damaged or not a PyTorch checkpoint ({first}); copy or save it again")


def _state_dict(checkpoint: Any, source: str) -> dict[str, Tensor]:
    held = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    tensors = {k: v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, Mapping) else {}
    if not tensors:
        raise ValueError(f"{source} holds no state dict (name -> tensor), but a {type(checkpoint).__name__}")
    return tensors


def _names_in_callback_state(checkpoint: Any) -> list[str]:
    """Return the parameters that EMPCallback scored, if a Lightning checkpoint says so."""
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    for key, state in (callbacks or {}).items():
        if str(key).startswith("EMPCallback") and isinstance(state, Mapping):
            shapes = state.get("shapes")
            return list(shapes) if isinstance(shapes, Mapping) else []
    return []


def _prunable_by_name(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names that training would score, as far as names and shapes can tell."""
    tied = {value.data_ptr() for name, value in state.items() if _EMBEDDING.fullmatch(_owner(name))}
    return [
        name
        for name, value in state.items()
        if value.is_floating_point()
        and value.dim() >= 2
        and "weight" in name.rpartition(".")[2]
        and not _NORM.fullmatch(_owner(name))
        and value.data_ptr() not in tied
    ]


def _owner(name: str) -> str:
    """Return the name of the module that owns a parameter: "proj" for "blocks.0.attn.proj.weight"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _as_module(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a module tree whose parameters have the names and values of a state dict; ties stay ties."""
    root = nn.Module()
    made: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for name, value in state.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            # Straight into the registry: a part called "type" would clash with a method of nn.Module.
            owner = cast("nn.Module", owner._modules.setdefault(part, nn.Module()))
        # Empty tensors share the address 0 and are no ties.
        identity = (value.data_ptr() or id(value), value.shape)
        if identity not in made:
            made[identity] = nn.Parameter(value, requires_grad=value.is_floating_point())
        owner._parameters[last] = made[identity]
    return root
