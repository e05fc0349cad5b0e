"""How many heads a token keeps: as many as are effective for it, and what shows whether that number says anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from scipy import stats
from torch import Tensor

from emp_callbacks.study.gates.bench import Bench
from emp_callbacks.study.once.results import Row
from emp_callbacks.targets.head_norms import added_norms
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.heads import attention_heads

__all__ = ["VARIANTS", "TokenCounts", "partial_spearman", "spread_evenly"]

VARIANTS = {
    "B1": "each token its own count",
    "B2": "every token the mean count",
    "B3": "B1's counts, shuffled over tokens",
    "B4": "the same heads for every token",
    "B4'": "the same, as many of each layer as B1",
    "B5": "B1's counts, random heads",
}
"""Ways of choosing heads by token -> what they do; all keep as many on average."""

_SLACK = 0.01  # as EMPConfig.tolerance: N_eff = 3.998 keeps 4


class TokenCounts:
    """The test text, read with some heads of each token left out; B1 is measured at once.

    A head's score at a token is the norm of what it adds to the stream, ||o_h W_h||. B1 keeps the
    floor(beta * N_eff + 0.01) highest of each layer, at least one. All others keep exactly as many in sum: B2, in each
    layer, at some tokens drawn at random one head more than at the others; B3 the counts of all layers at another
    token; B4 those heads of the model whose mean score on the validation text is highest, at some tokens one more, and
    B4' the same of each layer by itself, so that layers share as in B1.

    Args:
        bench: The model, with the weights of its own training.
        beta: Factor on N_eff, > 0.
    """

    def __init__(self, bench: Bench, beta: float) -> None:
        self._bench, self._beta = bench, beta
        self._layers = [target.heads for target in attention_heads(bench.module) if target.heads is not None]
        self._generator = torch.Generator().manual_seed(bench.dense.seed)
        self._tokens = sum(targets.numel() for _, targets in bench.texts["test"])
        self._dense = torch.cat([nll.flatten() for nll in bench.token_losses(bench.texts["test"])])
        self.counts = torch.zeros(len(self._layers), self._tokens, dtype=torch.int64)
        self._start = 0
        self._own_loss = self._loss("test", self._own_counts)

    def measure(self, variant: str) -> Row:
        """Return the test loss in nats per token, the heads per token and layer, and of B1 what counts go with."""
        if variant == "B1":
            return {"test_loss": self._own_loss, "heads": self._mean(self.counts), **self._told()}
        if variant in ("B4", "B4'"):
            mask = self._static_heads() if variant == "B4" else self._static_heads_of_layers()
            loss = self._loss("test", lambda layer, scores: mask[layer][self._now(scores)])
            return {"test_loss": loss, "heads": self._mean(torch.stack([m.sum(1) for m in mask]))}
        table = self._fixed() if variant == "B2" else self._shuffled() if variant == "B3" else self.counts

        def heads(layer: int, scores: Tensor) -> Tensor:
            if variant == "B5":
                scores = torch.rand(scores.shape, generator=self._generator)
            return highest(scores, table[layer, self._now(scores)])

        return {"test_loss": self._loss("test", heads), "heads": self._mean(table)}

    # ---- which heads ----------------------------------------------------------------------------------------------

    def _own_counts(self, layer: int, scores: Tensor) -> Tensor:
        n_eff = scores.sum(1).square() / scores.square().sum(1)
        count = (self._beta * n_eff + _SLACK).floor().clamp(1, scores.shape[1]).long()
        self.counts[layer, self._now(scores)] = count
        return highest(scores, count)

    def _fixed(self) -> Tensor:
        return torch.stack([spread_evenly(int(own.sum()), self._tokens, self._generator) for own in self.counts])

    def _shuffled(self) -> Tensor:
        return self.counts[:, torch.randperm(self._tokens, generator=self._generator)]

    def _static_heads(self) -> list[Tensor]:
        """Return which heads each token keeps, shape (tokens, heads) for each layer, bool."""
        everywhere = spread_evenly(int(self.counts.sum()), self._tokens, self._generator)
        mask = highest(torch.cat(self._score_sums).expand(self._tokens, -1), everywhere)
        return list(torch.split(mask, [layer.units for layer in self._layers], dim=1))

    def _static_heads_of_layers(self) -> list[Tensor]:
        pairs = zip(self._score_sums, self._fixed(), strict=True)
        return [highest(scores.expand(self._tokens, -1), counts) for scores, counts in pairs]

    @cached_property
    def _score_sums(self) -> list[Tensor]:
        """The sum of each head's scores over the validation text, shape (heads,) for each layer, float64."""
        sums = [torch.zeros(layer.units, dtype=torch.float64) for layer in self._layers]

        def watch(layer: int, scores: Tensor) -> Tensor:
            sums[layer] += scores.double().sum(0)
            return torch.ones_like(scores, dtype=torch.bool)

        self._loss("val", watch)
        return sums

    # ---- one pass over a text -------------------------------------------------------------------------------------

    def _now(self, scores: Tensor) -> slice:
        """Return the place of the tokens that pass by, in the text."""
        return slice(self._start, self._start + len(scores))

    def _loss(self, part: str, heads: Callable[[int, Tensor], Tensor]) -> float:
        """Return the mean loss over a text where `heads` says which each token keeps.

        `heads` takes the layer's number and its scores, shape (tokens, heads), and returns bool, same shape.
        """
        handles = []
        for number, layer in enumerate(self._layers):

            def change(
                values: Tensor,
                number: int = number,
                layer: HeadOutputs = layer,
            ) -> Tensor:
                scores = added_norms(layer, values).cpu()
                kept = heads(number, scores.flatten(0, 1)).view(scores.shape)
                return values * layer.spread(kept.to(values), values)

            handles += layer.register(change)
        try:
            losses, self._start = [], 0
            for nll in self._bench.token_losses(self._bench.texts[part]):
                losses.append(nll.flatten())
                self._start += nll.numel()
        finally:
            for handle in handles:
                handle.remove()
        return float(torch.cat(losses).mean())

    # ---- what is said ---------------------------------------------------------------------------------------------

    def _mean(self, counts: Tensor) -> float:
        """Return the mean count of heads per token and layer."""
        return float(counts.sum()) / (self._tokens * len(self._layers))

    def _told(self) -> Row:
        """Return how the count of a token, over all layers, goes with the dense model's loss at it."""
        length = self._bench.texts["test"][0][1].shape[1]
        counts, position = self.counts.sum(0), torch.arange(self._tokens) % length
        varies = bool((counts != counts[0]).any())
        return {
            "dense_loss": float(self._dense.mean()),
            "spearman": float(stats.spearmanr(counts, self._dense).statistic) if varies else None,
            "partial_spearman": partial_spearman(counts, self._dense, position) if varies else None,
            "count_share": torch.bincount(self.counts.flatten()).div(self.counts.numel()).tolist(),
        }


def highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the mask of the highest scores of each token, so many as `counts` says.

    Args:
        scores: Shape (tokens, heads).
        counts: Shape (tokens,), int64.
    """
    places = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return places < counts[:, None]


def spread_evenly(total: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return counts with this sum, shape (tokens,), int64, that differ by one at most; which tokens have more is drawn.

    Examples:
        >>> sorted(spread_evenly(7, 3, torch.Generator()).tolist())
        [2, 2, 3]
    """
    counts = torch.full((tokens,), total // tokens)
    counts[torch.randperm(tokens, generator=generator)[: total % tokens]] += 1
    return counts


def partial_spearman(one: Tensor, other: Tensor, given: Tensor) -> float:
    """Return Spearman's correlation of two variables for equal values of a third: Pearson's partial one, of ranks.

    NaN where the third says all of another.

    Source: Kendall, "Partial rank correlation", Biometrika 32 (1942), for Spearman's ranks.

    Args:
        one: Shape (n,).
        other: Shape (n,).
        given: Shape (n,).
    """
    ranks = torch.stack([torch.from_numpy(stats.rankdata(values)) for values in (one, other, given)])
    (_, ab, ac), (_, _, bc), _ = torch.corrcoef(ranks).tolist()
    rest = ((1 - ac * ac) * (1 - bc * bc)) ** 0.5
    return float((ab - ac * bc) / rest) if rest > 0 else float("nan")
