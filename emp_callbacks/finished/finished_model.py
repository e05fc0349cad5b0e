"""A finished model, from wherever its weights are: a checkpoint, a recipe, timm, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emp_callbacks.checkpoint.reading import (
    as_module,
    callback_states,
    prunable_by_name,
    read_checkpoint,
    scored_weights,
)
from emp_callbacks.checkpoint.state_dicts import find_weights
from emp_callbacks.core.packing import unpack_bits
from emp_callbacks.finished.example_call import Example, image_example, model_example, recorded_example
from emp_callbacks.finished.inspection import LoadedModel, load_model
from emp_callbacks.finished.transformers_folder import built_from, can_be_built
from emp_callbacks.targets.names import canonical_name, few, match_names

if TYPE_CHECKING:
    from emp_callbacks.study.recipe.parts import RecipeParts

__all__ = ["FinishedModel", "open_model"]


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """Weights, and the modules that they belong to where they are known.

    Attributes:
        module: Holds the weights under their names in training.
        prefix: Start of those names that a file leaves out, such as "model."; only names with it are exported.
        weights: Names of the weights that training scored or would score; None: by the modules' types.
        has_modules: Whether `module` can compute; else it is names and values alone.
        example: Arguments with which `inner` can be called, if known.
        runs: States of the EMPCallbacks in a Lightning checkpoint.
        notes: What a reader must know.
        folder: The Hugging Face folder that the weights come from, under its names.
    """

    module: nn.Module
    prefix: str
    weights: list[str] | None = None
    has_modules: bool = True
    example: Example | None = None
    runs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def inner(self) -> nn.Module:
        """The user's own model: the module behind the prefix."""
        return self.module.get_submodule(self.prefix[:-1]) if self.prefix else self.module

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and buffers to export, by the names that the user's own model gives them."""
        state = self.module.state_dict()
        names = {name: canonical_name(name) for name in state}
        return {new.removeprefix(self.prefix): state[old] for old, new in names.items() if new.startswith(self.prefix)}


def open_model(
    source: str,
    *,
    recipe: RecipeParts | None = None,
    prefix: str | None = None,
    pretrained: bool = False,
    needs_modules: bool = False,
    input_size: Sequence[int] | None = None,
) -> FinishedModel:
    """Return the model behind `source`, masked as its checkpoint's EMPCallbacks masked it, in evaluation mode.

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
        example = image_example(input_size or _timm_size(loaded.module))
        return FinishedModel(module=loaded.module.eval(), prefix="", example=example, notes=tuple(loaded.notes))
    why_not_built: list[str] = []
    if recipe is None and (Path(source) / "config.json").is_file() and (needs_modules or can_be_built(source)):
        loaded = LoadedModel(built_from(source), None, []) if needs_modules else load_model(source)
        if loaded.include is None:
            module = loaded.module.eval()
            example = image_example(input_size or _timm_size(module)) or model_example(module)
            notes = tuple(loaded.notes)
            return FinishedModel(module=module, prefix="", example=example, notes=notes, folder=Path(source))
        why_not_built = loaded.notes
    state, runs, notes = _read(source, pretrained)
    notes = (*why_not_built, *notes)
    if recipe is not None:
        _load_into(recipe.module.eval(), state, source)
        prefix = _prefix(recipe.module.state_dict(), prefix, lightning=True)
        model = FinishedModel(module=recipe.module, prefix=prefix, runs=runs, notes=notes)
        return replace(model, example=image_example(input_size) or recorded_example(recipe, model.inner))
    return FinishedModel(
        module=as_module(state),
        prefix=_prefix(state, prefix, lightning=source.endswith(".ckpt")),
        weights=scored_weights(state, runs) or prunable_by_name(state),
        has_modules=False,
        runs=runs,
        notes=notes,
        folder=Path(source) if Path(source).is_dir() else None,
    )


def _timm_size(module: nn.Module) -> Sequence[int] | None:
    """Return the size of the images that a model of timm reads; None of others."""
    told: Mapping[str, Any] = getattr(module, "default_cfg", None) or {}
    return told.get("input_size")


def _read(source: str, pretrained: bool) -> tuple[dict[str, Tensor], tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Return masked weights, the states of the EMPCallbacks and notes."""
    if source.startswith("timm:"):
        loaded = load_model(source, pretrained=pretrained)
        return loaded.module.state_dict(), (), tuple(loaded.notes)
    if pretrained:
        raise ValueError(f"--pretrained goes with timm:NAME; {source} already holds its weights")
    checkpoint = read_checkpoint(Path(source))
    state, found = find_weights(checkpoint, source)
    runs = tuple(callback_states(checkpoint))
    # observe_only measured masks that it never applied: the model is dense.
    grown = sum(_mask(state, run.get("masks", {})) for run in runs if run.get("mode") != "observe")
    notes = [*found, *([f"{grown:,} weights had grown back since the last refresh and are zero again"] * (grown > 0))]
    notes += [
        f"the run masked {run['target']} in the forward pass; a file of weights does not hold that"
        for run in runs
        if _masked_in_forward(run)
    ]
    learning = any((run.get("gates") or {}).get("learns") for run in runs)
    notes += ["the gates of the run still learned; they are in no weights: none of its heads is pruned here"] * learning
    return state, runs, tuple(notes)


def _masked_in_forward(run: Mapping[str, Any]) -> bool:
    rows = run.get("trajectory", {}).get("rows", ())
    by_sample = any(row.get("scope") == "sample" for row in rows)  # dynamic heads, too
    return by_sample or run.get("target") in ("features", "attention_edges")


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
    """Load weights into a recipe's module; names may lack the first part that all of the module's have.

    Raises:
        ValueError: A name is left over or missing, but for those of tied tensors, or a shape differs.
    """
    own = module.state_dict()
    matched = match_names(list(own), list(state))
    given = {matched[name]: value for name, value in state.items() if name in matched}
    filled = {_place(own[name]) for name in given}
    differ = sorted(state.keys() - matched.keys())
    differ += sorted(name for name, value in own.items() if name not in given and _place(value) not in filled)
    differ += sorted(name for name, value in given.items() if value.shape != own[name].shape)
    if differ:
        raise ValueError(
            f"{source} does not fit the recipe's {type(module).__name__}: {few(differ, 5)} "
            "differ in name or shape; name the recipe that the weights were trained with"
        )
    module.load_state_dict(given, strict=False)


def _place(value: Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape


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
