"""`emp export` and `emp prune`: masked weights as a plain file; one-shot EMP on a finished model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import make_criterion
from emp_callbacks.finished_model import FinishedModel, RecipeParts, open_model, open_recipe, training_loss
from emp_callbacks.pruner import EMPPruner
from emp_callbacks.shrink import ShrinkReport, pruned_units, shrink

__all__ = ["ExportReport", "Source", "export", "prune", "report_lines", "shrink_table", "write_weights"]


class Source(NamedTuple):
    """Where a finished model comes from.

    Attributes:
        name: What `emp inspect` reads: a checkpoint file, a Hugging Face folder, or timm:NAME.
        config: Recipe whose model the weights belong to; None: the source says enough.
        prefix: Start of the names that the written file leaves out; None: see `open_model`.
        pretrained: Load timm's weights.
        input_size: Size of an example, without the batch; None: the data's or the model's own.
    """

    name: str
    config: str | None = None
    prefix: str | None = None
    pretrained: bool = False
    input_size: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        tensors: Number of tensors.
        n: Number of values in them.
        zeros: Values that are zero.
        sparsity: Share of zeros in matrices and kernels (tensors of two or more dimensions), in [0, 1].
        file_bytes: Size of the file.
        tied: Name -> name of the tensor that it equals, being one parameter of the model; both are written.
        shrunk: What was removed, if asked for.
        notes: What a reader must know.
    """

    path: Path
    tensors: int
    n: int
    zeros: int
    sparsity: float
    file_bytes: int
    tied: dict[str, str]
    shrunk: ShrinkReport | None
    notes: tuple[str, ...]


def export(
    source: Source, out: str | os.PathLike[str], *, shrink_units: bool = False, overwrite: bool = False
) -> ExportReport:
    """Write the masked weights of a finished model as plain safetensors, by the names of the user's own model.

    Args:
        source: The model.
        out: The file; written as a whole or not at all.
        shrink_units: Whether heads, neurons and channels that are zero are removed; `load_shrunk` reads such a file.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: There is no such source, or no such folder for `out`.
        ValueError: The source is damaged, or its modules are needed and not known.
        NotImplementedError: The model cannot be shrunk.
        ArithmeticError: The shrunk model's outputs would differ.
    """
    check_free(out, overwrite)
    recipe = open_recipe(source.config) if source.config else None
    model = _opened(source, recipe, needs_modules=shrink_units)
    shrunk = None
    if shrink_units:
        _check_modules(model, source.name, "--shrink")
        shrunk = _shrunk(model, pruned_units(model.inner))
    return write_weights(model, out, _described(model.run), shrunk)


def prune(
    source: Source,
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    batches: int = 32,
    shrink_units: bool = False,
    overwrite: bool = False,
) -> tuple[EMPPruner, ExportReport]:
    """Prune a finished model once by EMP and write its weights, as `export` does.

    Args:
        source: The model. With a recipe its EMPCallback's settings are the defaults.
        out: The file; written as a whole or not at all.
        settings: Fields of EMPConfig that say what is pruned and how; the rest keeps its default.
        batches: Training batches of the recipe's data for criteria that read data, >= 1. The model is in evaluation
            mode for them: without dropout, and with the batch norms' running statistics.
        shrink_units: Whether pruned heads, neurons and channels are removed.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The pruner (masks, trajectory) and what was written.

    Raises:
        FileExistsError: `out` exists.
        ValueError: A setting is invalid, or it needs modules or data that the source does not have.
        NotImplementedError: The target is masked in the forward pass, or the model cannot be shrunk.
    """
    check_free(out, overwrite)
    recipe = open_recipe(source.config) if source.config else None
    config = _one_shot(recipe.config if recipe else EMPConfig(), settings)
    needs = make_criterion(config.criterion, config.target).needs
    if needs and recipe is None:
        raise ValueError(
            f"criterion {config.criterion_name!r} reads {needs} of data; name a recipe with --config RECIPE"
        )
    model = _opened(source, recipe, needs_modules=config.target != "weights" or shrink_units)
    if config.target != "weights":
        _check_modules(model, source.name, f"target {config.target!r}")
    if shrink_units:
        _check_modules(model, source.name, "--shrink")
    if model.weights and not config.include:
        config = replace(config, include=[escape(name) for name in model.weights])
    pruner = EMPPruner(model.module, config=config)
    if needs and recipe:
        _gather(recipe, pruner, batches)
    pruner.refresh()
    pruner.finalize()
    shrunk = _shrunk(model, _kept(pruner, model)) if shrink_units else None
    return pruner, write_weights(model, out, _described(_run_of(pruner)), shrunk)


