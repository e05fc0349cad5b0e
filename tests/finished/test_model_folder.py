"""`--out DIR`: a folder that the model's own library loads, and nothing of what was there is lost."""

import inspect
import json
import os

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from emp_callbacks.checkpoint.whole_output import is_folder
from emp_callbacks.cli.main import main
from emp_callbacks.finished.export import Source, export, prune
from emp_callbacks.finished.finished_model import open_model
from emp_callbacks.finished.weights_file import report_lines
from emp_callbacks.shrinking import load_shrunk
from emp_callbacks.study.recipe.parts import RecipeParts

WORDS = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
WHISPER = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
WHISPER |= {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4}
WHISPER |= {"max_source_positions": 8, "max_target_positions": 8, "decoder_start_token_id": 1, "suppress_tokens": None}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None}

GPT2 = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

TOKENS = torch.arange(3, 17).view(2, 7)
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),  # tied
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=4)),  # tied
    "bert": lambda: BertForMaskedLM(BertConfig(**LLAMA)),  # tied
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),  # tied
}
COMPANIONS = {"tokenizer.json": "{}", "merges.txt": "a b", "chat_template.jinja": "{{ x }}", "LICENSE": "free"}


def logits(model):
    reads = {"input_ids": TOKENS}
    if model.config.model_type == "whisper":
        sound = torch.linspace(-1, 1, 2 * 4 * 16).view(2, 4, 16)
        reads = {"input_features": sound, "decoder_input_ids": TOKENS[:, :4]}
    with torch.no_grad():
        return model.eval()(**reads).logits


