"""A study at operating points: densities, pairs with one-shot, what cheats, and what is reused."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from emp_callbacks import EMPCallback
from emp_callbacks.cli.main import main
from emp_callbacks.config import EMPConfig
from emp_callbacks.schedule import Ramp
from emp_callbacks.study import side_by_side
from emp_callbacks.study.arm_settings import Budget, arm_config, restarts_of
from emp_callbacks.study.arms import ARMS, Cell, check_arms, plan_jobs
from emp_callbacks.study.cells import CellRunner
from emp_callbacks.study.comparison import run_study
from emp_callbacks.study.horizon import Horizon, horizon_of
from emp_callbacks.study.recipe.check import RecipeError
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.report.fairness import fairness_checks
from emp_callbacks.study.rewinding import Rewinding
from emp_callbacks.study.training_cost import network_cost

ONE_SHOT = ["one_shot", "one_shot_erk"]
TRAINED = ["training_feedback", "training_freeze", "sap", "gmp", "rigl", "set", "one_shot_finetune_lr"]
FIXED = ["fixed_magnitude", "fixed_emp_shares", "random_emp_shares", "small_dense"]
SIZE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def write(folder, arms, points=(0.3,), **study):
    callback = {"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_steps": 2}}
    file = folder / "recipe.yaml"
    text = yaml.safe_dump({
        "trainer": {
            "max_epochs": 3, "accelerator": "cpu", "devices": 1, "limit_train_batches": 8, "limit_val_batches": 1,
            "callbacks": [callback],
        },
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
            "init_args": {"model": "vit_tiny_patch16_224", "model_args": SIZE, "lr": 0.01},
        },
        "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 32}},
        "study": {"seeds": [0], "arms": list(arms), "points": list(points), **study},
    })  # fmt: skip
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    file = write(folder, ["dense", *ONE_SHOT, *TRAINED, *FIXED])
    return folder, run_study(Recipe(file), folder / "out")


def labelled(results):
    return {Cell(run["arm"], run["seed"], run["point"]).label: run for run in results["runs"]}


def test_each_arm_ends_at_its_point_and_emp_has_its_own_count_beside_it(study):
    runs = labelled(study[1])
    n = runs["dense"]["n"]
    for arm in ("gmp", "rigl", "set", "one_shot_finetune_lr", "fixed_magnitude", "one_shot"):
        assert runs[f"{arm}@0.3"]["keep"] == pytest.approx(0.3 * n, abs=len(runs["dense"]["layers"])), arm
    assert runs["one_shot@0.3"]["keep"] == math.floor(0.3 * n)
    assert runs["training_feedback@0.3"]["density"] == pytest.approx(0.3, abs=0.03), "steered by beta"
    assert runs["training_freeze@0.3"]["keep"] >= math.ceil(0.3 * n), "the point is its floor"
    assert runs["training_feedback"]["density"] > 0.4
    assert {"sap", "one_shot", "training_freeze"} < runs.keys()
    assert not {"sap@0.3", "dense@0.3", "gmp"} & runs.keys()


def test_every_pruned_run_stands_beside_one_shot_at_exactly_its_density(study):
    folder, results = study
    runs = labelled(results)
    for label, run in runs.items():
        if run["arm"] in ("dense", "one_shot"):
            assert run.get("matched") is None
        else:
            assert run["matched"]["keep"] == run["keep"], label
    # By hand: the dense weights, of which so many of the highest magnitude are kept.
    run = runs["training_feedback@0.3"]
    weights = load_file(folder / "out" / "runs" / "dense-seed0.safetensors")
    names = list(run["layers"])
    values = torch.cat([weights[name].flatten().abs() for name in names])
    lowest = values.sort(descending=True).values[run["keep"] - 1]
    recipe = Recipe(folder / "recipe.yaml")
    recipe.build_bare(logger=False)
    recipe.model.load_state_dict({name: w * (w.abs() >= lowest) if name in names else w for name, w in weights.items()})
    (metrics,) = recipe.trainer.test(recipe.model, datamodule=recipe.datamodule, verbose=False)
    assert run["matched"]["metrics"]["test/accuracy"] == pytest.approx(metrics["test/accuracy"])


def test_training_stops_refreshing_where_the_healing_begins(study):
    runs = labelled(study[1])
    steps = 24
    for label, run in runs.items():
        if run["arm"] not in ("dense", "small_dense", *ONE_SHOT):
            assert max(row["step"] for row in run["trajectory"]) <= 0.75 * steps, label
    assert runs["gmp@0.3"]["refreshes"] > 3
    assert runs["one_shot_finetune_lr@0.3"]["refreshes"] == 1
    assert runs["sap"]["refreshes"] == 4


def test_layers_share_as_the_leader_does(study):
    runs = labelled(study[1])
    leader = runs["training_feedback@0.3"]
    for arm in ("fixed_emp_shares", "random_emp_shares"):
        follower = runs[f"{arm}@0.3"]
        scale = follower["density"] / leader["density"]
        for name, density in leader["layers"].items():
            assert follower["layers"][name] == pytest.approx(min(1.0, density * scale), rel=0.05, abs=0.02), name


def test_what_else_a_record_holds(study):
    runs = labelled(study[1])
    small, dense = runs["small_dense@0.3"], runs["dense"]
    assert small["differs"] == ["init", "density"]
    assert small["keep"] == pytest.approx(0.3 * dense["n"], rel=0.4)
    assert small["parameters"] < dense["parameters"]
    assert small["flops"]["dense"] == dense["flops"]["dense"] > 2 * small["flops"]["inference"]
    assert 0.3 < runs["rigl@0.3"]["explored"] < 1
    assert runs["gmp@0.3"]["explored"] is None
    assert runs["one_shot@0.3"]["flops"]["inference"] < 0.6 * dense["flops"]["dense"]
    assert runs["rigl@0.3"]["flops"]["training"] < runs["training_feedback@0.3"]["flops"]["training"]
    assert len(dense["data"]["train"]) == 64


def test_the_conditions_hold_and_every_report_is_written(study, capsys):
    folder, results = study
    assert [check.detail for check in fairness_checks(results) if not check.passed] == []
    assert main(["report", str(folder / "out")]) == 0
    assert "At equal density" in capsys.readouterr().out


# ---- cheating ---------------------------------------------------------------------------------------------------

CHEATS = {
    "Same initial weights": ["--model.init_args.model_args.embed_dim=8"],
    "Same batches in the same order": ["--data.init_args.seed=7"],
    "Same number of optimizer steps": ["--trainer.max_epochs=4"],
}


@pytest.mark.parametrize("condition", [*CHEATS, "density"])
def test_an_arm_that_cheats_is_caught(condition, tmp_path, monkeypatch):
    file = write(tmp_path, ["dense", "one_shot", "gmp"])

    def other_recipe(self, cell):
        return Recipe(self.recipe.path, CHEATS[condition]) if cell.arm == "gmp" else self.recipe

    if condition == "density":
        budget = CellRunner.budget
        monkeypatch.setattr(CellRunner, "budget", lambda self, cell: replace(budget(self, cell), density=0.5))
    else:
        monkeypatch.setattr(CellRunner, "_recipe_of", other_recipe)
    results = run_study(Recipe(file), tmp_path / "out")
    failed = {check.name: check.detail for check in fairness_checks(results) if not check.passed}
    assert any("gmp" in detail for detail in failed.values())
    wanted = "ensity" if condition == "density" else condition
    assert any(wanted in name for name in failed), failed


# ---- going on ---------------------------------------------------------------------------------------------------


def test_more_points_prune_the_dense_network_that_is_there(study, tmp_path, fits):
    file = write(tmp_path, ["dense", "one_shot"])
    first = labelled(run_study(Recipe(file), tmp_path / "out"))
    assert len(fits) == 1
    file = write(tmp_path, ["dense", "one_shot"], points=(0.3, 0.1))
    again = labelled(run_study(Recipe(file), tmp_path / "out"))
    assert len(fits) == 1, "nothing is trained again"
    assert again["one_shot@0.3"] == first["one_shot@0.3"]
    assert again["one_shot@0.1"]["batches_digest"] == first["dense"]["batches_digest"]
    assert again["one_shot@0.1"]["density"] == pytest.approx(0.1, abs=1e-3)


def test_without_the_dense_weights_a_study_still_ends(tmp_path):
    recipe = Recipe(write(tmp_path, ["dense", "one_shot", "gmp"]))
    run_study(recipe, tmp_path / "out")
    runs = tmp_path / "out" / "runs"
    (runs / "dense-seed0.safetensors").unlink()
    (runs / "gmp@0.3-seed0.json").unlink()
    again = labelled(results := run_study(recipe, tmp_path / "out"))
    assert again["gmp@0.3"].get("matched") is None
    checks = {check.name: check for check in fairness_checks(results)}
    assert all(check.passed for check in checks.values())


@pytest.mark.slow
@pytest.mark.processes
def test_side_by_side_is_what_one_after_the_other_gives(study, tmp_path):
    _, whole = study
    file = write(tmp_path, ["dense", "one_shot", "training_feedback", "gmp"])
    assert main(["compare", "--config", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    ours = labelled(json.loads((tmp_path / "out" / "results.json").read_text()))
    for label, run in ours.items():
        expected = labelled(whole)[label]
        assert (run["metrics"], run["keep"], run.get("matched")) == (
            expected["metrics"], expected["keep"], expected.get("matched")
        )  # fmt: skip


def test_what_trained_behind_another_mode_is_not_taken_up(tmp_path):
    arms = ["dense", "one_shot", "training_feedback", "fixed_magnitude"]
    run_study(Recipe(write(tmp_path, arms)), tmp_path / "out")
    arms[2] = "training_project"  # now fixed_magnitude trains in its mode
    with pytest.raises(FileExistsError, match=r"fixed_magnitude@0\.3-seed0\.json does not match"):
        run_study(Recipe(write(tmp_path, arms)), tmp_path / "out")


@pytest.mark.parametrize("stop", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_cell_that_fails_side_by_side_is_named_and_ctrl_c_says_how_to_go_on(stop, tmp_path, monkeypatch, capsys):
    def run(path, overrides, called, out, name):
        if name == "gmp@0.3:0":
            raise stop

    monkeypatch.setattr(side_by_side, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(side_by_side, "_run_cell", run)
    recipe = Recipe(write(tmp_path, ["dense", "gmp", "training_feedback"]))
    with pytest.raises(type(stop), match=r"boom|after 3 of 4 runs; run the same command again"):
        side_by_side.run_side_by_side(recipe, tmp_path / "out", 1, console=Console(width=200))
    assert ("gmp@0.3:0 failed; finished runs are kept" in capsys.readouterr().out) == isinstance(stop, RuntimeError)


# ---- settings ---------------------------------------------------------------------------------------------------

RECIPE = EMPConfig(every_n_steps=10)
HORIZON = Horizon(steps=200, epochs=4, healing=0.25)


@pytest.mark.parametrize(
    ("arm", "first", "last"),
    [
        ("training_feedback", 10, 150),
        ("one_shot_finetune", 150, 150),
        ("gmp", 30, 120),
        ("rigl", 1, 150),
        ("sap", 40, 160),
    ],
)
def test_when_each_arm_refreshes(arm, first, last):
    schedule = arm_config(arm, RECIPE, budget=Budget(point=0.1, density=0.1), horizon=HORIZON).schedule
    due = [step for step in range(1, 201) if schedule.is_due(step - 1, step)]
    assert (due[0], due[-1]) == (first, last) if arm != "rigl" else due[0] == first
    assert due[-1] <= last


def test_a_schedule_of_epochs_and_a_stop_of_the_recipes_own():
    epochs = EMPConfig(every_n_epochs=1)
    assert arm_config("training_freeze", epochs, horizon=HORIZON).stop == 3
    assert arm_config("training_freeze", EMPConfig(every_n_epochs=1, stop=4), horizon=HORIZON).stop == 4
    assert arm_config("gmp", epochs, budget=Budget(density=0.1), horizon=HORIZON).every_n_steps == 50
    assert arm_config("dense", epochs, horizon=HORIZON).stop is None
    unknown = Horizon(steps=200, epochs=None, healing=0.25)
    with pytest.raises(ValueError, match=r"every_n_epochs=1 counts epochs.*give every_n_steps"):
        arm_config("training_freeze", epochs, horizon=unknown)
    assert arm_config("training_freeze", RECIPE, horizon=unknown).stop == 150


def test_what_decides_how_much_is_kept():
    budget = Budget(point=0.1, density=0.1, n_eff_share=0.5, shares={"a": 0.2, "b": 0.05})
    settings = {
        arm: arm_config(arm, RECIPE, "training_feedback", budget, HORIZON) for arm in ARMS if arm in TRAINED + FIXED
    }
    assert settings["training_feedback"].beta == pytest.approx(0.2)
    assert (settings["training_freeze"].min_density, settings["training_freeze"].beta) == (0.1, 1.0)
    assert settings["gmp"].density == Ramp(first=1.0, last=0.1, begin=20, until=120, shape="cubic")
    assert (settings["rigl"].shares, settings["rigl"].mode, settings["rigl"].density) == ("erk", "rewire", 0.1)
    assert settings["fixed_emp_shares"].shares == {"a": 0.2, "b": 0.05}
    assert (settings["random_emp_shares"].criterion, settings["random_emp_shares"].mode) == ("random", "feedback")
    assert settings["sap"].density is None
    assert (restarts_of("sap", HORIZON), restarts_of("one_shot_finetune_lr", HORIZON)) == ([0.2, 0.4, 0.6, 0.8], [0.75])


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"points": [0.5, 1.5]}, r"study.points must be a fraction in \(0, 1\], got 1.5"),
        ({"points": [0.5, 0.5]}, "names a density twice"),
        ({"healing": 1.0}, "study.healing=1 leaves no time for pruning"),
        ({"margin": 0.0}, "study.margin must be > 0"),
        ({"arms": ["one_shot", "gmp"], "points": [0.5]}, "add dense to study.arms"),
        ({"arms": ["dense", "gmp"], "points": []}, "'gmp' takes its density from a training arm"),
    ],
)
def test_bad_points_are_refused(study, message, tmp_path, capsys):
    file = write(tmp_path, study.pop("arms", ["dense", "gmp", "training_freeze"]), **study)
    assert main(["compare", "--config", str(file), "--list-cells"]) == 2
    assert message.split("\\")[0] in capsys.readouterr().err


def test_cells_are_named_with_their_points_and_come_after_those_that_they_need():
    jobs = plan_jobs(["gmp", "fixed_emp_shares", "training_feedback", "dense", "one_shot"], [3], [0.2])
    assert [job.fit.name for job in jobs] == [
        "dense:3", "training_feedback:3", "training_feedback@0.2:3", "gmp@0.2:3", "fixed_emp_shares@0.2:3",
    ]  # fmt: skip
    check_arms(["dense", "gmp"], [0.2])


def test_a_model_without_restarts_or_widths_is_refused_before_anything_runs(tmp_path, monkeypatch):
    file = write(tmp_path, ["dense", "training_feedback", "sap"])
    with pytest.raises(RecipeError):
        Recipe(file).with_model(no_such_argument=1)

    def refuse(*_, **__):
        raise RecipeError("no key lr_restarts")

    recipe = Recipe(file)
    monkeypatch.setattr(recipe, "with_model", refuse)
    with pytest.raises(ValueError, match=r"arm 'sap' needs a model whose learning rate can begin anew, and .*Image"):
        run_study(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_long_a_recipe_trains(tmp_path):
    file = write(tmp_path, ["dense", "one_shot"])

    def horizon(*options):
        found = horizon_of(Recipe(file, options), 0.25)
        return found.steps, found.epochs, found.pruned_until

    assert horizon() == (24, 3, 18)
    assert horizon("--trainer.limit_train_batches", "0.5") == (3 * 16, 3, 36)
    assert horizon("--trainer.accumulate_grad_batches", "3") == (9, 3, 7)
    assert horizon("--trainer.max_steps", "10") == (10, 1, 8)
    assert horizon("--trainer.max_epochs", "null", "--trainer.max_steps", "18") == (18, 2, 14)
    with pytest.raises(ValueError, match="a study needs an end"):
        horizon("--trainer.max_epochs", "-1")


# ---- rewinding and cost -----------------------------------------------------------------------------------------


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append({name: value.clone() for name, value in self.state_dict().items()})
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_after_a_refresh_training_begins_anew_from_the_initial_weights_that_are_kept(tmp_path):
    task, emp = Task(), EMPCallback(every_n_steps=3, stop=3, mode="freeze", summary=False)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(30, 4)), batch_size=5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=5, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[emp, Rewinding(emp)],
    )  # fmt: skip
    trainer.fit(task, data)
    first, rewound = task.seen[0], task.seen[3]
    masks = emp.pruner.masks
    assert any(not mask.all() for mask in masks.values())
    for name, value in rewound.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue  # as the fourth step's own forward pass finds them, checked below
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(kept, first[name], 0.0)), name
    assert torch.equal(rewound["net.1.running_mean"], first["net.1.running_mean"])
    (optimizer,) = trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_the_cost_of_a_training_by_hand():
    flops = {"0": 100, "2": 20}

    def row(step, density):
        return {"step": step, "layers": [{"name": "0.weight", "density": density}]}

    rows = [row(4, 0.5), row(8, 0.1)]
    dense, half, tenth = 120.0, 70.0, 30.0
    by_hand = {
        "observe": 10 * 3 * dense,
        "project": 10 * 3 * dense,
        "freeze": 3 * (4 * dense + 4 * half + 2 * tenth),
        "feedback": 10 * dense + 2 * (4 * dense + 4 * half + 2 * tenth),
    }
    for mode, expected in by_hand.items():
        cost = network_cost(flops, rows, mode, steps=10, batch=2)
        assert cost["training"] == pytest.approx(2 * expected), mode
        assert cost["dense_training"] == 2 * 10 * 3 * dense
    assert cost["inference"] == pytest.approx(tenth)
