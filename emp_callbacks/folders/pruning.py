"""EMP once on a model in a folder: block after block is read, pruned and written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import make_criterion
from emp_callbacks.folders.global_choice import GlobalChoice
from emp_callbacks.folders.layer_row import LayerRow
from emp_callbacks.folders.output import FolderOutput, check_out
from emp_callbacks.folders.plan import Plan
from emp_callbacks.folders.progress import Progress, Silent
from emp_callbacks.folders.skeleton import Skeleton
from emp_callbacks.folders.units import Unit
from emp_callbacks.folders.walk import BlockWalk, Visit
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.pruning.pruner import EMPPruner

if TYPE_CHECKING:
    from emp_callbacks.folders.samples import Samples

__all__ = ["FolderReport", "Order", "prune_folder"]

Order = Literal["sequential", "dense"]
"""Whether a block sees what the pruned blocks before it return (Wanda), or what the dense ones do (the EMP paper)."""


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What was written.

    Attributes:
        out: The folder.
        rows: Each pruned weight, in the order of the model.
        architecture: Name of the model's class in transformers.
        settings: What was done, as plain JSON types.
        seconds: Of this call, without what an interrupted one before it had done.
        notes: What a reader must know.
    """

    out: Path
    rows: tuple[LayerRow, ...]
    architecture: str
    settings: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...]

    @property
    def density(self) -> float:
        """Kept share of the weights that were scored, in [0, 1]."""
        kept: float = sum(row.keep for row in self.rows)
        return kept / sum(row.n for row in self.rows)


