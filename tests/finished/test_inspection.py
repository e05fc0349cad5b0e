import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.cli.main import main
from emp_callbacks.finished.inspection import inspect_model, load_model
from emp_callbacks.finished.streamed_model import stream_model
from tests.targets.mixtures import language_model, needs_stacked_experts

# N_eff by hand: (3 + 1)^2 / (9 + 1) = 1.6 and 3; together (4 + 6)^2 / (10 + 12) = 100 / 22.
STATE = {
    "first.weight": torch.tensor([[3.0, 1.0, 0.0, 0.0]]),
    "first.bias": torch.tensor([9.0]),
    "second.weight": torch.tensor([[2.0], [-2.0], [2.0]]),
    "wte.weight": torch.ones(5, 2),
    "norm1.weight": torch.ones(2, 2),
    "steps": torch.tensor(3),
}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(STATE, path)
    return path


def rows_of(path, **settings):
    """Return the rows of a file or folder that is read tensor by tensor, seen to be those of all of it in memory."""
    loaded, streamed = load_model(str(path)), stream_model(str(path))
    include = loaded.include
    if streamed.include and include is None:  # a language model, whose output embedding is left out
        assert "the output embedding" in streamed.notes[0]
        include = streamed.include
    else:
        assert (streamed.include, streamed.notes) == (include, loaded.notes)
    rows = inspect_model(streamed.module, **{"include": streamed.include, **settings}, read=streamed.read)
    assert rows == inspect_model(loaded.module, **{"include": include, **settings})
    return {row.name: row for row in rows}


def test_global_scope_by_hand(checkpoint):
    rows = rows_of(checkpoint)
    assert list(rows) == ["first.weight", "second.weight", "all"]
    total = rows["all"]
    assert (total.n, total.keep) == (7, 4)
    assert total.n_eff == pytest.approx(100 / 22)
    assert total.n_eff_fraction == pytest.approx(100 / 22 / 7)
    assert total.density == pytest.approx(5 / 7)
    assert total.preserved_mass == pytest.approx(9 / 10)
    assert total.mass_bound == pytest.approx(4 / 7 + 3 / 7 * (2 / (5 * 6)) ** 0.5)
    assert [(rows[n].keep, rows[n].n_eff) for n in list(rows)[:2]] == [(1, 1.6), (3, 3.0)]


def test_tensor_scope_by_hand(checkpoint):
    rows = rows_of(checkpoint, scope="tensor", beta=2.0)
    assert rows["first.weight"].keep == 2  # floor(3.2) = 3, but only two are not zero
    assert rows["first.weight"].preserved_mass == 1.0
    assert rows["second.weight"].keep == 3
    assert rows["all"].n_eff == pytest.approx(4.6)
    assert rows["all"].mass_bound is None


def test_row_scope_by_hand(checkpoint):
    rows = rows_of(checkpoint, scope="row")
    assert rows["second.weight"].keep == 3
    assert rows["second.weight"].n_eff == pytest.approx(3.0)
    assert rows["first.weight"].shape == (1, 4)


