import pytest
import torch
from torch import nn

from emp_callbacks import EMPCallback, EMPConfig, EMPPruner, Ramp

BAD = [
    ({"beta": 0}, "beta must be a finite number > 0, got 0"),
    ({"beta": -2.0}, "got -2.0"),
    ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1, got 0"),
    ({"every_n_epochs": -1}, "every_n_epochs must be an integer >= 1, got -1"),
    ({"every_n_epochs": 1, "every_n_steps": 5}, "every_n_epochs=1 and every_n_steps=5 are both given; keep one"),
    ({"every_n_steps": 5, "start": 9, "stop": 8}, "stop=8 lies before the first refresh at step 9"),
    ({"every_n_steps": 5, "start": 0}, "start must be an integer >= 1, got 0"),
    ({"target": "head"}, "target must be one of 'weights', 'heads', 'neurons', .*; got 'head'"),
    (
        {"criterion": "l1"},
        "criterion 'l1' is unknown; criteria for weights: magnitude, taylor, saliency, wanda, random",
    ),
    ({"target": "heads", "criterion": "magnitude"}, "'magnitude' does not fit target 'heads'; .*weight_norm, taylor"),
    ({"target": "heads", "scope": "row"}, "target='heads' has no such rows: use 'global' or 'tensor'"),
    ({"target": "features", "mode": "project"}, "'project' zeroes weights, and features have none"),
    ({"target": "attention_edges", "mode": "freeze"}, "mode='freeze' keeps a mask, but here each sample has its own"),
    ({"target": "features", "dynamic": True, "mode": "freeze"}, "here each sample has its own"),
    ({"target": "features", "dynamic": True, "criterion": "taylor"}, "scored by 'activation' .*, not by 'taylor'"),
    ({"target": "heads", "dynamic": True, "mode": "freeze"}, "here each sample has its own"),
    (
        {"target": "heads", "dynamic": True, "criterion": "taylor"},
        "heads are scored by 'output_norm' .* by 'taylor'",
    ),
    ({"target": "heads", "dynamic": True, "rescale": True}, "rescale=True is for features, and target='heads'"),
    ({"target": "heads", "per": "token"}, "per='token' is for features, and target='heads'"),
    ({"target": "heads", "dynamic": True, "per": "head"}, "per='head' is unknown; choose one of sample, token"),
    ({"target": "heads", "criterion": "output_norm"}, "mode='feedback' could bring none back: use mode='project'"),
    ({"target": "neurons", "dynamic": True}, "dynamic=True is for features, and target='neurons'"),
    ({"target": "neurons", "axis": "token"}, "axis='token' is for features, and target='neurons'"),
    ({"apply": "training"}, "apply='training' is for features, and target='weights'; use target='features'"),
    (
        {"target": "attention_edges", "choose": "gumbel", "dynamic": True},
        "choose='gumbel' is for features, and target=",
    ),
    ({"gradient": "straight_through", "target": "heads"}, "gradient='straight_through' is for features, and target='h"),
    ({"axis": "pixel", "target": "features"}, "axis='pixel' is unknown"),
    ({"apply": "eval", "target": "features"}, "apply='eval' is unknown; choose one of always, training"),
    ({"choose": "random", "target": "features"}, "choose='random' is unknown; choose one of top, gumbel"),
    ({"gradient": "ste", "target": "features"}, "gradient='ste' is unknown; choose one of masked, straight_through"),
    ({"choose": "gumbel", "target": "features"}, "choose='gumbel' goes by each sample's own scores, .*dynamic=True"),
    ({"rescale": True, "target": "features"}, "rescale=True goes by each sample's own scores, .*dynamic=True"),
    ({"rescale": 1, "target": "features"}, "rescale must be True or False, got 1"),
    ({"evidence_steps": 0}, "evidence_steps must be an integer >= 1, got 0"),
    ({"min_units": -1}, "min_units must be an integer >= 0, got -1"),
    ({"tolerance": 1.0}, r"tolerance must be a number of units in \[0, 1\), got 1.0"),
    ({"scope": "layer"}, "scope must be one of 'global', 'tensor', 'row'; got 'layer'"),
    ({"mode": "hard"}, "mode must be one of 'feedback', 'project', 'freeze', 'rewire'; got 'hard'"),
    ({"include": "*.weight"}, "include must be a list of glob patterns, got the string"),
    ({"exclude": []}, "exclude must be a non-empty list"),
    ({"min_density": 1.5}, r"min_density must be a fraction in \[0, 1\], got 1.5"),
    ({"density": 0.0}, r"density must be a fraction in \(0, 1\], got 0.0"),
    ({"density": 0.5, "beta": 2.0}, "density=0.5 fixes the keep count, so beta=2.0 would do nothing"),
    ({"density": 0.5, "min_density": 0.6}, "min_density=0.6 is above density=0.5"),
    (
        {"density": Ramp(first=1.0, last=0.0, until=5), "every_n_steps": 1},
        r"density must be a fraction in \(0, 1\], got 0.0",
    ),
    ({"shares": "erk"}, "shares='erk' shares a density among layers that do not compete: give density"),
    ({"shares": "erk", "density": 0.5}, "give density, and scope='tensor' or 'row'"),
    ({"shares": "erk", "density": 0.5, "target": "neurons"}, "target='neurons' has one dimension, of which it would"),
    ({"shares": "erc", "density": 0.5, "scope": "tensor"}, "shares must be 'uniform', 'erk' or a mapping"),
    ({"shares": {"weight": -1}, "density": 0.5, "scope": "tensor"}, r"shares\['weight'\] must be .* >= 0, got -1"),
    ({"mode": "rewire"}, "mode='rewire' needs target='weights', a density or pattern, and scope='global' or 'tensor'"),
    ({"mode": "rewire", "density": 0.5, "criterion": "taylor"}, "'taylor' needs evidence; use 'magnitude'"),
    (
        {"mode": "rewire", "density": 0.5, "grow": "momentum"},
        "grow must be one of 'gradient', .*; got 'momentum'",
    ),
    ({"mode": "rewire", "density": 0.5, "drop_fraction": 1.0}, "drop_fraction=1 would replace every weight"),
    ({"mode": "freeze", "grow": "random"}, "grow and drop_fraction are of mode='rewire', and mode='freeze'"),
    ({"observe_only": "no"}, "observe_only must be True or False, got 'no'"),
    ({"certify": 1}, "certify must be True or False, got 1"),
    ({"dynamic": None}, "dynamic must be True or False, got None"),
    ({"positions": ""}, "positions must be a key of the batch, a function of it .*, got ''"),
    ({"positions": 3}, "positions must be a key of the batch, a function of it .*, got 3"),
    ({"positions": "nowhere.at_all"}, "positions 'nowhere.at_all' cannot be imported"),
]