def write_weights(
    model: FinishedModel, out: str | os.PathLike[str], metadata: Mapping[str, str], shrunk: ShrinkReport | None = None
) -> ExportReport:
    """Write a model's tensors with what was done to them; the file appears when it is whole.

    Safetensors holds no shared memory: a tied tensor is written under each of its names, so that the file loads with
    a plain `load_state_dict`.
    """
    from safetensors.torch import save_file

    path = Path(out)
    state = model.tensors()
    tied = _ties(state)
    metadata = {**metadata, **(shrunk.metadata() if shrunk else {}), "tied": json.dumps(tied)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(_apart(state), partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    matrices = [value for value in state.values() if value.dim() >= 2]
    return ExportReport(
        path=path,
        tensors=len(state),
        n=sum(value.numel() for value in state.values()),
        zeros=sum(_zeros(value) for value in state.values()),
        sparsity=sum(map(_zeros, matrices)) / (sum(value.numel() for value in matrices) or 1),
        file_bytes=path.stat().st_size,
        tied=tied,
        shrunk=shrunk,
        notes=(*model.notes, *_left_out(model, len(state))),
    )


def check_free(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise before any work is done unless the file can be written."""
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or add --overwrite")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; name a file, such as {path / 'model.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {path.absolute().parent} does not exist; make it first")


# ---- for a terminal ------------------------------------------------------------------------------------------------


def report_lines(report: ExportReport) -> list[str]:
    """Return the report as lines of text."""
    lines = [
        f"{report.path}: {report.tensors:,} tensors, {report.n:,} values, {report.file_bytes:,} bytes",
        f"zero: {report.zeros:,} values; {report.sparsity:.1%} of matrices and kernels",
    ]
    lines += [f"tied: {name} = {first} (written under both names)" for name, first in report.tied.items()]
    if report.shrunk and not report.shrunk.layers:
        lines.append("no head, neuron or channel is pruned as a whole: nothing was removed")
    elif report.shrunk:
        (before, after), (flops_before, flops_after) = report.shrunk.parameters, report.shrunk.flops
        lines.append(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
        lines.append(f"FLOPs of the example: {flops_before:,} -> {flops_after:,} ({flops_after / flops_before:.1%})")
        lines.append(f"largest difference of the outputs on it: {report.shrunk.difference:.1e} of the largest output")
        lines.append("load it with emp_callbacks.load_shrunk(model, file) into the dense architecture")
    return lines + [f"note: {note}" for note in report.notes]


def shrink_table(shrunk: ShrinkReport) -> Table:
    """Return what was removed from each layer for a terminal."""
    table = Table(title="removed heads, neurons and channels", title_justify="left", show_footer=True)
    table.add_column("layer", footer="all", overflow="fold")
    for column, heading in enumerate(("units", "pruned", "removed", "had to stay"), start=1):
        total = sum(_counts(layer)[column - 1] for layer in shrunk.layers)
        table.add_column(heading, justify="right", footer=f"{total:,}")
    for layer in shrunk.layers:
        table.add_row(layer.name, *(f"{count:,}" for count in _counts(layer)))
    return table


def _counts(layer: Any) -> tuple[int, int, int, int]:
    return layer.units, layer.pruned, layer.removed, layer.pruned - layer.removed


# ---- parts ---------------------------------------------------------------------------------------------------------


def _opened(source: Source, recipe: RecipeParts | None, *, needs_modules: bool) -> FinishedModel:
    return open_model(
        source.name,
        recipe=recipe,
        prefix=source.prefix,
        pretrained=source.pretrained,
        needs_modules=needs_modules,
        input_size=source.input_size,
    )


def _one_shot(config: EMPConfig, settings: Mapping[str, Any]) -> EMPConfig:
    """Return settings for one refresh of a finished model."""
    if settings.get("target", config.target) in ("features", "attention_edges"):
        raise NotImplementedError(
            f"target {settings.get('target', config.target)!r} is masked in the forward pass, which a file of weights "
            "cannot hold; prune weights, heads, neurons or kan_nodes"
        )
    # A schedule of beta has arrived at its last value.
    once: dict[str, Any] = {
        "every_n_epochs": None,
        "every_n_steps": None,
        "start": None,
        "stop": None,
        "mode": "project",
    }
    once |= {"observe_only": False, "beta": config.beta_at(sys.maxsize)}
    if settings.get("target", config.target) != config.target:
        once["criterion"] = None  # the recipe's fits its own target
    once |= {"density": None} if "beta" in settings else {}
    once |= {"beta": 1.0} if "density" in settings else {}
    return replace(config, **{**once, **settings})


def _check_modules(model: FinishedModel, source: str, what: str) -> None:
    if not model.has_modules:
        raise ValueError(
            f"{what} needs the model, and {source} holds names and values alone; name the recipe that builds it with "
            "--config RECIPE, or use timm:NAME or a Hugging Face folder with config.json"
        )


def _gather(recipe: RecipeParts, pruner: EMPPruner, batches: int) -> None:
    """Show the pruner gradients, inputs and activations of training batches; no weight is updated."""
    if batches < 1:
        raise ValueError(f"--batches must be at least 1, got {batches}")
    recipe.module.zero_grad()
    for index, batch in enumerate(islice(recipe.data.train_dataloader(), batches)):
        training_loss(recipe.module, batch, index).backward()
        pruner.collect()
        recipe.module.zero_grad()


def _kept(pruner: EMPPruner, model: FinishedModel) -> dict[str, Tensor]:
    """Return the kept units of the inner model."""
    if pruner.config.target not in ("heads", "neurons"):
        return pruned_units(model.inner)
    return {name.removeprefix(model.prefix): mask for name, mask in pruner.masks.items()}


def _shrunk(model: FinishedModel, kept: Mapping[str, Tensor]) -> ShrinkReport:
    if model.example is None:
        raise ValueError("no example input is known to compare the shrunk model on; give --input-size, such as 3 32 32")
    return shrink(model.inner, kept, model.example.args, model.example.kwargs)


def _run_of(pruner: EMPPruner) -> dict[str, Any]:
    config = pruner.config
    told = {"target": config.target, "criterion": config.criterion_name, "scope": config.scope, "mode": "one-shot"}
    return {**told, "trajectory": pruner.trajectory.records()}


def _described(run: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a file: who wrote it, and how the weights were pruned, if that is known."""
    from emp_callbacks import __version__

    described = {"format": "pt", "emp_version": __version__}
    described |= {key: str(run[key]) for key in ("target", "criterion", "scope", "mode") if key in run}
    if rows := run.get("trajectory"):
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        density = sum(row["keep"] for row in last) / sum(row["n"] for row in last)
        told = {"step": rows[-1]["step"], "beta": rows[-1]["beta"], "density": density}
        described |= {key: json.dumps(value) for key, value in told.items()}
    return described


def _left_out(model: FinishedModel, written: int) -> list[str]:
    out = len(model.module.state_dict()) - written
    return [f"{out} tensors without the prefix {model.prefix!r} were left out"] if out else []


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tied = {}
    for name, value in state.items():
        if value.numel():
            original = first.setdefault((value.data_ptr(), value.shape, value.stride()), name)
            if original != name:
                tied[name] = original
    return tied


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU of which no two share memory, copied only where they must be."""
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(storage.data_ptr())
        apart[name] = own
    return apart


def _zeros(value: Tensor) -> int:
    return value.numel() - int(value.count_nonzero())