def test_the_file_is_not_changed_and_signs_do_not_matter(checkpoint):
    before = checkpoint.read_bytes()
    rows_of(checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_model_and_its_bare_state_dict_agree(tmp_path):
    loaded = load_model("timm:resnet10t")
    assert any("randomly initialised" in note for note in loaded.notes)
    torch.save(loaded.module.state_dict(), tmp_path / "resnet.pth")
    rows = inspect_model(loaded.module)
    assert list(rows_of(tmp_path / "resnet.pth").values()) == rows
    assert rows[-1].keep == int(rows[-1].n_eff)


def test_tied_weights_count_once_and_heads_tied_to_embeddings_not_at_all(tmp_path):
    shared, tied = torch.randn(3, 3), torch.randn(4, 3)
    state = {"a.weight": shared, "b.weight": shared, "embed_tokens.weight": tied, "lm_head.weight": tied}
    torch.save(state, tmp_path / "tied.pt")
    assert list(rows_of(tmp_path / "tied.pt")) == ["a.weight", "all"]


def test_ties_in_a_file_that_emp_wrote_are_ties_again(tmp_path):
    tied = torch.randn(4, 3)
    state = {"embed_tokens.weight": tied, "a.weight": torch.randn(3, 3), "lm_head.weight": tied.clone()}
    file = tmp_path / "exported.safetensors"
    save_file(state, file)
    assert list(rows_of(file)) == ["a.weight", "lm_head.weight", "all"]
    save_file(state, file, {"emp_tied": json.dumps({"lm_head.weight": "embed_tokens.weight"})})
    assert list(rows_of(file)) == ["a.weight", "all"]
    loaded = load_model(str(file)).module
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_several_callbacks_name_the_weights_of_all(tmp_path):
    states = {
        "EMPCallback{a}": {"target": "weights", "shapes": {"second.weight": [3, 1]}, "masks": {}},
        "EMPCallback{b}": {"target": "heads", "shapes": {"attn": [2], "first.weight": [1, 4]}, "masks": {}},
        "EMPCallback{c}": {"target": "weights", "shapes": {"wte.weight": [5, 2]}, "masks": {}},
    }
    torch.save({"state_dict": STATE, "callbacks": states}, tmp_path / "run.ckpt")
    assert load_model(str(tmp_path / "run.ckpt")).include == ["second.weight", "wte.weight"]


def test_patch_embeddings_are_convolutions_and_odd_names_work(tmp_path):
    state = {"patch_embed.proj.weight": torch.randn(2, 1, 2, 2), "type.weight": torch.randn(2, 2)}
    torch.save({"state_dict": state}, tmp_path / "odd.ckpt")
    assert list(rows_of(tmp_path / "odd.ckpt")) == ["patch_embed.proj.weight", "type.weight", "all"]


def test_callback_state_names_the_weights(tmp_path):
    callbacks = {"EMPCallback{target=weights}": {"shapes": {"wte.weight": [5, 2]}, "masks": {}}}
    torch.save({"state_dict": STATE, "callbacks": callbacks}, tmp_path / "run.ckpt")
    loaded = load_model(str(tmp_path / "run.ckpt"))
    assert (loaded.include, loaded.notes) == (["wte.weight"], [])


def test_safetensors_file_folder_and_shards(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    expected = rows_of(tmp_path / "model.safetensors")
    assert rows_of(tmp_path) == expected
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = list(STATE)
    parts = {"1.safetensors": names[:2], "2.safetensors": names[2:]}
    for file, held in parts.items():
        save_file({name: STATE[name] for name in held}, sharded / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert rows_of(sharded)["all"] == expected["all"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_a_clear_error(suffix, tmp_path, capsys):
    whole = tmp_path / f"whole{suffix}"
    save_file(STATE, whole) if suffix == ".safetensors" else torch.save(STATE, whole)
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(whole.read_bytes()[:-200])
    assert main(["inspect", str(broken)]) == 2
    message = capsys.readouterr().err
    assert "is damaged" in message
    assert message.count("\n") == 1


def test_code_in_a_file_never_runs(tmp_path, capsys):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert main(["inspect", str(tmp_path / "module.pt")]) == 2
    assert "never runs code from a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timm:resnet10tt"], "nearest names: resnet10t"),
        (["nothing.pt"], "does not exist"),
        (["timm:resnet10t", "--beta", "-1"], "beta must be"),
        (["timm:resnet10t", "--include", "blocks.*"], "matches no parameter"),
    ],
)
def test_mistakes_are_explained(words, message, capsys):
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_table_and_the_json_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["inspect", str(checkpoint), "--exclude", "second*", "--json", str(file)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "told apart by their names" in shown
    written = json.loads(file.read_text())
    assert [row["name"] for row in written["tensors"]] == ["first.weight", "all"]
    assert written["tensors"][0]["n_eff"] == 1.6


FAMILIES = {
    "timm": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1, 1, 1)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)),
    "t5": lambda: transformers.T5Model(transformers.T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)),
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
    ),
    "mixture": lambda: language_model("GptOss"),
    "normed": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    ),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[needs_stacked_experts] * (name == "mixture")) for name in FAMILIES]
)
def test_a_file_and_its_model_choose_the_same_weights(family, tmp_path):
    model = FAMILIES[family]()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert {*rows_of(tmp_path / "model.pt")} - {"all"} == {*EMPPruner(model).masks}


@needs_stacked_experts
def test_a_hugging_face_folder_is_the_model_that_it_is_of(tmp_path):
    model = language_model("Mixtral")
    model.save_pretrained(tmp_path)  # in another form: one tensor for each expert
    rows = rows_of(tmp_path)
    assert {*rows} - {"all"} == {*EMPPruner(model, exclude=["lm_head.weight"]).masks}  # as where it is pruned once
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 96, 32)
    told = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(told.replace('"mixtral"', '"nobody_knows"'))
    loaded = load_model(str(tmp_path))
    assert loaded.include is not None
    assert "could not load" in loaded.notes[0]
    assert "told apart by their names" in loaded.notes[0]
