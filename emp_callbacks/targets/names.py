"""How names select parts of a model: the names that its author gave, and glob patterns on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

# What wrappers put into names and a user did not write.
_WRAPPER_NAMES = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Fabric, which shows a LightningModule under both of these
    "_original_module",
)
_PEFT_LAYER, _PEFT_MODEL = "base_layer", ("base_model", "model")


def canonical_name(name: str) -> str:
    """Return the name that the user's own model gives a parameter or, with a dot at its end, a module."""
    return known_names(name)[0]


def known_names(name: str) -> list[str]:
    """Return the name that the user's own model gives, and the one that PEFT made of it if that is another."""
    parts = [part for part in name.split(".") if part not in _WRAPPER_NAMES]
    own: list[str] = []
    for part in parts:
        own.append(part)
        if tuple(own[-2:]) == _PEFT_MODEL:
            del own[-2:]
    # A part with numbers below it is somebody's Sequential: PEFT's base layers are no containers.
    own = [part for part, below in pairwise([*own, ""]) if part != _PEFT_LAYER or below.isdigit()]
    return list(dict.fromkeys([".".join(own), ".".join(parts)]))


def few(names: Sequence[str], most: int = 4) -> str:
    """Return the first names and how many more there are, for a message."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def match_names(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Return which of the names in another model (key) mean the same as one of ours (value).

    Wrappers do not count, among them averages, DistributedDataParallel and PEFT; and the other model may be a part of
    ours, whose names then lack a prefix.
    """
    known = {_unwrapped(name): name for name in ours} | {name: name for name in ours}
    plain = {name: own if (own := canonical_name(name)) in known else _unwrapped(own) for name in theirs}
    prefixes = {own.removesuffix(name): None for name in plain.values() for own in known if own.endswith(f".{name}")}
    best = max(["", *prefixes], key=lambda prefix: sum(f"{prefix}{name}" in known for name in plain.values()))
    return {name: known[f"{best}{own}"] for name, own in plain.items() if f"{best}{own}" in known}


def _unwrapped(name: str) -> str:
    name = canonical_name(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Return whether one of a thing's names matches one of the glob patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], kind: str, example: str) -> None:
    """Check that every pattern matches a name.

    Args:
        patterns: Glob patterns.
        names: All that they can match.
        kind: What bears the names, for the message.
        example: A pattern that would do.

    Raises:
        ValueError: One does not; the message holds near names.
    """
    for pattern in patterns:
        if not matches(names, [pattern]):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3) or names[:5]
            hint = f"near names: {', '.join(near)}" if near else "the model has none"
            raise ValueError(f"pattern {pattern!r} matches no {kind}; {hint} (globs work: {example!r})")
