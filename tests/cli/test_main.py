import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import unicodedata
import warnings
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from emp_callbacks import __version__
from emp_callbacks.cli.check import check_parser
from emp_callbacks.cli.folder_options import perplexity_parser
from emp_callbacks.cli.main import COMMANDS, main
from emp_callbacks.cli.once_options import criteria_parser, gates_parser, sweep_parser, violations_parser
from emp_callbacks.cli.options import (
    compare_parser,
    export_parser,
    inspect_parser,
    prune_parser,
    recipes_parser,
    report_parser,
)
from emp_callbacks.cli.recipes import find_recipe, with_files
from emp_callbacks.cli.study import LIGHTNING_HELP
from emp_callbacks.cli.submit import submit_parser
from emp_callbacks.cli.tokenize import tokenize_parser
from emp_callbacks.study.comparison import StudyInterrupted
from emp_callbacks.study.recipe.checkpoints import newest_checkpoint

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
    (("study",), {"seeds": [1, 1]}, "study.seeds", "different numbers, and 1 occurs twice"),
    (("study",), {"seeds": [2**32]}, "study.seeds must lie in [0, 4294967295]", "got 4294967296"),
    (("study",), {"seeds": list(range(1001))}, "study.seeds holds 1,001 seeds", "at most 1,000"),
    ((), {"seed_everything": -1}, "seed_everything must lie in [0, 4294967295]", "got -1"),
    ((), {"trainer": [1]}, "'trainer' in recipe must be a mapping", "got [1]"),
    ((), {"study": None}, "'study' in recipe must be a mapping", "got nothing"),
    (("model",), {"class_path": ".."}, "unknown class '..' at 'model.class_path'", "module.Class"),
    (("model",), {"class_path": "torch.nn.Linear"}, "is torch.nn.modules.linear.Linear", "no pytorch_lightning.L"),
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
    (("model", "init_args"), {"model": "resnet10tt"}, "bad value for 'model': unknown timm", "resnet10t"),
    (("model", "init_args", "model_args"), {"global_poo": 1}, "bad value for 'model': TypeError: ", "'global_poo'"),
    (("trainer",), {"accelerator": "abacus"}, "bad value for 'trainer': ValueError: ", "accelerator='abacus'"),
    (("trainer",), {"devices": -5}, "bad value for 'trainer': TypeError: ", "should be an int > 0"),
    (
        (*EMP, "init_args"),
        {"beta": {"first": 1.0, "last": 2.0, "until": 0}},
        "bad value for 'trainer.callbacks': until must be",
        "got 0",
    ),
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


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def f(:", "cannot be imported: SyntaxError: invalid syntax (at_fault.py, line 1); EMP_TRACEBACK=1 shows"),
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import pytorch_lightning as pl\nclass Own(pl.LightningModule):\n    def __init__(self):\n        {}['x']\n",
         "bad value for 'model': KeyError: 'x'; EMP_TRACEBACK=1 shows where"),
    ],
    ids=["syntax", "import", "in its class"],
)  # fmt: skip
def test_what_goes_wrong_in_a_module_of_the_users_own_is_one_line(code, told, tmp_path, capsys, monkeypatch):
    (tmp_path / "at_fault.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "at_fault", raising=False)
    file = write_recipe(tmp_path, model={"class_path": "at_fault.Own"})
    assert main(["fit", "--config", file, "--trainer.default_root_dir", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_recipe_names_the_nearest_file(tmp_path, capsys):
    write_recipe(tmp_path)
    assert main(["compare", "--config", str(tmp_path / "recipes.yaml")]) == 2
    assert "does not exist; did you mean" in capsys.readouterr().err


ALIASES = "a: &a [1, 1]\n" + "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghijk"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\nb: 2", "is not valid YAML"),
        (b"a: \x01", "is not valid YAML"),
        (b"a: 2020-13-45", "is not valid YAML"),
        (b"- 1", "must be a mapping of keys to values, got list"),
        ("# caf\xe9\na: 1".encode("latin-1"), "is not UTF-8 text: byte 0xe9 at position 5"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nests more than 50 levels"),
        (ALIASES.encode(), "holds more than 10,000 values (aliases count)"),
        (b"a: &a [*a]", "holds more than 10,000 values"),
        (b"a: [" + b"1," * 200_000 + b"]", "holds more than 10,000 values"),
        (b"a: '" + b" " * 1_000_000 + b"'", "has 1,000,005 bytes"),
    ],
    ids=["syntax", "control character", "date", "list", "latin-1", "deep", "aliases", "endless", "long", "large"],
)
def test_a_file_that_is_no_recipe_is_an_error(content, words, tmp_path, capsys):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    assert main(["fit", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert f"recipe {file} {words}" in message
    assert message.count("\n") == 1


def test_an_option_cannot_hold_what_a_recipe_cannot(tmp_path, capsys):
    deep = "[" * 60 + "]" * 60
    assert main(["fit", "--config", write_recipe(tmp_path), "--model.init_args.model_args", deep]) == 2
    assert "the command line nests more than 50 levels" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("emp_callbacks.study.recipe.recipe.run_lightning", lambda *_: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", "--config", write_recipe(tmp_path)])


def test_a_switch_shows_where_an_error_was_raised(monkeypatch):
    assert main(["inspect", "none.pt"]) == 2
    monkeypatch.setenv("EMP_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        main(["inspect", "none.pt"])


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(COMMANDS, "inspect", full)
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == "emp: No space left on device\n"


REFUSED = [
    (["test", "--ckpt_path", "best"], "`ModelCheckpoint` is not configured to save the best model"),
    (["fit", "--ckpt_path", ""], "--ckpt_path is empty"),
    (["check", "--trainer.devices", "x"], "trainer.devices must be a number, a list of devices, auto or -1, got 'x'"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_lightning_cannot_run_is_one_line(words, told, tmp_path, capsys):
    own = [] if words[0] == "check" else ["--trainer.default_root_dir", str(tmp_path)]
    assert main([words[0], "--config", write_recipe(tmp_path), *words[1:], *own]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("out", ["", ".", ".."])
def test_what_is_written_needs_a_name_of_its_own(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.randn(3, 3)}, "a.pt")
    for command in ("prune", "export"):
        assert main([command, "a.pt", "--out", out, "--overwrite"]) == 2
        assert f"--out {out!r} has no name of its own" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_budget_is_said_once(tmp_path, capsys):
    torch.save({"a.weight": torch.randn(3, 3)}, tmp_path / "a.pt")
    words = ["prune", str(tmp_path / "a.pt"), "--out", str(tmp_path / "o.safetensors")]
    assert main([*words, "--beta", "0.5", "--density", "0.5"]) == 2
    assert "--beta 0.5 and --density 0.5 both say how much is kept" in capsys.readouterr().err


def test_fit_trains_saves_its_recipe_and_never_overwrites_it(tmp_path, capsys):
    folder = tmp_path / "fit"
    words = ["fit", "--config", write_recipe(tmp_path), "--trainer.default_root_dir", str(folder)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    ends = shown[shown.index("EMP at step 2") :]
    for line in (
        f"\nrun: {folder}\n",
        f"\ntrajectory: {folder / 'emp_trajectory.jsonl'}\n",
        f"\ncheckpoint: {folder / 'checkpoints' / 'last.ckpt'}\n",
        f"\n  emp report {folder}\n",
        f"\n  emp inspect {folder / 'checkpoints' / 'last.ckpt'}\n",
    ):
        assert line in ends
    saved = (folder / "config.yaml").read_text()
    rows = (folder / "emp_trajectory.jsonl").read_text()
    capsys.readouterr()
    assert main(words) == 2
    assert "an earlier run lives in this folder" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == saved
    assert (folder / "emp_trajectory.jsonl").read_text() == rows
    assert main([*words, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0  # goes on, as a restart does
    assert [json.loads(row)["step"] for row in (folder / "emp_trajectory.jsonl").read_text().splitlines()] == [2, 4]
    assert "max_epochs: 2" in (folder / "config.yaml").read_text()
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    assert main([*words[:-1], str(tmp_path / "other"), "--ckpt_path", checkpoint, "--trainer.max_epochs", "3"]) == 0
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


def test_a_checkpoint_to_go_on_from_is_looked_at_first(tmp_path, capsys):
    words = ["fit", "--config", write_recipe(tmp_path), "--trainer.default_root_dir", str(tmp_path / "fit")]
    assert main([*words, "--ckpt_path", str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt does not exist" in capsys.readouterr().err
    (tmp_path / "text.ckpt").write_text("hello")
    assert main([*words, "--ckpt_path", str(tmp_path / "text.ckpt")]) == 2
    assert "text.ckpt is text, which holds no weights" in capsys.readouterr().err
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    assert main([*words, "--ckpt_path", str(tmp_path / "weights.pt")]) == 2
    message = capsys.readouterr().err
    assert "weights.pt is no checkpoint of Lightning" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "fit").exists()


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    words = ["test", "--config", write_recipe(tmp_path)]
    other = {"state_dict": {"layer.weight": torch.ones(2)}, "pytorch-lightning_version": "2.5.2"}
    torch.save({**other, "epoch": 0, "global_step": 0, "loops": {}}, tmp_path / "other.ckpt")
    assert main([*words, "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("emp: the checkpoint does not fit the recipe's ImageClassification: ")
    assert 'Missing key(s) in state_dict: "model.cls_token"' in message


def test_names_in_a_file_are_shown_as_they_are(tmp_path, capsys):
    names = ["[/x].weight", "[red].weight", "layer[0].weight", "a\x1b[31mb.weight"]
    torch.save({name: torch.randn(3, 3) for name in names}, tmp_path / "odd.pt")
    out = tmp_path / "m[lr=1].safetensors"
    assert main(["inspect", str(tmp_path / "odd.pt")]) == 0
    assert main(["prune", str(tmp_path / "odd.pt"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for name in names[:3]:
        assert shown.count(f"\n{name} ") == 2
    assert shown.count("\na\\x1b[31mb.weight ") == 2
    assert f"{out}: 4 tensors" in shown
    assert main(["inspect", "a\x1b[31m\nb.pt"]) == 2
    assert (
        capsys.readouterr().err == "emp: checkpoint a\\x1b[31m b.pt does not exist; a timm model is written timm:NAME\n"
    )


ODD = "a\x1b[31m[x][red]\x9b\u202e"
"""A name with markup, with what steers a terminal in one byte and in two, and with what turns the line around."""


def shows_plainly(capsys):
    """Return what was printed, without a character that steers."""
    shown = "".join(capsys.readouterr())
    assert not [c for c in shown if unicodedata.category(c)[0] == "C" and c != "\n"]
    return shown


def test_no_name_steers_the_terminal(tmp_path, capsys):
    folder = tmp_path / ODD
    folder.mkdir()
    file, name = folder / f"{ODD}.pt", f"{ODD}.weight"
    torch.save({name: torch.randn(3, 3)}, file)
    assert main(["inspect", str(file), "--json", str(folder / "rows.json")]) == 0
    assert json.loads((folder / "rows.json").read_text())["tensors"][0]["name"] == name
    for words in (["prune", str(file)], ["export", str(file)]):
        assert main([*words, "--out", str(folder / words[0])]) == 0
        assert [*load_file(folder / words[0] / "model.safetensors")] == [name]
        assert main(["inspect", str(folder / words[0])]) == 0
        assert main([*words, "--out", str(folder / words[0])]) == 2
        assert main([*words, "--out", str(folder / words[0]), "--overwrite"]) == 0
    assert main(["inspect", str(folder / "rows.json")]) == 2
    assert main(["inspect", str(file), "--include", f"{ODD}*"]) == 2
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": ODD}}))
    assert main(["inspect", str(folder)]) == 2
    torch.save({ODD: {name: torch.ones(2, 2)}, "other": {name: torch.ones(2, 2)}}, file)
    assert main(["inspect", str(file)]) == 2
    for words in (["--beta", ODD], ["--scope", ODD], [f"--{ODD}"]):
        with pytest.raises(SystemExit):
            main(["inspect", str(file), *words])
    shown = shows_plainly(capsys)
    assert r"a\x1b[31m[x][red]\x9b\u202e.weight" in shown
    assert "emp: warning" not in shown


def test_a_warning_is_one_line_without_code(tmp_path, capsys, monkeypatch):
    def warn(words):  # as the interpreter shows a warning: pytest has its own way
        sys.stderr.write(warnings.formatwarning(UserWarning(f"beware\nof {words[0]}"), UserWarning, "a.py", 1, "code"))

    monkeypatch.setitem(COMMANDS, "inspect", warn)
    before = warnings.formatwarning
    assert main(["inspect", ODD]) == 0
    assert capsys.readouterr().err == "emp: warning: beware of a\\x1b[31m[x][red]\\x9b\\u202e\n"
    assert warnings.formatwarning is before


def test_the_same_warning_is_shown_once_in_a_command(capsys, monkeypatch):
    def warn(_):
        for _ in range(3):
            with warnings.catch_warnings():  # as a study does for each training, which forgets what was said
                warnings.warn("advice of a host", stacklevel=1)

    monkeypatch.setitem(COMMANDS, "inspect", warn)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: sys.stderr.write(f"{message}\n"))
    for _ in range(2):
        assert main(["inspect"]) == 0
        assert capsys.readouterr().err == "advice of a host\n"


def test_on_a_terminal_a_word_comes_before_the_imports_and_from_the_first_rank_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["inspect", f"{ODD}.pt"]) == 2
    first, _ = capsys.readouterr().err.splitlines()
    assert first == r"emp inspect: reading a\x1b[31m[x][red]\x9b\u202e.pt ..."
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", "none.pt"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


PARSERS = {
    "check": check_parser, "compare": compare_parser, "sweep-beta": sweep_parser, "compare-criteria": criteria_parser,
    "violations": violations_parser, "gates": gates_parser, "submit": submit_parser, "report": report_parser,
    "recipes": recipes_parser, "inspect": inspect_parser, "prune": prune_parser, "export": export_parser,
    "perplexity": perplexity_parser, "tokenize": tokenize_parser,
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_its_examples_are_commands_of_recipes_that_come_along(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    parser = PARSERS.get(command)
    shown = LIGHTNING_HELP[command] if parser is None else parser().format_help()
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.findall(rf"^  emp ({command}\b.*)$", shown.replace("\\\n", ""), flags=re.MULTILINE)
    assert examples
    for _, *words in map(shlex.split, examples):
        with_files(words)  # raises where there is no such recipe
        if parser is not None:
            options, more = parser().parse_known_args(words)
            given = getattr(options, "data", None) or getattr(options, "config", None) or []
            assert all(find_recipe(one) for one in ([given] if isinstance(given, str) else given))
            assert all(word.startswith(("--trainer.", "--study.", "--data.", "--config")) for word in more[::2])


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["prune", "timm:resnet10t", "--out", str(tmp_path / "out.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "pip install 'emp-callbacks[study]'" in message
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


def test_what_a_recipe_names_may_lie_in_the_current_folder_and_hides_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emp", "--version"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert main() == 0
    assert sys.path[-1] == str(tmp_path)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"emp {__version__}\n"


@pytest.mark.parametrize("command", LIGHTNING_HELP)
def test_what_needs_a_recipe_says_so(command, capsys):
    assert main([command]) == 2
    assert f"name a recipe: emp {command} --config quickstart" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["comparee"]) == 2
    assert "did you mean 'compare'" in capsys.readouterr().err


STOPPED = """
import os, pathlib, signal, sys, threading, time
from emp_callbacks.cli.main import COMMANDS, main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without one
recipe, folder = sys.argv[1], pathlib.Path(sys.argv[2])


def stop_when(exists, number):
    def wait():
        while not exists.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def fit(name, number):
    run = folder / name
    stop_when(run / "emp_trajectory.jsonl", number)
    return main(["fit", "--config", recipe, "--trainer.max_epochs", "100000", "--trainer.default_root_dir", str(run)])


def inspect(_):
    stop_when(folder, signal.SIGTERM)
    time.sleep(60)


COMMANDS["inspect"] = inspect
print(fit("terminated", signal.SIGTERM), fit("interrupted", signal.SIGINT), main(["inspect"]), "codes")
"""


@pytest.mark.processes
def test_a_real_signal_ends_a_command_with_a_code_that_schedulers_believe(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    words = [sys.executable, "-c", STOPPED, write_recipe(tmp_path), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "143 130 143 codes", done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("emp: stopped")]
    go_on = "emp: stopped: training did not finish; add --ckpt_path last to go on from its last checkpoint"
    assert said == [go_on, go_on, "emp: stopped: inspect did not finish; run the same command again"]


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_the_signal_before_a_time_limit_ends_no_command_that_has_nothing_to_save(command, monkeypatch):
    during = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setitem(COMMANDS, command, lambda _: during.append(signal.getsignal(signal.SIGUSR1)))
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        assert main([command]) == 0
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert during == [signal.SIG_DFL if command == "fit" else signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("lightning", "code"), [(SIGTERMException(), 143), (KeyboardInterrupt(), 130)])
def test_a_study_that_lightning_ended_says_how_far_it_came_and_by_which_signal(lightning, code, monkeypatch, capsys):
    def stop(_):
        try:
            raise lightning
        except BaseException as error:
            raise StudyInterrupted(1, 2) from error

    monkeypatch.setitem(COMMANDS, "compare", stop)
    assert main(["compare"]) == code
    assert capsys.readouterr().err.startswith("emp: interrupted after 1 of 2 runs; run the same command")


@pytest.mark.processes
def test_help_does_not_import_lightning():
    code = (
        "import sys; from emp_callbacks.cli.main import COMMANDS, main; main(['--help']);"
        " sys.exit('pytorch_lightning' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_prunes_nothing_says_so(tmp_path, capsys):
    torch.save({"a.weight": torch.ones(4, 4)}, tmp_path / "a.pt")
    words = ["prune", str(tmp_path / "a.pt"), "--out", str(tmp_path / "o.safetensors"), "--overwrite"]
    assert main(words) == 0
    assert "nothing is pruned: all 16 weights are kept" in capsys.readouterr().out
    assert main([*words, "--density", "0.5"]) == 0
    assert "nothing is pruned" not in capsys.readouterr().out


def test_a_layer_that_keeps_next_to_nothing_is_one_note_of_inspect_and_of_prune(tmp_path, capsys, recwarn):
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(30, 30), "b.weight": 1e-3 * torch.randn(20, 20)}
    state["b.weight"][0, :5] = 1.0
    torch.save(state, tmp_path / "state.pt")
    told = {}
    for words in (
        ["inspect", "--json", str(tmp_path / "rows.json")],
        ["prune", "--out", str(tmp_path / "out.safetensors")],
    ):
        assert main([words[0], str(tmp_path / "state.pt"), *words[1:]]) == 0
        told[words[0]] = [line for line in capsys.readouterr().out.splitlines() if "next to nothing is kept" in line]
    (note,) = told["inspect"]
    assert note.startswith("note: next to nothing is kept of b.weight (1.25 %), where all layers together keep ")
    assert told["prune"] == [note]
    assert note.removeprefix("note: ") in json.loads((tmp_path / "rows.json").read_text())["notes"]
    assert not recwarn.list  # said once
    words = ["prune", str(tmp_path / "state.pt"), "--scope", "tensor", "--min-density", "0.3"]
    assert main([*words, "--out", str(tmp_path / "wide.safetensors")]) == 0
    assert "next to nothing" not in capsys.readouterr().out
    assert int((load_file(tmp_path / "wide.safetensors")["b.weight"] != 0).sum()) == 120


def test_last_is_the_newest_checkpoint_of_all_starts(tmp_path):
    trainer = pl.Trainer(logger=CSVLogger(tmp_path, name="fit"), accelerator="cpu", enable_progress_bar=False)
    assert newest_checkpoint(trainer) is None
    for version, age in ((0, 0), (1, -100)):
        file = tmp_path / "fit" / f"version_{version}" / "checkpoints" / "a.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (age + 10_000, age + 10_000))
    assert newest_checkpoint(trainer) == str(tmp_path / "fit" / "version_0" / "checkpoints" / "a.ckpt")