@pytest.mark.parametrize("make", [EMPConfig, EMPCallback, lambda **s: EMPPruner(nn.Linear(2, 2), **s)])
@pytest.mark.parametrize(("settings", "message"), BAD, ids=[next(iter(s)) + m[-6:] for s, m in BAD])
def test_bad_settings_are_refused_at_construction(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_settings_that_need_a_schedule():
    with pytest.raises(ValueError, match="start=3, stop=None need every_n_epochs or every_n_steps"):
        EMPConfig(start=3)
    with pytest.raises(ValueError, match="the Ramp of beta needs every_n_epochs or every_n_steps"):
        EMPConfig(beta=Ramp(first=2.0, last=1.0, until=3))
    with pytest.raises(ValueError, match="the Ramp of drop_fraction needs"):
        EMPConfig(drop_fraction=Ramp(first=0.3, last=0.0, until=5), mode="rewire", density=0.5)


@pytest.mark.parametrize("make", [EMPCallback, lambda **s: EMPPruner(nn.Linear(2, 2), **s)])
def test_a_misspelt_setting_names_the_nearest(make):
    with pytest.raises(TypeError, match="unknown setting 'every_n_epoch'; did you mean 'every_n_epochs'"):
        make(every_n_epoch=1)


def test_defaults_and_overrides():
    assert EMPCallback().config == EMPConfig(every_n_epochs=1)
    assert EMPCallback(every_n_steps=7, start=2).config == EMPConfig(every_n_steps=7, start=2)
    config = EMPConfig(every_n_steps=7, mode="freeze", beta=1.5)
    assert EMPCallback.from_config(config).config == config
    pruner = EMPPruner(nn.Linear(2, 2), config=config, beta=2.0)
    assert pruner.config == EMPConfig(every_n_steps=7, mode="freeze", beta=2.0)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a DeepSpeed engine, got dict"):
        EMPPruner({})
    with pytest.raises(TypeError, match=r"config must be an EMPConfig, got dict; .*name: \*\*settings, as in every_n"):
        EMPPruner(nn.Linear(2, 2), None, {"every_n_steps": 1})
    with pytest.raises(TypeError, match=r"config must be an EMPConfig, got int; pass settings by name, as in every"):
        EMPPruner(nn.Linear(2, 2), None, 3, mode="freeze")
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 1)
    for given in (scheduler, [scheduler]):
        with pytest.raises(TypeError, match=r"optimizer must be .*Optimizer \(.*got StepLR; pass its .optimizer$"):
            EMPPruner(nn.Linear(2, 2), given)
    for given, kind in ((5, "int"), ({"lr": 1}, "dict"), ("adam", "str"), (EMPConfig(), "EMPConfig"), ([{}], "dict")):
        with pytest.raises(TypeError, match=rf"optimizer must be .*Optimizer \(.*got {kind}; pass what updates the"):
            EMPPruner(nn.Linear(2, 2), given)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer .* got float"):
        EMPPruner(nn.Linear(2, 2), [torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 0.1])


