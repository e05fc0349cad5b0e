import copy
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from emp_callbacks import __version__
from emp_callbacks.cli.main import main

TASK = "emp_callbacks.study.recipe.tasks.ImageClassification"
RECIPE = {
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "limit_train_batches": 2,
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_epochs": 1}}],
    },
    "model": {
        "class_path": TASK,
        "init_args": {
            "model": "vit_tiny_patch16_224",
            "model_args": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1},
        },
    },
    "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData"},
    "study": {"seeds": [0]},
}
EMP = ("trainer", "callbacks", 0)


def write_recipe(folder, *path, rename=None, **changes):
    """Write RECIPE with the mapping at `path` changed, or one of its keys renamed."""
    recipe = copy.deepcopy(RECIPE)
    place = recipe
    for key in path:
        place = place[key]
    place.update(changes)
    if rename:
        place[rename[1]] = place.pop(rename[0])
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


TYPOS = [
    (("trainer",), {"max_epoch": 1}, "'trainer.max_epoch'", "'trainer.max_epochs'"),
    (("trainer",), {"max_epochs": "many"}, "'trainer.max_epochs'", "expected int or null, got 'many'"),
    ((), {"trainr": {}}, "'trainr'", "'trainer'"),
    ((), {"max_epochs": 3}, "'max_epochs'", "'trainer.max_epochs'"),
    (("study",), {"seed": [1]}, "'study.seed'", "'study.seeds'"),
    (("study",), {"seeds": "a"}, "'study.seeds'", "expected list, got 'a'"),
    (("study",), {"seeds": [1, 1]}, "study.seeds", "different numbers"),
    (("study",), {"arms": ["dense", "trainig_freeze"]}, "'trainig_freeze'", "'training_freeze'"),
    (("study",), {"arms": ["dense", "random"]}, "'random'", "training_feedback"),
    (
        EMP,
        {"class_path": "emp_callbacks.EMPCalback"},
        "trainer.callbacks[0].class_path",
        "'emp_callbacks.EMPCallback'",
    ),
    (EMP, {"class_path": "emp_calbacks.EMPCallback"}, "no module 'emp_calbacks'", "'emp_callbacks'"),
    (EMP, {"class_path": "EMPCalback"}, "'EMPCalback'", "'EMPCallback'"),
    (
        (*EMP, "init_args"),
        {"every_n_epoch": 1},
        "trainer.callbacks[0].init_args.every_n_epoch'",
        "trainer.callbacks[0].init_args.every_n_epochs'",
    ),
    ((*EMP, "init_args"), {"beta": "x"}, "'beta'", "expected float"),
    ((*EMP, "init_args"), {"beta": -1}, "beta must be", "got -1"),
    (("model",), {"class_path": TASK.removesuffix("sification")}, "model.class_path", "ImageClassification'"),
    (("model", "init_args"), {"weigth_decay": 1}, "'model.init_args.weigth_decay'", "'model.init_args.weight_decay'"),
    (("model", "init_args"), {"lr": "high"}, "'lr'", "expected float, got 'high'"),
    (("model", "init_args"), {"model": "resnet10tt"}, "'resnet10tt'", "resnet10t"),
    (
        ("data",),
        {"class_path": "emp_callbacks.study.recipe.data.FashionMNISTData", "init_args": {"folder": "/no/such"}},
        "not found in /no/such",
        "",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "named", "hint"), TYPOS, ids=[str(t[2]) for t in TYPOS])
def test_a_mistake_in_a_recipe_is_one_line_that_names_key_and_remedy(path, change, named, hint, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["compare", "--config", write_recipe(tmp_path, *path, **change), "--out", str(out)])
    message = capsys.readouterr().err.strip()
    assert code == 2
    assert named in message
    assert hint in message
    assert "\n" not in message
    assert not list(out.glob("runs/*.json"))


@pytest.mark.parametrize(
    ("place", "old", "new", "hint"),
    [
        (("model",), "init_args", "init_arg", "'model.init_args'"),
        (("model",), "class_path", "clas_path", "'model.class_path'"),
        (EMP, "init_args", "init_arg", "'trainer.callbacks[0].init_args'"),
    ],
)
def test_a_mistyped_class_key_is_named(place, old, new, hint, tmp_path, capsys):
    assert main(["fit", "--config", write_recipe(tmp_path, *place, rename=(old, new))]) == 2
    message = capsys.readouterr().err
    assert f".{new}' in recipe" in message or f"]{new}" in message
    assert hint in message


