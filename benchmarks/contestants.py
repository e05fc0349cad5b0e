"""Ways to come from weights to masks: EMP's refresh, the paper's sort, torch's pruning, and the least one must read.

The paper's algorithm (arXiv:2509.25606) is written as it is stated: scores in one vector, shares of their sum, N_eff
in float32, a full sort, a comparison with the nu-th highest score. It returns masks and does not apply them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timing import Contestant
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from emp_callbacks import EMPPruner
from emp_callbacks.core.effective_number import FLOOR_SLACK
from emp_callbacks.pruning.decision import decide
from emp_callbacks.pruning.groups import KeepRule, Scored

CHUNK = 1 << 18  # 1 MiB of float32: stays in a core's cache
GPT2_WIDTH = 768
GPT2_BLOCK = 12 * GPT2_WIDTH**2


# ---- weights --------------------------------------------------------------------------------------------------------


def gpt2_like(size: float) -> nn.Module:
    """Return the four matrices of as many GPT-2 blocks as come nearest to `size` weights.

    The width gives way for the rest: it is GPT-2's 768 where `size` is a multiple of GPT2_BLOCK.
    """
    blocks = max(1, round(size / GPT2_BLOCK))
    width = max(1, round(math.sqrt(size / blocks / 12)))
    shapes = {"c_attn": (width, 3 * width), "c_proj": (width, width), "c_fc": (width, 4 * width)}
    shapes["mlp_c_proj"] = (4 * width, width)

    def block() -> nn.Module:
        return nn.ModuleDict({name: Conv1D(outputs, inputs) for name, (inputs, outputs) in shapes.items()})

    torch.manual_seed(0)
    return nn.ModuleList([block() for _ in range(blocks)])


def llama_mlp(scale: float) -> nn.Module:
    """Return the MLP of a Llama-7B block; `scale` is the factor on its number of weights."""
    width, hidden = (max(1, round(side * math.sqrt(scale))) for side in (4096, 11008))
    torch.manual_seed(0)
    matrices = [nn.Linear(*sides, bias=False) for sides in ((width, hidden), (width, hidden), (hidden, width))]
    for matrix in matrices:
        nn.init.normal_(matrix.weight, std=0.02)
    return nn.ModuleList(matrices)


class Subject:
    """A model, the weights of it that EMP prunes, a copy of their dense values, and the one pruner at work on them."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        self.model = model
        pruner = EMPPruner(model)
        names = list(pruner.weight_masks)
        pruner.finalize()
        for name in names:
            parameter = model.get_parameter(name)
            parameter.data = change(parameter.data)
        self.weights = {name: model.get_parameter(name).detach() for name in names}
        self.dense = [weight.clone() for weight in self.weights.values()]
        self.pruner: EMPPruner | None = None
        self._settings: dict[str, Any] = {}

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.dense)

    def restore(self) -> None:
        """Put the dense values back, in the same memory."""
        for weight, dense in zip(self.weights.values(), self.dense, strict=True):
            weight.copy_(dense)

    def prune(self, **settings: Any) -> EMPPruner:
        """Return the pruner of these settings, its masks in place, the weights dense; whichever was before has ended.

        Several would have to be of one mode, and would hide the weights from each other.
        """
        if self.pruner is None or self._settings != settings:
            if self.pruner is not None:
                self.pruner.finalize()
            self.restore()
            self.pruner, self._settings = EMPPruner(self.model, **settings), settings
            self.pruner.refresh()
        self.restore()
        return self.pruner

    def masks(self, **settings: Any) -> list[Tensor]:
        """Return the masks of one refresh."""
        masks = self.prune(**settings).masks
        return [masks[name] for name in self.weights]


# ---- EMP ------------------------------------------------------------------------------------------------------------


def refresh(subject: Subject, **settings: Any) -> Contestant:
    """A whole refresh: scores, masks, masks applied, row of the trajectory. Repeated: old masks are in place."""
    return Contestant(lambda: _at_work(subject).refresh(), partial(subject.prune, **settings))


def selection(subject: Subject, scope: str = "global") -> Contestant:
    """The part of a refresh that finds the masks and changes nothing."""
    prepare = partial(subject.prune, scope=scope, observe_only=True)
    return Contestant(lambda: _select(_at_work(subject), scope), prepare)


def select(subject: Subject, scope: str = "global") -> list[Tensor]:
    """Return the masks that a selection finds for the weights as they are."""
    return _select(subject.prune(scope=scope, observe_only=True), scope)


def _at_work(subject: Subject) -> EMPPruner:
    if subject.pruner is None:
        raise RuntimeError("nothing prunes the weights: call prune() first")
    return subject.pruner


@torch.no_grad()
def _select(pruner: EMPPruner, scope: str) -> list[Tensor]:
    scored = [Scored(layer.span, pruner._refresher.criterion.score(layer)) for layer in pruner._layers]
    decisions = decide(scored, scope, KeepRule(), pruner._backend, 0)
    return [decision.mask(i) for decision in decisions for i in decision.members]


