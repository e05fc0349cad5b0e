"""A recipe's model, data module and optimizers without memory, devices and downloads: on torch's `meta` device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from emp_callbacks.extras import is_installed
from emp_callbacks.study.recipe.memory import Sizes
from emp_callbacks.study.recipe.parts import ANYWHERE
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.sharding import Strategy

__all__ = ["AskedTrainer", "build_on_meta", "optimizers_of", "sizes_of", "without_weights"]

# Of a configuration in transformers' own words, what LanguageModel has names for and what it takes as model_args.
_SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
_FURTHER = ("intermediate_size", "num_key_value_heads", "head_dim", "tie_word_embeddings")


class AskedTrainer:
    """A trainer as the recipe asks for it: what data modules and optimizers ask of it, without its devices.

    Args:
        trainer: For one CPU process; answers all else.
        strategy: What the recipe asks for.
        data: The data module.
    """

    estimated_stepping_batches: int = 0
    global_rank = local_rank = node_rank = 0
    is_global_zero = True

    def __init__(self, trainer: pl.Trainer, strategy: Strategy, data: Any) -> None:
        self._trainer, self.datamodule = trainer, data
        self.world_size, self.num_nodes, self.num_devices = strategy.ranks, strategy.nodes, strategy.devices
        self.distributed_sampler_kwargs = {"num_replicas": strategy.batches, "rank": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def without_weights(recipe: Recipe) -> str:
    """Let the model begin without the weights that a file or a hub holds; return what is to be said of that."""
    given = recipe.config.model.get("init_args") or {}
    pretrained = given.get("pretrained")
    if not pretrained:
        return ""
    told = f"pretrained={pretrained!r} is not loaded: "
    given["pretrained"] = False if pretrained is True else None
    if "distill" in given:
        given["distill"] = None  # a teacher is made of the weights
    if pretrained is True:
        return f"{told}a compute node may have no network to fetch it"
    config, source = _configuration(str(pretrained)) if "architecture" in given else (None, "")
    if config is None:
        return f"{told}it is not on this machine, and the sizes here are those of the recipe's other settings"
    for name, theirs in {**_SIZES, "architecture": "model_type"}.items():
        given[name] = getattr(config, theirs)
    given["model_args"] = {name: getattr(config, name) for name in _FURTHER if hasattr(config, name)}
    return f"{told}{source}"


def _configuration(name: str) -> tuple[Any, str]:
    """Return the configuration of a pretrained transformer, and where from; None if it is not known here."""
    if not is_installed("transformers"):
        return None, ""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), "its configuration is on this machine"
    except (OSError, ValueError):
        known = name in CONFIG_MAPPING.keys()  # noqa: SIM118  (a lazy mapping, which `in` would import from)
    told = f"it is not on this machine, and the sizes here are transformers' own of {name}"
    return (AutoConfig.for_model(name), told) if known else (None, "")


def build_on_meta(recipe: Recipe) -> str:
    """Build model, data module and trainer for one CPU process; return how the model was built.

    Raises:
        RecipeError: An entry of the recipe cannot be built.
    """
    recipe.config.trainer.strategy = "auto"  # DeepSpeed, say, need not be here
    try:
        with torch.device("meta"):
            recipe.build(list, **ANYWHERE)
            recipe.model.configure_model()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if not _reads_values(error):
            raise
        recipe.build(list, **ANYWHERE)
        recipe.model.configure_model()
        return "on the CPU: it reads values while it is built"
    return "without memory (meta)"


def _reads_values(error: BaseException | None) -> bool:
    """Return whether something failed because tensors have no values on `meta`."""
    while error is not None:
        if "meta" in str(error).lower():
            return True
        error = error.__cause__
    return False


def optimizers_of(configured: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers in what `configure_optimizers` returned; see Lightning for the forms that it may have."""
    if isinstance(configured, torch.optim.Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return [configured["optimizer"]]
    if isinstance(configured, (list, tuple)):
        return [one for part in configured for one in optimizers_of(part)]
    return []  # none, or schedulers of the learning rate


def sizes_of(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Sizes:
    """Return what a model and its optimizers hold. On `meta` gradients and states are made, elsewhere nothing."""
    trained = {id(p): p for one in optimizers for group in one.param_groups for p in group["params"] if p.requires_grad}
    return Sizes(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        trained=sum(parameter.numel() for parameter in trained.values()),
        states=_states(optimizers, list(trained.values())),
    )


def _states(optimizers: Sequence[torch.optim.Optimizer], trained: Sequence[nn.Parameter]) -> float | None:
    """Return how many bytes of state belong to a byte of the parameters: a step without values tells."""
    if not trained or not all(parameter.is_meta for parameter in trained):
        return None
    try:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError):  # it reads values, or is fused
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
    held = [value for one in optimizers for state in one.state.values() for value in state.values()]
    nbytes = sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.is_meta)
    return nbytes / sum(parameter.nbytes for parameter in trained)
