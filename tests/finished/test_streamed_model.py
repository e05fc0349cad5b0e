import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from emp_callbacks.cli.main import main
from emp_callbacks.finished.inspection import inspect_model
from emp_callbacks.finished.streamed_model import stream_model
from tests.targets.mixtures import language_model, needs_stacked_experts

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=40))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64))


def whisper():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **heads, **ids))


def wav2vec2():
    sizes = {**SMALL, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    return transformers.Wav2Vec2Model(config)


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=40)),
    "mixtral": lambda: language_model("Mixtral"),
}


@pytest.fixture(params=[pytest.param(name, marks=[needs_stacked_experts] * (name == "mixtral")) for name in MODELS])
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"scope": "global"}, {"scope": "tensor", "beta": 0.4}, {"scope": "row"}], ids=str)
def test_a_folder_read_tensor_by_tensor_is_its_model(model, dtype, settings, tmp_path):
    settings = dict(settings)
    if isinstance(model, transformers.Wav2Vec2Model) and settings["scope"] == "row":
        settings = settings | {"exclude": ["*pos_conv*"]}  # the direction of a weight norm
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    streamed = stream_model(str(tmp_path))
    rows = inspect_model(streamed.module, include=streamed.include, read=streamed.read, **settings)
    left_out = [] if streamed.include is None else ["lm_head.weight"]
    assert (len(streamed.notes), left_out) in ((0, []), (1, ["lm_head.weight"]))
    exclude = [*settings.pop("exclude", []), *left_out] or None
    assert rows == inspect_model(model, exclude=exclude, **settings)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_one_tensor_is_held_at_a_time(scope, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    streamed, last, count = stream_model(str(tmp_path)), [lambda: None], [0]

    def read(parameter):
        assert last[0]() is None, "a tensor was held while the next was read"
        values = streamed.read(parameter)
        last[0], count[0] = weakref.ref(values), count[0] + 1
        return values

    rows = inspect_model(streamed.module, read=read, scope=scope)
    looks = {"global": range(3, 5), "tensor": [1], "row": [1]}[scope]
    assert -(-count[0] // (len(rows) - 1)) in looks


def test_patterns_choose_alike(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    streamed = stream_model(str(tmp_path))
    for chosen in ({"include": ["*mlp*", "*embed*"]}, {"exclude": ["*self_attn*"]}):
        rows = inspect_model(streamed.module, read=streamed.read, **chosen)
        assert rows == inspect_model(model, **chosen)
        assert 3 < len(rows) < 17


def test_a_folder_of_pytorch_files(tmp_path):
    model = gpt2()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    streamed = stream_model(str(tmp_path))
    assert inspect_model(streamed.module, read=streamed.read) == inspect_model(model)


def test_matrices_that_the_model_does_not_have_are_told_of(tmp_path):
    model = llama()
    model.config.architectures = ["LlamaModel"]
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    streamed = stream_model(str(tmp_path))
    assert streamed.notes == ["left out: lm_head.weight, which the folder holds and a LlamaModel does not have"]
    assert "lm_head.weight" not in [row.name for row in inspect_model(streamed.module, read=streamed.read)]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_checkpoint(zipped, scope, tmp_path):
    state = {f"{i}.weight": torch.randn(5, 4) for i in range(3)} | {"tied.weight": torch.ones(3, 3)}
    state["again.weight"] = state["tied.weight"]
    path = tmp_path / "state.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    streamed = stream_model(str(path))
    rows = inspect_model(streamed.module, include=streamed.include, read=streamed.read, scope=scope)
    module = nn.ModuleDict({name.split(".")[0]: nn.Linear(4, 5) for name in [*state][:4]})
    for name, value in [*state.items()][:4]:
        module[name.split(".")[0]].weight = nn.Parameter(value)
    assert rows == inspect_model(module, scope=scope)
    assert [row.name for row in rows] == ["0.weight", "1.weight", "2.weight", "tied.weight", "all"]


def test_tensors_come_in_the_order_of_their_names_whatever_their_types(tmp_path):
    dtypes = [torch.float64, torch.bfloat16, torch.float32]
    save_file(
        {f"{name}.weight": torch.ones(2, 2, dtype=dtype) for name, dtype in zip("bac", dtypes, strict=True)},
        tmp_path / "mixed.safetensors",
    )
    streamed = stream_model(str(tmp_path / "mixed.safetensors"))
    rows = inspect_model(streamed.module, include=streamed.include, read=streamed.read)
    assert [row.name for row in rows] == ["a.weight", "b.weight", "c.weight", "all"]
    assert (rows[-1].n_eff, rows[-1].keep) == (12.0, 12)


def test_what_stands_in_for_values_on_disk_is_never_taken_for_them(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    streamed = stream_model(str(tmp_path / "one.safetensors"))
    with pytest.raises(FloatingPointError, match="NaN"):
        inspect_model(streamed.module, include=streamed.include)


def test_float8_is_refused_in_one_line(tmp_path, capsys):
    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "narrow.safetensors")
    assert main(["inspect", str(tmp_path / "narrow.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "a.weight is of torch.float8_e4m3fn, which cannot be scored" in message
    assert message.count("\n") == 1


_PEAK = """
import contextlib, io, re, sys
from emp_callbacks.cli.main import main

def peak():  # of this program: getrusage counts what the one before it in the process took
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def inspect(folder):
    for scope in ("global", "tensor", "row"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["inspect", folder, "--scope", scope]) == 0

inspect(sys.argv[1])
before = peak()
inspect(sys.argv[2])
print(peak() - before)
"""


def tensors(count):
    """Return bfloat16 weights of 5 MB each."""
    values = torch.randn(1024, 2500).bfloat16()
    return {f"{i:02}.weight": values.roll(i, 1) for i in range(count)}


def shards(folder, count):
    folder.mkdir()
    held = tensors(count)
    files = {name: f"{i // 4}.safetensors" for i, name in enumerate(held)}
    for file in {*files.values()}:
        save_file({name: value for name, value in held.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def checkpoint(path, count):
    torch.save({"state_dict": tensors(count)}, path)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("write", [shards, checkpoint])
def test_memory_does_not_grow_with_the_file(write, tmp_path):
    """Twenty tensors, 100 MB, take hardly more than two do."""
    small, large = tmp_path / "small", tmp_path / "large"
    write(small, 2)
    write(large, 20)
    words = [sys.executable, "-c", _PEAK, str(small), str(large)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 10  # KiB
