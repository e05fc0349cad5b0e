"""Which tensors of a folder's files a parameter of the model is made from, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from emp_callbacks.targets.names import few

__all__ = ["FileNames"]


class _Source(NamedTuple):
    """A tensor of the files, and the pattern of the conversion that takes it; None where it is taken as it is."""

    name: str
    pattern: str | None


class FileNames:
    """How the names of a transformers model and of its files belong together, as `from_pretrained` has it.

    transformers renames (`gamma` is `weight`, a base model's names lack its prefix) and converts (experts that the
    files hold one by one are one parameter): its own rules are asked.

    Args:
        model: The model, on whatever device.
        names: Of the tensors in the files.

    Attributes:
        unused: Tensors of the files that no parameter or buffer of the model is made from.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self._model = model
        self._transforms, rename = _rules(model)
        self._sources: dict[str, list[_Source]] = {}
        self.unused: list[str] = []
        state = model.state_dict()
        for name in names:
            own, pattern = rename(name, state)
            if own in state:
                self._sources.setdefault(own, []).append(_Source(name, pattern))
            else:
                self.unused.append(name)

    def of(self, parameter: str) -> tuple[str, ...]:
        """Return the names of the tensors that a parameter or buffer is made from; empty where there are none."""
        return tuple(source.name for source in self._sources.get(parameter, ()))

    def assemble(self, parameter: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return the value of a parameter or buffer from what the files hold.

        Args:
            parameter: A name of the model that has sources.
            read: Gives a tensor of the files.
        """
        sources = self._sources[parameter]
        if sources[0].pattern is None:
            return read(sources[0].name)
        converter = copy.deepcopy(self._converter(sources[0].pattern))
        for source in sources:
            converter.add_tensor(parameter, source.name, source.pattern, read(source.name))
        made = converter.convert(parameter, model=self._model, config=self._model.config)
        value: Tensor | list[Tensor] = made[parameter]
        return value[0] if isinstance(value, list) else value

    def split(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """Return what the files hold of a parameter's value: name -> tensor, the inverse of `assemble`.

        Raises:
            NotImplementedError: transformers cannot write the parameter under the names that were read.
        """
        sources = self._sources[parameter]
        if sources[0].pattern is None:
            return {sources[0].name: value}
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = self._transforms
        made: dict[str, Tensor] = revert_weight_conversion(self._model, {parameter: value})
        if {*made} != {source.name for source in sources}:
            raise NotImplementedError(
                f"{parameter} is made from {few([source.name for source in sources])}, and transformers would write it "
                f"as {few([*made])}; load the folder with transformers, save it again, and prune that"
            )
        return made

    def _converter(self, pattern: str) -> Any:
        return next(one for one in self._transforms if pattern in one.source_patterns and hasattr(one, "operations"))


Rename = Callable[[str, dict[str, Tensor]], tuple[str, str | None]]


def _rules(model: Any) -> tuple[list[Any], Rename]:
    """Return transformers' conversions for a model, and what gives a tensor's name in it and its conversion."""
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5, which converts nothing
        return [], lambda name, state: (_known(model, name, state), None)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def rename(name: str, state: dict[str, Tensor]) -> tuple[str, str | None]:
        own, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if own not in state and name in state:  # as transformers does: it should not have been renamed
            own, pattern = rename_source_key(name, [], [], prefix, state)
        return own, pattern

    return transforms, rename


def _known(model: Any, name: str, state: dict[str, Tensor]) -> str:
    """Return a tensor's name in a model of transformers 4, which may have, or lack, the prefix of its base model."""
    fixed: str | tuple[str, bool] = model._fix_state_dict_key_on_load(name)
    own = fixed if isinstance(fixed, str) else fixed[0]
    prefix = model.base_model_prefix
    tried = (own, f"{prefix}.{own}", own.removeprefix(f"{prefix}."))
    return next((one for one in tried if one in state), name)
