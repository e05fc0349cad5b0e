"""The studies that prune trained models once: rows against what the model itself does, reuse, reports, mistakes."""

import json
import math

import pytest
import torch
import yaml
from rich.console import Console
from torch.nn import functional

from emp_callbacks import emp_mask
from emp_callbacks.cli.main import main
from emp_callbacks.study.comparison import StudyInterrupted
from emp_callbacks.study.folder_lock import BusyError
from emp_callbacks.study.once import beta_sweep as sweeping
from emp_callbacks.study.once.beta_sweep import beta_sweep
from emp_callbacks.study.once.criteria_comparison import criteria_comparison, overlap
from emp_callbacks.study.once.dense_models import dense_model
from emp_callbacks.study.once.results import Harm, cases, curves
from emp_callbacks.study.once.study import run_once_study
from emp_callbacks.study.once.violation_findings import BOUNDS, is_violated, pairs_of, pruned_rows
from emp_callbacks.study.once.violations import score_shape, violations
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.report.page import write_page
from emp_callbacks.study.report.terminal import print_page
from emp_callbacks.study.run_store import read_results
from emp_callbacks.study.training import Training

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


def write(folder, name="tiny", **callback):
    init_args = {"every_n_epochs": 1, **callback}
    file = folder / f"{name}.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "max_epochs": 2,
                    "accelerator": "cpu",
                    "devices": 1,
                    "limit_train_batches": 6,
                    "limit_val_batches": 0,
                    "callbacks": [{"class_path": "emp_callbacks.EMPCallback", "init_args": init_args}],
                },
                "model": {
                    "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
                    "init_args": {"model": "vit_tiny_patch16_224", "model_args": VIT, "lr": 0.02},
                },
                "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 64}},
                "study": {"seeds": [0, 1]},
            }
        )
    )
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe and its trained models, which all tests share."""
    home = tmp_path_factory.mktemp("once")
    write(home)
    return home


def run(study, folder, out=None, **settings):
    recipes = [Recipe(folder / "tiny.yaml")]
    return run_once_study(study, recipes, folder / (out or study.command), models=folder / "models", **settings)


@pytest.fixture(scope="module")
def sweep(folder):
    return run(beta_sweep(), folder)


@pytest.fixture(scope="module")
def compared(folder):
    return run(criteria_comparison(targets=["weights", "heads"], batches=3), folder)


@pytest.fixture(scope="module")
def measured(folder):
    return run(violations(betas=[0.5, 1.0, 3.0], batches=2, probes=4), folder)


def dense(folder, seed=0):
    return dense_model(Recipe(folder / "tiny.yaml"), seed, folder / "models", lambda *_: None)


# ---- trained models -------------------------------------------------------------------------------------------------


def test_models_are_trained_once_for_all_studies_and_what_is_pruned_does_not_matter(folder, sweep, compared, fits):
    again = dense(folder)
    assert again.reused
    write(folder, "other", target="heads", beta=0.5)
    other = (folder / "other.yaml").rename(folder / "kept.yaml")
    kept = dense_model(Recipe(other), 0, folder / "models", lambda *_: None)
    assert not kept.reused  # models go by the recipe's name, too
    assert len(fits) == 1
    assert all(torch.equal(again.weights[name], kept.weights[name]) for name in kept.weights)
    assert again.metrics == kept.metrics
    changed = Recipe(folder / "tiny.yaml", ["--model.init_args.lr", "0.03"])
    assert not dense_model(changed, 0, folder / "models", lambda *_: None).reused
    assert len(list((folder / "models").glob("tiny-*-seed0.pt"))) == 2


def test_a_damaged_model_is_named(folder, sweep, tmp_path):
    file = next((folder / "models").glob("tiny-*-seed1.pt"))
    target = tmp_path / file.name
    target.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"seed1.pt is damaged .*\n?.*trained again"):
        dense_model(Recipe(folder / "tiny.yaml"), 1, tmp_path, lambda *_: None)


# ---- sweep-beta -----------------------------------------------------------------------------------------------------


def test_rows_are_what_pruning_by_hand_does(folder, sweep):
    assert [(row["seed"], row["beta"]) for row in sweep["rows"]] == [
        (seed, beta) for seed in (0, 1) for beta in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    ]
    model = dense(folder)
    module = model.training.model
    for row in sweep["rows"][:6]:
        module.load_state_dict(model.weights)
        names = [n for n, p in module.named_parameters() if p.ndim >= 2 and n.endswith("weight") and "norm" not in n]
        weights = [dict(module.named_parameters())[name] for name in names]
        mask = emp_mask(torch.cat([w.detach().reshape(-1) for w in weights]), row["beta"])
        assert (row["n"], row["keep"]) == (mask.numel(), int(mask.sum()))
        with torch.no_grad():
            for weight, part in zip(weights, torch.split(mask, [w.numel() for w in weights]), strict=True):
                weight.mul_(part.view_as(weight))
        assert row["after"] == pytest.approx(model.training.test()["test/accuracy"])
        assert row["before"] == model.metrics["test/accuracy"]
        assert row["tight_mass_bound"] <= row["preserved_mass"]
    densities = [row["density"] for row in sweep["rows"][:6]]
    assert densities == sorted(densities)
    assert densities[0] < 0.5


def test_a_second_call_measures_nothing_and_a_third_seed_only_itself(folder, sweep, fits, monkeypatch):
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(sweeping, "outcome", None)
    again = run(beta_sweep(), folder, console=console)
    assert again["rows"] == sweep["rows"]
    assert "tiny seed 1: measured earlier" in console.export_text()
    assert fits == []


def test_other_settings_in_the_same_folder_are_refused(folder, sweep):
    with pytest.raises(FileExistsError, match="different recipe"):
        run(beta_sweep(betas=[1.0]), folder)
    before = (folder / "sweep-beta" / "results.json").read_text()
    run(beta_sweep(tolerance=3.0), folder)  # a matter of reading, not of measuring
    assert json.loads((folder / "sweep-beta" / "results.json").read_text())["rows"] == json.loads(before)["rows"]


def test_the_report_and_its_picture_can_be_written_again(folder, sweep, capsys):
    out = folder / "sweep-beta"
    page = beta_sweep().page(read_results(out / "results.json"))
    write_page(page, out, sweep)
    first = (out / "report.html").read_text()
    assert (out / "sweep_beta.png").read_bytes()[:4] == b"\x89PNG"
    assert "beta = 1 is the cliff" in first
    assert "http" not in first.replace("http-equiv", "")
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert "Where it falls" in capsys.readouterr().out


def curve(changes, higher=True, metric="test/accuracy", seeds=(0, 1)):
    rows = [
        {
            "model": "m", "seed": seed, "target": "weights", "criterion": "magnitude", "scope": "global", "beta": beta,
            "n": 100, "n_eff_fraction": 0.6, "density": min(1.0, 0.6 * beta), "before": 0.9,
            "after": 0.9 + change / 100,
        }
        for beta, change in changes.items()
        for seed in seeds
    ]  # fmt: skip
    model = {"arm": "m", "metric": metric, "higher_is_better": higher}
    (found,) = curves({"models": [model], "rows": rows})
    return found


@pytest.mark.parametrize(
    ("changes", "least", "steepest", "cliff"),
    [
        ({0.5: -9, 0.75: -2, 1.0: -0.3, 1.25: -0.1, 2.0: 0.0}, 1.0, (0.5, 0.75), True),
        ({0.5: -9, 0.75: -0.4, 1.0: -0.3, 1.25: 0.1, 2.0: 0.0}, 0.75, (0.5, 0.75), False),
        ({0.5: -9, 0.75: -8, 1.0: -2, 1.25: -0.1, 2.0: 0.0}, 1.25, (0.75, 1.0), False),
        ({0.5: -9, 1.0: -2, 1.25: 0.0}, 1.25, (0.5, 1.0), False),  # -14 and -8 for each unit of beta
        ({0.5: -5, 1.0: -2, 1.25: 0.0}, 1.25, (1.0, 1.25), False),  # -6 and -8
        ({0.5: 1, 1.0: -3, 1.25: 0}, 1.25, (1.0, 1.25), False),  # unharmed below, by luck, does not count
        ({0.5: -9, 1.0: -3, 2.0: -1}, None, (0.5, 1.0), False),
    ],
)
def test_where_a_curve_falls(changes, least, steepest, cliff):
    found = curve(changes)
    assert found.least_tolerated(0.5) == least
    assert found.steepest() == steepest
    assert found.is_cliff(0.5) is cliff


def test_harm_has_the_metrics_own_direction_and_unit():
    accuracy, perplexity = Harm(metric="test/accuracy", higher_is_better=True), Harm(metric="p", higher_is_better=False)
    assert accuracy.of(accuracy.change(0.9, 0.88)) == pytest.approx(2.0)
    assert perplexity.of(perplexity.change(10.0, 11.0)) == pytest.approx(10.0)
    assert (accuracy.unit, perplexity.unit) == ("points", "%")


def test_another_target_is_swept_with_its_own_criterion(folder, sweep):
    found = run(beta_sweep(betas=[0.5, 1.0], overrides={"target": "heads", "criterion": "taylor"}), folder, "heads")
    assert {(row["target"], row["criterion"], row["scope"], row["n"]) for row in found["rows"]} == {
        ("heads", "taylor", "global", 4)
    }


# ---- compare-criteria -----------------------------------------------------------------------------------------------


def test_every_criterion_that_fits_is_compared(compared):
    found = {case.target: case for case in cases(compared)}
    assert set(found["weights"].rows) == {"magnitude", "taylor", "saliency", "wanda", "random"}
    assert set(found["heads"].rows) == {
        "weight_norm", "taylor", "saliency", "activation", "output_norm", "random"
    }  # fmt: skip
    for case in found.values():
        assert all([row["seed"] for row in rows] == [0, 1] for rows in case.rows.values())
    wanda = found["weights"].rows["wanda"][0]
    assert len(wanda["certified"]) == len(wanda["measured"]) > 5
    assert all(m <= c for c, m in zip(wanda["certified"], wanda["measured"], strict=True))
    assert found["weights"].rows["taylor"][0]["loss_change_bound"] > 0
    assert found["weights"].rows["magnitude"][0]["loss_change_bound"] is None


def test_overlaps_are_those_of_the_masks(folder, compared):
    model = dense(folder)
    flat = []
    for criterion in ("magnitude", "random"):
        config = model.training.recipe_config.once(criterion=criterion, density=0.5, evidence_steps=3)
        pruner = model.pruner(config)
        pruner.refresh()
        pruner.finalize()
        flat.append(torch.cat([mask.reshape(-1) for mask in pruner.masks.values()]))
    (row,) = [r for r in compared["rows"] if (r["seed"], r["criterion"], r["target"]) == (0, "random", "weights")]
    both, either = int((flat[0] & flat[1]).sum()), int((flat[0] | flat[1]).sum())
    assert row["overlaps"]["magnitude"]["matched"]["jaccard"] == pytest.approx(both / either)
    assert abs(row["overlaps"]["magnitude"]["matched"]["jaccard"] - 1 / 3) < 0.05  # as independent masks


def test_overlap_by_hand():
    one, other = torch.tensor([True, True, True, False]), torch.tensor([True, True, False, False])
    assert overlap(one, other)["jaccard"] == pytest.approx(2 / 3)
    assert overlap(one, other)["chance"] == pytest.approx(0.375 / (0.75 + 0.5 - 0.375))
    nothing = torch.zeros(4, dtype=torch.bool)
    assert overlap(nothing, nothing)["jaccard"] == 1.0


def test_a_criterion_that_cannot_score_a_model_is_left_out(folder, compared):
    neurons = run(criteria_comparison(targets=["neurons"], batches=1), folder, "neurons", seeds=[0])
    assert "bn_scale" not in {row["criterion"] for row in neurons["rows"]}  # a Vision Transformer has no batch norm
    page = criteria_comparison().page(neurons)
    assert any("does not discriminate" in warning for warning in page.warnings)


def test_the_page_of_criteria(folder, compared, tmp_path):
    page = criteria_comparison().page(compared)
    written = write_page(page, tmp_path, compared).read_text()
    assert (tmp_path / "compare_criteria.png").is_file()
    assert "tiny, heads: N_eff / N is weight_norm" in written
    assert "Is a smaller N_eff the sign of a better criterion?" in written
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_page(page, console)
    assert "Overlap of the masks" in console.export_text()


# ---- violations -----------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_first_batches(folder, measured):
    model = dense(folder)
    with model.training.batches(2) as (batches, _):
        losses = [float(functional.cross_entropy(model.training.model(x), y).detach()) for x, y in batches]
    for row in measured["rows"]:
        if row["seed"] == 0:
            assert row["loss_before"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert row["change"] == pytest.approx(row["loss_after"] - row["loss_before"])


def test_theorems_hold_and_what_nothing_prunes_is_not_counted(measured):
    rows = pruned_rows(measured)
    assert 10 < len(rows) < len(measured["rows"]) == 2 * 5 * 3
    for name in ("mass", "tight_mass", "wanda", "taylor"):
        found = pairs_of(rows, name)
        assert found
        assert not any(is_violated(name, value, bound) for _, value, bound in found), name
    assert {row["criterion"] for row, *_ in pairs_of(rows, "wanda")} == {"wanda"}
    assert all(row["beta"] == 1.0 for row, *_ in pairs_of(rows, "mass"))


def test_what_counts_as_violated():
    assert set(BOUNDS) >= {"mass", "tight_mass", "distance", "asymptotic", "inverse_trace", "taylor"}
    assert is_violated("mass", measured=0.7, bound=0.71)
    assert not is_violated("mass", measured=0.71, bound=0.7)
    assert is_violated("distance", measured=0.71, bound=0.7)
    assert not is_violated("distance", measured=0.7, bound=0.7)


def test_a_broken_bound_is_found_and_explained(measured, tmp_path):
    page = violations().page(measured)
    written = write_page(page, tmp_path, measured).read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"violations.png", "violations_why.png"}
    assert "Mass bounds: 0 of" in page.headline
    broken = json.loads(json.dumps(measured))
    for row in broken["rows"]:
        row["preserved_mass"] = 0.0
    assert "Mass bounds: 0 of" not in violations().page(broken).headline
    assert "of the" in written


def test_the_shape_of_scores_by_hand():
    shape = score_shape({"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([0.0, 8.0])})
    assert shape["gini"] == pytest.approx(0.75)
    assert shape["cv"] == pytest.approx(math.sqrt(3))  # N_eff / N = 1 / (1 + 3)
    assert shape["top_percent"] == 1.0
    torch.manual_seed(0)
    normal = score_shape({"a": torch.randn(20_000).abs()})
    assert normal["kurtosis"] == pytest.approx(0.87, abs=0.15)  # half-normal
    assert score_shape({"a": torch.zeros(5)}) == {"cv": 0.0, "kurtosis": 0.0, "gini": 0.0, "top_percent": 0.0}
    sampled = score_shape({"a": torch.arange(1000.0)}, most=100)
    assert sampled["gini"] == pytest.approx(score_shape({"a": torch.arange(1000.0)})["gini"], abs=0.02)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_a_command_ends_with_its_report(folder, sweep, capsys):
    words = ["--config", str(folder / "tiny.yaml"), "--out", str(folder / "cli"), "--models", str(folder / "models")]
    assert (
        main(["violations", *words, "--seeds", "0", "--criteria", "magnitude", "--betas", "1", "--batches", "1"]) == 0
    )
    shown = capsys.readouterr().out
    assert "[1/1] tiny seed 0: test/accuracy" in shown
    assert f"report: {folder / 'cli' / 'report.html'}" in shown
    assert json.loads((folder / "cli" / "results.json").read_text())["command"].startswith("emp violations --config")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep-beta", "--betas", "0"], "beta must be a finite number > 0"),
        (["sweep-beta", "--tolerance", "0"], "tolerance must be > 0"),
        (["sweep-beta", "--target", "head"], "target must be one of"),
        (["compare-criteria", "--density", "1.5"], "density must be a fraction"),
        (["compare-criteria", "--targets", "features"], "masked in the forward pass"),
        (["violations", "--criteria", "magnitud"], "criterion 'magnitud' is unknown"),
        (["violations", "--criteria", "weight_norm"], "does not fit target 'weights'"),
        (["violations", "--probes", "1"], "probes must be >= 2"),
        (["violations", "--batches", "0"], "evidence_steps must be an integer >= 1"),
        (["sweep-beta", "--trainer.max_epoch", "1"], "trainer.max_epochs"),
        (["sweep-beta", "--trainer.devices", "0"], "bad value for 'trainer': "),
        (["compare-criteria", "--model.init_args.model", "resnet10tt"], "unknown timm model 'resnet10tt'"),
        (["compare-criteria", "--targets", "heads", "--scope", "row"], "scope='row' lets the weights"),
        (["violations", "--seeds", "0", "1", "0"], "--seeds must be different numbers, and 0 occurs twice"),
        (["sweep-beta", "--seeds", "-1"], "--seeds must lie in [0, 4294967295], got -1"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(words, message, folder, tmp_path, capsys, fits):
    paths = [
        "--config",
        str(folder / "tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--models",
        str(tmp_path / "models"),
    ]
    assert main([words[0], *paths, *words[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert fits == []
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_not_logged_is_one_line(folder, sweep, tmp_path, capsys, fits):
    words = ["--config", str(folder / "tiny.yaml"), "--out", str(tmp_path / "out"), "--models", str(folder / "models")]
    assert main(["sweep-beta", *words, "--study.metric", "test/acuracy"]) == 2
    error = capsys.readouterr().err
    assert "study.metric 'test/acuracy' is not logged by the test of tiny" in error
    assert "did you mean 'test/accuracy'?" in error
    assert error.count("\n") == 1


def test_a_recipe_needs_no_callbacks(folder, tmp_path):
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    del recipe["trainer"]["callbacks"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(recipe))
    study = beta_sweep(betas=[1.0])
    found = run_once_study(study, [Recipe(tmp_path / "bare.yaml")], tmp_path / "out", models=tmp_path, seeds=[0])
    assert [row["target"] for row in found["rows"]] == ["weights"]


def test_two_commands_do_not_train_one_model_at_once(folder, tmp_path, monkeypatch):
    def train(*_):
        dense_model(Recipe(folder / "tiny.yaml"), 0, tmp_path, lambda *_: None)

    monkeypatch.setattr(Training, "fit", train)
    with pytest.raises(BusyError, match="another emp command trains tiny-"):
        train()


def test_two_recipes_of_one_name_are_refused(folder, tmp_path):
    (tmp_path / "tiny.yaml").write_text((folder / "tiny.yaml").read_text())
    recipes = [Recipe(folder / "tiny.yaml"), Recipe(tmp_path / "tiny.yaml")]
    with pytest.raises(ValueError, match="two recipes are named tiny"):
        run_once_study(beta_sweep(), recipes, tmp_path / "out", models=tmp_path / "models")


def test_an_interrupted_study_says_so_and_keeps_its_models(folder, sweep, tmp_path, monkeypatch):
    calls = []

    def stop_at_the_second(dense, settings, on_case):
        calls.append(dense.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep["rows"][:6]

    study = beta_sweep()
    broken = type(study)(**{**vars(study), "measure": stop_at_the_second})
    with pytest.raises(StudyInterrupted, match="after 1 of 2 runs; run the same command again"):
        run_once_study(broken, [Recipe(folder / "tiny.yaml")], tmp_path / "out", models=folder / "models")
    assert [path.name for path in (tmp_path / "out" / "runs").glob("*.json")] == ["tiny-seed0.json"]


def test_a_reused_model_leaves_the_logs_of_its_training_alone(folder, sweep):
    (logs,) = [path for path in (folder / "models").glob("tiny-*-seed0") if (path / "metrics.csv").is_file()][:1]
    before = (logs / "metrics.csv").read_text()
    model = dense(folder)
    assert model.reused
    model.training.test()
    assert (logs / "metrics.csv").read_text() == before