def prune_folder(
    folder: Path,
    out: Path,
    config: EMPConfig,
    *,
    samples: Samples | None = None,
    order: Order = "sequential",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FolderReport | None:
    """Prune the weights of a Hugging Face folder once and write a folder that `from_pretrained` loads.

    One block's weights are in memory at a time, and of criteria that read inputs what the last block returned for each
    sample. A call that was killed is taken up behind its last finished block by the same call.

    Args:
        folder: The folder.
        out: The folder to write; it is absent or whole.
        config: What is pruned and how, see `EMPConfig.once`: target "weights". Criteria that read inputs decide block
            after block: scope "row" or "tensor", or a pattern.
        samples: What the model is called with, for criteria that read inputs.
        order: What the next block sees.
        dtype: In which the model computes; None: its own. Tensors are written in the dtype that they had.
        device: On which it computes.
        rank: Number of this process.
        world_size: Number of processes among which blocks are spread, for criteria that read nothing.
        overwrite: Whether a folder that is there may make way: it is renamed to NAME.old-1, -2, ...
        progress: Is told how far it is.

    Returns:
        What was written; None in other processes than the first.

    Raises:
        FileExistsError: `out` exists.
        OSError: A file is missing, or cannot be read or written.
        ValueError: A setting is invalid, or the folder is damaged.
        NotImplementedError: The model cannot be followed block by block.
        FloatingPointError: A score is NaN or Inf.
    """
    begun, told = time.monotonic(), progress or Silent()
    check_out(out, overwrite=overwrite)
    needs = make_criterion(config.criterion, config.target).needs
    _check(config, needs, samples, world_size)
    skeleton = Skeleton(folder, dtype, device)
    plan = Plan(skeleton, config)
    walk = None
    if needs and samples is not None:  # what cannot be followed is told before anything is written
        walk = BlockWalk(skeleton, plan.all_units, samples.inputs[0], together=plan.prunes)
        plan.keep_called(walk.order)
    settings = _settings(config, skeleton, samples if needs else None, order)
    told.begin("copying", sum(info.nbytes for info in skeleton.files.infos.values()))
    output = FolderOutput(
        skeleton.files,
        out,
        settings,
        rank=rank,
        world_size=world_size,
        overwrite=overwrite,
        on_copied=told.advance,
    )
    finished = [f"went on behind {len(output.done)} blocks that an earlier call had finished"] if output.done else []
    if walk is not None and samples is not None:
        _in_turn(plan, output, walk, samples.inputs, order, told)
    else:
        _each_alone(plan, output, rank, world_size, told)
    if rank:
        return None
    output.wait_for(len(plan.units))
    rows = [LayerRow(**row) for unit in plan.units for row in output.done[unit.name]]
    seconds = time.monotonic() - begun
    notes = (*plan.notes, *finished, *(samples.notes if samples and needs else ()))
    report = FolderReport(
        out=out,
        rows=tuple(rows),
        architecture=type(skeleton.model).__name__,
        settings=settings,
        seconds=seconds,
        notes=notes,
    )
    output.finish({**settings, "density": report.density, "rows": [asdict(row) for row in rows]})
    return report


def _check(config: EMPConfig, needs: str | None, samples: Samples | None, world_size: int) -> None:
    if needs not in (None, "inputs"):
        raise ValueError(
            f"criterion {config.criterion_name!r} reads {needs}, and a folder is read block by block, forward only: "
            "use 'wanda' or 'magnitude', or a recipe that holds the whole model (--config RECIPE)"
        )
    if needs and (samples is None or not samples.inputs):
        raise ValueError(
            f"criterion {config.criterion_name!r} reads the inputs of layers; name a text with --text FILE"
        )
    if needs and config.scope == "global":
        raise ValueError(
            f"scope 'global' compares all weights, and criterion {config.criterion_name!r} sees one block after "
            "another; use --scope row, as Wanda and the EMP paper do, or --scope tensor"
        )
    if needs and world_size > 1:
        raise ValueError(
            f"criterion {config.criterion_name!r} needs the blocks one after another, so that {world_size} processes "
            "would wait for each other: start one, without torchrun"
        )


def _in_turn(
    plan: Plan,
    output: FolderOutput,
    walk: BlockWalk,
    inputs: Sequence[Mapping[str, Tensor]],
    order: Order,
    told: Progress,
) -> None:
    """Prune the units in the order in which the model calls them, by what they are called with."""
    last = max(number for number, unit in enumerate(walk.order) if unit in plan.names)
    twice = 2 * len(plan.names) if order == "sequential" else len(plan.names)
    told.begin("pruning", (last + 1 - len(plan.names) + twice) * len(inputs))
    for number, visit in enumerate(walk.visits(inputs, on_run=told.advance)):
        if visit.unit not in plan.names:
            visit.run(keep=True)
        elif visit.unit.name in output.done:
            _go_past(plan, output, visit, order, told, len(inputs))
        else:
            _prune_visited(plan, output, visit, order, is_last=number == last)
        if number == last:
            break


def _go_past(plan: Plan, output: FolderOutput, visit: Visit, order: Order, told: Progress, samples: int) -> None:
    """Run samples through a unit that an earlier call finished."""
    if order == "sequential":
        with torch.no_grad():
            for name, full in plan.names[visit.unit].items():
                value = plan.skeleton.names.assemble(full, output.read)
                visit.unit.module.get_parameter(name).copy_(value)
        told.advance(samples)
    visit.run(keep=True)


def _prune_visited(plan: Plan, output: FolderOutput, visit: Visit, order: Order, *, is_last: bool) -> None:
    pruner = plan.pruner(visit.unit)
    visit.run(keep=order == "dense")
    _refresh(plan, output, visit.unit, pruner)
    if order == "sequential" and not is_last:
        visit.run(keep=True)


def _each_alone(plan: Plan, output: FolderOutput, rank: int, world_size: int, told: Progress) -> None:
    """Prune every so many-th unit: none needs another."""
    own = [unit for unit in plan.units[rank::world_size] if unit.name not in output.done]
    choice = _global_choice(plan, told) if own and plan.config.scope == "global" else None
    told.begin("pruning", len(own))
    for unit in own:
        with plan.skeleton.loaded([unit.module]):
            _prune_alone(plan, output, unit, choice)
        told.advance()


def _prune_alone(plan: Plan, output: FolderOutput, unit: Unit, choice: GlobalChoice | None) -> None:
    pruner = plan.pruner(unit)
    if choice is None:
        _refresh(plan, output, unit, pruner)
        return
    names = plan.names[unit]
    chosen = {name: choice.of(names[name], scores) for name, scores in pruner.scores().items()}
    masks = {name: mask for name, (mask, _) in chosen.items()}
    _write(plan, output, unit, masks, [row for _, row in chosen.values()])


def _global_choice(plan: Plan, told: Progress) -> GlobalChoice:
    """Return what stays where all weights of the model compete."""

    def scores() -> Iterator[tuple[str, Tensor]]:
        told.begin("scoring", len(plan.units))
        for unit in plan.units:
            with plan.skeleton.loaded([unit.module]):
                for name, value in plan.pruner(unit).scores().items():
                    yield plan.names[unit][name], value
            told.advance()

    config = plan.config
    rule = KeepRule(beta=config.beta_at(0), density=config.density_at(0), min_density=config.min_density)
    return GlobalChoice(scores, rule, plan.skeleton.dtype)


def _refresh(plan: Plan, output: FolderOutput, unit: Unit, pruner: EMPPruner) -> None:
    """Choose what stays of a loaded unit, whose weights compete among themselves, and write it."""
    pruner.refresh()
    names = plan.names[unit]
    rows = [
        LayerRow(
            name=names[layer.name],
            n=layer.n,
            n_eff=event.n_eff if event.scope == "row" else layer.n_eff,
            keep=layer.keep,
            preserved_mass=layer.preserved_mass,
            note=event.note,
        )
        for event in pruner.last_events
        for layer in event.layers
    ]
    pruner.finalize()
    _write(plan, output, unit, pruner.masks, rows)


def _write(plan: Plan, output: FolderOutput, unit: Unit, masks: Mapping[str, Tensor], rows: Sequence[LayerRow]) -> None:
    for name, full in plan.names[unit].items():
        for in_file, mask in plan.skeleton.names.split(full, masks[name]).items():
            output.write(in_file, plan.skeleton.files.read(in_file).masked_fill_(~mask.cpu(), 0))
    output.note(unit.name, [asdict(row) for row in rows])


def _settings(config: EMPConfig, skeleton: Skeleton, samples: Samples | None, order: Order) -> dict[str, Any]:
    """Return what decides on what is written, as plain JSON types."""
    from emp_callbacks import __version__

    names = ("target", "scope", "beta", "density", "pattern", "min_density", "include", "exclude")
    told: dict[str, Any] = {"emp_version": __version__, "criterion": config.criterion_name}
    told |= {name: getattr(config, name) for name in names}
    told["dtype"] = str(skeleton.dtype).removeprefix("torch.")
    if samples is not None:
        told |= {"order": order, "samples": len(samples.inputs), "samples_sha256": _digest(samples.inputs)}
    return told


def _digest(inputs: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for one in inputs:
        for name, value in sorted(one.items()):
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
