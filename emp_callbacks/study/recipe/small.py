"""The same architecture, narrower: the dense network that a pruned one has to beat at the same number of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import signature
from typing import Any

import torch

from emp_callbacks.study.recipe.tasks import ImageClassification, LanguageModel
from emp_callbacks.targets.weights import prunable_weights

__all__ = ["narrower"]

_TASKS = {f"{task.__module__}.{task.__name__}": task for task in (ImageClassification, LanguageModel)}
# Arguments that are widths: of timm's ResNets, of timm's Vision Transformers, of emp_fc2 and its like, of GPT-2.
_WIDTHS = ("channels", "stem_width", "embed_dim", "widths", "n_embd")
_HEADS = {"embed_dim": "num_heads", "n_embd": "n_head"}  # must divide the width
_LEAST = {"stem_width": 4}  # timm: the first of the stem's layers has stem_width // 4 * 3 channels
_FINENESS = 4096  # narrower by so many different factors
_NEAR = 0.85  # of the target: not worth another number of heads


def narrower(class_path: str, init_args: Mapping[str, Any], weights: int) -> dict[str, Any]:
    """Return the arguments of the same architecture with at most `weights` prunable weights, and as near as it can be.

    All widths shrink by one factor and are rounded; depth stays. A Transformer keeps its number of heads, which divides
    its width; where that misses the target by more than 15 %, it may get half as many. Nothing is widened.

    Args:
        class_path: The task, as a recipe names it: ImageClassification or LanguageModel with its module.
        init_args: Its arguments. Widths of an image model must stand in `model_args`: `channels` (and `stem_width`) of
            a ResNet, `embed_dim` and `num_heads` of a Vision Transformer, `widths` of the EMP paper's networks.
        weights: Highest number of weights, counted as EMP counts what it may prune: see `prunable_weights`.

    Returns:
        A copy of `init_args` with other widths.

    Raises:
        ValueError: The task or the model's widths are not known, the model is pretrained, or even the narrowest one
            has more weights; the message says what to do.
    """
    task = _TASKS.get(class_path)
    if task is None:
        raise ValueError(
            f"how to make {class_path} narrower is not known: give the narrower model's init_args yourself; known are "
            f"{' and '.join(_TASKS)}"
        )
    model = _Widths(task, init_args)
    found: list[tuple[int, int]] = []
    for heads in model.heads:
        if model.count(1, heads) <= weights:
            found.append((_largest(partial(model.count, heads=heads), weights), heads))
            if model.count(*found[-1]) >= _NEAR * weights:
                break
    if not found:
        raise ValueError(
            f"the narrowest {task.__name__} of this depth has {model.count(1, heads):,} prunable weights, more than "
            f"the {weights:,} asked for: take fewer blocks or a higher density"
        )
    return model.arguments(*max(found, key=lambda choice: model.count(*choice)))


class _Widths:
    """The widths among a task's arguments, and the task with each of them multiplied by part / _FINENESS."""

    def __init__(self, task: type[ImageClassification | LanguageModel], init_args: Mapping[str, Any]) -> None:
        given = {name: parameter.default for name, parameter in signature(task).parameters.items()} | dict(init_args)
        name = given["pretrained"] if task is LanguageModel else given["model"]
        if given["pretrained"]:
            raise ValueError(f"a narrower {name!r} has no pretrained weights: leave pretrained out")
        self._task, self._init_args = task, init_args
        self._sizes = given if task is LanguageModel else dict(given["model_args"] or {})
        self._widths = {key: self._sizes[key] for key in _WIDTHS if key in self._sizes}
        if not set(self._widths) - {"stem_width"}:
            raise ValueError(
                f"the widths of {name!r} are not known: write them into model_args, such as channels and stem_width "
                "(ResNet), embed_dim and num_heads (Vision Transformer) or widths (emp_fc2, emp_fc5, emp_fc12, emp_kan)"
            )
        self.count = cache(self._count)

    @property
    def heads(self) -> list[int]:
        """Numbers of heads to try, the model's own first; [1] for a model without."""
        for key in self._widths:
            if key in _HEADS and _HEADS[key] not in self._sizes:
                raise ValueError(f"{_HEADS[key]} must divide the width: write it into model_args beside {key}")
        whole = next((self._sizes[_HEADS[key]] for key in self._widths if key in _HEADS), 1)
        return [whole, whole // 2] if whole % 2 == 0 else [whole]

    def arguments(self, part: int, heads: int) -> dict[str, Any]:
        """Return the task's arguments with scaled widths and so many heads."""
        new = _scaled(self._widths, part / _FINENESS, heads)
        if self._task is not LanguageModel:
            new = {"model_args": {**self._sizes, **new}}
        return {**self._init_args, **new}

    def _count(self, part: int, heads: int) -> int:
        with torch.device("meta"):  # shapes only
            model = self._task(**self.arguments(part, heads))
        return sum(target.parameter.numel() for target in prunable_weights(model))


def _largest(count: Callable[[int], int], most: int) -> int:
    """Return the largest part of _FINENESS with a count of at most `most`: more of it makes no width smaller."""
    low, high = 1, _FINENESS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= most else (low, middle)
    return low


def _scaled(widths: Mapping[str, Any], factor: float, heads: int) -> dict[str, Any]:
    """Return the arguments that change when all widths are multiplied by `factor`."""
    new: dict[str, Any] = {}
    for name, width in widths.items():
        if name in _HEADS:
            new |= {name: max(heads, round(width * factor / heads) * heads), _HEADS[name]: heads}
        elif isinstance(width, (list, tuple)):
            new[name] = [max(1, round(each * factor)) for each in width]
        else:
            new[name] = max(_LEAST.get(name, 1), round(width * factor))
    return new
