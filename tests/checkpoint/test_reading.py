"""What others wrote is read, or refused in one line that says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emp_callbacks.checkpoint.reading import callback_states, read_checkpoint, state_dict_in

STATE = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(3, 2)}


def refused(match, work, *args, kind=ValueError):
    with pytest.raises(kind, match=match) as raised:
        work(*args)
    assert "\n" not in str(raised.value)
    return raised.value


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(STATE, path)

    def denied(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    error = refused("Permission denied", read_checkpoint, path, kind=PermissionError)
    assert error.filename == str(path)


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(STATE, path)

    def gone(*_, **__):
        raise FileNotFoundError("No such file or directory: weights.safetensors")  # safetensors': without a filename

    monkeypatch.setattr("safetensors.safe_open", gone)
    refused(r"weights.safetensors is damaged .*\(No such file", read_checkpoint, path)


@pytest.fixture
def sharded(tmp_path):
    save_file(STATE, tmp_path / "model-1.safetensors")
    save_file({"c.weight": torch.ones(2)}, tmp_path / "model-2.safetensors")
    files = {**dict.fromkeys(STATE, "model-1.safetensors"), "c.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_shards_are_read_as_one(sharded):
    assert {name: value.shape for name, value in read_checkpoint(sharded).items()} == {
        **{name: value.shape for name, value in STATE.items()},
        "c.weight": (2,),
    }


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-2.safetensors").unlink()
    match = r"model-2.safetensors is missing, which model.safetensors.index.json names"
    refused(match, read_checkpoint, sharded, kind=FileNotFoundError)


def test_a_shard_that_may_not_be_read_is_named(sharded, monkeypatch):
    opens = Path.open

    def denied(self, *args, **settings):
        if self.name == "model-2.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opens(self, *args, **settings)

    monkeypatch.setattr(Path, "open", denied)
    error = refused("Permission denied", read_checkpoint, sharded, kind=PermissionError)
    assert error.filename == str(sharded / "model-2.safetensors")


def test_a_tensor_that_no_shard_holds_is_named(sharded):
    save_file({"d.weight": torch.ones(2)}, sharded / "model-2.safetensors")
    refused(r"the index of .* says that c.weight is in model-2.safetensors, and it is not", read_checkpoint, sharded)


@pytest.mark.parametrize("shards", [False, True])
def test_pytorchs_own_files_are_read_and_what_is_one_stays_one(shards, tmp_path):
    state = {**STATE, "tied.weight": STATE["a.weight"]}
    if shards:
        torch.save(state, tmp_path / "pytorch_model-1.bin")
        torch.save({"c.weight": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
        files = {**dict.fromkeys(state, "pytorch_model-1.bin"), "c.weight": "pytorch_model-2.bin"}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    held = read_checkpoint(tmp_path)
    assert {*held} == {*state, *(["c.weight"] if shards else [])}
    assert held["tied.weight"].data_ptr() == held["a.weight"].data_ptr() != held["b.weight"].data_ptr()


@pytest.mark.parametrize(
    "text",
    [
        *("not json", "[1]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'),
        *('{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "../x.safetensors"}}', "[" * 9999, "\udcff"),
    ],
)
def test_an_index_that_is_none_is_refused(text, sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    refused(r"index.json is no index of files with weights \(.+\); copy the folder again", read_checkpoint, sharded)


@pytest.mark.parametrize("tied", ["no json", "[1]", '"a"', '{"a.weight": 3}', '{"a.weight": ["b.weight"]}'])
def test_ties_that_cannot_be_read_are_refused(tied, tmp_path):
    save_file(STATE, tmp_path / "tied.safetensors", {"emp_tied": tied})
    refused("does not say which tensors are one", read_checkpoint, tmp_path / "tied.safetensors")


# ---- what they hold -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*(nested|quantize|deprecated)")
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda: torch.ones(2, 2).to(torch.float8_e4m3fn), "w is of torch.float8_e4m3fn, which cannot be scored"),
        (lambda: torch.ones(2, 2).to_sparse(), r"w is a sparse tensor \(torch.sparse_coo\)"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), r"w is a sparse tensor \(torch.sparse_csr\)"),
        (lambda: torch.empty(2, 2, device="meta"), r"w is a tensor without values \(device meta\)"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "w is a nested tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), r"w is quantized \(torch.qint8\)"),
    ],
)
def test_tensors_that_cannot_be_scored_are_named(value, match):
    refused(match, state_dict_in, {"state_dict": {**STATE, "w": value()}}, "x.pt")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]
)
def test_plain_tensors_of_every_other_kind_are_read(dtype):
    state = {**STATE, "w": torch.ones(2).to(dtype)}
    assert state_dict_in({"model": state, "epoch": 3}, "x.pt").keys() == state.keys()


def test_names_must_be_words():
    refused(r"x.pt names a tensor 7; names of weights are words", state_dict_in, {7: torch.ones(2)}, "x.pt")


@pytest.mark.parametrize("callbacks", [[1], "EMPCallback", 3])
def test_callbacks_that_are_no_states_by_name_are_refused(callbacks):
    refused(f"callbacks are {type(callbacks).__name__}, not states", callback_states, {"callbacks": callbacks})


@pytest.mark.parametrize(
    "state", [{"masks": [1]}, {"masks": {"a": 1}}, {"shapes": 3}, {"shapes": ["a"]}, {"trajectory": 3}], ids=str
)
def test_a_callbacks_state_of_other_types_is_refused(state):
    refused(r"the state of EMPCallback\{a\} is damaged", callback_states, {"callbacks": {"EMPCallback{a}": state}})


def test_states_of_other_callbacks_and_of_none_are_no_matter():
    held = {"shapes": {"a.weight": [2, 3]}, "masks": {"a.weight": torch.zeros(1, dtype=torch.uint8)}}
    for callbacks in (None, {}, {"Timer": 3}):
        assert callback_states({"callbacks": callbacks}) == []
    assert callback_states({"callbacks": {"Timer": 3, "EMPCallback{a}": held}}) == [held]
    assert callback_states([1]) == []
