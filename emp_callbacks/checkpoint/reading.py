"""Weights in files: Lightning checkpoints, state dicts, safetensors, Hugging Face folders. Code in them never runs."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emp_callbacks.checkpoint.file_formats import SAFETENSORS, file_format, refuse_quantized
from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.checkpoint.safe_unpickling import load_inert
from emp_callbacks.checkpoint.state_dicts import find_weights
from emp_callbacks.targets.experts import routers, stacked_experts
from emp_callbacks.targets.names import canonical_name
from emp_callbacks.targets.shapes import own_shape

__all__ = [
    "TIED_KEY",
    "as_module",
    "callback_states",
    "prunable_by_name",
    "read_checkpoint",
    "scored_weights",
    "state_dict_in",
    "tied_names",
    "trajectory_rows",
]

TIED_KEY = "emp_tied"
"""Key of the safetensors metadata under which a file says which tensors are one (JSON: name -> name)."""

# A bare state dict has no module types: these names of a weight's owner stand for embeddings and norms
# (the owner only: `patch_embed.proj.weight` is a convolution).
_EMBEDDING = re.compile(r"(emb|embed\w*|\w*_emb|\w*_?embeddings?|wte|wpe|relative_\w*bias)", re.IGNORECASE)
_READ = {"step", "beta", "keep", "n"}  # of the rows of a trajectory
_NORM = re.compile(r"(\w*norm\w*|ln_?\w*|bn\d*)", re.IGNORECASE)


def read_checkpoint(path: Path, *, mapped: bool = False) -> Any:
    """Return what a file or a Hugging Face folder holds: tensors, plain values, and placeholders of other objects.

    Args:
        path: The file or folder.
        mapped: Leave tensors of a PyTorch file on disk until they are used.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is damaged, or needs code.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist; a timm model is written timm:NAME")
    if not path.is_file():
        raise ValueError(f"{path} is no file on a disk, and weights are read in no fixed order; copy it to one")
    return _read_safetensors(path) if file_format(path) == SAFETENSORS else _read_pickled(path, mapped)


