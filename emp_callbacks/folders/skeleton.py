"""The model that a folder is of, without its weights: modules whose parameters come and go."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.checkpoint.file_formats import refuse_quantized
from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.extras import needs
from emp_callbacks.folders.names import FileNames
from emp_callbacks.targets.names import few

__all__ = ["Skeleton", "configuration_of"]

_UNCOLLECTED = 1 << 24  # bytes of weights that were let go of; to look for them takes a quarter of a second


class Skeleton:
    """A transformers model whose parameters are on no device until they are loaded, in evaluation mode.

    Buffers that no file holds have their values. Parameters are loaded in the dtype of most values of the files.

    Args:
        folder: A Hugging Face folder.
        dtype: In which the model computes; None: its own.
        device: On which it computes.

    Attributes:
        model: The model.
        config: Its configuration.
        files: The folder's tensors.
        names: How parameters and tensors belong together.
        dtype: In which the model computes.
        unused: Tensors of the files that are no part of the model.
        own_names: Empty parameter -> the one of its names under which the files hold it.

    Raises:
        ImportError: transformers or accelerate is not installed.
        OSError: A file is missing.
        ValueError: The folder is damaged, its weights are quantized, need code, or lack some of the model's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        needs(f"building the model of {folder}", "hf", "transformers", "accelerate")
        self.folder, self.device = folder, device or torch.device("cpu")
        self.config = configuration_of(folder)
        self.files = FolderFiles(folder)
        self.dtype = dtype or self.files.dtype
        self.model = _empty_model(folder, self.config, self.dtype)
        takes = inspect.signature(self.model.forward).parameters
        self._without_cache = {"use_cache": False} if "use_cache" in takes else {}
        self.names = FileNames(self.model, self.files.names)
        self.unused = self.names.unused
        self._let_go = 0
        self._empty = {
            (module, name): parameter
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self.own_names = self._names_with_sources()
        for name, buffer in self.model.named_buffers():
            if self.names.of(name):
                buffer.copy_(self.names.assemble(name, self.files.read))
        for owner in self.model.modules():
            owner._buffers.update({k: v.to(self.device) for k, v in owner._buffers.items() if v is not None})

    def _names_with_sources(self) -> dict[nn.Parameter, str]:
        """Return, for each parameter, the one of its names under which the files hold it."""
        known: dict[nn.Parameter, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self.names.of(name):
                known.setdefault(parameter, name)
        missing = [name for name, parameter in self.model.named_parameters() if parameter not in known]
        if missing:
            raise ValueError(
                f"{self.folder} holds no {few(missing)} of a {type(self.model).__name__}; copy the folder again, or "
                "name the right architecture in its config.json"
            )
        return known

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return the value of a parameter, as the model holds it while empty, in memory of its own."""
        return self._value(self.own_names[parameter])

    def empty_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the empty parameters of a module, each once, by their names in it."""
        found: dict[nn.Parameter, str] = {}
        for prefix, owner in module.named_modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    found.setdefault(self._empty[owner, name], f"{prefix}.{name}" if prefix else name)
        return {name: parameter for parameter, name in found.items()}

    def outside(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return the modules of the model that are neither among some nor in them."""
        held = {owner for module in modules for owner in module.modules()}
        return [owner for owner in self.model.modules() if owner not in held]

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block the parameters of some modules, and of all in them, have their values."""
        owners = [owner for module in modules for owner in module.modules()]
        self.load(owners)
        try:
            yield
        finally:
            self.unload(owners)

    def call(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return what the model returns for one sample; it keeps no keys and values for a next one."""
        given = {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }
        return self.model(**given, **self._without_cache)

    def load(self, owners: Iterable[nn.Module]) -> None:
        """Give the parameters that modules hold themselves their values; what is one parameter stays one."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for owner in owners:
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                empty = self._empty[owner, name]
                if empty not in made:
                    made[empty] = nn.Parameter(self._value(self.own_names[empty]), requires_grad=empty.requires_grad)
                owner._parameters[name] = made[empty]

    def unload(self, owners: Iterable[nn.Module]) -> None:
        """Let go of the values of the parameters that modules hold themselves."""
        for owner in owners:
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    self._let_go += 0 if parameter.is_meta else parameter.nbytes
                    owner._parameters[name] = self._empty[owner, name]
        # Pruners and traced forwards hold weights in circles: uncollected, those of many blocks would be in memory.
        if self._let_go > _UNCOLLECTED:
            gc.collect()
            self._let_go = 0

    def _value(self, name: str) -> Tensor:
        value = self.names.assemble(name, self.files.read)
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)


def configuration_of(folder: Path) -> Any:
    """Return the configuration of a folder's model; weights that cannot be pruned are refused."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which says what model its weights are of; copy it too")
    refuse_quantized(folder)
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the folder again") from error
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration that does not fit is met anywhere
        raise ValueError(f"transformers does not know the model of {folder}: {error}") from error


def _empty_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return the model with parameters on no device; buffers are real."""
    import transformers
    from accelerate import init_empty_weights

    names = config.architectures or []
    auto: Any = transformers.AutoModel
    kind: Any = getattr(transformers, names[0], None) if names else auto
    if kind is None:
        raise ValueError(f"transformers {transformers.__version__} has no {names[0]}, which {folder} is of; update it")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False), _no_random_weights():
            model: Any = kind.from_config(config) if kind is auto else kind(config)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"transformers could not build the model of {folder}: {error}") from error
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # making the parameters empty has untied them
    return model.eval()


def _no_random_weights() -> Any:
    """Return transformers' own block in which no weight is drawn: they would be replaced, and take minutes."""
    try:
        home: Any = import_module("transformers.initialization")
    except ImportError:  # before transformers 5
        home = import_module("transformers.modeling_utils")
    return home.no_init_weights()
