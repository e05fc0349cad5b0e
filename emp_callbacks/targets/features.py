"""Intermediate activations as units: channels, tokens or patches of a module's output.

A static site masks the same features for every sample until a new mask is installed. A dynamic one chooses
anew for each sample, in each forward pass. Shapes below: B samples, F features, and what remains of an
activation, the positions of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.targets.activation_modules import is_activation
from emp_callbacks.targets.compiled_site import choose, watch
from emp_callbacks.targets.feature_form import FeatureForm, FeatureLayout, feature_layout
from emp_callbacks.targets.forward_site import CountRule, ForwardSite, choose_rows, in_backward, named_sites
from emp_callbacks.targets.positions import counted_rows
from emp_callbacks.targets.replace_pruned import replace_pruned, rescale_kept, straight_through
from emp_callbacks.targets.watched_gradient import WatchGradient

STATISTICS = ("activation", "taylor", "saliency")


class FeatureSite(ForwardSite):
    """One module whose output features are scored and masked in the forward pass.

    Attributes:
        form: What a feature is.
        size: Number of features F; None before the first forward.
        mask: Of a static site, shape (F,), bool, True = kept; None: nothing was pruned yet.
        active: Of a dynamic site: whether samples are masked.
    """

    def __init__(
        self, name: str, module: nn.Module, form: FeatureForm, criterion_statistic: str, rule: CountRule
    ) -> None:
        super().__init__(name, module)
        self.form = form
        self.size: int | None = None
        self.mask: Tensor | None = None
        self.active = False
        self._mean: Tensor | None = None
        self._criterion = criterion_statistic
        self._rule = rule
        self._device = torch.device("cpu")

    @property
    def _masks_now(self) -> bool:
        return self.form.apply == "always" or self.module.training

    @property
    def reads_positions(self) -> bool:
        return not self.form.dynamic and self.form.axis == "channel"

    def _recall(self) -> None:
        self.size = self.size or next((len(total) for total in self.sums.values() if total.dim()), None)

    def statistics(self) -> dict[str, Tensor]:
        """Return this rank's sums since `reset`, float64, always the same keys and shapes.

        A static site: "samples", shape (), and, each shape (F,), summed over samples: "activation" (mean over
        positions of |a|), "taylor" (|sum over positions of a * dL/dy|) or "saliency" (mean over positions of |dL/dy|),
        whichever the criterion reads; with center="mean" also "value" (mean over positions of a) and, in place of
        "activation", "square" (of a^2). Of channels only the `positions` that count are positions. `a` is the
        activation before the mask and y the output after it, so a pruned feature is scored as if let through. L is
        what backward() was called on: the mean over a batch makes dL/dy B times smaller than a sum, and a gradient
        scaler multiplies it; neither is undone. What a criterion reads from gradients counts samples in the backward
        pass.

        A dynamic site, each shape (): "samples", and summed over them "n_eff", "keep" (features) and "mass" (kept
        share of the scores); "not_finite" counts samples with NaN or Inf, which are in no other sum.

        Raises:
            RuntimeError: No forward pass reached the module.
        """
        if self.size is None:
            raise RuntimeError(
                f"no forward pass has reached {self.name!r} ({type(self.module).__name__}): run the model first, or "
                "exclude the module if the model does not call it"
            )
        shapes = {key: (() if key in _SCALARS else (self.size,)) for key in self._keys()}
        return {key: self._sum(key, shape, self._device) for key, shape in shapes.items()}

    def _keys(self) -> tuple[str, ...]:
        if self.form.dynamic:
            return ("samples", "n_eff", "keep", "mass", "not_finite")
        if self.form.center == "zero":
            return ("samples", self._criterion)
        return ("samples", "square" if self._criterion == "activation" else self._criterion, "value")

    def means(self, sums: dict[str, Tensor]) -> Tensor:
        """Return the mean of each feature from (all ranks') statistics with center="mean", shape (F,), float64."""
        return sums["value"] / sums["samples"].clamp(min=1)

    def scores(self, sums: dict[str, Tensor]) -> Tensor:
        """Return the score of each feature from (all ranks') statistics of a static site, shape (F,), float64.

        The mean over samples of what the criterion reads; with center="mean" the activation criterion is the standard
        deviation sqrt(E a^2 - (E a)^2), what is lost when the feature becomes its mean.
        """
        if "square" not in sums:
            return sums[self._criterion] / sums["samples"].clamp(min=1)
        variance = sums["square"] / sums["samples"].clamp(min=1) - self.means(sums).square()
        return variance.clamp(min=0).sqrt()

    @torch.inference_mode(False)
    def install(self, mask: Tensor, mean: Tensor | None = None) -> None:
        """Mask the same features for every sample from now on.

        Args:
            mask: Shape (F,), bool, True = kept; copied into the mask in use, so compiled code stays valid.
            mean: What pruned features become with center="mean", shape (F,), floating.

        Raises:
            TypeError: The mask is not bool.
            ValueError: The site is dynamic, a shape is not (F,), or center="mean" and there is no mean.
        """
        self._check_install(mask, mean)
        there = to_device(mask.detach(), self._device)
        self.mask = there.clone() if self.mask is None else self.mask.copy_(there)
        if self.form.center == "mean" and mean is not None:
            if self._mean is None:
                self._mean = to_device(mean.detach(), self._device).to(torch.float64, copy=True)
            else:
                self._mean.copy_(to_device(mean, self._mean.device))

    def _check_install(self, mask: Tensor, mean: Tensor | None) -> None:
        if self.form.dynamic:
            raise ValueError(f"{self.name!r} is dynamic: each sample has its own mask; set active=True instead")
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask of {self.name!r} must be bool (True = kept), got {mask.dtype}; call .bool()")
        if self.form.center == "mean" and mean is None:
            raise ValueError(f"{self.name!r} has center='mean': install needs the mean of each feature")
        held = (self.size,) if self.mask is None else tuple(self.mask.shape)
        size = mask.shape if held == (None,) else held
        for what, value in (("mask", mask), ("mean", mean)):
            if value is not None and (value.dim() != 1 or tuple(value.shape) != tuple(size)):
                raise ValueError(f"{what} of {self.name!r} has shape {tuple(value.shape)}, must be {tuple(size)}")

    def _register(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self._hook)]

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        activation = self._activation_of(output)
        masked = self._nested(activation) if activation.is_nested else self._seen(activation, self.positions)
        if masked is None:
            return None
        return masked if isinstance(output, Tensor) else (masked, *output[1:])

    def _seen(self, activation: Tensor, positions: Tensor | None) -> Tensor | None:
        """Gather, if it is time to, and return the activation masked; None where nothing is changed."""
        self._refuse_recording(steady=self.mask is not None and not self.observing)
        layout = feature_layout(self.form, activation.shape, self.name)
        if layout.number() != self.size or activation.device != self._device:
            self._meet(activation, layout)
        if self.form.dynamic:
            return self._dynamic(activation, layout)
        return self._static(activation, layout, positions)

    def _nested(self, activation: Tensor) -> Tensor | None:
        """Do the same with each sample of a nested tensor: they differ in length, and nothing in it is padding."""
        samples = [sample[None] for sample in activation.unbind()]
        masked = [self._seen(sample, None) for sample in samples]
        if all(sample is None for sample in masked):
            return None
        changed = [b[0] if m is None else m[0] for b, m in zip(samples, masked, strict=True)]
        if activation.layout == torch.jagged:  # the same offsets: it can still be added to what it came from
            return torch.nested.nested_tensor_from_jagged(torch.cat(changed), activation.offsets())  # type: ignore[attr-defined]
        return torch.nested.as_nested_tensor(changed)

    def _activation_of(self, output: Any) -> Tensor:
        first = output[0] if type(output) is tuple and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            what = (
                f"a tuple that begins with {type(first).__name__}" if type(output) is tuple else type(output).__name__
            )
            raise TypeError(
                f"module {self.name!r} ({type(self.module).__name__}) returns {what}; features need a floating tensor "
                "or a tuple that begins with one: exclude it or name a module inside it"
            )
        return first

    def _meet(self, activation: Tensor, layout: FeatureLayout) -> None:
        """Learn what the module gives, at its first forward or when it has moved to another device."""
        known = self.size if self.size is not None else (None if self.mask is None else self.mask.numel())
        if known is not None and known != layout.number():
            raise ValueError(
                f"module {self.name!r} ({type(self.module).__name__}) gave {known} features along its {self.form.axis} "
                f"axis before and {layout.number()} now, in an output of shape {tuple(activation.shape)}; one mask "
                "cannot serve both: exclude it, and include modules whose outputs keep one size"
            )
        self.size, self._device = layout.number(), activation.device
        if self.mask is not None:
            self.mask = self.mask.to(activation.device)
        if self._mean is not None:
            self._mean = self._mean.to(activation.device)

    def _static(self, activation: Tensor, layout: FeatureLayout, positions: Tensor | None) -> Tensor | None:
        masked = self._masked(activation, layout, self.mask) if self.mask is not None and self._masks_now else None
        if not self._gathers:
            return masked
        output = activation if masked is None else masked
        gradient = self._criterion != "activation"
        if gradient and not (torch.is_grad_enabled() and output.requires_grad):
            return masked
        if torch.compiler.is_compiling():
            watched: Tensor = watch(output, activation.detach(), positions, self._number, gradient)
            return watched
        if gradient:
            shown: Tensor = WatchGradient.apply(output, activation.detach(), self, positions)
            return shown
        self.see_forward(activation, positions)
        return masked

    def _masked(self, activation: Tensor, layout: FeatureLayout, mask: Tensor) -> Tensor:
        fill = 0.0 if self._mean is None else layout.spread(self._mean).to(activation.dtype)
        return self._passed(activation, replace_pruned(activation.reshape(layout.view), layout.spread(mask), fill))

    def _passed(self, activation: Tensor, masked: Tensor) -> Tensor:
        """Return the masked activation as the module gives it, with the gradient that the form asks for."""
        output = masked.reshape(activation.shape)
        return straight_through(activation, output) if self.form.gradient == "straight_through" else output

    def _dynamic(self, activation: Tensor, layout: FeatureLayout) -> Tensor | None:
        compiling = torch.compiler.is_compiling()
        if self.active and self._masks_now:
            viewed = activation.reshape(layout.view)
            mean = self._sample_means(viewed, layout)
            scores = _distances(viewed, mean, layout)
            noise = self._noise(scores)
            kept = choose(scores, noise, self._number) if compiling else self.choose(scores, noise)
            masked = replace_pruned(viewed, layout.spread(kept), mean)
            return self._passed(activation, rescale_kept(masked, mean, scores, kept) if self.form.rescale else masked)
        if not self._gathers:
            return None
        if compiling:
            watched: Tensor = watch(activation, activation.detach(), None, self._number, False)
            return watched
        self.see_forward(activation, None)
        return None

    def _noise(self, scores: Tensor) -> Tensor | None:
        # Drawn out here, as dropout draws its own: checkpointing and torch.compile then know how to draw it again.
        drawn = self.form.choose == "gumbel" and self.module.training
        return torch.empty_like(scores).exponential_() if drawn else None

    def _sample_means(self, viewed: Tensor, layout: FeatureLayout) -> Tensor | float:
        return viewed.mean(layout.features, keepdim=True) if self.form.center == "mean" else 0.0

    @torch.no_grad()
    def see_forward(self, activation: Tensor, positions: Tensor | None) -> None:
        """Gather what the statistics need of an activation, shape as the module gave it; not when it is recomputed."""
        layout = feature_layout(self.form, activation.shape, self.name)
        viewed = activation.detach().reshape(layout.view)
        if self.form.dynamic:
            self.choose(_distances(viewed, self._sample_means(viewed, layout), layout), None)
        elif in_backward():
            return
        else:
            counted = self._counted(positions, layout, viewed)
            plain = self.form.center == "zero"
            read = layout.mean(viewed.abs() if plain else viewed.double().square(), counted)
            self._add_static("activation" if plain else "square", read, viewed, layout, counted)

    @torch.no_grad()
    def see_gradient(self, activation: Tensor, gradient: Tensor, positions: Tensor | None) -> None:
        """Gather what the statistics need of an activation and dL/dy, both as the module gave it."""
        layout = feature_layout(self.form, activation.shape, self.name)
        viewed, slope = activation.reshape(layout.view), gradient.reshape(layout.view)
        counted = self._counted(positions, layout, viewed)
        first_order = self._criterion == "taylor"
        read = layout.sum(viewed.double() * slope, counted).abs() if first_order else layout.mean(slope.abs(), counted)
        self._add_static(self._criterion, read, viewed, layout, counted)

    def _counted(self, positions: Tensor | None, layout: FeatureLayout, viewed: Tensor) -> Tensor | None:
        """Return which positions of a viewed activation count, shape (B, T, 1) or (rows, 1), bool; None: all do."""
        if not self.reads_positions or layout.features != (viewed.dim() - 1,):
            return None
        rows = counted_rows(positions, viewed.shape)
        return None if rows is None else rows.to(viewed.device).unsqueeze(-1)

    def _add_static(
        self, name: str, read_bf: Tensor, viewed: Tensor, layout: FeatureLayout, counted: Tensor | None
    ) -> None:
        samples = read_bf.new_full((), viewed.shape[0])
        if counted is not None and viewed.dim() == 2:  # every position is a sample by itself
            samples = counted.sum(dtype=read_bf.dtype)
        sums = {name: read_bf.sum(0), "samples": samples}
        if self.form.center == "mean":
            sums["value"] = layout.mean(viewed, counted).sum(0)
        self._add(sums)

    @torch.no_grad()
    def choose(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Return which features each sample keeps, shape (B, F), bool; gather statistics if it is time to."""
        choice = choose_rows(scores, self._rule, noise)
        if self._gathers and not in_backward():
            whole = choice.finite.double()
            self._add({
                "samples": whole.sum(),
                "n_eff": choice.n_eff.sum(),
                "keep": (choice.keep * whole).sum(),
                "mass": (choice.mass * whole).sum(),
                "not_finite": (1 - whole).sum(),
            })  # fmt: skip
        return choice.mask


def _distances(viewed: Tensor, mean: Tensor | float, layout: FeatureLayout) -> Tensor:
    """Return how far each sample's features are from what pruning makes of them, shape (B, F), float64."""
    return layout.mean((viewed - mean).detach().abs())


_SCALARS = ("samples", "n_eff", "keep", "mass", "not_finite")


def feature_sites(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    form: FeatureForm,
    criterion_statistic: str,
    rule: CountRule,
) -> list[FeatureSite]:
    """Return one site, not yet attached, for each module whose output is masked.

    Args:
        model: Any module.
        include: Globs on module names; None: the activation modules (ReLU, GELU, ... and those of timm and
            transformers), without sigmoids, which are gates.
        exclude: Globs on module names to leave out.
        form: What a feature is.
        criterion_statistic: "activation", "taylor" or "saliency": what a static site gathers.
        rule: Keep counts of a dynamic site.

    Raises:
        ValueError: `criterion_statistic` is unknown, a pattern matches no module, or nothing is left.
    """
    if criterion_statistic not in STATISTICS:
        raise ValueError(
            f"criterion {criterion_statistic!r} reads no activations; choose one of {', '.join(STATISTICS)}"
        )
    chosen = named_sites(model, include, exclude, is_activation, "activation modules")
    return [FeatureSite(name, module, form, criterion_statistic, rule) for name, module in chosen]
