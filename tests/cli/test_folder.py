"""`emp prune FOLDER --out FOLDER2` and `emp perplexity`, as they are typed."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.cli.main import main
from tests.folders.kinds import called, made, samples

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a byte-level Llama, and a text beside it."""
    made("llama", tmp_path / "model", vocab_size=384, max_position_embeddings=64)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def emp(*words):
    return main([str(word) for word in words])


ALL = ("--eval-windows", "1000")
WANDA = ("--criterion", "wanda", "--samples", "4", "--length", "32")


def test_wanda_from_a_text_into_a_folder_that_generates(folder, capsys):
    out = folder / "out"
    assert emp("prune", folder / "model", *WANDA, "--text", folder / "text.txt", "--out", out) == 0
    told = capsys.readouterr().out
    assert "wanda, scope row" in told
    assert "model.layers.*.mlp.up_proj.weight" in told
    assert "perplexity: " in told
    assert "peak resident memory" in told
    assert f"transformers.LlamaForCausalLM.from_pretrained('{out}')" in told
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    record = json.loads((out / "emp_prune.json").read_text())
    assert (record["samples"], record["order"], record["scope"]) == (4, "sequential", "row")


def test_the_perplexities_are_those_of_the_folders(folder, capsys):
    out, text = folder / "out", folder / "text.txt"
    assert emp("prune", folder / "model", *WANDA, "--text", text, "--eval-text", text, *ALL, "--out", out) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity: "))
    told = [float(word) for word in line.replace(",", " ").split() if word.replace(".", "").isdigit()]
    found = []
    for name in ("model", "out"):
        json_file = folder / f"{name}.json"
        assert emp("perplexity", folder / name, "--text", text, "--json", json_file) == 0
        found.append(json.loads(json_file.read_text()))
    assert told[:2] == [round(one["value"], 4) for one in found]
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    ids = transformers.AutoTokenizer.from_pretrained(folder / "model")(TEXT, return_tensors="pt").input_ids
    windows = ids[0, : ids.shape[1] // 64 * 64].view(-1, 64)
    with torch.no_grad():
        losses = [float(model(one[None], labels=one[None]).loss) for one in windows]
    assert found[0]["windows"] == len(windows)
    assert found[0]["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_calibration_leaves_out_what_perplexity_is_measured_on(folder, capsys, monkeypatch):
    from emp_callbacks.cli import folder_work

    seen = {}
    for name in ("text_samples", "perplexity_windows"):
        real = getattr(folder_work, name)
        monkeypatch.setattr(
            folder_work, name, lambda *args, real=real, name=name, **more: seen.setdefault(name, real(*args, **more))
        )
    text = "".join(f"{i:04d}" for i in range(1000))
    (folder / "text.txt").write_text(text)
    command = ("prune", folder / "model", *WANDA, "--samples", "60", "--text", folder / "text.txt")
    assert emp(*command, "--out", folder / "out") == 0

    def characters(inputs):
        return ["".join(chr(i - 3) for i in one["input_ids"][0].tolist() if 3 <= i < 259) for one in inputs]

    calibration, tail = characters(seen["text_samples"].inputs), characters(seen["perplexity_windows"].inputs)
    assert all(one in text[:3700] for one in calibration)
    assert all(one in text[3500:] and one not in text[:3500] for one in tail)


def test_magnitude_needs_no_text_and_goes_over_the_whole_model(folder, capsys):
    assert emp("prune", folder / "model", "--out", folder / "out", "--density", "0.5", "--no-perplexity") == 0
    told = capsys.readouterr().out
    assert "magnitude, scope global" in told
    assert "density 0.5000" in told
    assert "perplexity" not in told


def test_the_smallest_budget_within_a_tolerance(folder, capsys):
    command = ("prune", folder / "model", "--scope", "row", "--eval-text", folder / "text.txt", "--eval-windows", "4")
    assert emp(*command, "--tolerance", "0.05", "--out", folder / "out") == 0
    told = capsys.readouterr().out
    assert "chosen" in told
    record = json.loads((folder / "out" / "emp_prune.json").read_text())
    chosen = next(line for line in told.splitlines() if "chosen" in line)
    assert f"{record['beta']:.4g}" in chosen
    assert f"{record['density']:.3f}" in chosen
    assert {path.name for path in folder.iterdir()} == {"model", "text.txt", "out"}
    before, after = _perplexities(told)
    assert math.log(after) <= math.log(before) * 1.05


def _perplexities(told):
    line = next(line for line in told.splitlines() if line.startswith("perplexity: "))
    return [float(word) for word in line.replace(",", " ").split() if word.replace(".", "", 1).isdigit()][:2]


def test_both_kinds_of_output_leave_the_head_alone(folder, capsys):
    model = folder / "model"
    assert emp("prune", model, "--scope", "tensor", "--out", folder / "one.safetensors") == 0
    assert "left out: lm_head.weight" in capsys.readouterr().out
    assert emp("prune", model, "--scope", "tensor", "--out", folder / "out", "--no-perplexity") == 0
    assert "left out: lm_head.weight" in capsys.readouterr().out
    assert emp("inspect", model, "--scope", "tensor", "--json", folder / "rows.json") == 0
    assert "left out: lm_head.weight" in capsys.readouterr().out
    from safetensors.torch import load_file

    one, files = load_file(folder / "one.safetensors"), FolderFiles(folder / "out")
    assert all(torch.equal(one[name], files.read(name)) for name in files.names)
    rows = {row["name"]: row["keep"] for row in json.loads((folder / "rows.json").read_text())["tensors"]}
    record = json.loads((folder / "out" / "emp_prune.json").read_text())
    assert {row["name"]: row["keep"] for row in record["rows"]} == {k: v for k, v in rows.items() if k != "all"}


def test_images_for_a_vision_model(tmp_path, capsys):
    made("vit", tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    draws = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(draws.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    command = ("prune", tmp_path / "model", "--criterion", "wanda", "--images", tmp_path / "images", "--samples", "3")
    assert emp(*command, "--out", tmp_path / "out") == 0
    assert "perplexity" not in capsys.readouterr().out
    written = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.isfinite(called(written, samples("vit")[0])).all()


def test_sounds_for_a_speech_model(tmp_path, capsys):
    import wave

    made("whisper", tmp_path / "model", max_source_positions=50)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "model")
    (tmp_path / "sounds").mkdir()
    for i in range(3):
        with wave.open(str(tmp_path / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((np.sin(np.arange(16000) * (0.1 + i)) * 9000).astype("<i2").tobytes())
    command = ("prune", tmp_path / "model", "--criterion", "wanda", "--sounds", tmp_path / "sounds")
    assert emp(*command, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "model.encoder.layers.*.fc1.weight" in told
    assert "model.decoder.layers.*.fc1.weight" in told
    assert transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--criterion", "wanda"), "--text FILE"),
        (("--criterion", "taylor"), "reads gradients"),
        (("--criterion", "wanda", "--text", "absent.txt"), "absent.txt"),
        (("--target", "heads", "--text", "text.txt"), "with --target"),
        (("--tolerance", "0.1"), "--eval-text FILE or --text FILE"),
        (("--tolerance", "0.1", "--density", "0.5"), "drop one"),
        (("--dtype", "float16", "--device", "nowhere"), "nowhere"),
        (("--density", "7"), "density"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, says, folder, capsys):
    assert emp("prune", folder / "model", *words, "--out", folder / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("emp: ")
    assert told.count("\n") == 1
    assert says in told
    assert {path.name for path in folder.iterdir()} == {"model", "text.txt"}


def test_a_classifier_has_no_perplexity_and_is_pruned_all_the_same(folder, capsys):
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=384
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "bert")
    transformers.ByT5Tokenizer().save_pretrained(folder / "bert")
    assert emp("perplexity", folder / "bert", "--text", folder / "text.txt") == 2
    assert "BertForSequenceClassification" in capsys.readouterr().err
    command = ("prune", folder / "bert", *WANDA, "--text", folder / "text.txt", "--out", folder / "out")
    assert emp(*command) == 0
    told = capsys.readouterr().out
    assert "note: " in told
    assert "has no perplexity" in told
