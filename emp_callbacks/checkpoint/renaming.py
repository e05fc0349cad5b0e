"""A state whose model stood at another place: `layer.weight` there is `net.layer.weight` here, or the reverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from emp_callbacks.checkpoint.state import masked_weights
from emp_callbacks.layer import Layer


def under_our_names(state: Any, layers: Sequence[Layer]) -> Any:
    """Return a state with the names that this run has, where only a prefix differs; else the state as it is.

    Args:
        state: What `EMPPruner.state_dict` returned, not yet checked.
        layers: This run's.
    """
    ours = {*(layer.name for layer in layers), *(weight.name for weight in masked_weights(layers))}
    parts = [state.get(key) for key in ("shapes", "units")] if isinstance(state, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        return state  # what is wrong with it is said by those who read it
    held = {name for part in parts for name in part or () if isinstance(name, str)}
    rename = _prefix(held, ours)
    if rename is None:
        return state
    renamed = {key: _keys(state[key], rename) for key in ("shapes", "units", "masks", "stash") if key in state}
    evidence = state.get("evidence")
    if isinstance(evidence, Mapping) and isinstance(evidence.get("tensors"), Mapping):
        renamed["evidence"] = {**evidence, "tensors": _keys(evidence["tensors"], lambda key: _in_key(key, rename))}
    renamed["averages"] = [_keys(average, rename) for average in state.get("averages", ())]
    return {**state, **renamed}


def _prefix(held: Set[str], ours: Set[str]) -> Callable[[str], str] | None:
    """Return what makes the held names ours; None where they are ours, or no prefix does it."""
    if not held or held <= ours:
        return None
    first = min(held)
    for name in ours:
        if name.endswith(f".{first}"):
            longer = name.removesuffix(first)
            if {longer + one for one in held} <= ours:
                return lambda one: longer + one
        if first.endswith(f".{name}"):
            shorter = first.removesuffix(name)
            if all(one.startswith(shorter) for one in held) and {one.removeprefix(shorter) for one in held} <= ours:
                return lambda one: one.removeprefix(shorter)
    return None


def _keys(named: Any, rename: Callable[[str], str]) -> Any:
    return {rename(name): value for name, value in named.items()} if isinstance(named, Mapping) else named


def _in_key(key: str, rename: Callable[[str], str]) -> str:
    """Return the key of a tensor of evidence, `kind:name` or `kind:name:part`, with the name as it is here."""
    kind, colon, rest = key.partition(":")
    name, *part = rest.split(":", 1)
    return ":".join([kind, rename(name), *part]) if colon else key
