"""Files and folders of others are told by what is in them, each in one line with a remedy."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emp_callbacks.checkpoint.file_formats import SAFETENSORS, file_format, refuse_quantized
from emp_callbacks.checkpoint.reading import read_checkpoint

STATE = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(3, 2)}
ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
TABLE_END = struct.pack("<Q", 0xDB4775248B80FB57)  # of TensorFlow's index


def field(number, value):
    """Return a field of a protobuf that has a length."""
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes([len(value)]) + value


def written(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(*names):
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, "x")

    return written(write)


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"))


def scripted(file):
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(4, 3))), file)


def exported(file):
    torch.export.save(torch.export.export(nn.Linear(4, 3), (torch.ones(1, 4),)), file)


def old_protocol_4(file):
    torch.save(STATE, file, _use_new_zipfile_serialization=False, pickle_protocol=4)


BLOB = field(5, b"\0\0\x80\x3f")
LAYER = field(1, b"conv1") + field(2, b"Convolution") + field(7, BLOB)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()

FOREIGN = {
    "keras.h5": (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "HDF5.*from_tf=True"),
    "net.onnx": (b"\x08\x0d" + field(2, b"pytorch") + field(7, b"graph"), "an ONNX model; name the PyTorch model"),
    "net.caffemodel": (field(1, b"CaffeNet") + field(100, LAYER), "a model of Caffe; read it there"),
    "old.caffemodel": (field(1, b"CaffeNet") + field(2, field(4, b"conv1") + field(6, BLOB)), "a model of Caffe"),
    "saved_model.pb": (b"\x08\x01" + field(2, field(1, field(4, b"serve"))), "a SavedModel of TensorFlow"),
    "frozen.pb": (field(1, field(1, b"w") + field(2, b"Const")), "a graph of TensorFlow"),
    "model.ckpt.index": (b"\0\0\x08\x01" + b"x" * 40 + TABLE_END, "the index of a checkpoint of TensorFlow"),
    "model.ckpt.data-00000-of-00001": (ARRAY.tobytes(), "the values of a checkpoint of TensorFlow"),
    "flax_model.msgpack": (b"\x81\xa6params\x81\xa5dense\x81\xa6kernel\xc7", "Flax, in msgpack; .*from_flax=True"),
    "m.gguf": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "a GGUF or GGML file of llama.cpp"),
    "model.bin": (struct.pack("<IH", 6, 12) + b"WhisperSpec\0" + struct.pack("<I", 3), "a model of CTranslate2"),
    "net.tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite model"),
    "w.npy": (written(lambda file: np.save(file, ARRAY)), "a NumPy array; save its arrays by name"),
    "w.npz": (written(lambda file: np.savez(file, a=ARRAY)), "an archive of NumPy arrays"),
    "arrays.pkl": (pickle.dumps({"a": ARRAY}), "a plain pickle, and emp never runs code"),
    "list.pt": (pickle.dumps([1, 2], protocol=2), "a plain pickle"),
    "ordered.pth": (pickle.dumps(OrderedDict(a=1), protocol=5), "a plain pickle"),
    "script.pt": (scripted, r"TorchScript, a program; torch.save what torch.jit.load"),
    "program.pt2": (exported, r"a program of torch.export; torch.save what torch.export.load"),
    "model.keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "a Keras model"),
    "a.zip": (zipped("a.txt"), "a zip archive without weights"),
    "model.nemo": (written(tarred), "a tar archive; unpack it"),
    "model.tar.gz": (b"\x1f\x8b\x08\0", "compressed; unpack it first"),
    "page.safetensors": (
        b"\n<!DOCTYPE html>\n<html><title>404</title>",
        "a web page",
    ),
    "denied.bin": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML, as a download that failed leaves"),
    "lfs.safetensors": (LFS, "a pointer of Git LFS, not the weights; fetch them with git lfs pull"),
    "pytorch_model.bin": (LFS, "a pointer of Git LFS"),
    "empty.safetensors": (b"", "empty; copy or save it again"),
    "zeros.pt": (bytes(5000), "full of zeros"),
    "model.safetensors.index.json": (INDEX, "the index of a folder's shards; name the folder itself"),
    "pytorch_model.bin.index.json": (INDEX, "the index of a folder's shards; name the folder itself"),
    "config.json": (b'{\n "model_type": "gpt2"}', "JSON, which holds no weights"),
    "recipe.yaml": (b"model:\n  a: 1\n", "text, which holds no weights"),
    "zip.safetensors": (
        written(lambda file: torch.save(STATE, file)),
        "a file of PyTorch's by the name of safetensors",
    ),
    "protocol_4.pt": (old_protocol_4, "a plain pickle"),
    "noise.bin": (b"\xaa\x10\xa5\xb3\xc6\x70\x31\x09", "damaged, or no file of PyTorch's or safetensors: it begins"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_named_with_a_remedy(name, tmp_path):
    content, says = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(written(content) if callable(content) else content)
    with pytest.raises(ValueError, match=rf"{name} is {says}") as caught:
        read_checkpoint(path)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "weights"])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_weights_are_read_whatever_the_file_is_called(form, name, tmp_path):
    path = tmp_path / name
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    assert (file_format(path) == SAFETENSORS) == (form == "safetensors")
    assert {name: value.tolist() for name, value in read_checkpoint(path).items()} == {
        name: value.tolist() for name, value in STATE.items()
    }


def test_a_pipe_is_not_waited_for(tmp_path):
    with pytest.raises(ValueError, match="is no file on a disk"):
        read_checkpoint(Path("/dev/null"))


FOLDERS = {
    "variant": (["config.json", "model.fp16.safetensors"], "a variant of the weights alone.*name that file"),
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "an adapter of PEFT's alone; .*merge_and_unload",
    ),
    "tensorflow": (["config.json", "tf_model.h5"], "holds the weights of TensorFlow alone; .*from_tf"),
    "flax": (["config.json", "flax_model.msgpack"], "holds the weights of Flax alone; .*from_flax"),
    "saved model": (["saved_model.pb", "variables"], "is a SavedModel of TensorFlow"),
    "checkpoint": (["checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"], "a checkpoint of TensorFlow"),
    "ctranslate2": (["config.json", "model.bin", "vocabulary.json"], "is a model of CTranslate2"),
    "onnx": (["config.json", "model.onnx"], "holds an ONNX model"),
    "gguf": (["model-q4.gguf"], "holds a GGUF file"),
    "deepspeed": (["global_step7", "latest", "zero_to_fp32.py"], "a checkpoint of DeepSpeed; python zero_to_fp32.py"),
    "distributed": ([".metadata", "__0_0.distcp"], "a distributed checkpoint of PyTorch; .*dcp_to_torch"),
    "cache": (["blobs", "refs", "snapshots"], "is a folder of the hub's cache; name the one below its snapshots"),
    "other names": (["config.json", "consolidated.00.pth"], "weights by other names; name one of its files"),
    "nothing": (["config.json"], "neither model.safetensors nor pytorch_model.bin"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_weights_says_what_it_holds(kind, tmp_path):
    names, says = FOLDERS[kind]
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=says) as caught:
        read_checkpoint(tmp_path)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quantized_folder_is_refused_before_it_is_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    told = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"weights quantized by gptq \(quantization_config.*save model.dequantize"):
        read_checkpoint(tmp_path)
    for plain in ({"quantization_config": None}, {}, ["quantization_config"]):
        (tmp_path / "config.json").write_text(json.dumps(plain))
        refuse_quantized(tmp_path)
    assert read_checkpoint(tmp_path).keys() == STATE.keys()
