"""A finished model, from wherever its weights are: a checkpoint, a recipe, timm, a Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.packing import unpack_bits
from emp_callbacks.inspection import _as_module, _prunable_by_name, _read_checkpoint, _state_dict, load_model
from emp_callbacks.targets.names import canonical_name

__all__ = ["Example", "FinishedModel", "RecipeParts", "open_model", "open_recipe"]

_EXAMPLES = 2  # of a batch, for comparing outputs


@dataclass(frozen=True)
class Example:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecipeParts:
    """What a recipe builds: LightningModule, data module that is set up, and the settings of its EMPCallback."""

    module: Any
    data: Any
    config: EMPConfig


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """Weights, and the modules that they belong to where they are known.

    Attributes:
        module: Holds the weights under their names in training.
        prefix: Start of those names that a file leaves out, such as "model."; only names with it are exported.
        weights: Names of the weights that training scored or would score; None: by the modules' types.
        has_modules: Whether `module` can compute; else it is names and values alone.
        example: Arguments with which `inner` can be called, if known.
        recipe: The recipe's other parts, if there is one.
        run: State of the EMPCallback in a Lightning checkpoint; empty if there is none.
        notes: What a reader must know.
    """

    module: nn.Module
    prefix: str
    weights: list[str] | None = None
    has_modules: bool = True
    example: Example | None = None
    recipe: RecipeParts | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def inner(self) -> nn.Module:
        """The user's own model: the module behind the prefix."""
        return self.module.get_submodule(self.prefix[:-1]) if self.prefix else self.module

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and buffers to export, by the names that the user's own model gives them."""
        state = self.module.state_dict()
        names = {name: canonical_name(name) for name in state}
        return {new.removeprefix(self.prefix): state[old] for old, new in names.items() if new.startswith(self.prefix)}


def open_recipe(path: str | Path) -> RecipeParts:
    """Build the model and the data of a recipe; nothing is trained.

    Raises:
        FileNotFoundError: If there is no such recipe.
        RecipeError: If a key or a value in it is not known.
    """
    import pytorch_lightning as pl

    from emp_callbacks.integrations.lightning import EMPCallback
    from emp_callbacks.study.recipe import Recipe
    from emp_callbacks.study.training import _quiet

    recipe = Recipe(path)
    seed = recipe.config.seed_everything
    pl.seed_everything(seed if isinstance(seed, int) else 0, workers=True, verbose=False)
    callbacks: list[Any] = []

    def without_callbacks(own: list[Any]) -> list[Any]:
        callbacks.extend(own)
        return []

    with _quiet():
        recipe.build(without_callbacks, logger=False, enable_checkpointing=False)
    recipe.datamodule.prepare_data()
    recipe.datamodule.setup("fit")
    configs = [callback.config for callback in callbacks if isinstance(callback, EMPCallback)]
    return RecipeParts(
        module=recipe.model, data=recipe.datamodule, config=configs[0] if configs else EMPConfig(every_n_epochs=1)
    )


def open_model(
    source: str,
    *,
    recipe: RecipeParts | None = None,
    prefix: str | None = None,
    pretrained: bool = False,
    needs_modules: bool = False,
    input_size: Sequence[int] | None = None,
) -> FinishedModel:
    """Return the model behind `source`, masked as its checkpoint's EMPCallback masked it, in evaluation mode.

    Args:
        source: What `emp inspect` reads: a checkpoint file, a Hugging Face folder, or timm:NAME.
        recipe: Gives the modules for the weights of a checkpoint.
        prefix: Start of the names that a file leaves out. Default: "module." of DistributedDataParallel; and of a
            Lightning checkpoint (.ckpt) or a recipe the first part of the names, if all have the same ("model.").
        pretrained: Load timm's weights.
        needs_modules: Whether a Hugging Face folder must be built as a model.
        input_size: Size of one example, without the batch. Default: as the recipe's data or the model says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or does not fit the recipe's model, or no weight has the prefix.
    """
    if source.startswith("timm:") and recipe is None:
        loaded = load_model(source, pretrained=pretrained)
        example = _image(getattr(loaded.module, "default_cfg", {}).get("input_size"), input_size)
        return FinishedModel(module=loaded.module.eval(), prefix="", example=example, notes=tuple(loaded.notes))
    if needs_modules and recipe is None and (Path(source) / "config.json").is_file():
        module = _from_transformers(source).eval()
        return FinishedModel(module=module, prefix="", example=_image(None, input_size) or _tokens(module))
    state, run, notes = _read(source, pretrained)
    if recipe is not None:
        _load_into(recipe.module.eval(), state, source)
        lightning = _prefix(recipe.module.state_dict(), prefix, lightning=True)
        model = FinishedModel(module=recipe.module, prefix=lightning, recipe=recipe, run=run, notes=tuple(notes))
        example = _image(None, input_size) or _recorded(model)
        return FinishedModel(**{**vars(model), "example": example})
    return FinishedModel(
        module=_as_module(state),
        prefix=_prefix(state, prefix, lightning=source.endswith(".ckpt")),
        weights=_scored(state, run),
        has_modules=False,
        run=run,
        notes=tuple(notes),
    )


