"""Finds a mistyped key or class in a recipe and names the nearest valid one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser

from emp_callbacks.blame import in_a_line

__all__ = ["RecipeError", "check_options", "check_recipe", "explain_parse_error", "nearest"]

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
# jsonargparse's words for what it expected, and ours.
_KINDS = {"NoneType": "null", "collections.abc.Sequence": "list", "dot import path string": "class_path"}
_RECIPE_CLASSES = (
    pl.Callback,
    pl.LightningModule,
    pl.LightningDataModule,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name most like `name`, or an empty string.

    Examples:
        >>> nearest("max_epoch", ["max_steps", "max_epochs"])
        "; did you mean 'max_epochs'?"
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_recipe(recipe: Mapping[str, Any], parser: ArgumentParser) -> None:
    """Check every key and class path of a recipe against the parser that will read it.

    Raises:
        RecipeError: For the first unknown key or class, with its full name and the nearest valid one.
    """
    _check_mapping(recipe, _keys_of(parser), "", "")


def check_options(options: Iterable[str], parser: ArgumentParser) -> None:
    """Check the names of command line options such as `trainer.max_epochs`.

    Raises:
        RecipeError: For the first unknown one; parts of a class (`model.lr`) are left to the parser.
    """
    keys = _keys_of(parser)
    flags = {text[2:].rstrip("+") for action in parser._actions for text in action.option_strings}
    for option in options:
        parents = {option[: i.start()] for i in re.finditer(r"\.", option)}
        class_part = any(parent in keys and parent not in _groups(keys) for parent in parents)
        if option.rstrip("+") not in flags and not class_part:
            hint = _suggestion(option, "", keys).replace("mean '", "mean '--")
            raise RecipeError(f"unknown option '--{option}'{hint}")


def explain_parse_error(message: str) -> str:
    """Return jsonargparse's many-line message about a value as one line that names key and value."""
    key = re.search(r'Parser key "([^"]+)"', message)
    if key is None:
        return " ".join(message.split())
    reason = _class_problem(key[1], message) or _expectation(message) or " ".join(message.split("\n", 1)[-1].split())
    return f"bad value for '{key[1]}': {reason}"


def _class_problem(key: str, message: str) -> str:
    """Return what is wrong inside a class of the recipe, or an empty string."""
    pattern = r"^( *)- Problem with given class_path '([^']+)':\n(.*?)(?=^\1- |\Z)"
    found = re.search(pattern, message, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        return ""
    path, inner = found[2], found[3]
    if option := re.search(r"Option '([^']+)' is not accepted", inner):
        known = {name.removeprefix("x.") for name in _init_keys(_resolve(path, key)) or ()}
        return f"{path} has no argument {option[1]!r}{nearest(option[1], known)}"
    return f"{path}: {explain_parse_error(inner)}"


def _expectation(message: str) -> str:
    kinds = re.findall(r"Expected (?:an? )?(?:<class ')?([\w. ]+)", message)
    names = {_KINDS.get(kind, kind): None for kind in kinds if "path but" not in kind}
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if not names or not value:
        return ""
    is_number = "str" in names and re.fullmatch(r"[-+.\d]+", value[1])
    hint = "; YAML reads text such as 2:4 or 007 as a number: put it in quotes" if is_number else ""
    return f"expected {' or '.join(names)}, got {value[1]!r}{hint}"


def _keys_of(parser: ArgumentParser) -> set[str]:
    """Return the full dotted keys that a parser reads."""
    ignored = {"help", "print_config", "print_shtab"}
    return {a.dest for a in parser._actions if a.dest not in ignored and not a.dest.endswith(".help")}


def _groups(keys: set[str]) -> set[str]:
    return {key[: dot.start()] for key in keys for dot in re.finditer(r"\.", key)}


def _check_mapping(mapping: Mapping[str, Any], keys: set[str], prefix: str, shown: str) -> None:
    """Check a mapping whose keys start with `prefix` in `keys`; `shown` is the prefix in messages."""
    groups = _groups(keys)
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key not in keys and key not in groups:
            raise RecipeError(f"unknown key '{shown}{name}' in recipe{_suggestion(key, prefix, keys, shown)}")
        if key in groups and not isinstance(value, (Mapping, str)):  # a text may name a file
            kind = "nothing" if value is None else f"{value!r:.60}"
            raise RecipeError(f"'{shown}{name}' in recipe must be a mapping of keys to values, got {kind}")
        if key in groups and isinstance(value, Mapping) and "class_path" not in value:
            _check_mapping(value, keys, f"{key}.", f"{shown}{name}.")
        else:
            _check_value(value, f"{shown}{name}")


def _check_value(value: Any, shown: str) -> None:
    """Check classes named anywhere inside a value."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{shown}[{index}]")
    elif isinstance(value, Mapping) and "class_path" in value:
        _check_class(value, shown)
    elif isinstance(value, Mapping) and len(value) <= len(_CLASS_KEYS):
        for key in value:
            if hint := nearest(str(key), ["class_path"]):
                raise RecipeError(f"unknown key '{shown}.{key}' in recipe{hint.replace('class', shown + '.class')}")


def _check_class(spec: Mapping[str, Any], shown: str) -> None:
    for key in spec:
        if key not in _CLASS_KEYS:
            raise RecipeError(f"unknown key '{shown}.{key}' in recipe{_full_hint(str(key), _CLASS_KEYS, shown)}")
    owner = _resolve(str(spec["class_path"]), f"{shown}.class_path")
    _check_kind(owner, shown)
    init_args = spec.get("init_args") or {}
    if not isinstance(owner, type) or not isinstance(init_args, Mapping):
        return
    keys = _init_keys(owner)
    if keys is None:
        return
    _check_mapping(init_args, keys, "x.", f"{shown}.init_args.")


def _check_kind(owner: Any, shown: str) -> None:
    """Check that the model and the data are what Lightning trains with; a function may return them."""
    base = {"model": pl.LightningModule, "data": pl.LightningDataModule}.get(shown)
    if base is None or inspect.isfunction(owner) or (isinstance(owner, type) and issubclass(owner, base)):
        return
    named = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else repr(owner)
    raise RecipeError(f"'{shown}.class_path' in recipe is {named}, and no pytorch_lightning.{base.__name__}")


def _init_keys(owner: type) -> set[str] | None:
    """Return "x." + name for each argument of a class, or None where the signature cannot be read."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(owner, "x", fail_untyped=False, sub_configs=True)
    except (ValueError, TypeError):
        return None
    return _keys_of(parser)


def _resolve(path: str, shown: str) -> Any:
    """Return the object behind a class path; a short name must be a known recipe class."""
    if "." not in path:
        return _resolve_short(path, shown)
    if not all(part.isidentifier() for part in path.split(".")):
        raise RecipeError(
            f"unknown class {path!r} at '{shown}' in recipe: write the module and the class, module.Class"
        )
    module, names = _import_longest(path.split("."), path, shown)
    found: Any = module
    for done, name in enumerate(names):
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("_")]
            if done == 0 and hasattr(found, "__path__"):
                public += [info.name for info in pkgutil.iter_modules(found.__path__)]
            parent = ".".join(path.split(".")[: -len(names) + done])
            hint = _full_hint(name, public, parent)
            raise RecipeError(f"unknown class {path!r} at '{shown}' in recipe{hint}")
        found = getattr(found, name)
    return found


