"""What each output unit of each parameter keeps, decided for all parameters together: `scope="row"`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from emp_callbacks.core.bounds import tight_mass_bounds
from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers
from emp_callbacks.core.row_parts import RowCuts, RowPart
from emp_callbacks.core.row_selection import RowMatrix, RowThresholds, find_rows, row_sums
from emp_callbacks.core.threshold import local_sum
from emp_callbacks.layer import Ranks
from emp_callbacks.layer.row_layout import RowLayout, row_layout
from emp_callbacks.pruning.groups import Decision, KeepRule, Scored, check_finite, sums_of_layers


def decide_rows(layers: Sequence[Scored], rule: KeepRule, ranks: Ranks, step: int) -> list[Decision]:
    """Return one decision per layer, whose rows are each a group of their own. Collective; changes nothing.

    The arguments and errors are those of `decide`.
    """
    local = torch.cat([_local_row_sums(layer) for layer in layers])
    rows = [layer.span.rows for layer in layers]
    by_row = torch.split(ranks.all_sum(local).cpu(), rows)
    sums = torch.stack([of_layer.sum(0) for of_layer in by_row])
    check_finite(torch.stack([own.sum(0) for own in torch.split(local, rows)]), sums, layers, ranks, step)
    moments = [ScoreMoments.unstack(rows) for rows in by_row]
    n_eff = [effective_numbers(each) for each in moments]
    layouts = [row_layout(layer.span, layer.scores.reshape(-1), slice(0, layer.scores.numel())) for layer in layers]
    matrices = []
    for layer, layout, each, effective in zip(layers, layouts, moments, n_eff, strict=True):
        size = layer.span.size // len(effective)
        keep = rule.of_group(layer.span.name).counts(effective, size, each.nonzero)
        matrices.append(RowMatrix(layout.parts, _counted(layer), keep, each, size, layer.scores.dtype))
    is_whole = all(layer.span.replicated for layer in layers)  # on every rank: no row can be cut
    thresholds = find_rows(matrices, local_sum if is_whole else ranks.all_sum)
    own_lowest = [
        torch.stack([found.lowest_kept(part) for part in layout.parts]).min()
        for found, layout in zip(thresholds, layouts, strict=True)
    ]
    lowest = ranks.all_min(gather_rows(own_lowest)).tolist()
    own = sums_of_layers(ScoreMoments.unstack(sums))
    return [
        Decision(
            group=layer.span.name,
            members=(i,),
            n=layer.span.size,
            n_eff=float(n_eff[i].sum()),
            keep=int(matrices[i].keep.sum()),
            threshold=lowest[i],
            layer_sums=(own[i],),
            digest=zlib.crc32(matrices[i].keep.numpy().tobytes()),
            note=_note(matrices[i]),
            is_top=False,
            mass_floor=_mean_floor(matrices[i], n_eff[i]),
            mask=partial(_mask, layer, layouts[i], thresholds[i]),
            cut=_cut(thresholds[i]),
        )
        for i, layer in enumerate(layers)
    ]


def _local_row_sums(layer: Scored) -> Tensor:
    """Return the moments of each row over what this rank counts of it, shape (G, 3)."""
    return row_sums(_counted(layer), layer.span.rows)


def _counted(layer: Scored) -> list[RowPart]:
    return row_layout(layer.span, layer.scores.reshape(-1), layer.span.counted).parts


def _note(matrix: RowMatrix) -> str:
    silent = int(((matrix.moments.nonzero == 0) & (matrix.keep > 0)).sum())
    return f"{silent} rows whose scores are all 0 are kept whole" if silent else ""


def _mask(layer: Scored, layout: RowLayout, thresholds: RowThresholds, member: int) -> Tensor:  # noqa: ARG001
    return layout.flat([thresholds.mask(part) for part in layout.parts]).view(layer.scores.shape)


def _cut(thresholds: RowThresholds) -> Callable[[int], RowCuts] | None:
    cuts = thresholds.cuts
    return None if cuts is None else lambda _: cuts


def _mean_floor(matrix: RowMatrix, n_eff: Tensor) -> float | None:
    """Return the lower bound on what all rows keep of their mass together; None if there is none."""
    mass = matrix.moments.total
    total = float(mass.sum())
    return float((tight_mass_bounds(matrix.keep, matrix.size, n_eff) * mass).sum()) / total if total else None
