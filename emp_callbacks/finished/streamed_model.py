"""What `emp inspect` looks at: the structure of a model, and its weights one at a time from where they are."""

from __future__ import annotations

import math
from glob import escape
from pathlib import Path
from typing import NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from emp_callbacks.checkpoint.file_formats import SAFETENSORS, file_format, refuse_quantized
from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.checkpoint.reading import (
    TIED_KEY,
    as_module,
    callback_states,
    read_checkpoint,
    tied_names,
)
from emp_callbacks.checkpoint.state_dicts import find_weights
from emp_callbacks.finished.inspection import Read, chosen_by_name, load_model
from emp_callbacks.finished.transformers_folder import can_be_built, is_of_timm
from emp_callbacks.folders.plan import without_output_embedding
from emp_callbacks.folders.skeleton import Skeleton
from emp_callbacks.targets.names import few
from emp_callbacks.targets.weights import prunable_weights

__all__ = ["StreamedModel", "stream_model"]


class StreamedModel(NamedTuple):
    """Weights to inspect.

    Attributes:
        module: Has their names and shapes; the values of its parameters are not to be looked at.
        include: The names to look at; None: the rule of training.
        notes: What a reader must know.
        read: Returns the values of a parameter of `module`.
    """

    module: nn.Module
    include: list[str] | None
    notes: list[str]
    read: Read


def stream_model(source: str, *, pretrained: bool = False) -> StreamedModel:
    """Return the weights behind `source`: a checkpoint file, a Hugging Face folder, or timm:NAME.

    Of files in the safetensors format, and in PyTorch's since 1.6, one tensor is in memory at a time; a folder of
    timm's is loaded. Files are read as tensors only; code in them never runs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds no weights or needs code, or timm has no such model.
    """
    if source.startswith("timm:") or pretrained:
        loaded = load_model(source, pretrained=pretrained)
        return StreamedModel(*loaded, read=nn.Parameter.detach)
    path, why = Path(source), list[str]()
    refuse_quantized(path)
    if can_be_built(source):
        try:
            if is_of_timm(path):
                return StreamedModel(*load_model(source), read=nn.Parameter.detach)
            skeleton = Skeleton(path)
        except ValueError as error:
            why = [str(error)]
        else:
            targets, notes = without_output_embedding(skeleton.model, prunable_weights(skeleton.model))
            include = [escape(target.name) for target in targets] if notes else None
            return StreamedModel(skeleton.model, include, [*_left_over(skeleton), *notes], skeleton.read)
    if path.is_dir() or (path.is_file() and file_format(path) == SAFETENSORS):
        return _of_files(path, why)
    return _of_checkpoint(path)


def _left_over(skeleton: Skeleton) -> list[str]:
    """Return what is to be told of matrices in the files that the model of their configuration does not have."""
    names = [name for name in skeleton.unused if len(skeleton.files.infos[name].shape) > 1]
    kind = type(skeleton.model).__name__
    return [f"left out: {few(names)}, which the folder holds and a {kind} does not have"] if names else []


def _of_files(path: Path, why: list[str]) -> StreamedModel:
    """Return what a folder or a safetensors file holds, with parameters of NaN that take no memory."""
    refuse_quantized(path)
    files = FolderFiles(path)
    tied = tied_names(files.metadata.get(TIED_KEY, "{}"), path)
    # As the safetensors library has them, whatever their order in the file.
    names = (
        sorted(files.names, key=lambda name: (files.infos[name].file, name)) if files.is_safetensors else files.names
    )
    own = {name: other if (other := tied.get(name, name)) in files.infos else name for name in names}
    blank = {name: torch.tensor(math.nan).to(info.dtype).expand(info.shape) for name, info in files.infos.items()}
    state, found = find_weights({name: blank[other] for name, other in own.items()}, str(path))
    module = as_module(state)
    include, told = chosen_by_name(state, str(path), notes=why)
    name_of = {id(parameter): own[name] for name, parameter in module.named_parameters()}
    return StreamedModel(module, include, [*found, *told], lambda parameter: files.read(name_of[id(parameter)]))


def _of_checkpoint(path: Path) -> StreamedModel:
    """Return what a file of PyTorch's holds, which is mapped anew at each read: what was read of it is let go of."""
    checkpoint = read_checkpoint(path, mapped=True)
    state, found = find_weights(checkpoint, str(path))
    module = as_module(state)
    include, told = chosen_by_name(state, str(path), callback_states(checkpoint))
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}

    def read(parameter: nn.Parameter) -> Tensor:
        if not is_zipfile(path):  # of before PyTorch 1.6: all of it is in memory
            return parameter.detach()
        return find_weights(read_checkpoint(path, mapped=True), str(path)).tensors[name_of[id(parameter)]]

    return StreamedModel(module, include, [*found, *told], read)