def _read_pickled(path: Path, mapped: bool) -> Any:
    try:
        return load_inert(path, mapped=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise _damaged(path, error) from error
        raise ValueError(
            f"{path} holds Python objects besides tensors, and emp never runs code from a file;"
            " save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except Exception as error:  # damaged bytes lead the unpickler anywhere
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; those that were one when `emp` wrote them are one again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            tied = tied_names((opened.metadata() or {}).get(TIED_KEY, "{}"), path)
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return {name: state.get(tied.get(name, name), value) for name, value in state.items()}


def tied_names(text: str, path: Path) -> dict[str, str]:
    """Return which tensors of a safetensors file are one with another: name -> name of the other.

    Args:
        text: What the file's metadata has under TIED_KEY.
        path: The file.

    Raises:
        ValueError: It is no such mapping.
    """
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise ValueError(
            f"{path} does not say which tensors are one: its {TIED_KEY!r} is {text[:60]!r}; export it again"
        )
    return tied


def _read_folder(folder: Path) -> dict[str, Any]:
    """Return what the files of a Hugging Face folder hold; tensors of one file that are one stay one."""
    refuse_quantized(folder)
    held: dict[str, Any] = {}
    for file in FolderFiles(folder).files:
        held.update(read_checkpoint(folder / file))
    return held


def _damaged(path: Path, error: Exception) -> ValueError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
    return ValueError(f"{path} is damaged or not a PyTorch checkpoint ({first}); copy or save it again")


def state_dict_in(checkpoint: Any, source: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, see `find_weights`.

    Raises:
        ValueError: There are none, or they cannot be scored.
    """
    return find_weights(checkpoint, source).tensors


def callback_states(checkpoint: Any) -> list[Mapping[str, Any]]:
    """Return the state of every EMPCallback in a Lightning checkpoint.

    Raises:
        ValueError: What should be the callbacks' states is not that.
    """
    callbacks = (checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None) or {}
    if not isinstance(callbacks, Mapping):
        raise ValueError(
            f"the checkpoint's callbacks are {type(callbacks).__name__}, not states by name: it is not Lightning's; "
            "give its state_dict alone"
        )
    states = {key: state for key, state in callbacks.items() if str(key).startswith("EMPCallback")}
    for key, state in states.items():
        if isinstance(state, Mapping):
            _check_state(key, state)
    return [state for state in states.values() if isinstance(state, Mapping)]


def _check_state(key: str, state: Mapping[str, Any]) -> None:
    masks, shapes = state.get("masks", {}), state.get("shapes", {})
    fits = isinstance(masks, Mapping) and isinstance(shapes, Mapping)
    if not fits or not all(isinstance(name, str) for name in (*masks, *shapes)):
        raise ValueError(f"the state of {key} is damaged: masks or shapes are not by name; use an older checkpoint")
    if not all(isinstance(mask, Tensor) and mask.dtype == torch.uint8 for mask in masks.values()):
        raise ValueError(f"the state of {key} is damaged: a mask is no tensor of bits; use an older checkpoint")
    rows = trajectory_rows(state)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.keys() >= _READ for row in rows):
        raise ValueError(f"the state of {key} is damaged: its trajectory has no rows; use an older checkpoint")


def trajectory_rows(state: Mapping[str, Any]) -> Any:
    """Return the rows that the state of a run holds of its trajectory: the last ones, or in an old state all."""
    held = state.get("trajectory", [])
    return held.get("rows") if isinstance(held, Mapping) else held


def scored_weights(state: Mapping[str, Tensor], runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the weights that a run's callbacks scored; none if `state` does not hold them all."""
    weights = [run.get("shapes", ()) for run in runs if run.get("target", "weights") == "weights"]
    scored = list(dict.fromkeys(name for names in weights for name in names))
    return scored if {*scored} <= {canonical_name(name) for name in state} else []


def prunable_by_name(state: Mapping[str, Tensor]) -> list[str]:
    """Return the canonical names of what training would score, as far as names and shapes can tell."""
    tree = as_module(state)
    tables = {name for name, value in state.items() if value.dim() == 2 and _EMBEDDING.fullmatch(_owner(name))}
    tied = {state[name].data_ptr() for name in tables}
    apart = {parameter.data_ptr() for parameter in routers(tree, own_shape)}
    stacks = [stacked for module in tree.modules() if (stacked := stacked_experts(module, own_shape)) is not None]
    experts = {parameter.data_ptr() for stacked in stacks for parameter in (stacked.up, stacked.down)}
    return [
        canonical_name(name)
        for name, value in state.items()
        if value.is_floating_point()
        and value.dim() >= 2
        and (_is_weight(name, state) or value.data_ptr() in experts)
        and not _NORM.fullmatch(_owner(name))
        and value.data_ptr() not in tied | apart
    ]


def _is_weight(name: str, state: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor is called a weight, and is not what weight or spectral norm computes one from."""
    owner, _, last = name.rpartition(".")
    if owner.endswith(".parametrizations.weight"):
        beside = state.get(f"{owner}.original0")
        return last == "original1" and beside is not None and beside.dim() == state[name].dim()  # weight norm's
    if f"{owner}.weight_u" in state or (last == "weight_g" and f"{owner}.weight_v" in state):
        return False
    return "weight" in last


def _owner(name: str) -> str:
    """Return the name of the module that owns a parameter: "proj" for "blocks.0.attn.proj.weight"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def as_module(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a module tree whose parameters have the names and values of a state dict; ties stay ties."""
    root = nn.Module()
    made: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for name, value in state.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            # Straight into the registry: a part called "type" would clash with a method of nn.Module.
            owner = cast("nn.Module", owner._modules.setdefault(part, nn.Module()))
        # Empty tensors share the address 0 and are no ties.
        identity = (value.data_ptr() or id(value), value.shape)
        if identity not in made:
            made[identity] = nn.Parameter(value, requires_grad=value.is_floating_point())
        owner._parameters[last] = made[identity]
    return root
