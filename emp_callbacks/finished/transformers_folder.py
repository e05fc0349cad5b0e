"""A Hugging Face folder as the model that it is of."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from emp_callbacks.extras import needs
from emp_callbacks.targets.names import few

__all__ = ["built_from", "can_be_built"]


def can_be_built(source: str) -> bool:
    """Return whether a source is a folder that says which model it is of, and transformers is there to build it."""
    return (Path(source) / "config.json").is_file() and find_spec("transformers") is not None


def built_from(folder: str) -> nn.Module:
    """Return the model that a Hugging Face folder is of, with its weights.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: The folder has no weights.
        ValueError: It is damaged, or of no model that transformers knows.
    """
    needs(f"building the model of {folder}", "hf", "transformers")
    import transformers

    if not list(Path(folder).glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds config.json and no *.safetensors; name a folder with weights")
    config = Path(folder) / "config.json"
    try:
        told = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error}); copy the folder again") from error
    names = told.get("architectures") if isinstance(told, dict) else None
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "AutoModel"
    architecture = getattr(transformers, name, transformers.AutoModel)
    try:
        model, found = architecture.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"transformers could not load {folder}: {error}") from error
    if missing := sorted(found["missing_keys"]):  # it would go on with random values
        raise ValueError(f"transformers could not load {folder}: it holds no {few(missing)} of a {name}")
    built: nn.Module = model
    return built
