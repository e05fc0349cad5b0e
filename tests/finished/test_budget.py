"""`emp prune --tolerance`: the smallest budget by the measured loss, from a checkpoint to a file."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

from emp_callbacks.cli.main import main
from emp_callbacks.finished.export import Source, prune
from emp_callbacks.study.recipe.data import DigitsData
from emp_callbacks.study.recipe.tasks import ImageClassification

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def batches_of(count):
    data = DigitsData(batch_size=64, seed=0)
    data.setup()
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint that was trained for a moment, and its recipe, whose callback has a density of its own."""
    folder = tmp_path_factory.mktemp("budget")
    callback = {"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_epochs": 1, "density": 0.5}}
    task = "emp_callbacks.study.recipe.tasks.ImageClassification"
    model = {"class_path": task, "init_args": {"model": "vit_tiny_patch16_224", "model_args": SIZES}}
    data = {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 64}}
    recipe = {"trainer": {"max_epochs": 1, "callbacks": [callback]}, "model": model, "data": data}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(0)
    trained = ImageClassification("vit_tiny_patch16_224", SIZES)
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
    for _ in range(4):
        for images, labels in batches_of(10):
            optimizer.zero_grad()
            functional.cross_entropy(trained(images), labels).backward()
            optimizer.step()
    torch.save({"state_dict": trained.state_dict()}, folder / "last.ckpt")
    return folder


def words(files, out, *more):
    return ["prune", str(files / "last.ckpt"), "--config", str(files / "recipe.yaml"), "--out", str(out), *more]


def search_in(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["budget_search"]), json.loads(opened.metadata()["density"])


def loss_of(state, count):
    task = ImageClassification("vit_tiny_patch16_224", SIZES).eval()
    task.load_state_dict({f"model.{name}": value for name, value in state.items()})
    with torch.no_grad():
        losses = [float(functional.cross_entropy(task(images), labels)) for images, labels in batches_of(count)]
    return sum(losses) / count


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_what_is_written_has_the_loss_that_was_measured(files, criterion, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    more = ["--tolerance", "0.05", "--criterion", criterion, "--scope", "tensor", "--batches", "3"]
    assert main(words(files, out, *more)) == 0
    shown = capsys.readouterr().out
    found, density = search_in(out)
    assert "tolerated up to" in shown
    assert shown.count("chosen") == 1
    assert found["says"] in shown
    assert 3 < len(found["tried"]) <= 12
    assert found["density"] == density < 1
    assert found["criterion"] == criterion
    dense = loss_of({k.removeprefix("model."): v for k, v in torch.load(files / "last.ckpt")["state_dict"].items()}, 3)
    assert found["dense_loss"] == pytest.approx(dense, rel=1e-5)
    assert found["limit"] == pytest.approx(1.05 * dense)
    written = loss_of(load_file(out), 3)
    assert written == pytest.approx(found["loss"], rel=1e-5)
    assert written <= 1.05 * dense
    own = [tried for tried in found["tried"] if tried["beta"] == found["beta"]]
    assert [(tried["loss"], tried["within"]) for tried in own] == [(found["loss"], True)]


def test_auto_alone_tolerates_one_percent(files, tmp_path):
    out = tmp_path / "out.safetensors"
    assert main(words(files, out, "--beta", "auto", "--batches", "1")) == 0
    assert search_in(out)[0]["loss_tolerance"] == 0.01


def test_units_are_pruned_by_it_too(files, tmp_path):
    source = Source(str(files / "last.ckpt"), str(files / "recipe.yaml"))
    settings = {"target": "neurons", "criterion": "taylor"}
    seen = []
    pruner, report = prune(
        source, tmp_path / "out", settings, batches=2, loss_tolerance=0.05, shrink_units=True, on_tried=seen.append
    )
    assert pruner.density == report.budget.density < 1
    assert sorted(seen) == list(report.budget.tried)
    assert report.shrunk.layers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tolerance", "0.1", "--beta", "0.5"], "--beta 0.5 says what is kept"),
        (["--tolerance", "0.1", "--density", "0.5"], "--density 0.5 says what is kept"),
        (["--beta", "auto", "--density", "0.5"], "--density 0.5 says what is kept"),
        (["--tolerance", "-1"], "loss_tolerance must be"),
        (["--tolerance", "0.1", "--batches", "0"], "--batches must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(more, message, files, tmp_path, capsys):
    assert main(words(files, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_data_the_remedy_is_named(files, tmp_path, capsys):
    assert main(["prune", str(files / "last.ckpt"), "--tolerance", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "measures the loss of training steps on data; name a recipe with --config RECIPE" in capsys.readouterr().err


def test_a_density_and_a_tolerance_are_refused_by_the_function_too(files, tmp_path):
    source = Source(str(files / "last.ckpt"), str(files / "recipe.yaml"))
    with pytest.raises(ValueError, match=r"density=0\.3 says what is kept"):
        prune(source, tmp_path / "out", {"density": 0.3}, batches=1, loss_tolerance=0.1)


def test_a_beta_that_is_no_number_is_a_usage_error(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(files, tmp_path / "out", "--beta", "automatic"))
    assert "--beta" in capsys.readouterr().err


def test_where_no_budget_is_within_nothing_is_written(files, tmp_path, capsys, monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(ImageClassification, "training_step", lambda *_: torch.tensor(float(next(calls))))
    assert main(words(files, tmp_path / "out", "--beta", "auto", "--batches", "1")) == 2
    assert "no budget is within --tolerance 0.01: keeping everything has a loss of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