def scattered(model):
    """Scale every matrix's rows at random, so that scores differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 2 * torch.rand(len(parameter), *[1] * (parameter.dim() - 1), dtype=parameter.dtype)
    return model.eval()


def saved(model, folder):
    """Write a folder as a hub has it, with files that are no weights."""
    model.save_pretrained(folder)
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("dense weights")
    (folder / "training_args.bin").write_text("a pickle")
    return folder


def dense(family):
    torch.manual_seed(0)
    return scattered(FAMILIES[family]())


def pickled(folder, *, shards):
    """Turn a folder's weights into PyTorch's own files, tied tensors under both names."""
    model = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    state = model.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: value for name, value in state.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


# ---- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["weights", "neurons", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_loads_what_was_pruned_in_memory(family, target, tmp_path):
    source = saved(dense(family), tmp_path / "dense")
    settings = {"target": target, "density": 0.5}
    _, report = prune(Source(str(source)), tmp_path / "out", settings)
    model, found = type(dense(family)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    _, file = prune(Source(str(source)), tmp_path / "out.safetensors", settings)
    masked = dense(family)
    masked.load_state_dict(load_file(file.path))
    assert torch.equal(logits(model), logits(masked))
    assert not torch.equal(logits(model), logits(dense(family)))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    assert f"load it with transformers.{type(model).__name__}.from_pretrained(" in "\n".join(report_lines(report))


def test_what_is_no_weights_comes_along_as_it_was(tmp_path):
    source = saved(dense("gpt2"), tmp_path / "dense")
    told = json.loads((source / "config.json").read_text()) | {"of_the_user": [1]}
    (source / "config.json").write_text(json.dumps(told))
    report = export(Source(str(source)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *COMPANIONS,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "1_Pooling",
    }
    for name in (*COMPANIONS, "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text(), name
    assert report.notes == (f"folders in {source} that hold weights were not copied: onnx",)


def test_a_generation_config_that_transformers_refuses_to_save_comes_along(tmp_path):
    source = saved(dense("llama"), tmp_path / "dense")
    odd = json.dumps({"num_beams": 1, "early_stopping": True, "eos_token_id": 2})
    (source / "generation_config.json").write_text(odd)
    export(Source(str(source)), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == odd


@pytest.mark.parametrize("said", ["bfloat16", "float32"])
def test_the_dtype_of_the_files_is_kept(said, tmp_path):
    source = saved(dense("llama").bfloat16(), tmp_path / "dense")
    told = json.loads((source / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in told:
            told[key] = said
    (source / "config.json").write_text(json.dumps(told))
    prune(Source(str(source)), tmp_path / "out", {"target": "heads", "density": 0.5})
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "whisper"])
def test_folders_of_pytorchs_own_files_are_read_as_those_of_safetensors(family, shards, tmp_path):
    source = saved(dense(family), tmp_path / "dense")
    settings = {"target": "neurons", "density": 0.5}
    prune(Source(str(source)), tmp_path / "expected", settings)
    prune(Source(str(pickled(source, shards=shards))), tmp_path / "out", settings)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((tmp_path / "out").glob("*.bin*"))
    models = [type(dense(family)).from_pretrained(tmp_path / name) for name in ("expected", "out")]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_the_metadata_say_what_was_done(tmp_path):
    source = saved(dense("llama"), tmp_path / "dense")
    prune(Source(str(source)), tmp_path / "out", {"target": "heads", "density": 0.5})
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        told = opened.metadata()
    assert (told["format"], told["target"], told["density"]) == ("pt", "heads", "0.5")
    assert told["emp_version"]


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    saves = transformers.PreTrainedModel.save_pretrained
    small = lambda self, folder: saves(self, folder, max_shard_size="10KB")  # noqa: E731
    source = saved(dense("llama"), tmp_path / "dense")
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", small)
    report = export(Source(str(source)), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert (report.path, report.file_bytes) == (tmp_path / "out", sum(file.stat().st_size for file in files))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["emp_version"]
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(dense("llama")))


def test_without_transformers_a_folder_is_pruned_by_names_and_is_one_again(tmp_path, monkeypatch):
    source = saved(dense("llama tied"), tmp_path / "dense")
    monkeypatch.setattr("emp_callbacks.finished.transformers_folder.find_spec", lambda _: None)
    _, report = prune(Source(str(source)), tmp_path / "out", {"density": 0.5})
    monkeypatch.undo()
    assert report.zeros > 0
    model, found = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) > 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_shrunk_model_that_its_configuration_cannot_state_is_not_built_by_accident(tmp_path):
    source = saved(dense("gpt2"), tmp_path / "dense")
    settings = {"target": "heads", "density": 0.5}
    _, report = prune(Source(str(source)), tmp_path / "out", settings, shrink_units=True)
    assert report.loaded_by.startswith("emp_callbacks.load_shrunk(model, ")
    _, masked = prune(Source(str(source)), tmp_path / "masked", settings)
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(
        logits(load_shrunk(model, report.path)), logits(GPT2LMHeadModel.from_pretrained(masked.path.parent))
    )
    with pytest.raises(RuntimeError, match="mismatched"):  # without a config.json: a model of 124 million
        GPT2LMHeadModel.from_pretrained(tmp_path / "out")


def without_architecture(source, name=None):
    told = json.loads((source / "config.json").read_text())
    told["architectures"] = name
    (source / "config.json").write_text(json.dumps(told))
    return Source(str(source))


@pytest.mark.parametrize("name", [None, [], ["pipeline"], ["OfTheUser"], "LlamaForCausalLM", [3]])
def test_a_head_is_not_dropped_where_no_class_is_named(name, tmp_path):
    source = without_architecture(saved(dense("llama"), tmp_path / "dense"), name)
    with pytest.raises(
        ValueError, match=r'LlamaModel of .*, which has no lm_head.weight; name the class .*"architectu'
    ):
        prune(source, tmp_path / "out", {"target": "heads", "density": 0.5})
    _, report = prune(source, tmp_path / "out", {"density": 0.5})  # by names
    assert "which has no lm_head.weight" in report.notes[0]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == dense("llama").state_dict().keys()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_body_without_a_named_class_is_built(tmp_path):
    dense("llama").model.save_pretrained(tmp_path / "dense")
    without_architecture(tmp_path / "dense")
    prune(Source(str(tmp_path / "dense")), tmp_path / "out", {"target": "heads", "density": 0.5})
    assert LlamaModel.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"] in ([], set())


def test_tensors_that_the_named_class_lacks_are_named(tmp_path):
    source = saved(dense("llama"), tmp_path / "dense")
    state = load_file(source / "model.safetensors") | {"extra.weight": torch.ones(3, 3)}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="holds extra.weight, which a LlamaForCausalLM does not have: left out"):
        export(Source(str(source)), tmp_path / "out")


@pytest.mark.parametrize(
    "harm",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"auto_map": {"AutoModel": "code.Model"}, "architectures": None, "model_type": "nobody_knows"},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_one_line(harm, tmp_path):
    source = saved(dense("llama"), tmp_path / "dense")
    told = json.loads((source / "config.json").read_text()) | harm
    (source / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"could not load|quantized by") as caught:
        prune(Source(str(source)), tmp_path / "out", {"target": "heads"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["inspect"], ["export"], ["prune"], ["prune", "--target", "heads"]], ids=" ".join)
def test_every_command_refuses_a_quantized_folder(words, tmp_path, capsys):
    source = saved(dense("llama"), tmp_path / "dense")
    told = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(told))
    capsys.readouterr()
    out = [] if words == ["inspect"] else ["--out", str(tmp_path / "out")]
    assert main([words[0], str(source), *words[1:], *out]) == 2
    message = capsys.readouterr().err
    assert "quantized" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- timm ----------------------------------------------------------------------------------------------------------

loads_local_folders = pytest.mark.skipif(
    "load_state_dict(" not in inspect.getsource(timm.models._hub.load_state_dict_from_path),
    reason=f"timm {timm.__version__} reads safetensors in a local folder as a pickle",
)


@loads_local_folders
def test_timm_loads_what_was_pruned_in_memory(tmp_path):
    torch.manual_seed(0)
    source = Source("timm:test_vit", input_size=(3, 160, 160))
    _, report = prune(source, tmp_path / "vit", {"target": "neurons", "density": 0.5})
    assert report.loaded_by == f"timm.create_model('local-dir:{tmp_path / 'vit'}', pretrained=True)"
    model = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    written = load_file(report.path)
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
    assert report.zeros > 0
    again, more = prune(Source(str(tmp_path / "vit")), tmp_path / "again", {"target": "heads", "density": 0.5})
    assert {*again.masks} == {f"blocks.{block}.attn" for block in range(len(model.blocks))}
    assert more.loaded_by == f"timm.create_model('local-dir:{tmp_path / 'again'}', pretrained=True)"


@loads_local_folders
def test_timm_builds_what_uniform_shrank(tmp_path):
    source = Source("timm:test_vit", input_size=(3, 160, 160))
    settings = {"target": "neurons", "density": 0.5}
    _, report = prune(source, tmp_path / "small", settings, shrink_units=True, uniform=True)
    small = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True)
    assert sum(parameter.numel() for parameter in small.parameters()) == report.shrunk.parameters[1]


# ---- a recipe ------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As a LightningModule holds a model: all names begin with `model.`."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_fits_a_module_that_holds_the_model(family, tmp_path):
    given = dense(family)
    source = saved(given, tmp_path / "dense")  # each tied tensor once, and names that begin with `model.` themselves
    task = Wrapped(FAMILIES[family]())
    recipe = RecipeParts(module=task, data=None, configs=())
    opened = open_model(str(source), recipe=recipe, input_size=(1,))
    assert opened.inner is task.model
    assert torch.equal(logits(task.model), logits(given))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"transformer.wte.weight": None}, "lm_head.weight"),
        ({"transformer.ln_f.weight": None}, "transformer.ln_f.weight"),
        ({"transformer.wte.weight": torch.ones(3, 3)}, "transformer.wte.weight"),
        ({"other.weight": torch.ones(3, 3)}, "other.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(change, says, tmp_path):
    source = saved(dense("gpt2"), tmp_path / "dense")
    state = load_file(source / "model.safetensors") | change
    held = {name: value for name, value in state.items() if value is not None}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    recipe = RecipeParts(module=Wrapped(FAMILIES["gpt2"]()), data=None, configs=())
    with pytest.raises(ValueError, match=rf"does not fit the recipe's Wrapped: .*{says}"):
        open_model(str(source), recipe=recipe)


# ---- where it is written -------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    torch.save({"a.weight": torch.ones(2, 2), "b.weight": torch.randn(3, 2)}, tmp_path / "in.pt")
    return Source(str(tmp_path / "in.pt"))


@pytest.mark.parametrize("name", ["out", "out/", "Llama-3.2-1B", "model.v2", "existing.safetensors"])
def test_all_but_a_name_of_safetensors_is_a_folder(name, weights, tmp_path):
    (tmp_path / "existing.safetensors").mkdir()
    out = f"{tmp_path}/{name}"
    assert is_folder(out)
    report = export(weights, out)
    assert os.listdir(out) == ["model.safetensors"]
    assert report.path.samefile(f"{out}/model.safetensors")
    assert report.file_bytes == report.path.stat().st_size


@pytest.mark.parametrize("name", ["out.safetensors", "Out.SafeTensors", "a.b.safetensors"])
def test_a_name_of_safetensors_is_a_file(name, weights, tmp_path):
    export(weights, tmp_path / name)
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize("name", ["out.pt", "out.bin", "out.h5"])
def test_a_name_of_another_format_is_refused(name, weights, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}: emp writes safetensors; name .*out.safetensors, or a folder"):
        export(weights, tmp_path / name)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_folder_with_content_is_moved_aside_and_only_when_told(weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("of the user")
    with pytest.raises(FileExistsError, match=r"is not empty; .*--overwrite to move it to .*out.old-1"):
        export(weights, out)
    report = export(weights, out, overwrite=True)
    assert os.listdir(out) == ["model.safetensors"]
    assert (tmp_path / "out.old-1" / "precious").read_text() == "of the user"
    assert report.notes == (f"what {out} held is in {tmp_path / 'out.old-1'} now",)
    export(weights, out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out", "out.old-1", "out.old-2"]


def test_a_folder_can_be_pruned_in_its_own_place(tmp_path):
    source = saved(dense("gpt2"), tmp_path / "gpt2")
    prune(Source(str(source)), source, {"density": 0.5}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["gpt2", "gpt2.old-1"]
    assert sorted(os.listdir(source)) == sorted({*os.listdir(tmp_path / "gpt2.old-1")} - {"onnx", "training_args.bin"})


def test_a_folder_that_cannot_make_way_is_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == out)
    with pytest.raises(FileExistsError, match=r"is a mount point; name a new folder in it, such as .*out/model"):
        export(Source("nothing.pt"), out)
    (out / "below").mkdir()
    monkeypatch.chdir(out / "below")
    with pytest.raises(FileExistsError, match="is or holds the current folder; name a new folder"):
        export(Source("nothing.pt"), out, overwrite=True)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"nothing may be written in .*; choose another --out"):
        export(Source("nothing.pt"), tmp_path / "new")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is a file; name a folder, or a file that ends in .safetensors"):
        export(Source("nothing.pt"), tmp_path / "file", overwrite=True)


def test_a_write_that_fails_leaves_the_folder_as_it_was(weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(weights, out)
    before = (out / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(weights, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out"]


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_folders_and_files_have_the_modes_that_the_umask_gives(umask, folder, file, tmp_path):
    source = saved(dense("gpt2"), tmp_path / "dense")
    for path in source.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o640)
    before = os.umask(umask)
    try:
        prune(Source(str(source)), tmp_path / "masked", {"target": "heads", "density": 0.5})
        settings = {"target": "neurons", "density": 0.5}
        prune(Source(str(source)), tmp_path / "small", settings, shrink_units=True, uniform=True)
        export(Source("timm:test_vit"), tmp_path / "vit")
    finally:
        os.umask(before)
    for name in ("masked", "small", "vit"):
        for path in (tmp_path / name, *(tmp_path / name).rglob("*")):
            assert oct(path.stat().st_mode & 0o777) == oct(folder if path.is_dir() else file), path