def _read(source: str, pretrained: bool) -> tuple[dict[str, Tensor], Mapping[str, Any], list[str]]:
    """Return masked weights, the EMPCallback's state and notes."""
    if source.startswith("timm:"):
        loaded = load_model(source, pretrained=pretrained)
        return loaded.module.state_dict(), {}, loaded.notes
    if pretrained:
        raise ValueError(f"--pretrained goes with timm:NAME; {source} already holds its weights")
    checkpoint = _read_checkpoint(Path(source))
    state, run = _state_dict(checkpoint, source), _callback_state(checkpoint)
    grown = _mask(state, run.get("masks", {}))
    notes = [f"{grown:,} weights had grown back since the last refresh and are zero again"] if grown else []
    if run.get("target") in ("features", "attention_edges"):
        notes.append(f"the run masked {run['target']} in the forward pass; a file of weights does not hold that")
    return state, run, notes


def _scored(state: Mapping[str, Tensor], run: Mapping[str, Any]) -> list[str]:
    """Return the names of the weights that the run scored; without a run, those that look like prunable weights."""
    masked = list(run.get("shapes", ()))
    if masked and {*masked} <= {canonical_name(name) for name in state}:
        return masked
    return [canonical_name(name) for name in _prunable_by_name(state)]


def _callback_state(checkpoint: Any) -> Mapping[str, Any]:
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    for key, state in (callbacks or {}).items():
        if str(key).startswith("EMPCallback") and isinstance(state, Mapping):
            return state
    return {}


@torch.no_grad()
def _mask(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Zero what the masks of a run prune and return how many values were not zero: in `project` weights grow back."""
    names = {canonical_name(name): name for name in state}
    grown = 0
    for name, packed in masks.items():
        weight = state.get(names.get(name, ""))
        if weight is not None and packed.numel() == (weight.numel() + 7) // 8:
            pruned = ~unpack_bits(packed, weight.numel()).view(weight.shape)
            grown += int((weight[pruned] != 0).sum())
            weight.masked_fill_(pruned, 0)
    return grown


def _load_into(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a recipe's module; names may lack the first part that all of the module's have."""
    own = module.state_dict()
    given = {canonical_name(name): value for name, value in state.items()}
    if not given.keys() & own.keys():
        before = _prefix(own, None, lightning=True)
        given = {f"{before}{name}": value for name, value in given.items()}
    differ = [*sorted(given.keys() - own.keys()), *sorted(own.keys() - given.keys())]
    differ += sorted(name for name in given.keys() & own.keys() if given[name].shape != own[name].shape)
    if differ:
        raise ValueError(
            f"{source} does not fit the recipe's {type(module).__name__}: {', '.join(differ[:5])} "
            f"({len(differ)} in all) differ in name or shape; name the recipe that the weights were trained with"
        )
    module.load_state_dict(given)


def _prefix(names: Iterable[str], given: str | None, *, lightning: bool) -> str:
    """Return the start of the names that a file leaves out, with its dot; empty for none."""
    names = [canonical_name(name) for name in names]
    if given is not None:
        chosen = f"{given.rstrip('.')}." if given else ""
        if not any(name.startswith(chosen) for name in names):
            raise ValueError(f"no weight's name starts with {chosen!r}; names: {', '.join(names[:5])}, ...")
        return chosen
    first = {name.split(".")[0] for name in names if "." in name}
    common = len(first) == 1 and all("." in name for name in names)
    return f"{first.pop()}." if common and (lightning or first == {"module"}) else ""


def _from_transformers(folder: str) -> nn.Module:
    import json

    import transformers

    if not list(Path(folder).glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds config.json and no *.safetensors; name a folder with weights")
    names = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or ["AutoModel"]
    architecture = getattr(transformers, names[0], transformers.AutoModel)
    try:
        return architecture.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"transformers could not load {folder}: {error}") from error


# ---- examples ------------------------------------------------------------------------------------------------------


def _image(default: Sequence[int] | None, given: Sequence[int] | None) -> Example | None:
    size = given or default
    return Example((torch.randn(1, *size, generator=torch.Generator().manual_seed(0)),)) if size else None


def _tokens(module: nn.Module) -> Example | None:
    """Return the inputs that a transformers model offers for a try; images where it reads pixels."""
    config: Any = module.config
    if getattr(module, "main_input_name", "") == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        image = _image(None, (getattr(config, "num_channels", 3), height, width))
        return None if image is None else Example((), {"pixel_values": image.args[0]})
    if getattr(module, "main_input_name", "") != "input_ids":
        return None
    offered: Any = module.dummy_inputs
    without_cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return Example((), {**offered, **without_cache})


def _recorded(model: FinishedModel) -> Example | None:
    """Return the arguments with which a training step of the recipe calls the inner model, for a few examples."""
    assert model.recipe is not None
    calls: list[Example] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        calls.append(Example(args, kwargs))

    batch = next(iter(model.recipe.data.train_dataloader()))
    hook = model.inner.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            training_loss(model.recipe.module, batch, 0)
    finally:
        hook.remove()
    if not calls:
        return Example((batch,)) if model.inner is model.module else None
    return _few(calls[0])


def _few(example: Example) -> Example:
    """Return the first examples of the batch, if the first dimension of every tensor is the batch."""
    tensors = [leaf for leaf in tree_leaves(vars(example)) if isinstance(leaf, Tensor)]
    if len({len(tensor) if tensor.dim() else 0 for tensor in tensors}) != 1:
        return example
    return Example(**tree_map(lambda leaf: leaf[:_EXAMPLES] if isinstance(leaf, Tensor) else leaf, vars(example)))


def training_loss(module: Any, batch: Any, index: int) -> Tensor:
    """Return the loss of a LightningModule's training step, outside a Trainer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*self\.log\(\).*|.*self\.trainer.*|.*isinstance\(treespec")
        returned = module.training_step(batch, index)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(module).__name__}.training_step returned {type(loss).__name__}, not a loss; "
            "criteria that read data need one"
        )
    return loss
