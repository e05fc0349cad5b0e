"""The file that `emp export` and `emp prune` write, and what they say about it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.checkpoint.reading import TIED_KEY
from emp_callbacks.checkpoint.tensor_file import write_tensors
from emp_callbacks.checkpoint.whole_output import appearing, aside, has_content, is_folder
from emp_callbacks.cost.budget_search import BudgetSearch
from emp_callbacks.finished.finished_model import FinishedModel
from emp_callbacks.finished.host_loading import HostLoading, host_loading
from emp_callbacks.finished.model_folder import (
    copy_companions,
    of_transformers,
    save_by_transformers,
    save_timm_configuration,
)
from emp_callbacks.shrinking import ShrinkReport
from emp_callbacks.terminal import FittedTable

__all__ = ["ExportReport", "check_free", "report_lines", "shrink_table", "write_weights"]

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file; the folder, if it holds several.
        tensors: Number of tensors.
        n: Number of values in them.
        zeros: Values that are zero.
        sparsity: Share of zeros in matrices and kernels (tensors of two or more dimensions), in [0, 1].
        file_bytes: Size of the file, or of all files of weights.
        tied: Name -> name of the tensor that it equals, being one parameter of the model; both are written.
        shrunk: What was removed, if asked for.
        notes: What a reader must know.
        budget: How beta was found, if it was looked for.
        loaded_by: How a shrunk model or a folder is loaded, in Python.
        prefix: Start of the model's names that those in the file lack.
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
    budget: BudgetSearch | None = None
    loaded_by: str | None = None
    prefix: str = ""


def write_weights(
    model: FinishedModel, out: str | os.PathLike[str], metadata: Mapping[str, str], shrunk: ShrinkReport | None = None
) -> ExportReport:
    """Write a model's tensors with what was done to them; the file or folder appears when it is whole.

    Safetensors holds no shared memory: a tied tensor is written under each of its names, so that the file loads with
    a plain `load_state_dict`. The metadata name the ties, and `emp` reads such tensors as one again.

    A folder (see `is_folder`) gets what the model's own library needs to load it: the configuration of transformers or
    timm, and what else the source folder holds. Of a shrunk model that library can state no sizes of, it gets the
    weights alone.

    Args:
        model: What is written.
        out: The file, or the folder.
        metadata: Goes into the file, or into each file of weights.
        shrunk: What was removed, if anything was.

    Raises:
        OSError: It cannot be written.
    """
    folder, out = is_folder(out), Path(out)
    host = host_loading(model.inner, shrunk) if shrunk else None
    loaded_by = _loaded_by(host, out, model.prefix) if shrunk else None
    state = model.tensors()
    tied = _ties(state)
    metadata = {**metadata, **(shrunk.metadata() if shrunk else {}), TIED_KEY: json.dumps(tied)}
    notes = [*model.notes, *_left_out(model, len(state))]
    with appearing(out, folder=folder) as partial:
        if folder:
            loaded_by, more = _fill(partial, out, model, metadata, shrunk, host)
            notes += more
            if has_content(out):
                notes.append(f"what {out} held is in {aside(out)} now")
        else:
            write_tensors(_apart(state), partial, {**metadata, **_told(loaded_by)})
    files = sorted(out.glob("*.safetensors")) if folder else [out]
    matrices = [value for value in state.values() if value.dim() >= 2]
    return ExportReport(
        path=files[0] if len(files) == 1 else out,
        tensors=len(state),
        n=sum(value.numel() for value in state.values()),
        zeros=sum(_zeros(value) for value in state.values()),
        sparsity=sum(map(_zeros, matrices)) / (sum(value.numel() for value in matrices) or 1),
        file_bytes=sum(file.stat().st_size for file in files),
        tied=tied,
        shrunk=shrunk,
        notes=tuple(notes),
        loaded_by=loaded_by,
        prefix=model.prefix,
    )


def _fill(
    folder: Path,
    out: Path,
    model: FinishedModel,
    metadata: Mapping[str, str],
    shrunk: ShrinkReport | None,
    host: HostLoading | None,
) -> tuple[str | None, list[str]]:
    """Write what the folder `out` is to hold, and return how it is loaded and what a reader must know."""
    inner = model.inner
    # Without a configuration, `from_pretrained` would build a model of the default sizes, which may be 7 billion.
    notes = copy_companions(model.folder, folder) if model.folder else []
    config = (host.config if host else None) if shrunk else getattr(inner, "config", None)
    how: str | None
    if config is not None and of_transformers(inner):
        how = f"transformers.{type(inner).__name__}.from_pretrained({str(out)!r})"
        save_by_transformers(inner, config, folder, {**metadata, **_told(how)})
        if model.folder and not shrunk:
            copy_companions(model.folder, folder)  # as they were, in place of what transformers made of them
        return how, notes
    if shrunk and shrunk.surgery and of_transformers(inner):
        notes.append(
            f"{type(inner).__name__}.from_pretrained cannot load this: {type(inner.config).__name__} can state no such "
            "sizes, config.json is the dense model's"
        )
    call = None
    if getattr(inner, "pretrained_cfg", None) and (host or not shrunk):
        call = save_timm_configuration(inner, folder, host.arguments if host else {})
    plainly = _loaded_by(host, out / WEIGHTS, model.prefix) if shrunk else None
    how = call.replace("FOLDER", str(out)) if call else plainly
    write_tensors(_apart(model.tensors()), folder / WEIGHTS, {**metadata, **_told(how)})
    return how, notes


def _told(loaded_by: str | None) -> dict[str, str]:
    return {"loaded_by": loaded_by} if loaded_by else {}


def _loaded_by(host: HostLoading | None, file: Path, prefix: str) -> str:
    if host is not None and host.config is None:
        return f"{host.call}; model.load_state_dict(safetensors.torch.load_file({str(file)!r}))"
    behind = f", which is {prefix.rstrip('.')!r} of the module that was trained" if prefix else ""
    return f"emp_callbacks.load_shrunk(model, {str(file)!r}), into the dense architecture{behind}"


def check_free(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise before any work is done unless the file or the folder can be written.

    Raises:
        OSError: It exists and may not be replaced, or it cannot be made there.
        ValueError: The name is one of another format.
    """
    path, folder = Path(out), is_folder(out)
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder, or a file that ends in .safetensors")
    if (has_content(path) if folder else path.exists()) and not overwrite:
        held = " and is not empty" if folder else ""
        moves = f" to move it to {aside(path)}" if folder else ""
        raise FileExistsError(f"{path} exists{held}; choose another --out, or add --overwrite{moves}")
    if folder and path.exists():
        _check_movable(path)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written in {parent}; choose another --out")


