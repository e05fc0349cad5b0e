"""What PEFT adds to a model: adapters, and the wrappers around the base that they adapt."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Where modules of PEFT keep what they were given or, as `modules_to_save`, a copy of it.
_GIVEN = ("base_layer", "base_model", "model", "original_module", "modules_to_save")


def is_peft(module: nn.Module) -> bool:
    """Return whether a module is one of PEFT's, or of a kind that says itself where its adapters are."""
    kind = type(module)
    return hasattr(kind, "adapter_layer_names") or any(
        base.__module__.partition(".")[0] == "peft" for base in kind.__mro__
    )


def adapted(module: nn.Module) -> nn.Module | None:
    """Return the layer that a module of PEFT stands in for; None if it is another kind of module."""
    base = module._modules.get("base_layer")
    return base if base is not None and is_peft(module) else None


def adapter_paths(model: nn.Module) -> set[str]:
    """Return the names of the modules whose own parameters are adapters, PEFT's wrappers among them."""
    return {name for name, is_adapter in _walk("", model, inside=False) if is_adapter}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that are adapters' under all their names."""
    paths = adapter_paths(model)
    adapters, others = set[nn.Parameter](), set[nn.Parameter]()
    for name, module in model.named_modules(remove_duplicate=False) if paths else ():
        (adapters if name in paths else others).update(module.parameters(recurse=False))
    return adapters - others


def adapted_weights(model: nn.Module) -> dict[int, bool]:
    """Return the ids of the parameters that adapters change while they are merged, and whether they are now."""
    found: dict[int, bool] = {}
    for module in model.modules():
        if (base := adapted(module)) is not None:
            merged = bool(getattr(module, "merged", False))
            found |= {id(parameter): merged for parameter in base.parameters(recurse=False)}
    return found


def _walk(name: str, module: nn.Module, *, inside: bool) -> Iterator[tuple[str, bool]]:
    """Yield the name of every module below this one, and whether it belongs to an adapter."""
    is_own = is_peft(module)
    yield name, inside or is_own
    for own, child in module._modules.items():
        if child is not None:
            given = is_own and own in _GIVEN
            yield from _walk(f"{name}.{own}" if name else own, child, inside=(inside or is_own) and not given)
