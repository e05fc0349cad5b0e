import errno
import fcntl
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from rich.console import Console

from emp_callbacks.cli.main import main
from emp_callbacks.config import EMPConfig
from emp_callbacks.study import comparison
from emp_callbacks.study.arms import DEFAULT_ARMS, Cell, plan_jobs
from emp_callbacks.study.comparison import StudyInterrupted, run_study
from emp_callbacks.study.folder_lock import BusyError
from emp_callbacks.study.measure import measure
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.run_store import RunStore
from emp_callbacks.study.training import _interrupts_raised


def recipe_text(**study):
    callback = {"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_epochs": 1}}
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    return yaml.safe_dump({
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 1,
            "limit_test_batches": 1,
            "callbacks": [callback],
        },
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
            "init_args": {"model": "vit_tiny_patch16_224", "model_args": size, "lr": 0.01},
        },
        "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 32}},
        "study": {"seeds": [0, 1], "healing": 0.0, **study},
    })  # fmt: skip


def write(folder, **study):
    file = folder / "recipe.yaml"
    file.write_text(recipe_text(**study))
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One finished comparison of every arm with two seeds; its folder and results."""
    folder = tmp_path_factory.mktemp("study")
    recipe = Recipe(write(folder))
    return folder, run_study(recipe, folder / "out")


def by_arm(results, seed):
    return {run["arm"]: run for run in results["runs"] if run["seed"] == seed}


def test_every_arm_has_every_seed_and_the_files_hold_the_results(study):
    folder, results = study
    fitting = [arm for arm in DEFAULT_ARMS if not arm.endswith("_dynamic")]  # those are for features
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(a, s) for a in fitting for s in (0, 1)]
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert results["study"]["reference"] == "one_shot"
    assert len(list((folder / "out" / "runs").glob("*.json"))) == 14
    assert not list((folder / "out").rglob("*.tmp"))


def test_arms_of_a_seed_share_weights_batches_and_steps_and_seeds_differ(study):
    _, results = study
    digests = []
    for seed in (0, 1):
        runs = by_arm(results, seed).values()
        kinds = {(run["init_digest"], run["batches_digest"], run["steps"]) for run in runs}
        assert len(kinds) == 1
        digests.append(kinds.pop())
    assert digests[0][2] == 6
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1]


def test_densities_are_matched_and_measured_on_the_final_weights(study):
    _, results = study
    for seed in (0, 1):
        runs = by_arm(results, seed)
        leader = runs["training_feedback"]
        assert runs["dense"]["density"] == 1.0
        assert leader["keep"] == leader["trajectory"][-1]["keep"]
        for name in ("fixed_magnitude", "random"):
            assert abs(runs[name]["keep"] - leader["keep"]) <= 1
            assert len(runs[name]["trajectory"]) == 2
        assert runs["one_shot"]["keep"] == runs["one_shot"]["trajectory"][-1]["keep"]
        assert runs["one_shot"]["keep"] == int(runs["dense"]["n_eff"])
        assert runs["training_freeze"]["keep"] < leader["keep"]


def test_one_shot_is_the_dense_run_pruned(study):
    _, results = study
    runs = by_arm(results, 0)
    assert runs["one_shot"]["curve"] == runs["dense"]["curve"]
    assert [row["mode"] for row in runs["dense"]["trajectory"]] == ["observe", "observe"]
    assert runs["one_shot"]["metrics"] != runs["dense"]["metrics"]
    assert [point["epoch"] for point in runs["dense"]["curve"]] == [0, 1]
    assert [point["step"] for point in runs["dense"]["curve"]] == [3, 6]


def test_one_training_serves_dense_and_one_shot(tmp_path, fits):
    run_study(Recipe(write(tmp_path, arms=["one_shot", "dense"], seeds=[3])), tmp_path / "out")
    assert len(fits) == 1


def test_a_second_call_trains_nothing(study, fits):
    folder, results = study
    console = Console(record=True, width=120, file=io.StringIO())
    again = run_study(Recipe(folder / "recipe.yaml"), folder / "out", console=console)
    assert fits == []
    assert again == results
    assert "reused 14 of 14" in console.export_text()


def test_more_seeds_and_other_presentation_reuse_what_is_there(tmp_path, fits):
    recipe = write(tmp_path, arms=["dense"], seeds=[0])
    run_study(Recipe(recipe), tmp_path / "out")
    more = [
        "--study.seeds",
        "[0,1]",
        "--study.arms",
        "[dense,training_freeze]",
        "--trainer.log_every_n_steps",
        "7",
    ]
    results = run_study(Recipe(recipe, more), tmp_path / "out")
    assert len(results["runs"]) == 4
    assert len(fits) == 4


@pytest.mark.parametrize(
    "change",
    [
        ["--model.init_args.lr", "0.02"],
        ["--trainer.max_epochs", "3"],
        ["--trainer.callbacks.init_args.beta", "2"],
    ],
)
def test_another_recipe_is_refused_and_nothing_changes(study, change, capsys, fits):
    folder, _ = study
    words = ["compare", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "out"), *change]
    before = (folder / "out" / "config.yaml").read_text()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "different recipe" in message
    assert "--overwrite" in message
    assert (folder / "out" / "config.yaml").read_text() == before
    assert fits == []


def test_overwrite_moves_the_old_results_aside(tmp_path, capsys):
    out, recipe = tmp_path / "out", write(tmp_path, arms=["dense"], seeds=[0])
    words = ["compare", "--config", str(recipe), "--out", str(out), "--overwrite"]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(words[:-1]) == 2
    assert "was not written by emp" in capsys.readouterr().err
    assert main(words) == 0
    assert (tmp_path / "out.old-1" / "notes.txt").read_text() == "mine"
    assert main(words) == 0
    assert (tmp_path / "out.old-2" / "results.json").is_file()
    assert (out / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "[1/1] dense seed 0: test/accuracy" in shown
    assert "moved the earlier contents" in shown


def test_a_file_in_place_of_the_folder_is_refused_before_training(tmp_path, capsys, fits):
    recipe = write(tmp_path)
    for out in (recipe, recipe / "below"):
        assert main(["compare", "--config", str(recipe), "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert fits == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:100], "is damaged"),
        (lambda text: text.replace('"density": 1.0', '"density": 0.9'), "is damaged or was edited"),
        (lambda text: text.replace('"steps"', '"step"'), "is damaged or was edited"),
        (lambda text: text.replace('"content_digest"', '"digest"'), "has no digest of its content"),
        (lambda text: "[]", "a list, not a mapping"),
    ],
    ids=["cut", "another figure", "another name", "no digest", "no mapping"],
)
def test_a_run_file_that_was_changed_is_named(damage, words, study, fits):
    folder, _ = study
    broken = folder / "out" / "runs" / "dense-seed0.json"
    whole = broken.read_text()
    assert damage(whole) != whole
    broken.write_text(damage(whole))
    try:
        with pytest.raises(ValueError, match=rf"dense-seed0.json .*{words}.*remove it, and that run is done again"):
            run_study(Recipe(folder / "recipe.yaml"), folder / "out")
    finally:
        broken.write_text(whole)
    assert fits == []


def test_a_second_command_in_the_folder_ends_at_once(study, capsys, fits):
    folder, results = study
    words = ["compare", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
    first = RunStore(folder / "out", results["runs"][0]["recipe_digest"])
    first.open({})
    for more in ([], ["--only", "dense:0"], ["--overwrite"]):
        assert main([*words, *more]) == 2
        message = capsys.readouterr().err
        assert "another emp command works in" in message
        assert message.count("\n") == 1
    first.close()
    assert main(words) == 0
    assert fits == []
    assert not (folder / "out.old-1").exists()


def test_cells_that_run_alone_run_side_by_side_each_once(tmp_path):
    out = tmp_path / "out"
    one, other, same, all_ = (RunStore(out, "digest") for _ in range(4))
    one.open({}, only=[Cell("dense", 0)])
    other.open({}, only=[Cell("dense", 1)])
    for store, only in ((same, [Cell("dense", 0)]), (all_, [])):
        with pytest.raises(
            BusyError, match=rf"works in .*out: .* on {platform.node()}, process {os.getpid()}, since 20"
        ):
            store.open({}, only=only)
        store.close()
    one.close()
    same.open({}, only=[Cell("dense", 0)])
    for store in (same, other):
        store.close()
    all_.open({})
    all_.close()
    assert [path.name for path in (out / ".locks").iterdir()] == ["turn"]


def test_a_file_system_without_locks_does_not_stop_a_study(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunStore(tmp_path / "out", "digest").open({})


class StopAt(pl.Callback):
    """Raises KeyboardInterrupt in the given training, as Ctrl-C does."""

    started = 0
    stop_in = 2

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 1:
            StopAt.started += 1
        if StopAt.started == StopAt.stop_in and trainer.global_step == 2:
            raise KeyboardInterrupt


def test_an_interrupted_study_keeps_finished_runs_and_goes_on(tmp_path, monkeypatch, fits):
    monkeypatch.setattr(StopAt, "started", 0)
    handler = signal.getsignal(signal.SIGINT)
    recipe = Recipe(write(tmp_path, arms=["dense", "one_shot", "training_feedback"], seeds=[0]))
    build = recipe.build
    monkeypatch.setattr(recipe, "build", lambda edit, **kw: build(lambda own: [*edit(own), StopAt()], **kw))
    with pytest.raises(StudyInterrupted, match="interrupted after 2 of 3 runs; run the same command again"):
        run_study(recipe, tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is handler
    finished = sorted(path.name for path in (tmp_path / "out" / "runs").glob("*.json"))
    assert finished == ["dense-seed0.json", "one_shot-seed0.json"]
    assert not (tmp_path / "out" / "results.json").exists()
    results = run_study(Recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert len(results["runs"]) == 3
    assert len(fits) == 3


@pytest.mark.parametrize(("interrupted", "raised"), [(True, KeyboardInterrupt), (False, SystemExit)])
def test_an_exit_of_lightning_becomes_an_interrupt_only_if_it_was_one(interrupted, raised):
    handler = signal.getsignal(signal.SIGINT)

    def stop_as_lightning_does():
        with _interrupts_raised(SimpleNamespace(interrupted=interrupted)):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)

    with pytest.raises(raised):
        stop_as_lightning_does()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.processes
def test_a_real_ctrl_c_ends_with_130(tmp_path):
    recipe, out = write(tmp_path, arms=["dense", "training_freeze"], seeds=[0]), tmp_path / "out"
    reached = tmp_path / "reached"
    script = f"""
