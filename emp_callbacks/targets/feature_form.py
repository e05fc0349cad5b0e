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
WHEN = ("always", "training")
CHOICES = ("top", "gumbel")
GRADIENTS = ("masked", "straight_through")
_VALUES = {"axis": AXES, "center": CENTERS, "per": CHOOSERS, "apply": WHEN, "choose": CHOICES, "gradient": GRADIENTS}


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
        apply: When masks reach the forward pass: "always"; or, as dropout, while the masked module is in "training"
            mode, so that its evaluation is dense. What a mask is, and when it is made anew, does not depend on that.
        choose: Of the dynamic form, which floor(beta * N_eff) features a sample keeps: the "top" scores; or, in
            training mode, as many drawn without replacement, each next one with probability proportional to its score
            among those left (Gumbel-top-k; Kool, van Hoof, Welling 2019, arXiv:1903.06059). Scores of 0 are never
            drawn. In evaluation mode it is the top scores. The noise comes from torch's default generator of the
            activation's device, one number for each score, as dropout's does.
        gradient: What the backward pass sees: the gradient of the "masked" output, 0 for a pruned feature; or
            "straight_through", the output's gradient for every feature as if nothing were masked (Bengio et al. 2013,
            arXiv:1308.3432; of activations, Wang et al. 2024, arXiv:2407.10969).
        rescale: Of the dynamic form: whether a sample's kept features are moved away from what pruned ones become by
            the factor sum s / sum of its kept s, so that the scores' sum is as before the mask. The factor is a
            constant of the backward pass.
    """

    axis: str = "channel"
    dynamic: bool = False
    per: str = "sample"
    center: str = "zero"
    patch_size: int = 4
    apply: str = "always"
    choose: str = "top"
    gradient: str = "masked"
    rescale: bool = False

    def __post_init__(self) -> None:
        for name, known in _VALUES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
        if self.per == "token" and self.axis != "channel":
            raise ValueError(f"per='token' lets each token choose its channels: axis={self.axis!r} must be 'channel'")
        for name in ("dynamic", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        if not self.dynamic and (self.choose != "top" or self.rescale):
            given = "rescale=True" if self.rescale else f"choose={self.choose!r}"
            raise ValueError(
                f"{given} goes by each sample's own scores, which dynamic=True alone has: set it, or drop it"
            )
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
