from pathlib import Path

import pytest

from emp_callbacks.config import EMPConfig
from emp_callbacks.schedule import Ramp
from emp_callbacks.study.arm_settings import Budget, arm_config, fitting_arms
from emp_callbacks.study.arms import DEFAULT_ARMS
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.study.training import recipe_config
from emp_callbacks.targets.features import feature_sites

RECIPES = Path(__file__).parents[2] / "recipes"
FEATURES = EMPConfig(every_n_steps=3, target="features", scope="tensor")


def test_a_recipe_with_learned_gates_has_no_arms_but_a_dense_model():
    recipe = EMPConfig(every_n_epochs=1, target="heads", gates="top_k", gate_lr=0.5)
    with pytest.raises(ValueError, match="no arm of emp compare has learned gates"):
        fitting_arms(list(DEFAULT_ARMS), recipe)
    assert arm_config("dense", recipe).gates is None


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("weights", {"one_shot_dynamic", "training_dynamic"}),
        ("heads", {"one_shot_dynamic", "training_dynamic", "fixed_magnitude"}),
        ("features", {"training_project", "fixed_magnitude"}),
        (
            "attention_edges",
            {
                "one_shot_dynamic",
                "training_dynamic",
                "training_project",
                "training_freeze",
                "fixed_magnitude",
                "random",
            },
        ),
    ],
)
def test_all_arms_stand_for_those_that_fit_and_a_chosen_one_is_refused(target, missing):
    recipe = EMPConfig(every_n_epochs=1, target=target)
    assert fitting_arms(list(DEFAULT_ARMS), recipe) == [name for name in DEFAULT_ARMS if name not in missing]
    for name in missing:
        with pytest.raises(ValueError, match=rf"arm '{name}' does not go with .* \(target='{target}'\)"):
            fitting_arms(["dense", "training_feedback", name], recipe)


def test_dynamic_arms_change_only_who_chooses():
    static, dynamic = arm_config("training_feedback", FEATURES), arm_config("training_dynamic", FEATURES)
    changed = {name for name, value in vars(static).items() if value != getattr(dynamic, name)}
    assert changed == {"dynamic"}


def test_pruning_after_training_has_no_schedule_and_the_last_beta():
    recipe = EMPConfig(every_n_epochs=1, start=2, stop=4, beta=Ramp(first=1.0, last=0.5, until=3))
    config = arm_config("one_shot", recipe)
    assert config.schedule.unit is None
    assert (config.start, config.stop, config.beta, config.mode) == (None, None, 0.5, "project")
    assert arm_config("one_shot_dynamic", FEATURES).is_dynamic
    assert arm_config("dense", recipe).beta == recipe.beta


def test_random_features_stay_static_and_share_one_budget_whatever_they_follow():
    config = arm_config("random", FEATURES, leader="training_dynamic", budget=Budget(density=0.4))
    assert (config.dynamic, config.criterion, config.density, config.scope) == (False, "random", 0.4, "global")
    weights = EMPConfig(every_n_epochs=1, scope="row")
    assert arm_config("random", weights, leader="training_freeze", budget=Budget(density=0.4)).scope == "row"
    assert arm_config("random", weights, leader="training_freeze", budget=Budget(density=0.4)).mode == "freeze"


@pytest.mark.parametrize(
    ("name", "sites", "last"),
    [
        ("features_fashion_mnist", 8, "model.layer4.0.act2"),
        ("features_gpt", 4, "model.transformer.h.3.mlp.act"),
    ],
)
def test_the_feature_recipes_name_activations_and_arms_that_fit(name, sites, last):
    recipe = Recipe(RECIPES / f"{name}.yaml")
    config = recipe_config(recipe)
    assert fitting_arms(recipe.study.arms, config) == recipe.study.arms
    found = feature_sites(recipe.model, config.include, None, config.feature_form, "activation", lambda *_: None)
    assert (len(found), found[-1].name) == (sites, last)
