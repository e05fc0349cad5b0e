"""A Hugging Face folder as the model that it is of: of transformers, or of timm."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from emp_callbacks.checkpoint.file_formats import refuse_quantized
from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.checkpoint.reading import read_checkpoint, state_dict_in
from emp_callbacks.extras import needs
from emp_callbacks.targets.names import few

__all__ = ["built_from", "can_be_built", "is_of_timm"]


def can_be_built(source: str) -> bool:
    """Return whether a source is a folder that says which model it is of, and transformers is there to build it."""
    return (Path(source) / "config.json").is_file() and find_spec("transformers") is not None


def is_of_timm(folder: Path) -> bool:
    """Return whether a folder says that its model is one of timm's.

    Raises:
        ValueError: Its config.json is damaged.
    """
    config = folder / "config.json"
    told = _configuration(config) if config.is_file() else {}
    return isinstance(told.get("architecture"), str) and "model_type" not in told


def built_from(folder: str) -> nn.Module:
    """Return the model that a Hugging Face folder is of, with its weights, in the type that most of them have.

    Warns:
        UserWarning: The folder holds tensors that the model of its configuration does not have.

    Raises:
        ImportError: transformers or timm is not installed.
        OSError: The folder has no weights, or they cannot be read.
        ValueError: It is damaged, quantized, or of no model that its library knows as a whole.
    """
    refuse_quantized(Path(folder))
    files = FolderFiles(Path(folder))
    if is_of_timm(Path(folder)):
        return _built_by_timm(folder)
    told = _configuration(Path(folder) / "config.json")
    needs(f"building the model of {folder}", "hf", "transformers")
    import transformers

    architecture, options = _architecture(told)
    try:
        model, found = architecture.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=files.is_safetensors,
            output_loading_info=True,
            torch_dtype=files.dtype,
            **options,
        )
    except Exception as error:  # a configuration that does not fit is met anywhere
        raise ValueError(f"transformers could not load {folder}: {_first_sentence(error)}") from error
    name = type(model).__name__
    if missing := sorted(found["missing_keys"]):  # it would go on with random values
        raise ValueError(f"transformers could not load {folder}: it holds no {few(missing)} of a {name}")
    if unknown := sorted(found["unexpected_keys"]):
        if architecture is transformers.AutoModel:  # the body of what the folder holds
            raise ValueError(
                f"transformers {transformers.__version__} builds a {name} of {folder}, which has no {few(unknown)}; "
                'name the class in config.json: "architectures": ["..."]'
            )
        warnings.warn(f"{folder} holds {few(unknown)}, which a {name} does not have: left out", stacklevel=2)
    built: nn.Module = model
    return built


def _built_by_timm(folder: str) -> nn.Module:
    needs(f"building the model of {folder}", "study", "timm")
    import timm

    try:
        built: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
        built.load_state_dict(state_dict_in(read_checkpoint(Path(folder)), folder))  # no release of timm runs code then
    except Exception as error:  # as above
        raise ValueError(f"timm could not load {folder}: {_first_sentence(error)}") from error
    return built


def _first_sentence(error: BaseException) -> str:
    """Return what a library says in one line; what follows its first sentence is advice for others."""
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__


def _configuration(config: Path) -> dict[str, Any]:
    try:
        told = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is no JSON ({error}); copy the folder again") from error
    return told if isinstance(told, dict) else {}


def _architecture(told: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class that a configuration names, and what else it must be told; AutoModel where there is none."""
    import transformers

    names = told.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found, {}
    return transformers.AutoModel, {"trust_remote_code": False}  # it would ask, and wait for an answer
