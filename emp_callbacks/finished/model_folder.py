"""A folder that a model's own library loads: weights, configuration, and what else the source folder held."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from emp_callbacks.checkpoint.tensor_file import write_tensors
from emp_callbacks.finished.host_loading import same_shapes
from emp_callbacks.folders.output import copy_beside

__all__ = ["copy_companions", "of_transformers", "save_by_transformers", "save_timm_configuration"]


def of_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of transformers' own, with a configuration."""
    return (
        hasattr(model, "config") and hasattr(model, "save_pretrained") and type(model).__module__.startswith("transf")
    )


def save_by_transformers(model: Any, config: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write weights under the names that `from_pretrained` reads, with the configuration.

    Args:
        model: A model of transformers.
        config: Its configuration from now on.
        folder: Empty.
        metadata: What every file of weights says besides.
    """
    model.config = config
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        model.generation_config = type(generation)()  # some that are published are refused when they are saved
    model.save_pretrained(folder)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
        model.generation_config = generation
    for file in folder.glob("*.safetensors"):  # anew: with our metadata, and for all whom the umask lets read
        rewritten = file.with_name(f"{file.name}.new")
        write_tensors(load_file(file), rewritten, {"format": "pt", **metadata})
        rewritten.replace(file)


def save_timm_configuration(model: Any, folder: Path, arguments: Mapping[str, Any]) -> str | None:
    """Write what `timm.create_model("local-dir:FOLDER")` reads beside the weights, and return that call.

    None, and nothing is written, where timm would build another model: of arguments that it does not know any more.
    """
    from timm import create_model
    from timm.models import _hub

    config = folder / "config.json"
    save: Any = _hub.save_config_for_hf  # says that it takes a str, and opens a Path
    try:
        save(model, config, model_args=dict(arguments))
        fits = same_shapes(model, partial(create_model, f"local-dir:{folder}"))
    except (ValueError, TypeError):  # arguments that JSON does not hold
        fits = False
    if fits:
        return "timm.create_model('local-dir:FOLDER', pretrained=True)"
    config.unlink(missing_ok=True)
    return None


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy what is no weights from a folder to another: configuration, tokenizer, processor, licence, code.

    Returns:
        What a reader must know: folders with weights of their own stay behind.
    """
    copy_beside(source, folder)
    left = [one.name for one in sorted(source.iterdir()) if one.is_dir() and not (folder / one.name).exists()]
    left = [name for name in left if not name.startswith(".")]
    return [f"folders in {source} that hold weights were not copied: {', '.join(left)}"] if left else []
