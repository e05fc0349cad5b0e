"""Where in a checkpoint the weights are: the keys under which people keep them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.checkpoint.safe_unpickling import Placeholder

__all__ = ["FoundWeights", "find_weights"]

_PLAIN = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights", "params", "state")
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema")
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|grad|callbacks|loops", re.IGNORECASE)
_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|SCB|absmax|quant_state\..*)$|_packed_params\b")
_DEEPEST = 3  # keys that lie over the weights; a file may hold a mapping that holds itself
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FoundWeights(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
        tensors: Name -> tensor.
        notes: What a reader must know of where they were.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def find_weights(checkpoint: Any, source: str) -> FoundWeights:
    """Return the tensors of a checkpoint by name.

    They are the checkpoint itself, or are under a key that is known for it, or under the only key that has tensors by
    name. An optimizer's state is never taken; an average of the weights only where there are no others.

    Args:
        checkpoint: What a file holds.
        source: Names it in messages.

    Raises:
        ValueError: There are none or several to choose from; or one cannot be scored: float8, sparse, quantized,
            nested, or on no device.
    """
    held, notes = checkpoint, list[str]()
    for depth in range(_DEEPEST, 0, -1):
        key = _next_key(held, source, depth, notes)
        if key is None:
            break
        held = held[key]
    tensors = {k: v for k, v in _items(held).items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(_nothing_in(checkpoint, source))
    _check_names(_items(held), source)
    for name, value in tensors.items():
        if odd := _oddity(value):
            raise ValueError(
                f"{source}: {name} is {odd}, which cannot be scored; save the weights as plain tensors (bfloat16)"
            )
    if not any(value.numel() for value in tensors.values()):
        raise ValueError(
            f"{source} holds names without values, as ZeRO-3 leaves them; python zero_to_fp32.py FOLDER weights.pt "
            "makes a file of the whole checkpoint"
        )
    return FoundWeights(tensors, tuple(notes))


def _check_names(held: Mapping[Any, Any], source: str) -> None:
    for name, value in held.items():
        if isinstance(value, Tensor) and not _is_text(name):
            raise ValueError(f"{source} names a tensor {name!r}; names of weights are words, such as 'head.weight'")
        if isinstance(name, str) and _PACKED.search(name):
            raise ValueError(
                f"{source} holds packed weights of a quantized model ({name}), which cannot be scored; take the model "
                "that it was made from, or save model.dequantize()"
            )


def _is_text(name: Any) -> bool:
    """Return whether a name is one that a file can hold: half a character, which pickles may have, is none."""
    return isinstance(name, str) and name.encode(errors="replace").decode() == name


def _next_key(held: Any, source: str, depth: int, notes: list[str]) -> str | None:
    """Return the key under which the weights lie; None where they lie here, or nowhere."""
    kept = dict(_kept(held, depth))
    plain, averages = ([key for key in keys if key in kept] for keys in (_PLAIN, _AVERAGES))
    if not plain and any(isinstance(value, Tensor) and value.dim() for value in _items(held).values()):
        return None
    found = plain or averages[:1] or [*kept]
    if len(found) > 1:
        told = ", ".join(f"{key!r} ({count:,} tensors)" for key in found if (count := kept[key]) is not None)
        raise ValueError(
            f"{source} holds several models: {told}; save the one you mean: "
            f"torch.save(torch.load({source!r})[{found[0]!r}], 'weights.pt')"
        )
    if not found:
        return None
    if plain and averages:
        notes.append(f"took the weights under {found[0]!r}; an average of them is there, too, under {averages[0]!r}")
    elif not plain:
        notes.append(f"took the weights under {found[0]!r}")
    return found[0]


def _kept(held: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield the keys with tensors by name below them that are no optimizer's, and how many tensors."""
    for key, value in _items(held).items():
        if isinstance(key, str) and not _NO_WEIGHTS.search(key) and "param_groups" not in _items(value):
            count = sum(isinstance(one, Tensor) for one in _items(value).values())
            if depth > 1 and key in (*_PLAIN, *_AVERAGES):
                count = count or sum(below for _, below in _kept(value, depth - 1))
            if count:
                yield key, count


def _items(held: Any) -> Mapping[Any, Any]:
    return held if isinstance(held, Mapping) else {}


def _nothing_in(checkpoint: Any, source: str) -> str:
    """Return what is to be said of a checkpoint without tensors by name."""
    objects = [key for key, value in _items(checkpoint).items() if isinstance(value, Placeholder)]
    if objects:
        return (
            f"{source} keeps {objects[0]!r} as a Python object, and emp never runs code from a file; save its weights "
            "alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    keys = f" of {', '.join(map(repr, [*_items(checkpoint)][:5]))}" if _items(checkpoint) else ""
    return f"{source} holds no state dict (name -> tensor), but a {type(checkpoint).__name__}{keys}"


def _oddity(value: Tensor) -> str:
    """Return why a tensor is none that can be computed with as it is; empty if it is plain."""
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"quantized ({value.dtype})"
    if value.layout != torch.strided:
        return f"a sparse tensor ({value.layout})"
    if value.is_meta:
        return "a tensor without values (device meta)"
    return f"of {value.dtype}" if value.is_floating_point() and value.dtype not in _FLOATS else ""
