"""Attention edges as units: which keys each query reads.

Letters in shapes: `...` samples and heads, L queries, S keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.hooks import RemovableHandle

from emp_callbacks.targets.compiled_site import choose, watch
from emp_callbacks.targets.forward_site import CountRule, ForwardSite, RowChoice, choose_rows, in_backward, named_sites
from emp_callbacks.targets.heads import projections
from emp_callbacks.targets.intercept import Intercept, Interception

SCORES = ("weight", "logit")

_KEYS = ("rows", "n_eff", "allowed", "keep", "mass", "not_finite", "first_token", "first_token_rows")


class EdgeSite(ForwardSite):
    """One attention module whose edges are scored and masked before the softmax, in every query row by itself.

    While neither observing nor active nothing is intercepted. Otherwise the L x S scores of every sample and head are
    held in memory, which fused attention avoids: at most 24 bytes for each in a causal row of 1024 keys ("logit": 31),
    for one module at a time; in training the weights of every module stay until its backward pass.

    Inside torch.compile the graphs of a whole model stay whole; blocks compiled one by one are each compiled anew, and
    beyond `torch._dynamo.config.recompile_limit` run uncompiled.

    Attributes:
        score: "weight": the softmax weight. "logit": what enters the softmax, less the row's lowest.
        active: Whether edges are masked.
    """

    def __init__(self, name: str, module: nn.Module, score: str, rule: CountRule) -> None:
        super().__init__(name, module)
        self.score = score
        self.active = False
        self._rule = rule
        self._interception = Interception()
        self._device = torch.device("cpu")

    def detach(self) -> None:
        super().detach()
        self._interception.abandon()

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64, each of shape ().

        "rows": query rows of all samples and heads in which a key is allowed, and summed over them "n_eff",
        "allowed" (keys), "keep" (keys) and "mass" (kept share of the scores); "not_finite" counts rows with NaN or
        Inf, which are in no other sum. "first_token": softmax weight, before pruning, of key 0, summed over the
        "first_token_rows" rows in which more than one key is allowed.
        """
        return {key: self._sum(key, (), self._device) for key in _KEYS}

    def _register(self) -> list[RemovableHandle]:
        return [
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        self._interception.abandon()
        self._refuse_recording(steady=False)
        if not (self.active or self._gathers):
            return None
        intercept = Intercept({"scaled_dot_product_attention": self._attend}, anywhere=True)
        return self._interception.begin(intercept, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        ended, changed = self._interception.end(output)
        # output is None where the forward itself raised
        if ended is not None and output is not None and not ended.calls:
            raise RuntimeError(
                f"{self.name!r} ({type(module).__name__}) ran without torch's scaled_dot_product_attention, "
                'so its edges cannot be pruned; timm: set fused_attn = True; transformers: attn_implementation="sdpa"; '
                "nn.MultiheadAttention: call it with need_weights=False; or exclude the module"
            )
        return changed

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stand in for torch's scaled_dot_product_attention: same arguments, same result but for the pruned edges."""
        groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        compiling = torch.compiler.is_compiling()
        with torch.set_grad_enabled(self.active and torch.is_grad_enabled()):
            logits, seen = _logits(query, _repeat(key, groups), attn_mask, is_causal, scale)
        if self.active:
            kept = choose(seen, None, self._number) if compiling else self.choose(seen)
            weights = _softmax(logits.masked_fill(~kept, -torch.inf)).to(value.dtype)
            return F.dropout(weights, dropout_p) @ _repeat(value, groups)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if compiling:
            watched: Tensor = watch(output, seen, None, self._number, False)
            return watched
        self.see_forward(seen, None)
        return output

    @torch.no_grad()
    def choose(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return which edges are kept and gather statistics if it is time to.

        Args:
            scores: Logits, shape (..., L, S); -inf where a key is not allowed.
            noise: Not read: edges are never drawn.

        Returns:
            Same shape, bool, True = kept; of a row in which no key is allowed, all.
        """
        rows = scores.flatten(0, -2)
        allowed = rows != -torch.inf
        weights = _softmax(rows)
        choice = choose_rows(weights if self.score == "weight" else _above_lowest(rows, allowed), self._rule)
        kept = choice.mask & allowed
        if self._gathers and not in_backward():
            self._gather(choice, kept, allowed, weights[:, 0])
        return (kept | ~allowed.any(1, keepdim=True)).view(scores.shape)

    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:  # noqa: ARG002
        """Gather statistics of logits, see `choose`: of all rows, as attention masks say themselves what is read."""
        self.choose(activation)

    def _gather(self, choice: RowChoice, kept: Tensor, allowed: Tensor, first_weight: Tensor) -> None:
        keys = allowed.sum(1)
        counted = (keys > 0) & choice.finite
        several = (keys > 1) & choice.finite
        per_row = {
            "rows": counted,
            "n_eff": choice.n_eff * counted,
            "allowed": keys * counted,
            "keep": kept.sum(1) * counted,
            "mass": choice.mass * counted,
            "not_finite": (keys > 0) & ~choice.finite,
            "first_token": first_weight.masked_fill(~several, 0.0),
            "first_token_rows": several,
        }
        self._device = allowed.device
        self._add({key: value.sum(dtype=torch.float64) for key, value in per_row.items()})


def _repeat(heads: Tensor, groups: int) -> Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, -3)


def _logits(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return what enters the softmax, shape (..., L, S), float32 or float64, and it with -inf for keys not allowed."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    if is_causal:
        logits = logits.masked_fill(~_lower_triangle(logits), -torch.inf)
    if attn_mask is None:
        return logits, logits.detach()
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
        return logits, logits.detach()
    # transformers may write a key that is not allowed as the lowest number; torch gives a row of only those weights
    logits = logits + attn_mask
    return logits, logits.detach().masked_fill(attn_mask <= torch.finfo(attn_mask.dtype).min, -torch.inf)


def _lower_triangle(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()


def _softmax(logits: Tensor) -> Tensor:
    # not torch.softmax: a row without any key has weight 0, as in torch's attention
    weights: Tensor = torch.ops.aten._safe_softmax(logits, -1)
    return weights


def _above_lowest(rows: Tensor, allowed: Tensor) -> Tensor:
    lowest = rows.masked_fill(~allowed, torch.inf).amin(1, keepdim=True)
    return (rows - lowest).masked_fill(~allowed, 0.0)


def edge_sites(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    score: str,
    rule: CountRule,
) -> list[EdgeSite]:
    """Return one site, not yet attached, for each attention module.

    Args:
        model: Any module whose attention runs torch's scaled_dot_product_attention.
        include: Globs on module names, any module that runs it inside; None: the modules in which heads are found.
        exclude: Globs on module names to leave out.
        score: "weight" or "logit", see `EdgeSite`.
        rule: Keep counts of a query row.

    Raises:
        ValueError: `score` is unknown, a pattern matches no module, or nothing is left.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; choose one of {', '.join(SCORES)}")
    chosen = named_sites(model, include, exclude, lambda module: bool(projections(module)), "attention modules")
    return [EdgeSite(name, module, score, rule) for name, module in chosen]
