"""What mode "rewire" replaces at a refresh: the lowest of the kept are dropped, and as many others grown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, MissingEvidence, Ranks
from emp_callbacks.layer.shared_sums import together
from emp_callbacks.pruning.decision import decide
from emp_callbacks.pruning.groups import Decision, KeepRule, Scored
from emp_callbacks.pruning.pattern_decision import group_layers


@dataclass(frozen=True)
class Regrowth:
    """How weights are grown.

    Attributes:
        criterion: Scores what is pruned.
        fraction: Of a group's kept weights those that are replaced, in [0, 1).
    """

    criterion: Criterion
    fraction: float

    def decide(
        self, layers: Sequence[Layer], scored: Sequence[Scored], scope: str, rule: KeepRule, ranks: Ranks, step: int
    ) -> list[Decision]:
        """Return, for each group, what stays of the kept together with what is grown. Collective; changes nothing.

        A group keeps K = floor(density * n). The round((1 - fraction) * K) highest of the kept stay; of all others,
        those just dropped among them, the highest by the growth criterion fill up to K. What scores 0 neither stays
        nor is grown. A layer of which the growth criterion knows nothing drops nothing where layers do not compete.
        With a pattern each dropped weight makes room for one of its own N:M group, whatever that scores.

        Args:
            layers: All of which have a mask.
            scored: Their scores.
            scope: "global" or "tensor".
            rule: Gives the density.
            ranks: The job's processes.
            step: Optimizer step, for error messages.

        Raises:
            MissingEvidence: The growth criterion knows nothing of any layer.
            FloatingPointError: A score is NaN or Inf.

        Source: Evci et al., arXiv:1911.11134, algorithm 1.
        """
        sizes = {one.span.name: one.span.size for one in scored}
        sizes = {"global": sum(sizes.values())} if scope == "global" else sizes
        total = {name: max(1, math.floor(rule.of_group(name).density * n + 1e-6)) for name, n in sizes.items()}  # type: ignore[operator]
        masks = [layer.mask_or_ones for layer in layers]
        kept = [Scored(one.span, _where(mask, one.scores)) for one, mask in zip(scored, masks, strict=True)]
        growth = self._scores(layers, ranks)
        fewer = {
            name: keep if name in growth and growth[name] is None else max(1, round((1 - self.fraction) * keep))
            for name, keep in total.items()
        }
        stay = decide(kept, scope, _exactly(fewer, sizes), ranks, step)
        staying = {i: one.mask(i) & masks[i] for one in stay for i in one.members}
        others = []
        for i, layer in enumerate(layers):
            scores = growth[layer.name]
            nothing = torch.zeros_like(masks[i], dtype=torch.float32)
            others.append(Scored(layer.span, nothing if scores is None else _where(~staying[i], scores)))
        if rule.pattern is not None:
            return _within_groups(stay, staying, others, rule.pattern, ranks)
        lacking = {one.group: total[one.group] - one.keep for one in stay}
        grown = decide(others, scope, _exactly(lacking, sizes), ranks, step)
        return [_both(old, new, staying, lacking[old.group]) for old, new in zip(stay, grown, strict=True)]

    def _scores(self, layers: Sequence[Layer], ranks: Ranks) -> dict[str, Tensor | None]:
        """Return what the growth criterion says of each layer, by name; None where it knows nothing. Collective."""

        def work(i: int) -> Tensor | MissingEvidence:
            try:
                return self.criterion.score(layers[i]).abs()
            except MissingEvidence as error:
                return error

        found = together([layer.asking for layer in layers], work, ranks)
        missing = [scores for scores in found if isinstance(scores, MissingEvidence)]
        if missing and len(missing) == len(found):
            raise missing[-1]
        named = zip(layers, found, strict=True)
        return {layer.name: scores if isinstance(scores, Tensor) else None for layer, scores in named}


def _within_groups(
    stay: Sequence[Decision],
    staying: Mapping[int, Tensor],
    others: Sequence[Scored],
    pattern: GroupPattern,
    ranks: Ranks,
) -> list[Decision]:
    """Fill up every group of a pattern with the best that grows there. Collective."""
    filled = [one._replace(scores=one.scores.masked_fill(staying[i], math.inf)) for i, one in enumerate(others)]
    grouped = group_layers(filled, pattern, ranks)
    keep = [one.n // pattern.size * pattern.keep for one in stay]
    return [
        replace(old, keep=kept, mask=lambda i: grouped[i].mask(), is_top=False, mass_floor=None, cut=None)
        for old, kept in zip(stay, keep, strict=True)
    ]


def _where(mask: Tensor, scores: Tensor) -> Tensor:
    return torch.where(mask, scores, 0.0)


def _exactly(counts: dict[str, int], sizes: dict[str, int]) -> KeepRule:
    """Return the rule that keeps so many of each group: half a component above, so that no rounding loses one."""
    return KeepRule(densities={name: min(1.0, (count + 0.5) / sizes[name]) for name, count in counts.items()})


def _both(old: Decision, new: Decision, staying: Mapping[int, Tensor], lacking: int) -> Decision:
    # A group whose scores are all 0 is "kept whole": here that is nothing to grow.
    found = new.keep if lacking > 0 and new.n_eff else 0
    note = f"only {found} of {lacking} weights were grown: no others have a gradient" if found < lacking else old.note

    def mask(i: int) -> Tensor:
        return staying[i] | (new.mask(i) & ~staying[i]) if found else staying[i]

    digest = old.digest ^ (new.digest if found else 0)
    return replace(
        old, keep=old.keep + found, mask=mask, note=note, digest=digest, is_top=False, mass_floor=None, cut=None
    )
