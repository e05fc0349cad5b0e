"""How names select parts of a model: the names that its author gave, and glob patterns on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

# What wrappers put into names and a user did not write.
_WRAPPER_NAMES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def canonical_name(name: str) -> str:
    """Return the name that the user's own model gives a parameter or, with a dot at its end, a module."""
    for part in _WRAPPER_NAMES:
        name = name.replace(part, "")
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
