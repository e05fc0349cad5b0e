"""The folders that measurements are made on: random ones, and one trained on texts. And what is counted in them."""

import json
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    import make_llama_folder

    folder = tmp_path_factory.mktemp("random")
    config = make_llama_folder.llama_config(layers=2, hidden=64, vocabulary=384)
    return folder, make_llama_folder.write_folder(folder, config, shard_bytes=60_000)


def test_a_random_folder_is_one_that_transformers_loads(random_folder):
    folder, told = random_folder
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype="auto", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert told["parameters"] == sum(weight.numel() for weight in model.parameters())
    block = model.model.layers[1]
    assert told["block_bytes"] == 2 * sum(weight.numel() for weight in block.parameters())
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert float(weight.detach().float().std()) == pytest.approx(0.02, rel=0.05), name


def test_shards_of_a_random_folder_are_no_larger_than_asked(random_folder):
    folder, told = random_folder
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == told["shards"] > 3
    header = 4096
    assert all(file.stat().st_size < 60_000 + header for file in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in shards}


def test_a_tied_random_folder_holds_no_head(tmp_path):
    import make_llama_folder

    config = make_llama_folder.llama_config(layers=1, hidden=64, vocabulary=384, tied=True)
    make_llama_folder.write_folder(tmp_path, config, shard_bytes=10**9)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * sum(w.numel() for w in model.parameters()) + 8192


@pytest.mark.slow
def test_a_small_llama_is_trained_on_whole_works_and_written_with_its_tokenizer(tmp_path, capsys):
    import train_small_llama

    names = [f"{number:02}.txt" for number in range(16)]
    for name in names:
        (tmp_path / name).write_text(f"work {name}: the cat sat on the mat and the dog on the log.\n" * 30)
    sizes = [
        "--vocabulary",
        "300",
        "--hidden",
        "64",
        "--layers",
        "1",
        "--length",
        "32",
        "--steps",
        "30",
        "--every",
        "15",
    ]
    train_small_llama.main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out"), *sizes])
    out = tmp_path / "out"
    assert "work 05.txt" in (out / "valid.txt").read_text()
    assert (out / "test.txt").read_text().count("\n") == 30
    assert "work 15.txt" in (out / "test.txt").read_text()
    train = (out / "train.txt").read_text()
    assert "work 05.txt" not in train
    assert "work 15.txt" not in train
    told = json.loads((out / "training.json").read_text())
    assert told["test_perplexity"] < told["test_perplexity_unigram"] < 300
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [15, 30]
    assert rows[1]["valid_loss"] < rows[0]["valid_loss"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the cat sat"
    assert float(model(ids, labels=ids).loss) < math.log(300)


def test_rows_of_random_weights_are_counted_as_their_distribution_says():
    import row_counts

    rows = {(row["what"], *row["widths"]): row for row in row_counts.random_rows()}
    for (_, width), row in rows.items():
        # Of short rows the mean is off by order 1 / width.
        assert row["n_eff_fraction"] == pytest.approx(row["endless"], abs=1.5 / width + 0.001)
        assert row["pruned"] == pytest.approx(1 - row["n_eff_fraction"], abs=1 / width)
    assert rows["Gaussian rows", 4096]["endless"] == pytest.approx(0.6366, abs=1e-4)


def test_rows_of_a_folder_are_counted_by_kind_of_matrix(random_folder):
    import row_counts

    rows = {row["what"]: row for row in row_counts.folder_rows(random_folder[0], ["*.layers.*"])}
    assert rows.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all matrices"}
    assert rows["q_proj"]["rows"] == 2 * 64
    assert rows["all matrices"]["rows"] == sum(row["rows"] for row in rows.values()) / 2
    by_hand = [
        float(row.double().abs().sum() ** 2 / row.double().square().sum() / 64)
        for block in transformers.AutoModelForCausalLM.from_pretrained(random_folder[0]).model.layers
        for row in block.self_attn.q_proj.weight.detach()
    ]
    assert rows["q_proj"]["n_eff_fraction"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_a_pattern_that_names_no_matrix_is_refused(random_folder):
    import row_counts

    with pytest.raises(ValueError, match=r"no matrix of .* is named like nothing"):
        list(row_counts.folder_rows(random_folder[0], ["nothing"]))
