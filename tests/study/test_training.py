"""Pruning after training, and what is measured, for every target."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml

from emp_callbacks.config import EMPConfig
from emp_callbacks.cost.training_loss import training_loss
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.study import training as training_module
from emp_callbacks.study.arm_settings import arm_config
from emp_callbacks.study.comparison import run_study
from emp_callbacks.study.measure import measure
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.training import Training, _check_automatic
from emp_callbacks.trajectory import PruneEvent

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
RESNET = {"channels": [4, 4, 6, 6], "stem_width": 4}


def recipe_file(folder, model="vit_tiny_patch16_224", model_args=VIT, study=(), **settings):
    callback = {"class_path": "emp_callbacks.EMPCallback", "init_args": {"every_n_steps": 2, **settings}}
    text = yaml.safe_dump({
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 1,
            "limit_test_batches": 2,
            "callbacks": [callback],
        },
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
            "init_args": {"model": model, "model_args": model_args, "lr": 0.01},
        },
        "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": {"batch_size": 32}},
        "study": {"seeds": [0], **dict(study)},
    })  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def trained(folder, **settings):
    """Return a finished dense training."""
    recipe = Recipe(recipe_file(folder, **settings))
    training = Training(recipe, 0, lambda base: arm_config("dense", base), folder / "fit", lambda *_: None)
    training.fit()
    return training


def by_arm(results):
    return {run["arm"]: run for run in results["runs"]}


@pytest.mark.parametrize(
    ("target", "model", "model_args"),
    [
        ("heads", "vit_tiny_patch16_224", VIT),
        ("neurons", "resnet10t", RESNET),
        ("features", "resnet10t", RESNET),
        ("attention_edges", "vit_tiny_patch16_224", VIT),
        ("kan_nodes", "emp_kan", {"img_size": 8}),
    ],
)
def test_every_target_can_be_compared(target, model, model_args, tmp_path):
    arms = ["dense", "one_shot", "training_feedback"]
    file = recipe_file(tmp_path, model, model_args, {"arms": arms}, target=target, scope="global", beta=0.7)
    runs = by_arm(run_study(Recipe(file), tmp_path / "out"))
    assert (runs["dense"]["density"], runs["dense"]["keep"]) == (1.0, runs["dense"]["n"])
    for arm in arms[1:]:
        last = runs[arm]["trajectory"][-1]
        assert runs[arm]["n"] == last["n"]
        assert runs[arm]["density"] == last["density"] < 1
        assert runs[arm]["n_eff"] == last["n_eff"]
        assert runs[arm]["keep"] == last["keep"]
    assert runs["one_shot"]["refreshes"] == 1
    assert runs["one_shot"]["metrics"]["test/loss"] != runs["dense"]["metrics"]["test/loss"]
    assert runs["training_feedback"]["trajectory"][-1]["step"] == 4, "healing: three quarters of 6 steps"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """One study of every arm for features; its results."""
    folder = tmp_path_factory.mktemp("features")
    file = recipe_file(folder, "resnet10t", RESNET, {"healing": 0.0}, target="features", scope="tensor")
    return run_study(Recipe(file), folder / "out")


def test_features_are_compared_by_the_arms_that_fit(features):
    arms = ["dense", "one_shot", "one_shot_dynamic", "training_feedback", "training_freeze", "training_dynamic"]
    runs = by_arm(features)
    assert list(runs) == features["study"]["arms"] == [*arms, "random"]
    assert runs["one_shot"]["curve"] == runs["one_shot_dynamic"]["curve"] == runs["dense"]["curve"]
    assert len({run["metrics"]["test/loss"] for run in runs.values()}) == 7
    assert {row["scope"] for row in runs["training_dynamic"]["trajectory"]} == {"sample"}
    # 11 layers: a floor in each of them would keep up to 11 features less than the arm that random follows.
    assert abs(runs["random"]["keep"] - runs["training_feedback"]["keep"]) <= 1


def test_frozen_features_compound(features):
    runs = by_arm(features)
    steps = sorted({row["step"] for row in runs["training_freeze"]["trajectory"]})
    kept = [sum(r["keep"] for r in runs["training_freeze"]["trajectory"] if r["step"] == step) for step in steps]
    assert len(kept) == 3
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] == sum(r["keep"] for r in runs["training_feedback"]["trajectory"] if r["step"] == steps[0])
    assert runs["training_freeze"]["keep"] < runs["training_feedback"]["keep"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_shot_features_are_tested_behind_their_masks(dynamic, tmp_path):
    training = trained(tmp_path, model="resnet10t", model_args=RESNET, target="features", scope="tensor")
    weights = copy.deepcopy(training.model.state_dict())
    arm = "one_shot_dynamic" if dynamic else "one_shot"
    pruner = training.prune_once(arm_config(arm, training.recipe_config), tmp_path)
    record = training.record(pruner)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, weights[name]), name

    def mask_static(module, args, output, name):
        return output * pruner.masks[name].view(1, -1, 1, 1)

    def mask_dynamic(module, args, output, name):
        scores = output.abs().mean((2, 3)).double()
        n_eff = scores.sum(1) ** 2 / (scores**2).sum(1)
        keep = torch.floor(n_eff + 0.01).clamp(min=1)
        kept = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < keep[:, None]
        return output * kept[:, :, None, None]

    mask = mask_dynamic if dynamic else mask_static
    sites = [layer.name for event in pruner.last_events for layer in event.layers]
    assert len(sites) == 11
    hooks = [
        training.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: mask(module, args, output, name)
        )
        for name in sites
    ]
    training.model.eval()
    batches = [batch for _, batch in zip(range(2), training.data.test_dataloader(), strict=False)]
    with torch.no_grad():
        right = [(training.model(images).argmax(1) == labels).float() for images, labels in batches]
    for hook in hooks:
        hook.remove()
    assert record["metrics"]["test/accuracy"] == pytest.approx(float(torch.cat(right).mean()))
    assert not any(module._forward_hooks for module in training.model.modules())


@pytest.mark.parametrize("criterion", ["activation", "taylor", "saliency"])
def test_one_shot_gathers_training_batches_in_evaluation_mode(criterion, tmp_path):
    settings = {"target": "features", "scope": "tensor", "criterion": criterion, "evidence_steps": 2}
    training = trained(tmp_path, model="resnet10t", model_args=RESNET, **settings)
    random_state = torch.get_rng_state()
    pruner = training.prune_once(arm_config("one_shot", training.recipe_config), tmp_path)
    again = training.prune_once(arm_config("one_shot", training.recipe_config), tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items())

    seen = []
    name = "model.layer2.0.act1"
    training.model.eval().get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    sums = torch.zeros(4, dtype=torch.float64)
    for _, (images, labels) in zip(range(2), training.data.train_dataloader(), strict=False):
        loss = torch.nn.functional.cross_entropy(training.model(images), labels)
        out = seen.pop()
        (slope,) = torch.autograd.grad(loss, out)
        read = {"activation": out.abs(), "saliency": slope.abs()}
        per_sample = (out * slope).sum((2, 3)).abs() if criterion == "taylor" else read[criterion].mean((2, 3))
        sums += per_sample.detach().double().sum(0)
    keep = int(sums.sum() ** 2 / (sums**2).sum() + 0.01)
    expected = torch.zeros(4, dtype=torch.bool)
    expected[sums.topk(keep).indices] = True
    assert torch.equal(pruner.masks[name], expected)
    assert all(parameter.grad is None for parameter in training.model.parameters()) or criterion == "activation"


def test_one_shot_reads_gradients_of_heads(tmp_path):
    training = trained(tmp_path, target="heads", criterion="taylor", evidence_steps=3)
    modes = []
    training.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    pruner = training.prune_once(arm_config("one_shot", training.recipe_config), tmp_path)
    assert modes == [False] * 3
    assert pruner.last_events[0].criterion == "taylor"


def event(**changes):
    plain = dict.fromkeys(PruneEvent.__dataclass_fields__, 0)
    return PruneEvent(**{**plain, **changes})


def test_what_is_no_weight_is_measured_at_the_last_refresh():
    rows = [event(n=4, keep=1, density=0.25, n_eff=1.5), event(n=12, keep=7, density=7 / 12, n_eff=7.5)]
    heads = EMPConfig(target="heads", scope="tensor")
    assert measure(None, heads, rows) == {"density": 0.5, "n": 16, "keep": 8, "n_eff": 9.0}
    observed = EMPConfig(target="heads", scope="tensor", observe_only=True)
    assert measure(None, observed, rows) == {"density": 1.0, "n": 16, "keep": 16, "n_eff": 9.0}
    with pytest.raises(ValueError, match="no refresh, so nothing is known of the heads"):
        measure(None, heads, [])


def test_a_step_without_loss_or_with_its_own_optimizer_is_refused():
    with pytest.raises(ValueError, match="training_step returned NoneType, not a loss"):
        training_loss(SimpleNamespace(training_step=lambda batch, index: None), None, 0)
    with pytest.raises(ValueError, match="optimises by itself"):
        _check_automatic(SimpleNamespace(automatic_optimization=False))
    assert float(training_loss(SimpleNamespace(training_step=lambda b, i: {"loss": torch.ones(())}), None, 0)) == 1.0


def test_the_curve_holds_the_mean_training_loss_between_two_points(tmp_path, monkeypatch):
    losses = []
    step = training_module.TrainingRecord.on_train_batch_end

    def recorded(self, trainer, module, outputs, *rest):
        losses.append(float(outputs["loss"]))
        step(self, trainer, module, outputs, *rest)

    monkeypatch.setattr(training_module.TrainingRecord, "on_train_batch_end", recorded)
    curve = trained(tmp_path).evidence.curve
    assert [point["train/loss"] for point in curve] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_weights_pruned_after_training_read_no_data(tmp_path, monkeypatch):
    training = trained(tmp_path)
    monkeypatch.setattr(training.data, "train_dataloader", lambda: pytest.fail("data was read"))
    pruner = training.prune_once(arm_config("one_shot", training.recipe_config), tmp_path)
    assert isinstance(pruner, EMPPruner)
    assert (tmp_path / "emp_trajectory.jsonl").is_file()
