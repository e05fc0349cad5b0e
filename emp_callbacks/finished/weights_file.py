"""The file that `emp export` and `emp prune` write, and what they say about it."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from emp_callbacks.checkpoint.reading import TIED_KEY
from emp_callbacks.checkpoint.tensor_file import write_tensors
from emp_callbacks.cost.budget_search import BudgetSearch
from emp_callbacks.finished.finished_model import FinishedModel
from emp_callbacks.finished.host_loading import HostLoading, host_loading
from emp_callbacks.shrinking import ShrinkReport

__all__ = ["ExportReport", "check_free", "report_lines", "shrink_table", "write_weights"]


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
        budget: How beta was found, if it was looked for.
        loaded_by: How a shrunk model is loaded, in Python.
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


def write_weights(
    model: FinishedModel, out: str | os.PathLike[str], metadata: Mapping[str, str], shrunk: ShrinkReport | None = None
) -> ExportReport:
    """Write a model's tensors with what was done to them; the file appears when it is whole.

    Safetensors holds no shared memory: a tied tensor is written under each of its names, so that the file loads with
    a plain `load_state_dict`. The metadata name the ties, and `emp` reads such tensors as one again.

    A shrunk transformers model is written as a folder with its configuration where `out` has no suffix and the
    configuration can state its sizes.
    """
    out = Path(out)
    host = host_loading(model.inner, shrunk) if shrunk else None
    config = host.config if host and not out.suffix else None
    folder = config is not None
    path = out / "model.safetensors" if folder else out
    loaded_by = _loaded_by(host, out, folder=folder) if shrunk else None
    state = model.tensors()
    tied = _ties(state)
    metadata = {**metadata, **(shrunk.metadata() if shrunk else {}), TIED_KEY: json.dumps(tied)}
    if loaded_by:
        metadata["loaded_by"] = loaded_by
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        if folder:
            partial.mkdir()
            _write_configuration(model.inner, config, partial)
        write_tensors(_apart(state), partial / path.name if folder else partial, metadata)
        os.replace(partial, out)
    finally:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
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
        loaded_by=loaded_by,
    )


def _loaded_by(host: HostLoading | None, out: Path, *, folder: bool) -> str:
    if folder and host is not None:
        return host.call.replace("FOLDER", str(out))
    if host is not None and host.config is None:
        return f"{host.call}; model.load_state_dict(safetensors.torch.load_file({str(out)!r}))"
    return f"emp_callbacks.load_shrunk(model, {str(out)!r}), into the dense architecture"


def _write_configuration(model: Any, config: Any, folder: Path) -> None:
    """Write what `from_pretrained` reads beside the weights."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def check_free(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise before any work is done unless the file can be written."""
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out, or add --overwrite")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; name a file, such as {path / 'model.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {path.absolute().parent} does not exist; make it first")


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
        f"zero: {report.zeros:,} values; {report.sparsity:.1%} of matrices and kernels",
    ]
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


def shrink_table(shrunk: ShrinkReport) -> Table:
    """Return what was removed from each layer for a terminal."""
    table = Table(title="removed heads, experts, neurons and channels", title_justify="left", show_footer=True)
    table.add_column("layer", footer="all", overflow="fold")
    for column, heading in enumerate(("units", "pruned", "removed", "had to stay"), start=1):
        total = sum(_counts(layer)[column - 1] for layer in shrunk.layers)
        table.add_column(heading, justify="right", footer=f"{total:,}")
    reasons = any(layer.reason for layer in shrunk.layers)
    if reasons:
        table.add_column("why", overflow="fold")
    for layer in shrunk.layers:
        row = [layer.name, *(f"{count:,}" for count in _counts(layer))]
        table.add_row(*row, *([layer.reason or ""] if reasons else []))
    return table


def _counts(layer: Any) -> tuple[int, int, int, int]:
    return layer.units, layer.pruned, layer.removed, layer.pruned - layer.removed
