"""Learned gates on attention heads: what each head hands to its output projection, times a number that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.core.hard_concrete import (
    OPEN,
    binary_entropy,
    hard_concrete,
    log_alpha_of,
    open_probability,
    proportional_probabilities,
)
from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.targets.compiled_site import let_compiled_code_see_hooks
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.trajectory import GateStats

Kind = Literal["hard_concrete", "top_k"]
KINDS = ("hard_concrete", "top_k")
_MOST = 10.0  # |log alpha|: beyond it a gate is as good as fixed
_SMALLEST = 1e-6


@dataclass(frozen=True)
class GateGroup:
    """Heads that compete for open gates.

    Attributes:
        name: "global", or of the attention.
        heads: Their places among all heads.
        keep: How many are to stay in the end.
        first: How many were expected to be open when the gates began.
    """

    name: str
    heads: slice
    keep: int
    first: float

    @property
    def size(self) -> int:
        """Number of heads."""
        return int(self.heads.stop - self.heads.start)

    def target(self, progress: float) -> float:
        """Return how many are to be open when a share of the warm-up is over."""
        return self.first + (self.keep - self.first) * min(progress, 1.0)


class HeadGates:
    """Gates of all heads that compete, on the input of the output projections.

    "hard_concrete": in training mode a gate is drawn anew for each optimizer step, alike in all its forward passes and
    on all ranks, from the hard concrete distribution (Louizos et al., arXiv:1712.01312; of heads, Voita et al.,
    arXiv:1905.09418). "top_k": the highest are open and the rest closed; the gradient of a gate passes to its score
    unchanged (straight through; as a choice of heads, Li et al., TACL 2021). In evaluation mode both are hardened: as
    many as are to be open at this time are exactly 1, the others 0.

    A small gate is no unimportant head: what its head adds may be large. Nothing here reads a gate's size as that.

    Args:
        attentions: Where the gates are.
        kind: "hard_concrete" or "top_k".
        least: Heads of each attention that stay open in any case.
        warmup: Optimizer steps over which the number of open gates moves to what it is to be in the end.
        seed: Of the draws, the same on all ranks.

    Attributes:
        log_alpha: The parameter, shape (N,), float32: of all heads in the order of the attentions. "hard_concrete": the
            location of each gate's distribution. "top_k": its score.
        steps: Optimizer steps that the gates have learned in.
    """

    def __init__(self, attentions: Sequence[HeadOutputs], kind: Kind, *, least: int, warmup: int, seed: int) -> None:
        self.attentions, self.kind, self.least, self.warmup, self.seed = list(attentions), kind, least, warmup, seed
        sizes = [attention.units for attention in attentions]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.parts = {one.name: slice(s, s + one.units) for one, s in zip(attentions, starts, strict=True)}
        device = next(attentions[0].projection.parameters()).device
        self.log_alpha = nn.Parameter(torch.full((sum(sizes),), OPEN, device=device))
        self.groups: list[GateGroup] = []
        self.steps = 0
        self._uniform = torch.full_like(self.log_alpha, 0.5, requires_grad=False)
        self._hard = torch.ones_like(self._uniform)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self._members = torch.nn.functional.one_hot(owner).to(device)  # (N, attentions)
        self._handles: list[RemovableHandle] = []
        self._passed: set[str] = set()

    # ---- beginning ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, keep: Mapping[str, int], probabilities: Mapping[str, Tensor] | None) -> None:
        """Say how many gates are to be open in the end, and how they begin.

        Args:
            keep: Group -> count: "global", or attention -> count.
            probabilities: Attention -> P(open) of its heads, shape (units,); of "top_k" their logs are the scores.
                None: all open.
        """
        if probabilities is not None:
            flat = torch.cat([probabilities[name].double().cpu() for name in self.parts])
            hard = self.kind == "hard_concrete"
            start = log_alpha_of(flat) if hard else torch.log(flat.clamp(min=_SMALLEST) / flat.mean())
            self.log_alpha.copy_(start.to(self.log_alpha))
        elif self.kind == "top_k":
            self.log_alpha.zero_()
        for name, count in keep.items():
            heads = self._heads_of(name)
            drawn = float(self.probability[heads].sum())
            chosen = float(heads.stop - heads.start if probabilities is None else count)
            self.groups.append(GateGroup(name, heads, count, drawn if self.kind == "hard_concrete" else chosen))
        self.renew()

    @torch.no_grad()
    def resume(self, log_alpha: Tensor, groups: Mapping[str, Sequence[float]], steps: int) -> None:
        """Stand where gates stood that had learned in so many steps.

        Args:
            log_alpha: Shape (N,).
            groups: Group -> its `keep` and `first`.
            steps: Optimizer steps.
        """
        self.log_alpha.copy_(log_alpha.to(self.log_alpha))
        self.groups = [GateGroup(name, self._heads_of(name), int(k), first) for name, (k, first) in groups.items()]
        self.steps = steps
        self.renew()

    def _heads_of(self, group: str) -> slice:
        return slice(0, len(self.log_alpha)) if group == "global" else self.parts[group]

    @torch.no_grad()
    def renew(self) -> None:
        """Draw the gates of the next optimizer step, and choose which are open where they are hardened."""
        self.log_alpha.clamp_(-_MOST, _MOST)
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        drawn = torch.rand(len(self.log_alpha), generator=generator).clamp(_SMALLEST, 1.0 - _SMALLEST)
        self._uniform.copy_(to_device(drawn, self._uniform.device))
        self._hard.zero_()
        for group in self.groups:
            self._hard[group.heads].index_fill_(0, self._highest(group), 1.0)

    def _highest(self, group: GateGroup) -> Tensor:
        """Return which heads of a group are open when hardened: ties go to the first, each attention keeps `least`."""
        order = self.probability[group.heads].sort(descending=True, stable=True).indices
        if group.name != "global" or not self.least:
            return order[: self.count(group)]
        # Which of its attention's heads each is, best first: two sorts, however many attentions there are.
        members = self._members[order]
        place = (members.cumsum(0) * members).sum(1)
        first_those_that_stay = (place > self.least).int().sort(stable=True).indices
        stay = sum(min(self.least, attention.units) for attention in self.attentions)
        return order[first_those_that_stay][: max(self.count(group), stay)]

    # ---- what passes ----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the gates in place. Twice is once."""
        if self._handles:
            return
        let_compiled_code_see_hooks()
        for attention in self.attentions:
            change: Callable[[Tensor], Tensor] = partial(self._gated, attention, self.parts[attention.name])
            self._handles += attention.register(change)

    def detach(self) -> None:
        """Take the gates off: the model is as it was before `attach`."""
        while self._handles:
            self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}  # a copy of the model has copies of the hooks

    def _gated(self, attention: HeadOutputs, part: slice, values: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._passed.add(attention.name)
        gate = self.gate(part, attention.projection.training).to(values.device)
        # In float32, where the gradient of a gate, a sum over all positions times a scaler's factor, does not overflow.
        return (values * attention.spread(gate, values)).to(values.dtype)

    def gate(self, part: slice, training: bool) -> Tensor:
        """Return the gates of some heads as a forward pass in this mode applies them, float32, shape (units,)."""
        if not training:
            return self._hard[part]
        log_alpha = self.log_alpha[part]
        if self.kind == "top_k":
            return self._hard[part] + (log_alpha - log_alpha.detach())
        return hard_concrete(log_alpha, self._uniform[part])

    # ---- what they say --------------------------------------------------------------------------------------------

    @property
    def probability(self) -> Tensor:
        """P(open) of all heads, of "top_k" the sigmoid of the score: by it they are chosen; shape (N,), float64."""
        values = self.log_alpha.detach().double()
        return open_probability(values) if self.kind == "hard_concrete" else torch.sigmoid(values)

    def scores(self) -> Tensor:
        """Return `probability` on the CPU."""
        return self.probability.cpu()

    def count(self, group: GateGroup) -> int:
        """Return how many gates of a group are open now where they are hardened: at the end of the warm-up `keep`."""
        return max(round(group.target(self.progress)), 1) if self.progress < 1.0 else group.keep

    @property
    def progress(self) -> float:
        """Share of the warm-up that is over, in [0, 1]."""
        return min(self.steps / self.warmup, 1.0) if self.warmup else 1.0

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """Attention -> P(open) of its heads, shape (units,), float64; of "top_k", which draws nothing, 1 or 0."""
        found = self.scores() if self.kind == "hard_concrete" else self._hard.double().cpu()
        return {name: found[part].clone() for name, part in self.parts.items()}

    @property
    def unreached(self) -> list[str]:
        """The attentions that nothing has passed on its way to the output projection while something passed others."""
        return [name for name in self.parts if name not in self._passed] if self._passed else []

    @property
    def hardened(self) -> dict[str, Tensor]:
        """Attention -> which heads are open when hardened now, shape (units,), bool."""
        return {name: (self._hard[part] > 0).cpu() for name, part in self.parts.items()}

    def stats(self, group: GateGroup) -> GateStats:
        """Return how the gates of a group stand."""
        found = torch.cat([*self.probabilities.values()])[group.heads]
        entropy = float(binary_entropy(found).mean())
        return GateStats(
            open=int((found > 0.5).sum()),
            expected=float(found.sum()),
            target=group.target(self.progress),
            entropy=entropy,
        )

    @property
    def open(self) -> int:
        """Number of gates that are open rather than closed: P(open) > 1/2."""
        return sum(self.stats(group).open for group in self.groups)

    @property
    def expected(self) -> float:
        """Expected number of open gates: the sum of P(open)."""
        return sum(self.stats(group).expected for group in self.groups)

    @property
    def entropy(self) -> float:
        """Mean over gates of how undecided they are, in bits: 0 where each is always open or never."""
        return sum(self.stats(g).entropy * g.size for g in self.groups) / len(self.log_alpha)


def first_probabilities(scores: Mapping[str, Tensor], expected: float) -> dict[str, Tensor]:
    """Return P(open) of the heads of some attentions in proportion to their scores; see `proportional_probabilities`.

    Args:
        scores: Attention -> scores of its heads, shape (units,), >= 0.
        expected: Number of open gates over all of them.
    """
    found = proportional_probabilities(torch.cat([one.detach().cpu() for one in scores.values()]), expected)
    return dict(zip(scores, torch.split(found, [len(one) for one in scores.values()]), strict=True))
