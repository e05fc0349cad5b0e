"""The table of language models, on a folder of random weights."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

# A table is 14 prunings; the first import of matplotlib asks a process for the fonts.
pytestmark = [pytest.mark.slow, pytest.mark.processes]

ROOT = Path(__file__).parents[2]
ROWS_OF_A_PART = 3 + 3 + 2 * 3 + 1  # EMP; magnitude at three densities; Wanda the same in both orders; global


@pytest.fixture(scope="module")
def llm_table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import llm_table

        yield llm_table


@pytest.fixture(scope="module")
def words(llm_table, tmp_path_factory):
    """Return the command line for a folder of 2 blocks of width 64, without --out."""
    import make_llama_folder

    folder = tmp_path_factory.mktemp("llm")
    config = make_llama_folder.llama_config(layers=2, hidden=64, vocabulary=384, dtype=torch.float32)
    make_llama_folder.write_folder(folder / "model", config, shard_bytes=10**9)
    text = (ROOT / "LICENSE").read_text()
    (folder / "train.txt").write_text(text[:2000])
    (folder / "test.txt").write_text(text[2000:3000])
    given = ["--calibration", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    return [str(folder / "model"), *given, "--samples", "4", "--length", "32"]


@pytest.fixture(scope="module")
def made(llm_table, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    llm_table.main([*words, "--parts", "MLP only", "--out", str(out)])
    return out, json.loads((out / "llm_table.json").read_text())["rows"]


def test_every_row_is_there_and_prunes_what_it_says(made):
    out, rows = made
    assert len(rows) == 1 + ROWS_OF_A_PART
    mlp = 2 * 3 * 64 * 192
    for name, row in rows.items():
        if name == "dense":
            continue
        assert row["n"] == mlp, name
        assert row["density"] == row["kept"] / mlp
        if row["keep"] == 0.5:
            assert row["density"] == 0.5, name
        if row["keep"] == "N_eff":
            assert row["density"] == pytest.approx(row["n_eff_fraction"], abs=1 / 64), name
    assert not (out / "pruned").exists()


def test_the_dense_row_is_the_perplexity_that_transformers_gives(words, made):
    model = transformers.AutoModelForCausalLM.from_pretrained(words[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(words[0])
    ids = tokenizer(Path(words[4]).read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    windows = ids[0, : ids.shape[1] // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    row = made[1]["dense"]
    assert row["tokens"] == 31 * len(windows)
    assert row["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_fixed_rows_prune_to_the_density_that_they_borrow(made):
    _, rows = made
    emp = {(row["criterion"], row["order"]): row for name, row in rows.items() if name.endswith(", N_eff")}
    borrowed = [row for row in rows.values() if row.get("keep") in ("magnitude", "wanda")]
    assert len(borrowed) == 2 * 3 + 1
    for row in borrowed:
        order = "-" if row["keep"] == "magnitude" else row["order"].replace("-", "one pass")
        # Within rows a density is rounded down for each row.
        missing = emp[row["keep"], order]["density"] - row["density"]
        assert 0 <= missing < (1 / 64 if row["scope"] == "row" else 1e-3)


def test_random_rows_of_gaussian_weights_have_the_gaussian_count(made):
    _, rows = made
    assert rows["MLP only: magnitude, -, N_eff"]["n_eff_fraction"] == pytest.approx(0.6366, abs=0.02)


def test_the_table_and_the_picture_show_each_row(made):
    out, rows = made
    table = (out / "llm_table.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert table[2].startswith("| | dense")
    assert sum("| N_eff |" in line for line in table) == 3
    assert (out / "llm_table.png").stat().st_size > 10_000


def test_a_row_that_stands_is_not_computed_again(llm_table, words, made, monkeypatch):
    out, rows = made
    name = "MLP only: wanda, sequential, 50 %"
    left = {key: row for key, row in rows.items() if key != name}
    settings = json.loads((out / "llm_table.json").read_text())["settings"]
    (out / "llm_table.json").write_text(json.dumps({"settings": settings, "rows": left}))
    computed = []
    compute = llm_table.pruned_row

    def counted(arm, *others):
        computed.append(arm.name)
        return compute(arm, *others)

    monkeypatch.setattr(llm_table, "pruned_row", counted)
    llm_table.main([*words, "--parts", "MLP only", "--out", str(out)])
    assert computed == [name]
    again = json.loads((out / "llm_table.json").read_text())["rows"]
    assert again.keys() == rows.keys()
    assert again[name]["perplexity"] == rows[name]["perplexity"]


def test_rows_of_another_length_are_not_mixed_in(llm_table, words, made):
    out, _ = made
    with pytest.raises(ValueError, match=r"was made with another length, test_length; name another --out"):
        llm_table.main([*words[:-1], "16", "--parts", "MLP only", "--out", str(out)])


def test_a_folder_in_which_nothing_was_pruned_is_refused(llm_table, words):
    with pytest.raises(ValueError, match="nothing was pruned"):
        llm_table.kept_in(Path(words[0]), Path(words[0]))