def _check_movable(folder: Path) -> None:
    """Raise where a folder cannot make way for another of its name."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{folder} is or holds the current folder; name a new folder, such as {folder / 'model'}")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is a mount point; name a new folder in it, such as {folder / 'model'}")


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


def report_lines(report: ExportReport) -> list[str]:
    """Return the report as lines of text."""
    lines = [
        f"{report.path}: {report.tensors:,} tensors, {report.n:,} values, {report.file_bytes:,} bytes",
        f"zero: {report.sparsity:.1%} of matrices and kernels; {report.zeros:,} values in all, biases included",
    ]
    if report.prefix:
        lines.append(f"names: without {report.prefix!r}, for the module behind it (--prefix '' keeps it)")
    lines += [f"tied: {name} = {first} (written under both names)" for name, first in report.tied.items()]
    if report.shrunk and not report.shrunk.layers:
        lines.append("no head, expert, neuron or channel is pruned as a whole: nothing was removed")
    elif report.shrunk:
        (before, after), (flops_before, flops_after) = report.shrunk.parameters, report.shrunk.flops
        lines.append(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
        lines += _stayed(report.shrunk)
        lines.append(f"FLOPs of the example: {flops_before:,} -> {flops_after:,} ({flops_after / flops_before:.1%})")
        lines.append(f"largest difference of the outputs on it: {report.shrunk.difference:.1e} of the largest output")
        if report.shrunk.rerouted:
            lines.append(
                "tokens of removed experts go to others, which the masked model did not do: beside it the outputs "
                f"differ by {report.shrunk.rerouted:.1%} of the largest output"
            )
    if report.loaded_by and (report.shrunk is None or report.shrunk.layers):
        lines.append(f"load it with {report.loaded_by}")
    return lines + [f"note: {note}" for note in report.notes]


def _stayed(shrunk: ShrinkReport) -> list[str]:
    """Return what is to be said of pruned units that were not removed."""
    lines = []
    if not any(layer.removed for layer in shrunk.layers):
        why = Counter(layer.reason for layer in shrunk.layers).most_common(1)[0][0]
        lines.append(f"nothing could be removed; most often since {why}")
    if shrunk.brought_back:
        lines.append(f"kept as zeros for equal sizes (--uniform): {shrunk.brought_back:,} units that could have gone")
    return lines


def shrink_table(shrunk: ShrinkReport) -> FittedTable:
    """Return what was removed from each layer for a terminal."""
    table = FittedTable("removed heads, experts, neurons and channels")
    table.add_column("layer", footer="all")
    for column, heading in enumerate(("units", "pruned", "removed", "had to stay"), start=1):
        total = sum(_counts(layer)[column - 1] for layer in shrunk.layers)
        table.add_column(heading, worth=2 if heading == "units" else 0, footer=f"{total:,}")
    reasons = any(layer.reason for layer in shrunk.layers)
    if reasons:
        table.add_column("why", words=True)
    for layer in shrunk.layers:
        row = [layer.name, *(f"{count:,}" for count in _counts(layer))]
        table.add_row(*row, *([layer.reason or ""] if reasons else []))
    return table


def _counts(layer: Any) -> tuple[int, int, int, int]:
    return layer.units, layer.pruned, layer.removed, layer.pruned - layer.removed
