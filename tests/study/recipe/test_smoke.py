"""`--smoke`: what it lays over a recipe, the data that stands in, and that it fails where nothing was learned."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from emp_callbacks.cli.main import main
from emp_callbacks.study.recipe import stand_ins
from emp_callbacks.study.recipe.check import RecipeError
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.recipe.smoke import smoke_options
from emp_callbacks.study.recipe.stand_ins import stand_in

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
LARGE = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if "\nsmoke:" in path.read_text())


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(stand_ins.STAND_INS):  # only that it is asked for; two tests below make some
        monkeypatch.setitem(stand_ins.STAND_INS, name, lambda folder: None)


def recipe_with(smoke, tmp_path, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump({**yaml.safe_load(QUICKSTART.read_text()), "smoke": smoke}))
    return path


TINY = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 8,
    "trainer.limit_val_batches": 0,
    "trainer.logger": False,
    "trainer.default_root_dir": "run",
    "model.init_args.model_args": {"img_size": 8, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}


def test_large_recipes_have_a_smoke_section():
    assert {path.stem for path in LARGE} >= {"vit_s16", "resnet50", "gpt2_124m", "gpt2_continued", "llama_1b"}


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_smoke_section_is_the_same_recipe_on_two_cpu_processes(path):
    whole, small = Recipe(path), Recipe(path, ["--smoke"])
    assert (small.config.trainer.accelerator, int(small.config.trainer.devices)) == ("cpu", 2)
    for part in ("model", "data"):
        assert getattr(small.config, part).class_path == getattr(whole.config, part).class_path
    assert small.config.trainer.precision == whole.config.trainer.precision == "bf16-mixed"
    classes = [[callback.class_path for callback in one.config.trainer.callbacks] for one in (whole, small)]
    assert classes[0] == classes[1]
    emp = [one.config.trainer.callbacks[-1].init_args for one in (whole, small)]
    assert emp[0].target == emp[1].target
    assert emp[0].mode == emp[1].mode
    assert "stand-in" in json.dumps(small.resolved()["data"])


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_header_says_hardware_hours_and_the_dense_figure(path):
    header = path.read_text().partition("seed_everything")[0]
    for word in ("# Hardware: ", "Expected: ", "# Dense figure", "# Data: ", "--smoke"):
        assert word in header, word


def test_options_of_the_user_win_over_the_smoke_section(tmp_path):
    path = recipe_with({"trainer.max_epochs": 1, "model.init_args.lr": 0.5}, tmp_path)
    for words in (["--smoke", "--trainer.max_epochs", "7"], ["--trainer.max_epochs", "7", "--smoke"]):
        recipe = Recipe(path, words)
        assert (recipe.config.trainer.max_epochs, recipe.config.model.init_args.lr) == (7, 0.5)
    assert Recipe(path).config.trainer.max_epochs == 20
    assert "smoke" not in Recipe(path).resolved()


def test_a_recipe_without_the_section_is_refused(capsys):
    with pytest.raises(RecipeError, match=r"quickstart\.yaml has no smoke: section for --smoke; add one"):
        smoke_options([str(QUICKSTART)])
    assert main(["fit", "--config", str(QUICKSTART), "--smoke"]) == 2
    assert "no smoke: section" in capsys.readouterr().err


def test_a_mistyped_option_of_the_section_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown option '--trainer.max_epoch'.*'--trainer.max_epochs'"):
        Recipe(recipe_with({"trainer.max_epoch": 1}, tmp_path), ["--smoke"])


def test_a_run_tells_its_loss_and_goes_where_last_finds_it(tmp_path, capsys):
    path = recipe_with({**TINY, "trainer.max_epochs": 2, "model.init_args.lr": 0.02}, tmp_path)
    assert main(["fit", "--config", str(path), "--smoke"]) == 0
    assert "smoke: loss " in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert main(["fit", "--config", str(path), "--smoke", "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert " in 8 batches " in capsys.readouterr().out  # of the third epoch alone


def test_a_loss_that_does_not_fall_fails(tmp_path):
    same = {"trainer.overfit_batches": 1, "trainer.max_epochs": 4, "model.init_args.lr": 0.0}
    path = recipe_with({**TINY, **same, "trainer.callbacks.every_n_epochs": 9}, tmp_path)
    with pytest.raises(RuntimeError, match=r"smoke: the loss .* in 4 batches on 1 processes: it did not fall"):
        main(["fit", "--config", str(path), "--smoke"])


def test_a_run_without_a_refresh_fails(tmp_path):
    path = recipe_with({**TINY, "trainer.callbacks.every_n_epochs": 2, "model.init_args.lr": 0.02}, tmp_path)
    with pytest.raises(RuntimeError, match="smoke: 8 batches, and no refresh of weights"):
        main(["fit", "--config", str(path), "--smoke"])


def test_stand_ins_have_the_formats_of_the_real_ones(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no stand-in data 'imgs'; known: images, tokens, gpt2"):
        stand_in("imgs")


def test_processes_that_start_together_make_one_stand_in(tmp_path, monkeypatch):
    made = []

    def slowly(folder):
        made.append(folder)
        np.arange(4, dtype="<u2").tofile(folder / "train.bin")

    monkeypatch.setitem(stand_ins.STAND_INS, "tokens", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(stand_in, ["tokens"] * 8))
    (folder,) = found
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == [0, 1, 2, 3]
    assert [path.name for path in folder.parent.iterdir()] == ["tokens"]
