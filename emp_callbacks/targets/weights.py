"""Single weights as units: which parameters of a model are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from emp_callbacks.targets.names import canonical_name, check_patterns, matches


class WeightTarget(NamedTuple):
    """One prunable parameter.

    Attributes:
        name: Name in the model, without what torch.compile or a wrapper added.
        parameter: The parameter itself; looked up through this object at every use, never copied.
        output_dim: Dimension that counts output units: the rows of `scope="row"`.
    """

    name: str
    parameter: nn.Parameter
    output_dim: int


def prunable_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> list[WeightTarget]:
    """Return the parameters that EMP scores, each once, in the model's own order.

    By default: trainable floating-point parameters of two or more dimensions whose last name part contains
    "weight", except those of norms and embeddings and heads tied to an embedding.

    Args:
        model: Any module; tied parameters and shared modules count once, under their first name.
        include: Glob patterns on parameter names that replace the default rule: only what they name, and also
            norms, biases, embeddings or frozen parameters if named.
        exclude: Glob patterns on parameter names to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Raises:
        ValueError: A pattern matches no parameter, or nothing is left to prune.
        TypeError: A named parameter is not floating-point.
    """
    owners = _owners(model)
    names = {id(p): [name for name, _ in owned] for p, owned in owners.items()}
    every_name = [name for group in names.values() for name in group]
    check_patterns([*(include or ()), *(exclude or ())], every_name, "parameter", "blocks.*.weight")
    targets = []
    for parameter, owned in owners.items():
        wanted = (
            matches(names[id(parameter)], include) if include else _prunable_by_default(parameter, owned, full_shape)
        )
        if wanted and not (exclude and matches(names[id(parameter)], exclude)):
            targets.append(WeightTarget(owned[0][0], parameter, _output_dim(owned[0][1])))
    _check_targets(targets, model, full_shape)
    return targets


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
    """Return, for each parameter, every name it has and the module that owns it under that name."""
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {p: [] for p in model.parameters()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            owners[parameter].append((canonical_name(f"{prefix}.{name}" if prefix else name), module))
    return owners


def _prunable_by_default(
    parameter: nn.Parameter, owned: list[tuple[str, nn.Module]], full_shape: Callable[[nn.Parameter], torch.Size]
) -> bool:
    kinds = [type(module).__name__ for _, module in owned]
    return (
        parameter.requires_grad
        and parameter.is_floating_point()
        and len(full_shape(parameter)) >= 2
        and any("weight" in name.rpartition(".")[2] for name, _ in owned)
        and not any("Embedding" in kind or "Norm" in kind for kind in kinds)
    )


def _output_dim(owner: nn.Module) -> int:
    # transformers' Conv1D and transposed convolutions store (input, output, ...).
    return 1 if type(owner).__name__ == "Conv1D" or "ConvTranspose" in type(owner).__name__ else 0


def _check_targets(
    targets: list[WeightTarget], model: nn.Module, full_shape: Callable[[nn.Parameter], torch.Size]
) -> None:
    if not targets:
        held = [f"{name} {tuple(full_shape(p))}" for name, p in model.named_parameters()][:8]
        raise ValueError(
            f"{type(model).__name__} has no weights to prune by these rules; it holds "
            f"{'; '.join(held) if held else 'no parameters at all'}. Name what you want with include=['pattern']"
        )
    for target in targets:
        if not target.parameter.is_floating_point():
            raise TypeError(
                f"parameter {target.name!r} is {target.parameter.dtype}; EMP scores floating-point weights: exclude it"
            )
        if 0 in (shape := full_shape(target.parameter)):
            raise ValueError(f"parameter {target.name!r} has no elements (shape {tuple(shape)})")