# ---- the others -----------------------------------------------------------------------------------------------------


def paper_global(weights: Sequence[Tensor]) -> list[Tensor]:
    scores = torch.cat([weight.abs().flatten() for weight in weights]).float()
    shares = scores / scores.sum()
    keep = int(1 / shares.square().sum())
    threshold = torch.sort(scores, descending=True).values[keep - 1]
    return [weight.abs() >= threshold for weight in weights]


def paper_rows(weights: Sequence[Tensor]) -> list[Tensor]:
    return [_paper_rows_of(weight) for weight in weights]


def _paper_rows_of(weight: Tensor) -> Tensor:
    scores = weight.abs()
    shares = scores / scores.sum(dim=1, keepdim=True)
    keep = (1 / shares.square().sum(dim=1, keepdim=True)).long().clamp(1, weight.shape[1])
    threshold = torch.sort(scores, dim=1, descending=True).values.gather(1, keep - 1)
    return scores >= threshold


def torch_prune(subject: Subject, pruned: int) -> Contestant:
    """The global pruning of torch itself, of the `pruned` lowest magnitudes, on modules not pruned before."""
    fresh: list[tuple[nn.Module, str]] = []

    def copy_modules() -> None:
        subject.restore()
        model = copy.deepcopy(subject.model)
        places = (name.rpartition(".") for name in subject.weights)
        fresh[:] = [(model.get_submodule(module), name) for module, _, name in places]

    def work() -> None:
        prune.global_unstructured(fresh, pruning_method=prune.L1Unstructured, amount=pruned)

    return Contestant(work, copy_modules)


def plain_floor(weights: Sequence[Tensor], threshold: float | Tensor) -> list[Tensor]:
    """One read pass and one compare-and-write pass, as one would write them."""
    sum(weight.abs().sum() for weight in weights)
    return [weight.abs() > threshold for weight in weights]


def tight_floor(weights: Sequence[Tensor], threshold: float) -> Callable[[], None]:
    """Return the same two passes, by pieces that stay in cache and with no memory allocated."""
    masks = [torch.empty(weight.numel(), dtype=torch.bool) for weight in weights]
    pieces = [piece for weight in weights for piece in weight.view(-1).split(CHUNK)]
    kept = [piece for mask in masks for piece in mask.split(CHUNK)]
    buffer = torch.empty(CHUNK)

    def passes() -> None:
        for piece in pieces:
            torch.abs(piece, out=buffer[: len(piece)]).sum()
        for piece, mask in zip(pieces, kept, strict=True):
            part = torch.abs(piece, out=buffer[: len(piece)])
            mask.copy_(torch.gt(part, threshold, out=part))

    return passes


# ---- what must be chosen --------------------------------------------------------------------------------------------


class Chosen:
    """What the paper's rule keeps of rows of scores, with its sums in float64: how many, and the lowest kept score.

    Rows whose scores are all 0 are not foreseen.
    """

    def __init__(self, rows_gn: Tensor) -> None:
        n_eff = rows_gn.abs().sum(1, dtype=torch.float64).square() / _sum_of_squares(rows_gn)
        self.keep_g = (n_eff * (1 + FLOOR_SLACK)).floor().long().clamp(1, rows_gn.shape[1])
        ordered = torch.sort(rows_gn.abs(), dim=1, descending=True).values
        self.threshold_g1 = ordered.gather(1, self.keep_g[:, None] - 1)

    @property
    def keep(self) -> int:
        return int(self.keep_g.sum())

    def check(self, rows_gn: Tensor, mask_gn: Tensor, what: str) -> None:
        """Raise unless a mask keeps exactly these scores; of those equal to the lowest, any that make up the number."""
        scores, kept = rows_gn.abs(), mask_gn.sum(1)
        if not torch.equal(kept, self.keep_g):
            raise RuntimeError(f"{what} keeps {int(kept.sum()):,}, the paper's rule {self.keep:,}")
        wrong = int((mask_gn & (scores < self.threshold_g1)).sum() + (~mask_gn & (scores > self.threshold_g1)).sum())
        if wrong:
            raise RuntimeError(f"{what} differs from the paper's choice in {wrong:,} weights")


def _sum_of_squares(rows_gn: Tensor) -> Tensor:
    parts = [part.double().square().sum(1) for part in rows_gn.split(CHUNK, dim=1)]
    return torch.stack(parts).sum(0)


def differences(masks: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    """Return in how many weights two choices differ."""
    return sum(int((mask != other).sum()) for mask, other in zip(masks, others, strict=True))


def flat_row(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values as the one row in which they compete, shape (1, n); float32 scores, or bool."""
    row = torch.cat([tensor.reshape(-1) for tensor in tensors])[None]
    return row if row.dtype == torch.bool else row.float()
