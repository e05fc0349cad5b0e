"""The weights of a folder, one tensor at a time."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from emp_callbacks.checkpoint.folder_files import FolderFiles, is_weights_folder

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(4, 2, dtype=torch.bfloat16),
    "c": torch.arange(7),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


def single(folder):
    save_file(TENSORS, folder / "model.safetensors", {"format": "pt"})


def shards(folder, save=save_file, first="model", suffix="safetensors"):
    weight_map, names = {}, list(TENSORS)
    for i, part in enumerate((names[:2], names[2:])):
        file = f"{first}-{i + 1:05d}-of-00002.{suffix}"
        save({name: TENSORS[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{first}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


WAYS = {
    "safetensors": single,
    "shards": shards,
    "bin": lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin"),
    "old bin": lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "bin shards": lambda folder: shards(folder, torch.save, "pytorch_model", "bin"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_is_read_as_it_was_written(way, tmp_path):
    WAYS[way](tmp_path)
    files = FolderFiles(tmp_path)
    assert {*files.names} == {*TENSORS}
    for name, value in TENSORS.items():
        info = files.infos[name]
        assert (info.dtype, info.shape, info.nbytes) == (value.dtype, tuple(value.shape), value.nbytes)
        assert_close(files.read(name), value, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_is_memory_of_its_own(way, tmp_path):
    WAYS[way](tmp_path)
    files = FolderFiles(tmp_path)
    files.read("a.weight").zero_()
    assert_close(files.read("a.weight"), TENSORS["a.weight"], rtol=0, atol=0)


def test_a_folder_of_weights_is_known(tmp_path):
    assert not is_weights_folder(tmp_path)
    shards(tmp_path)
    assert is_weights_folder(tmp_path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"<html>not found"), "is a web page"),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(
                (f / "model-00001-of-00002.safetensors").read_bytes()[:-9]
            ),
            "cut short",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "no index of files"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"z": "model-00001-of-00002.safetensors"}})
            ),
            "says that z is in",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"z": "../z"}})),
            "names no files of this folder",
        ),
    ],
)
def test_a_damaged_folder_is_refused(harm, says, tmp_path):
    shards(tmp_path)
    harm(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        FolderFiles(tmp_path)
