"""`emp inspect --data`: what pruning a checkpoint would cost, without changing it."""

import json

import pytest
import torch
import yaml
from torch.nn import functional

from emp_callbacks.cli.main import main
from emp_callbacks.finished.certification import certify_source
from emp_callbacks.study.recipe.data import DigitsData
from emp_callbacks.study.recipe.tasks import ImageClassification

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recipe, a checkpoint of its model, and the model itself."""
    folder = tmp_path_factory.mktemp("certification")
    callback = {"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_epochs": 1, "beta": 0.8}}
    recipe = {
        "trainer": {"max_epochs": 1, "callbacks": [callback]},
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
            "init_args": {"model": "vit_tiny_patch16_224", "model_args": SIZES},
        },
        "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 32}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(3)
    task = ImageClassification("vit_tiny_patch16_224", SIZES).eval()
    torch.save({"state_dict": task.state_dict()}, folder / "last.ckpt")
    return folder, task


def paths(files):
    return str(files[0] / "last.ckpt"), str(files[0] / "recipe.yaml")


def losses_of(task, count):
    data = DigitsData(batch_size=32, seed=0)
    data.setup()
    with torch.no_grad():
        loader = iter(data.train_dataloader())
        return [float(functional.cross_entropy(task(x), y)) for x, y in (next(loader) for _ in range(count))]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_it_measures_the_loss_of_the_checkpoint_on_the_recipes_batches(files, criterion):
    found = certify_source(*paths(files), {"criterion": criterion}, batches=2, probes=2)
    assert found.batches == 2
    assert found.cost.loss_before == pytest.approx(sum(losses_of(files[1], 2)) / 2, rel=1e-4)
    (event,) = found.cost.events
    assert event.beta == 0.8  # the recipe's
    assert event.density < 1
    assert (event.certificate is not None) == (criterion == "taylor")
    assert all((layer.certificate is not None) == (criterion != "magnitude") for layer in event.layers)
    if criterion == "taylor":
        assert abs(found.cost.first_order) <= event.certificate.bound
    if criterion == "wanda":
        assert all(layer.certificate.measured <= layer.certificate.bound for layer in event.layers)


def test_the_command_shows_and_writes_it_and_leaves_the_checkpoint_alone(files, tmp_path, capsys):
    source, recipe = paths(files)
    before = (files[0] / "last.ckpt").read_bytes()
    words = ["inspect", source, "--data", recipe, "--beta", "1", "--batches", "1", "--probes", "2"]
    assert main([*words, "--json", str(tmp_path / "cost.json")]) == 0
    shown = capsys.readouterr().out
    for part in ("Tr(H)", "95%, 2 probes", "distance:", "preserved mass, tight bound", "change to second order"):
        assert part in shown
    assert (files[0] / "last.ckpt").read_bytes() == before
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["beta"] == 1.0
    assert written["bounds"].keys() == {"distance", "norm", "curvature", "asymptotic", "inverse_trace"}
    assert written["events"][0]["tight_mass_bound"] <= written["events"][0]["preserved_mass"]


def test_heads_are_certified_and_named_where_they_do_not_discriminate(files, capsys):
    source, recipe = paths(files)
    words = ["inspect", source, "--data", recipe, "--target", "heads", "--batches", "1", "--probes", "2"]
    assert main(words) == 0
    assert "does not discriminate here" in capsys.readouterr().out
    assert main([*words, "--criterion", "taylor"]) == 0
    shown = capsys.readouterr().out
    assert "loss change <=" in shown
    assert "first-order change, certified" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--criterion", "wanda"], "--data RECIPE"),
        (["--target", "heads"], "--data RECIPE"),
        (["--data", "RECIPE", "--batches", "0"], "--batches must be at least 1"),
        (["--data", "RECIPE", "--probes", "1"], "--probes must be at least 2"),
        (["--data", "RECIPE", "--target", "features"], "moves no weights"),
        (["--data", "RECIPE", "--criterion", "wunda"], "criterion 'wunda' is unknown"),
        (["--data", "no.yaml"], "does not exist"),
        (["--data", "RECIPE", "--pretrained"], "goes without --data"),
    ],
)
def test_mistakes_are_one_line(words, message, files, capsys):
    source, recipe = paths(files)
    assert main(["inspect", source, *[recipe if word == "RECIPE" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_weights_than_the_recipes_are_refused(files, tmp_path, capsys):
    torch.save({"state_dict": {"model.head.weight": torch.zeros(10, 16)}}, tmp_path / "part.ckpt")
    assert main(["inspect", str(tmp_path / "part.ckpt"), "--data", paths(files)[1]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