def _import_longest(parts: list[str], path: str, shown: str) -> tuple[Any, list[str]]:
    """Import the longest module at the start of a dotted path; return it and the remaining names."""
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            return importlib.import_module(name), parts[length:]
        except Exception as error:  # whatever a module of the user's does while it is imported
            if not _is_absent(name, error):
                told = f"module {name!r} of '{shown}' in recipe cannot be imported: {in_a_line(error)}"
                raise RecipeError(told) from error
    installed = {name.partition(".")[0] for name in sys.modules}
    raise RecipeError(
        f"unknown class {path!r} at '{shown}' in recipe: no module {parts[0]!r}{nearest(parts[0], installed)}"
    )


def _is_absent(name: str, error: Exception) -> bool:
    """Whether the import of a module failed because there is no such module, rather than one that it imports."""
    named = error.name if isinstance(error, ModuleNotFoundError) else None
    return named is not None and f"{name}.".startswith(f"{named}.")


def _resolve_short(name: str, shown: str) -> Any:
    for module in ("emp_callbacks", "emp_callbacks.study.recipe.tasks", "emp_callbacks.study.recipe.data"):
        importlib.import_module(module)
    known = {cls.__name__: cls for base in _RECIPE_CLASSES for cls in _subclasses(base)}
    if name not in known:
        raise RecipeError(f"unknown class {name!r} at '{shown}' in recipe{nearest(name, known)}")
    return known[name]


def _subclasses(base: Any) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)


def _full_hint(name: str, known: Iterable[str], parent: str) -> str:
    return nearest(name, known).replace("mean '", f"mean '{parent}.")


def _suggestion(key: str, prefix: str, keys: set[str], shown: str | None = None) -> str:
    """Return the hint for an unknown key: the nearest sibling, else the same name elsewhere."""
    shown = prefix if shown is None else shown
    name = key.removeprefix(prefix)
    siblings = {other.removeprefix(prefix).split(".")[0] for other in keys if other.startswith(prefix)}
    if hint := nearest(name, siblings if "." not in name else keys):
        return hint.replace("mean '", f"mean '{shown}") if "." not in name else hint
    elsewhere = sorted(other for other in keys if other.rpartition(".")[2] == name)
    if elsewhere and not elsewhere[0].startswith("x."):
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; known there: {', '.join(sorted(siblings))}" if len(siblings) <= 12 else ""