@pytest.mark.parametrize(
    ("options", "named", "hint"),
    [
        (["--trainer.max_epoch", "1"], "--trainer.max_epoch'", "'--trainer.max_epochs'"),
        (["--study.seed", "[0]"], "--study.seed'", "'--study.seeds'"),
        (["--model.lrr", "1"], "'lrr'", "'lr'"),
        (["--trainer.max_epochs", "x"], "'trainer.max_epochs'", "expected int"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_mistyped_option_is_named(command, options, named, hint, tmp_path, capsys):
    assert main([command, "--config", write_recipe(tmp_path), *options]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert hint in message


def test_a_missing_recipe_names_the_nearest_file(tmp_path, capsys):
    write_recipe(tmp_path)
    assert main(["compare", "--config", str(tmp_path / "recipes.yaml")]) == 2
    assert "does not exist; did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [1,\nb: 2", "- 1"])
def test_a_file_that_is_no_recipe_is_an_error(text, tmp_path, capsys):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert main(["fit", "--config", str(file)]) == 2
    assert "broken.yaml" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("emp_callbacks.study.recipe.recipe.run_lightning", lambda *_: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", "--config", write_recipe(tmp_path)])


def test_fit_trains_saves_its_recipe_and_never_overwrites_it(tmp_path, capsys):
    folder = tmp_path / "fit"
    words = ["fit", "--config", write_recipe(tmp_path), "--trainer.default_root_dir", str(folder)]
    assert main(words) == 0
    saved = (folder / "config.yaml").read_text()
    rows = (folder / "emp_trajectory.jsonl").read_text()
    capsys.readouterr()
    assert main(words) == 2
    assert "an earlier run lives in this folder" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == saved
    assert (folder / "emp_trajectory.jsonl").read_text() == rows
    checkpoint = str(next(folder.glob("checkpoints/*.ckpt")))
    words[0] = "test"
    assert main([*words, "--ckpt_path", checkpoint]) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["inspect", checkpoint]) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown
    assert "zero already" in shown


def test_what_fit_trained_is_exported_and_pruned(tmp_path, capsys):
    folder, out = tmp_path / "fit", str(tmp_path / "out.safetensors")
    recipe = write_recipe(tmp_path)
    assert main(["fit", "--config", recipe, "--trainer.default_root_dir", str(folder)]) == 0
    checkpoint = str(next(folder.glob("checkpoints/*.ckpt")))
    assert main(["export", checkpoint, "--out", out]) == 0
    held, written = torch.load(checkpoint, weights_only=True)["state_dict"], load_file(out)
    assert {f"model.{name}" for name in written} == held.keys()
    assert all(torch.equal(value, held[f"model.{name}"]) for name, value in written.items())
    capsys.readouterr()
    words = ["prune", checkpoint, "--config", recipe, "--target", "neurons", "--density", "0.5", "--shrink"]
    words += ["--criterion", "activation", "--batches", "2"]
    assert main([*words, "--out", out]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*words, "--out", out, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "model.blocks.0.mlp.fc1",
        "had to stay",
        "0.500",
        "FLOPs",
        "largest difference",
        "matrices and kernels",
    ):
        assert text in shown
    assert load_file(out)["blocks.0.mlp.fc1.weight"].shape == (16, 8)
    assert main(["inspect", out]) == 0


def test_a_missing_torch_pruning_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    words = ["prune", "timm:resnet10t", "--target", "neurons", "--shrink", "--input-size", "3", "32", "32"]
    assert main([*words, "--out", str(tmp_path / "out.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "pip install 'emp-callbacks[shrink]'" in message
    assert message.count("\n") == 1


def test_report_says_where_a_report_could_be_made(tmp_path, capsys):
    (tmp_path / "a" / "version_0").mkdir(parents=True)
    (tmp_path / "a" / "version_0" / "emp_trajectory.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path / "a" / "version_0") in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_help_shows_the_commands_with_examples(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("fit", "compare", "report", "inspect", "prune", "export", "examples:"):
        assert word in shown
    assert main([]) == 2


@pytest.mark.parametrize("command", ["fit", "validate", "test", "compare", "report", "inspect", "prune", "export"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"\n  emp {command} " in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"emp {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["comparee"]) == 2
    assert "did you mean 'compare'" in capsys.readouterr().err


@pytest.mark.processes
def test_help_does_not_import_lightning():
    code = (
        "import sys; from emp_callbacks.cli.main import main; main(['--help']);"
        " sys.exit('pytorch_lightning' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
