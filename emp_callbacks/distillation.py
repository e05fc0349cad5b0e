"""Learning from the dense model while a pruned one trains: knowledge distillation on logits.

Letters in shapes: C classes or tokens of a vocabulary; P stands for any number of dimensions of positions.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from emp_callbacks.checkpoint.reading import read_checkpoint, state_dict_in
from emp_callbacks.targets.names import match_names


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss (1 - weight) * task loss + weight * T^2 * KL(teacher || student), both softened by a temperature T.

    Args:
        teacher: A model whose logits are learned from; a path to its weights (a state_dict or a Lightning checkpoint by
            torch.save, or safetensors), for a copy of the model; None: a frozen copy of the model as training begins,
            the dense one of a fine-tuning. A network that is trained from nothing needs a trained one.
        temperature: T, > 0; above 1 it shows more of what the teacher thinks of the other classes.
        weight: Of the distillation, in (0, 1].

    Raises:
        ValueError: A number is out of its range.
        TypeError: `teacher` is something else.

    Source: Hinton, Vinyals, Dean, arXiv:1503.02531, section 2.
    """

    teacher: Any = None
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        for name, highest in (("temperature", math.inf), ("weight", 1.0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= highest or math.isinf(value):
                raise ValueError(f"distill: {name} must be in (0, {highest:g}], got {value!r}")
        if self.teacher is not None and not isinstance(self.teacher, (nn.Module, str, os.PathLike)):
            raise TypeError(
                "distill: teacher must be a model, a path to its weights or None (the model as it is when training "
                f"begins), got {type(self.teacher).__name__}"
            )

    def teacher_for(self, model: nn.Module) -> nn.Module:
        """Return the teacher of a model, frozen and in evaluation mode; the model before EMP prunes it.

        Raises:
            NotImplementedError: A copy would be of a shard.
            FileNotFoundError: There is no file at the path.
            ValueError: The file's weights are of another model.
        """
        if isinstance(self.teacher, nn.Module):
            return self.teacher.eval().requires_grad_(False)
        if any(hasattr(p, name) for p in model.parameters() for name in ("ds_id", "device_mesh", "_fsdp_flattened")):
            raise NotImplementedError(
                "distill: the model is sharded, so that no rank can copy it: pass the teacher itself, teacher=model"
            )
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if self.teacher is not None:
            load_weights(teacher, self.teacher)
        return teacher

    def mixed(self, task: Tensor, distilled: Tensor) -> Tensor:
        """Return the loss to minimise, of the task's and what `loss` returned; shape ()."""
        return (1 - self.weight) * task + self.weight * distilled

    def loss(
        self, student: Tensor, teacher: Tensor, counts: Tensor | None = None, total: Tensor | float | None = None
    ) -> Tensor:
        """Return T^2 * KL(teacher || student), shape (), float32, in nats.

        Args:
            student: Logits, shape (P, C), floating.
            teacher: Logits of the same shape; no gradient goes there.
            counts: Shape (P), bool: the positions that count; None: all do.
            total: Divides the sum over them, where batches are accumulated to so many; None: their number, the mean.

        Raises:
            ValueError: The shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"distill: the teacher's logits are of shape {tuple(teacher.shape)}, the model's of "
                f"{tuple(student.shape)}; a teacher must speak of the same classes and positions"
            )
        ours, theirs = (
            functional.log_softmax(one.float() / self.temperature, -1) for one in (student, teacher.detach())
        )
        by_position = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        if counts is not None:
            by_position = by_position * counts
        number = by_position.numel() if counts is None else counts.sum().clamp(min=1)
        return by_position.sum() * self.temperature**2 / (number if total is None else total)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of weights into a model; names may begin with what a wrapper put before them.

    Args:
        model: Changed.
        path: What `read_checkpoint` reads: a Lightning checkpoint, a state_dict, safetensors, a Hugging Face folder.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is damaged, or holds the weights of another model.
    """
    source = os.fspath(path)
    weights = state_dict_in(read_checkpoint(Path(path)), source)
    own = model.state_dict()
    found = {name: weights[theirs] for name, theirs in match_names(list(weights), list(own)).items()}
    held = {own[name].data_ptr() for name in found}
    missing = [name for name, value in own.items() if name not in found and value.data_ptr() not in held]
    if missing:  # tied ones stand once
        raise ValueError(f"{source} holds the weights of another model: it lacks {', '.join(sorted(missing)[:3])}, ...")
    model.load_state_dict(found, strict=False)