def test_once_is_one_refresh_of_a_finished_model():
    recipe = EMPConfig(
        every_n_epochs=2, start=2, stop=9, beta=Ramp(first=2.0, last=0.8, until=9), mode="freeze", scope="row",
        criterion="wanda", certify=True, include=["fc*"], observe_only=True,
    )  # fmt: skip
    once = recipe.once()
    assert once.schedule.unit is None
    assert (once.beta, once.mode, once.observe_only) == (0.8, "project", False)
    assert (once.scope, once.criterion_name, once.include, once.certify) == ("row", "wanda", ["fc*"], True)
    assert not recipe.once(criterion="saliency").certify


def test_once_with_another_target_brings_that_targets_own_choices():
    recipe = EMPConfig(every_n_epochs=1, criterion="wanda", scope="row", include=["fc*"], exclude=["fc2*"])
    neurons = recipe.once(target="neurons")
    assert (neurons.criterion_name, neurons.scope, neurons.include, neurons.exclude) == (
        "weight_norm",
        "tensor",
        None,
        None,
    )
    assert recipe.once(target="features").mode == "feedback"
    assert EMPConfig(target="features", apply="training").once().apply == "always"
    assert recipe.once(target="weights").include == ["fc*"]


def test_who_chooses_is_each_targets_own_until_it_is_said():
    heads = EMPConfig(every_n_epochs=1, target="heads", dynamic=True)
    assert (heads.criterion_name, heads.feature_form.per, heads.is_dynamic) == ("output_norm", "token", True)
    features = EMPConfig(target="features", dynamic=True)
    assert (features.criterion_name, features.feature_form.per) == ("activation", "sample")
    assert EMPConfig(target="heads", dynamic=True, per="sample").feature_form.per == "sample"
    assert (heads.once().mode, heads.once().is_dynamic) == ("feedback", True)
    assert (heads.once(dynamic=False).mode, heads.once(dynamic=False).is_dynamic) == ("project", False)
    for token in (features.once(per="token"), heads.once(per="token")):
        weights = token.once(target="weights")
        assert (weights.dynamic, weights.per, weights.mode, weights.criterion_name) == (
            False,
            None,
            "project",
            "magnitude",
        )


def test_once_with_beta_or_density_drops_the_other():
    fixed = EMPConfig(every_n_epochs=1, density=0.3)
    assert (fixed.once(beta=0.5).density, fixed.once(beta=0.5).beta) == (None, 0.5)
    moving = EMPConfig(every_n_epochs=1, beta=0.5)
    assert (moving.once(density=0.3).density, moving.once(density=0.3).beta) == (0.3, 1.0)
