"""Attention heads that each token, or each sample, chooses for itself in every forward pass.

Letters in shapes: N positions of all samples, B samples, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.targets.compiled_site import choose, watch
from emp_callbacks.targets.forward_site import CountRule, ForwardSite, choose_rows, in_backward
from emp_callbacks.targets.head_norms import added_norms, check_has_columns
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.heads import find_attention
from emp_callbacks.targets.positions import counted_rows
from emp_callbacks.targets.replace_pruned import replace_pruned
from emp_callbacks.targets.shapes import own_shape
from emp_callbacks.targets.unit_search import UnitSearch
from emp_callbacks.targets.units import UnitTarget
from emp_callbacks.targets.wrappers import innermost

_KEYS = ("samples", "n_eff", "keep", "mass", "not_finite")


class DynamicHeadSite(ForwardSite):
    """One attention whose heads are chosen anew in every forward pass, by the norm of what each adds to the stream.

    What a head adds is its output times its columns of the output projection (`head_norms.added_norms`), so every head
    is computed before some are dropped. The choice has no gradient; what kept heads hand on has, what dropped ones do
    has none.

    Attributes:
        outputs: Where the heads' outputs pass by.
        per: Who chooses: each "token", or each "sample" by the mean of its positions' norms, padded ones among them.
        size: Number of heads H.
        active: Whether heads are dropped.
    """

    def __init__(self, outputs: HeadOutputs, per: str, rule: CountRule) -> None:
        super().__init__(outputs.name, outputs.module)
        self.outputs = outputs
        self.per = per
        self.size = outputs.units
        self.active = False
        self._rule = rule
        self._device = torch.device("cpu")

    def on(self, module: nn.Module) -> DynamicHeadSite:
        """Return the same site for the attention of another model, by that one's projection; hooks not yet attached.

        Raises:
            ValueError: It has other heads.
        """
        inside = innermost(module)
        found = find_attention(UnitSearch(inside, own_shape), inside)
        if found is None or found.units != self.size:
            has = f"{found.units} heads" if found is not None else "no heads that are known"
            raise ValueError(
                f"{self.name!r} has {has} in the other model ({type(inside).__name__}), and {self.size} in the pruned"
            )
        twin = super().on(inside)
        assert isinstance(twin, DynamicHeadSite)
        twin.outputs = HeadOutputs(
            self.name, inside, found.output, found.columns, found.units, found.layout.calls_output
        )
        return twin

    @property
    def reads_positions(self) -> bool:
        return self.per == "token"

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64, each of shape ().

        "samples": of per="token" the positions that count, and summed over them "n_eff", "keep" (heads) and "mass"
        (kept share of the norms); "not_finite" counts those with NaN or Inf, which are in no other sum.
        """
        return {key: self._sum(key, (), self._device) for key in _KEYS}

    def _register(self) -> list[RemovableHandle]:
        return self.outputs.register(self._hand_on)

    def _hand_on(self, values: Tensor) -> Tensor | None:
        self._refuse_recording(steady=False)
        if not (self.active or self._gathers):
            return None
        self._check(values)
        compiling = torch.compiler.is_compiling()
        scores = self._scores(added_norms(self.outputs, values))
        if not self.active:
            if compiling:
                watched: Tensor = watch(values, scores, self.positions, self._number, False)
                return watched
            self.see_forward(scores, self.positions)
            return None
        kept = choose(scores, None, self._number) if compiling else self.choose(scores, None)
        channels = self.outputs.channels(values.ndim)
        moved = values.movedim(channels, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        if self.per == "sample":
            kept = kept.repeat_interleave(len(rows) // len(kept), 0)
        masked = replace_pruned(rows, self.outputs.spread(kept.reshape(-1, self.size), rows), 0.0)
        return masked.reshape(moved.shape).movedim(-1, channels)

    def _check(self, values: Tensor) -> None:
        if values.is_nested:
            raise RuntimeError(
                f"the heads of {self.name!r} hand on a nested tensor, whose positions cannot choose: pad the batch, or "
                f"exclude={[self.name]!r}"
            )
        if self.per == "sample" and values.ndim < 3:
            raise ValueError(
                f"per='sample' needs heads that hand on (B, ..., C), {self.name!r} hands on {tuple(values.shape)}, in "
                "which samples are not apart: use per='token'"
            )

    def _scores(self, norms: Tensor) -> Tensor:
        """Return what chooses: the norms, shape (..., H), or the means of each sample, shape (B, H)."""
        return norms if self.per == "token" else norms.flatten(1, -2).mean(1)

    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:  # noqa: ARG002
        """Gather statistics of scores, see `choose`."""
        self.choose(activation, None)

    @torch.no_grad()
    def choose(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Return which heads are kept, shape of `scores`, (..., H), bool; gather statistics if it is time to."""
        rows = scores.reshape(-1, self.size)
        choice = choose_rows(rows, self._rule, noise)
        if self._gathers and not in_backward():
            positions = counted_rows(self.positions, scores.shape) if self.reads_positions else None
            counted = torch.ones_like(choice.finite) if positions is None else _flat(positions, rows)
            whole = (choice.finite & counted).double()
            self._device = rows.device
            self._add({
                "samples": whole.sum(),
                "n_eff": (choice.n_eff * whole).sum(),
                "keep": (choice.keep * whole).sum(),
                "mass": (choice.mass * whole).sum(),
                "not_finite": (counted & ~choice.finite).sum(dtype=torch.float64),
            })  # fmt: skip
        return choice.mask.reshape(scores.shape)


def _flat(positions: Tensor, rows: Tensor) -> Tensor:
    """Return which rows count, shape (N,): of images in windows and the like, a position's rows lie together."""
    flat = positions.to(rows.device).flatten()
    return flat.repeat_interleave(len(rows) // len(flat))


def dynamic_head_sites(
    model: nn.Module, targets: Sequence[UnitTarget], per: str, rule: CountRule
) -> list[DynamicHeadSite]:
    """Return one site, not yet attached, for each attention.

    Args:
        model: The model.
        targets: The attentions, as `attention_heads` finds them.
        per: "token" or "sample", see `DynamicHeadSite`.
        rule: Keep counts of a token or a sample.

    Raises:
        ValueError: Of an attention the norm of what a head adds is not known, or with per="sample" tokens of a causal
            one would know later ones, or samples are not apart in what its heads hand on.
    """
    found = [target.heads for target in targets if target.heads is not None]
    for target in targets:
        if any(member.role == "adapter" for member in target.members):
            raise ValueError(
                f"the output projection of {target.name!r} has adapters of PEFT, which read the heads beside it: merge "
                f"them (merge_and_unload), or exclude={[target.name]!r}"
            )
    for outputs in found:
        check_has_columns(outputs)
    if per == "sample":
        _check_samples(model, found)
    return [DynamicHeadSite(outputs, per, rule) for outputs in found]


def _check_samples(model: nn.Module, found: Sequence[HeadOutputs]) -> None:
    for outputs in found:
        # A cross-attention does not say whose queries it has: beside a causal attention they are its block's.
        blocks = [module for module in model.modules() if outputs.module in module._modules.values()]
        if any(map(_is_causal, [outputs.module, *blocks])):
            raise ValueError(
                f"per='sample' lets the choice of a token depend on later ones, and {outputs.name!r} "
                f"({type(outputs.module).__name__}) is causal, or beside one that is: use per='token'"
            )
        if not outputs.is_called:
            raise ValueError(
                f"{outputs.name!r} ({type(outputs.module).__name__}) hands on the positions of all samples in one "
                "row, so that per='sample' finds no samples: use per='token'"
            )


def _is_causal(module: nn.Module) -> bool:
    """Return whether an attention, or one in it, says by attribute, config or class that tokens see no later ones."""
    for part in module.modules():
        stated = [getattr(part, name, None) for name in ("is_causal", "causal", "is_decoder")]
        stated.append(getattr(getattr(part, "config", None), "is_decoder", None))
        if any(value is True for value in stated) or "causal" in type(part).__name__.lower():
            return True
    return False
