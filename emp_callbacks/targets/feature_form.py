"""What a feature of an activation is: a channel, a token, a patch, and where each lies in a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

AXES = ("channel", "token", "patch")
CENTERS = ("zero", "mean")
CHOOSERS = ("sample", "token")


@dataclass(frozen=True, kw_only=True)
class FeatureForm:
    """What a feature is and what pruning makes of it.

    Attributes:
        axis: "channel": dimension 1 of (B, C, H, W), the last of (B, T, C) and (B, C). "token": dimension 1 of
            (B, T, C). "patch": squares of (B, C, H, W) through all channels, counted row by row.
        dynamic: Whether each sample prunes by its own scores.
        per: Of the dynamic form, who chooses: each "sample" by all of its tokens, or each "token" of (B, T, C) its own
            channels. A causal model needs "token": by sample, a token's mask would know the tokens after it.
        center: What a pruned feature becomes: "zero", or "mean": of a static site the feature's mean over samples
            and positions, of a dynamic one the mean over the sample's features, position by position.
        patch_size: Pixels per side of a patch; H and W must be multiples.
    """

    axis: str = "channel"
    dynamic: bool = False
    per: str = "sample"
    center: str = "zero"
    patch_size: int = 4

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"axis={self.axis!r} is unknown; choose one of {', '.join(AXES)}")
        if self.center not in CENTERS:
            raise ValueError(f"center={self.center!r} is unknown; choose one of {', '.join(CENTERS)}")
        if self.per not in CHOOSERS:
            raise ValueError(f"per={self.per!r} is unknown; choose one of {', '.join(CHOOSERS)}")
        if self.per == "token" and self.axis != "channel":
            raise ValueError(f"per='token' lets each token choose its channels: axis={self.axis!r} must be 'channel'")
        if not isinstance(self.dynamic, bool):
            raise TypeError(f"dynamic={self.dynamic!r} must be True or False")
        if not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size!r} must be a whole number of pixels >= 1")


class FeatureLayout(NamedTuple):
    """Where the features of one activation lie, once it is viewed in another shape.

    Attributes:
        view: The shape.
        features: Its dimensions that count features; dimension 0 counts samples, the others positions.
    """

    # Lists, not generators, below: torch.compile cannot trace those.

    view: tuple[int, ...]
    features: tuple[int, ...]

    # Methods: torch.compile of torch 2.7 cannot read properties of a named tuple in all cases.
    def positions(self) -> tuple[int, ...]:
        """Dimensions that count the positions of a feature."""
        return tuple([d for d in range(1, len(self.view)) if d not in self.features])

    def number(self) -> int:
        """Return the number of features F."""
        return prod([self.view[d] for d in self.features])

    def spread(self, value: Tensor) -> Tensor:
        """Return `value`, shape (F,) or (B, F), in a shape that broadcasts over the viewed activation."""
        shape = [n if d in self.features else 1 for d, n in enumerate(self.view)]
        shape[0] = value.shape[0] if value.dim() == 2 else 1
        return value.view(shape)

    def sum(self, viewed: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the sum over positions, those that count (bool, broadcasts over `viewed`), shape (B, F), float64."""
        at = self.positions()
        viewed = viewed if counted is None else viewed.masked_fill(~counted, 0.0)
        return (viewed.sum(at, dtype=torch.float64) if at else viewed.double()).flatten(1)

    def mean(self, viewed: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean over the same positions, 0 where none counts, shape (B, F), float64."""
        total = self.sum(viewed, counted)
        at = self.positions()
        if counted is None or not at:
            return total / prod([self.view[d] for d in at])
        return total / counted.sum(at).clamp(min=1)


def feature_layout(form: FeatureForm, shape: torch.Size, name: str) -> FeatureLayout:
    """Return where the features lie in an activation of this shape, which the module `name` gave.

    Raises:
        ValueError: The shape has no such axis, or patches do not tile it.
    """
    if form.dynamic and form.per == "token":
        if len(shape) > 3:
            raise ValueError(f"per='token' needs an output (B, T, C), {name!r} gave {tuple(shape)}; use per='sample'")
        return FeatureLayout((shape[:-1].numel(), shape[-1]), (1,))
    if form.axis == "channel" and len(shape) >= 2:
        return FeatureLayout(tuple(shape), (len(shape) - 1 if len(shape) <= 3 else 1,))
    if form.axis == "token" and len(shape) == 3:
        return FeatureLayout(tuple(shape), (1,))
    if form.axis == "patch" and len(shape) == 4:
        b, c, h, w = shape
        p = form.patch_size
        if h % p or w % p:
            raise ValueError(
                f"patch_size={p} does not tile the output of {name!r}, {h} x {w} pixels; choose a divisor of both or "
                "exclude the module"
            )
        return FeatureLayout((b, c, h // p, p, w // p, p), (2, 4))
    wanted = {"channel": "(B, C), (B, T, C) or (B, C, H, W)", "token": "(B, T, C)", "patch": "(B, C, H, W)"}[form.axis]
    raise ValueError(
        f"axis={form.axis!r} needs an output {wanted}, {name!r} gave {tuple(shape)}; choose another axis or exclude it"
    )
