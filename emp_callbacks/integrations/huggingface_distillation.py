"""Distillation in Hugging Face's Trainer: around its loss, with its own way of counting tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.distillation import Distillation, load_weights

_FILE = "emp_teacher.safetensors"
_IGNORED = -100  # labels of positions that the Trainer's losses leave out


@final
class TrainerDistillation:
    """Mixes what the teacher says into a Trainer's loss while it trains; evaluations have the task's loss alone.

    A teacher that is the model as training begins is written beside the checkpoints, as `emp_teacher.safetensors`:
    a resumed run learns from the same.

    Args:
        trainer: The Trainer.
        distillation: How.
    """

    def __init__(self, trainer: Trainer, distillation: Distillation) -> None:
        if not isinstance(distillation, Distillation):
            raise TypeError(
                f"distill must be an emp_callbacks.Distillation, such as Distillation(temperature=2.0), got "
                f"{type(distillation).__name__}"
            )
        self._trainer, self._how = trainer, distillation
        self._teacher: nn.Module | None = None
        self._sum, self._losses = torch.zeros(()), 0
        Wrapped(trainer, "compute_loss", self._compute_loss)
        Wrapped(trainer, "log", self._log)

    def begin(self, resumes: Path | None) -> None:
        """Find the teacher, before anything is pruned.

        Args:
            resumes: The checkpoint that a run goes on from; None: it begins.

        Raises:
            FileNotFoundError: It began without a teacher of its own.
        """
        first, trainer = self._how.teacher is None, self._trainer
        model: Any = trainer.model
        folder = Path(str(trainer.args.output_dir))
        if self._teacher is not None and resumes is None:
            return  # a second training of the same model learns from the same
        teacher = self._how.teacher_for(model)
        if first and resumes is not None:
            file = resumes.parent / _FILE
            if not broadcast_object_list([file.is_file()])[0]:
                raise FileNotFoundError(
                    f"{file} does not exist, so the teacher of the run that {resumes} is of is not known: pass it, "
                    "distill=Distillation(teacher=model)"
                )
            load_weights(teacher, file)
        elif first and trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.clone() for name, value in teacher.state_dict().items()}, folder / _FILE)
        self._teacher = teacher.to(trainer.args.device)

    def end(self) -> None:
        """Keep the teacher for a training that goes on; its losses are told."""
        self._sum, self._losses = torch.zeros(()), 0

    def _compute_loss(
        self, compute: Callable[..., Any], model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self._teacher is None or not model.training:
            return compute(model, inputs, return_outputs=return_outputs, **kwargs)
        given, labels = {key: inputs[key] for key in inputs if key != "labels"}, inputs.get("labels")
        task, outputs = compute(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad(), self._trainer.accelerator.autocast():
            said = _logits(self._teacher(**given), "teacher")
        distilled = self._distilled(_logits(outputs, "model"), said, labels, kwargs.get("num_items_in_batch"))
        self._sum, self._losses = self._sum.to(distilled.device) + distilled.detach(), self._losses + 1
        loss = self._how.mixed(task, distilled)
        return (loss, outputs) if return_outputs else loss

    def _distilled(self, student: Tensor, teacher: Tensor, labels: Tensor | None, items: Any) -> Tensor:
        """Return the loss of a batch, over the positions and divided by the number that the task's loss is."""
        counts = None
        if labels is not None and labels.dim() > 1 and labels.shape == student.shape[:-1]:
            if self._is_causal:  # what a position says is of the next
                student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
            counts = labels != _IGNORED
        trainer = self._trainer
        if counts is None or items is None or not trainer.model_accepts_loss_kwargs:
            return self._how.loss(student, teacher, counts)
        ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return self._how.loss(student, teacher, counts, total=items) * ranks

    @property
    def _is_causal(self) -> bool:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _log(self, log: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs and self._losses:
            logs["distillation_loss"] = float(self._sum) / self._losses
            self._sum, self._losses = torch.zeros(()), 0
        return log(logs, *args, **kwargs)


def _logits(outputs: Any, whose: str) -> Tensor:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"distill: the {whose} returns no logits ({type(outputs).__name__}), from which alone is learned: give it "
            "an output with `logits`, or leave distill out"
        )
    return found
