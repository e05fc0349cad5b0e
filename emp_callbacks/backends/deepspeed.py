"""DeepSpeed engines: ZeRO 0, 1, 2 and 3, in fp32, bf16 and fp16, also with the optimizer offloaded to the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from emp_callbacks.backends.base import Backend
from emp_callbacks.backends.step_watch import UpdateListener
from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.backends.zero import Held, ZeroSegment, layout_of
from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import WeightTarget


@final
class DeepSpeedBackend(Backend):
    """The engine that `deepspeed.initialize` returns.

    The segments' owners are the fp32 tensors that `engine.basic_optimizer` updates: after its step and before
    DeepSpeed copies them to what forward reads. So masks hold in every copy without communication.

    In `freeze`, gradients are masked where DeepSpeed has averaged them and before it clips by their norm. One
    exception: with bf16 and `grad_accum_dtype: fp32` in stage 1, DeepSpeed takes the norm of gradients that no rank
    can mask in full; there, the norm still counts the gradients of pruned weights, and only the update is masked.

    Args:
        engine: The engine, with an optimizer.

    Raises:
        ValueError: The engine has no optimizer.
        NotImplementedError: The engine keeps its weights in a way that was not tried; the message names the remedy.
    """

    name = "deepspeed"
    scales_loss = True

    def __init__(self, engine: Any) -> None:
        _check_supported(engine)
        super().__init__(engine.module, [engine.basic_optimizer], engine.seq_data_parallel_group)
        layout = layout_of(engine.optimizer, engine.basic_optimizer)
        if layout is None:
            raise NotImplementedError(
                f"{type(engine.optimizer).__name__} keeps its weights in a way that EMP does not know; use ZeRO stage "
                "0, 1, 2 or 3 with a torch optimizer or DeepSpeedCPUAdam"
            )
        self._engine, self._layout = engine, layout
        self._held: list[Held] = []
        self._owners: list[Tensor] = []
        self._wrapped: Wrapped | None = None

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def updates(self) -> Callable[[nn.Parameter], bool]:
        owners = {id(owner) for owner in self._layout.owners()}

        def updated(parameter: nn.Parameter) -> bool:
            place = self._layout.place(parameter)
            return place is not None and id(place.owner) in owners

        return updated

    def segments(self, targets: Sequence[WeightTarget]) -> list[Segment]:
        """Return this rank's part of every target, in order; a part may be empty. Collective.

        Raises:
            ValueError: The optimizer does not update a target.
            NotImplementedError: The parts of all ranks do not make up each parameter once.
        """
        segments = [self._segment(target) for target in targets]
        self._check_covered(segments)
        self._held = [(target.parameter, segment) for target, segment in zip(targets, segments, strict=True)]
        self._owners = list({id(segment.owner): segment.owner for segment in segments}.values())
        return segments

    @torch.no_grad()
    def refresh_copies(self) -> None:
        self._layout.update_copies(self._held)

    def forward_copies(self, segment: Segment) -> list[Tensor]:
        parameter = next(parameter for parameter, held in self._held if held is segment)
        return self._layout.copies(parameter, segment)

    def attach(self, listener: UpdateListener) -> None:
        super().attach(listener)
        wrapper = self._engine.optimizer
        if wrapper is not self._engine.basic_optimizer:

            def around(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return self._step(listener, step, *args, **kwargs)

            self._wrapped = Wrapped(wrapper, "step", around)

    def detach(self) -> None:
        super().detach()
        if self._wrapped is not None:
            self._wrapped.remove()
            self._wrapped = None

    def _step(self, listener: UpdateListener, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run DeepSpeed's step. The averaged gradients are there, their norm is not: `freeze` masks them now."""
        before, self._watch.applied = self._watch.applied, False
        listener.before_update(self._owners)
        if self._engine.gradient_clipping() > 0:
            self._layout.correct_norms(self._held)
        try:
            return step(*args, **kwargs)
        finally:
            if not self._watch.applied:  # overflow: the optimizer's own step did not run
                listener.after_update(self._owners)
            self._watch.applied |= before

    def _segment(self, target: WeightTarget) -> Segment:
        parameter, shape = target.parameter, self.full_shape(target.parameter)
        place = self._layout.place(parameter)
        if place is None or not self.updates()(parameter):
            raise ValueError(
                f"the engine's optimizer does not update {target.name!r}, so its mask would not hold; exclude it, or "
                "give it to the optimizer"
            )
        size, rank, ranks = shape.numel(), self.rank, self.world_size
        whole = slice(size * rank // ranks, size * (rank + 1) // ranks)
        return ZeroSegment(
            name=target.name,
            shape=shape,
            output_dim=target.output_dim,
            stacked=target.stacked,
            owner=place.owner,
            view=place.view,
            positions=place.start,
            replicated=self._layout.replicated,
            counted=whole if self._layout.replicated else slice(0, place.length),
            pending=place.pending,
        )

    def _check_covered(self, segments: Sequence[Segment]) -> None:
        """Raise on all ranks alike unless the counted parts of all ranks are as many as each parameter's elements."""
        counts = [segment.counted.stop - segment.counted.start for segment in segments]
        totals = self.all_sum(torch.tensor(counts)).tolist()
        for segment, total in zip(segments, totals, strict=True):
            if total != segment.size:
                raise NotImplementedError(
                    f"the ranks hold {total} elements of {segment.name!r}, which has {segment.size}: tensor, expert "
                    "or MiCS parallelism is not supported; shard over all ranks (plain ZeRO 0 to 3)"
                )


def _check_supported(engine: Any) -> None:
    if engine.basic_optimizer is None or engine.optimizer is None:
        raise ValueError("the engine has no optimizer, so nothing trains; pass engine.module to prune it by hand")
    for found, message in _refusals(engine, engine.optimizer, engine.basic_optimizer):
        if found:
            raise NotImplementedError(f"EMP cannot prune with this DeepSpeed configuration: {message}")


def _refusals(engine: Any, wrapper: Any, base: Any) -> list[tuple[bool, str]]:
    """Return what was not tried: whether the engine does it, and the remedy."""
    kind = type(base).__name__
    offload = getattr(getattr(getattr(engine, "_config", None), "zero_config", None), "offload_optimizer", None)

    def has(*names: str) -> bool:
        return any(bool(getattr(holder, name, False)) for holder in (engine, wrapper) for name in names)

    return [
        (
            not isinstance(base, torch.optim.Optimizer),
            f"{kind} is not a torch.optim.Optimizer; use AdamW or DeepSpeedCPUAdam",
        ),
        (
            any(part in kind for part in ("Onebit", "ZeroOne", "Muon")),
            f"{kind} changes gradients or momentum on its own; use AdamW",
        ),
        (has("pipeline_parallelism"), "a pipeline engine splits the model over ranks; use ZeRO"),
        (
            getattr(engine, "mp_world_size", 1) > 1,
            "tensor parallelism cuts parameters in a way that EMP does not know; use ZeRO alone",
        ),
        (has("has_moe_layers"), "experts live on different ranks; use a model without DeepSpeed MoE layers"),
        (
            has("swap_optimizer", "params_in_nvme_and_cpu"),
            "weights or optimizer states are swapped to NVMe; offload to the CPU (device: cpu)",
        ),
        (has("zenflow"), "ZenFlow updates weights outside the optimizer's step; remove zenflow from the config"),
        (
            bool(getattr(offload, "super_offload", False)),
            "SuperOffload updates weights in another process; remove super_offload from the config",
        ),
        (
            getattr(wrapper, "partial_offload", 1.0) != 1.0,
            "offload_optimizer.ratio below 1 updates some weights with a second optimizer; use ratio: 1",
        ),
    ]