import signal, sys, time
from pathlib import Path
from emp_callbacks.cli.main import main
from emp_callbacks.study.training_record import TrainingRecord

def wait(self, trainer, module):
    if Path({str(out / "runs" / "training_freeze-seed0")!r}).is_dir():
        Path({str(reached)!r}).touch()
        time.sleep(30)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without one
TrainingRecord.on_train_epoch_end = wait
sys.exit(main(["compare", "--config", {str(recipe)!r}, "--out", {str(out)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 200
    while not reached.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=200)
    assert process.returncode == 130
    assert message.strip().endswith("emp: interrupted after 1 of 2 runs; run the same command again to continue")
    assert "Traceback" not in message
    assert [path.name for path in (out / "runs").glob("*.json")] == ["dense-seed0.json"]


def test_report_writes_the_pages_again(study, capsys):
    folder, _ = study
    assert main(["report", str(folder / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (folder / "out" / "report.html").is_file()


def test_an_unlogged_metric_names_the_nearest(tmp_path):
    recipe = Recipe(write(tmp_path, arms=["dense"], seeds=[0], metric="test/acuracy"))
    with pytest.raises(ValueError, match="did you mean 'test/accuracy'"):
        run_study(recipe, tmp_path / "out")


def test_early_stopping_is_refused(tmp_path, fits):
    recipe = yaml.safe_load(recipe_text())
    stopping = {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss"},
    }
    recipe["trainer"]["callbacks"].append(stopping)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="EarlyStopping"):
        run_study(Recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    recipe["trainer"]["callbacks"].remove(stopping)
    recipe["trainer"]["max_time"] = "00:01:00:00"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"Timer, .*trainer\.max_time"):
        run_study(Recipe(tmp_path / "recipe.yaml"), tmp_path / "out2")
    assert fits == []


@pytest.mark.parametrize(
    ("arms", "settings", "words"),
    [
        (["dense", "training_dynamic"], {}, "arm 'training_dynamic' does not go with the recipe's EMPCallback"),
        (["one_shot_dynamic"], {"target": "neurons"}, "dynamic=True is for features, and target='neurons'"),
        (["training_feedback", "fixed_magnitude"], {"target": "features"}, "arm 'fixed_magnitude' does not go with"),
        (["dense", "training_project"], {"target": "features"}, "features have none"),
    ],
)
def test_an_arm_that_does_not_fit_is_refused_before_anything_runs(arms, settings, words, tmp_path, capsys, fits):
    recipe = yaml.safe_load(recipe_text(arms=arms))
    recipe["trainer"]["callbacks"][0]["init_args"].update(settings)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["compare", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Remove it from study.arms" in message
    assert fits == []
    assert not (tmp_path / "out").exists()


def test_the_results_hold_the_convergence(study):
    _, results = study
    found = results["convergence"]
    assert (found["metric"], found["baseline"]) == ("val/accuracy", "dense")
    assert [row["arm"] for row in found["arms"]] == [arm for arm in results["study"]["arms"] if arm != "one_shot"]
    last = [run["curve"][-1]["val/accuracy"] for run in results["runs"] if run["arm"] == "dense"]
    assert found["target"] == pytest.approx(sum(last) / 2)


def test_followers_come_after_the_arm_they_follow():
    jobs = plan_jobs(["random", "fixed_magnitude", "training_freeze", "one_shot", "dense"], [4])
    assert [[cell.arm for cell in job.cells] for job in jobs] == [
        ["dense", "one_shot"],
        ["training_freeze"],
        ["fixed_magnitude"],
        ["random"],
    ]
    assert jobs[0].fit.name == "dense:4"


def test_measure_by_hand():
    model = torch.nn.Linear(4, 2)
    model.weight.data.copy_(torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0]]))
    expected = {"density": 0.5, "n": 8, "keep": 4}
    assert measure(model, EMPConfig()) == {**expected, "n_eff": pytest.approx(64 / 18)}
    assert measure(model, EMPConfig(scope="row")) == {**expected, "n_eff": pytest.approx(1.6 + 2.0)}


def test_digest_ignores_key_order_but_no_value():
    assert comparison.digest({"a": 1, "b": 2}) == comparison.digest({"b": 2, "a": 1})
    assert comparison.digest({"a": 1}) != comparison.digest({"a": 2})


def test_a_fingerprint_covers_what_trains_a_run_and_nothing_else(tmp_path):
    file = write(tmp_path)

    def fingerprint(arm, seed, *options):
        study = comparison._Study(Recipe(file, options), tmp_path / "out", None)
        return study.runner.fingerprint(Cell(arm, seed))

    base = fingerprint("random", 0)
    assert fingerprint("random", 0, "--study.seeds", "[0]", "--trainer.enable_progress_bar", "false") == base
    others = [
        fingerprint("random", 1),
        fingerprint("fixed_magnitude", 0),
        fingerprint("random", 0, "--model.init_args.lr", "0.5"),
        fingerprint("random", 0, "--study.arms", "[training_freeze, random]"),
    ]
    assert len({base, *others}) == 5


def test_cells_run_alone_and_the_last_call_merges_them(study, fits, tmp_path, capsys):
    _, whole = study
    file = write(tmp_path, seeds=[0], arms=["dense", "one_shot", "training_feedback", "random"])
    words = ["compare", "--config", str(file), "--out", str(tmp_path / "out")]
    assert main([*words, "--list-cells"]) == 0
    assert capsys.readouterr().out.split() == ["dense:0", "training_feedback:0", "random:0"]
    assert main([*words, "--only", "random:0"]) == 2
    assert "random:0 takes its density from training_feedback:0" in capsys.readouterr().err
    assert main([*words, "--only", "dens:0"]) == 2
    assert "no cell 'dens:0' in this study; did you mean 'dense:0'?" in capsys.readouterr().err
    assert not fits
    # one-shot's cell is that of the dense training, of which it is made
    for cell, finished in (("one_shot:0", False), ("training_feedback:0", False), ("random:0", True)):
        assert main([*words, "--only", cell]) == 0
        assert (tmp_path / "out" / "results.json").exists() == finished
    assert len(fits) == 3
    assert main(words) == 0
    assert len(fits) == 3, "the merging call trains nothing"
    merged = by_arm(json.loads((tmp_path / "out" / "results.json").read_text()), 0)
    for arm, run in merged.items():
        assert run["metrics"] == by_arm(whole, 0)[arm]["metrics"]
