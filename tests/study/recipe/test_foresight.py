"""What is said of a recipe beforehand is what a real run of it then counts."""

import json

import pytest
import yaml

from emp_callbacks import EMPConfig
from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.study.quiet import quiet
from emp_callbacks.study.recipe.foresight import foresee
from emp_callbacks.study.recipe.memory import HALF_NORMAL, pruned_share
from emp_callbacks.study.recipe.recipe import Recipe

EMP = "emp_callbacks.EMPCallback"


def write(folder, trainer=None, model=None, data=None, **emp):
    """Write a recipe of a small network on scikit-learn's digits: 16 batches of 64 in an epoch."""
    recipe = {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": EMP, "init_args": {"every_n_epochs": 1, "summary": False} | emp}],
            **(trainer or {}),
        },
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.ImageClassification",
            "init_args": {"model": "emp_fc2", "model_args": {"img_size": 8}} | (model or {}),
        },
        "data": {"class_path": "emp_callbacks.study.recipe.data.DigitsData", "init_args": data or {}},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def seen_of(file, *overrides):
    return foresee(Recipe(file, overrides))


# ---- beside a real run ----------------------------------------------------------------------------------------------

SCHEDULES = {
    "epochs": ({}, {}),
    "an epoch cut short": ({"max_epochs": -1, "max_steps": 40}, {}),
    "steps of several batches": (
        {"accumulate_grad_batches": 3, "limit_train_batches": 7},
        {"every_n_epochs": None, "every_n_steps": 2, "start": 3},
    ),
    "a closing refresh": (
        {"max_steps": 20},
        {"mode": "project", "every_n_epochs": None, "every_n_steps": 8, "stop": 9},
    ),
    "part of the data": ({"limit_train_batches": 0.5}, {"stop": 2}),
}


@pytest.mark.parametrize(("trainer", "emp"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_refreshes_come_after_the_steps_that_were_said(tmp_path, trainer, emp):
    file = write(tmp_path, trainer, **emp)
    seen = seen_of(file)
    recipe = Recipe(file)
    with quiet():
        recipe.build(list)
        recipe.trainer.fit(recipe.model, recipe.datamodule)
    (callback,) = [one for one in recipe.trainer.callbacks if isinstance(one, EMPCallback)]
    assert seen.prunings[0].refreshes == tuple(event.step for event in callback.trajectory)
    assert seen.length.steps == recipe.trainer.global_step
    assert seen.sizes.parameters == sum(p.numel() for p in recipe.model.parameters())
    held = [v.nbytes for state in recipe.trainer.optimizers[0].state.values() for v in state.values() if v.ndim]
    assert seen.memory["optimizer states"] == sum(held)
    assert seen.prunings[0].components == callback.trajectory[0].n
    assert seen.examples == recipe.datamodule.batch_size * recipe.trainer.accumulate_grad_batches
    assert not seen.problems


# ---- what a cluster's recipe asks for, said without one -------------------------------------------------------------


def test_optimizers_tell_what_they_hold_themselves(tmp_path):
    plain = seen_of(write(tmp_path, model={"optimizer": "sgd", "momentum": 0.0}))
    sgd = seen_of(write(tmp_path, model={"optimizer": "sgd"}))
    adam = seen_of(write(tmp_path))
    assert (plain.sizes.states, sgd.sizes.states, adam.sizes.states) == (0.0, 1.0, 2.0)


ON_64 = {"accelerator": "gpu", "devices": 8, "num_nodes": 8, "precision": "bf16-mixed"}
FSDP2 = {"class_path": "emp_callbacks.study.recipe.strategies.FSDP2Strategy"}


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "states", "masks"),
    [
        ("ddp", 4, 4, 8, 1),
        (FSDP2, 4 / 64, 4 / 64, 8 / 64, 1 / 64),
        ("fsdp", 4 / 64, 4 / 64, 8 / 64, 1 / 64),
        ("deepspeed_stage_1", 2, 2, 8 / 64, 1 / 64),
        ("deepspeed_stage_2", 2, 2 / 64, 8 / 64, 1 / 64),
        ("deepspeed_stage_3", 2 / 64, 2 / 64, 8 / 64, 1 / 64),
    ],
)
def test_memory_is_divided_as_the_strategy_divides_it(tmp_path, strategy, weights, gradients, states, masks):
    seen = seen_of(write(tmp_path, {**ON_64, "strategy": strategy}, data={"batch_size": 4}))
    count, masked = seen.sizes.parameters, seen.prunings[0].masked.weights
    assert seen.strategy.ranks == 64
    assert seen.memory["weights"] == pytest.approx(weights * count)
    assert seen.memory["gradients"] == pytest.approx(gradients * count)
    assert seen.memory["optimizer states"] == pytest.approx(states * count)
    assert seen.memory["masks"] == pytest.approx(masks * masked)
    assert seen.memory["dense values"] == pytest.approx(masks * masked * (4 + 8 / 4096))  # on an accelerator all
    assert seen.memory.get("float32 masters", 0.0) == pytest.approx(masks * 4 * count if "deep" in str(strategy) else 0)
    assert seen.data.batches == 1077 // 64 // 4
    assert seen.examples == 64 * 4
    assert not seen.problems


def test_deepspeeds_own_configuration_decides(tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    strategy = {"class_path": "pytorch_lightning.strategies.DeepSpeedStrategy"}
    of = {"init_args": {"config": str(tmp_path / "zero.json")}}
    seen = seen_of(write(tmp_path, {**ON_64, "strategy": strategy | of}, data={"batch_size": 4}))
    assert seen.strategy.told == "ZeRO-1 on 8 nodes of 8 x accelerator, bf16-mixed"


def test_the_pruned_share_of_normal_weights_and_of_a_density():
    assert pruned_share(EMPConfig()) == pytest.approx(1 - HALF_NORMAL)
    assert pruned_share(EMPConfig(density=0.25)) == 0.75
    assert pruned_share(EMPConfig(beta=0.1, min_density=0.5)) == 0.5


# ---- problems -------------------------------------------------------------------------------------------------------

PLAIN_FSDP2 = {"class_path": "pytorch_lightning.strategies.ModelParallelStrategy"}
MISSING = {"class_path": "pytorch_lightning.strategies.DeepSpeedStrategy", "init_args": {"config": "missing.json"}}
PROBLEMS = {
    "a first refresh behind the end": (
        {},
        {"every_n_epochs": 4},
        {},
        "every_n_epochs=4 asks for no refresh: the first",
    ),
    "too few steps of several batches": (
        {"accumulate_grad_batches": 16},
        {"every_n_epochs": None, "every_n_steps": 4},
        {},
        "3 optimizer steps (of 16 batches: accumulate_grad_batches) in 3 epochs",
    ),
    "a batch too large": ({"devices": 8}, {}, {"batch_size": 200}, "batch_size=200 on 8 rank(s) is more than the 1077"),
    "no end": ({"max_epochs": -1}, {}, {}, "nothing ends the training"),
    "nothing to prune": ({}, {"include": ["nowhere.*"]}, {}, "'nowhere.*'"),
    "tensor parallel by default": (
        {**ON_64, "strategy": PLAIN_FSDP2},
        {},
        {"batch_size": 4},
        "only 8 of 64 ranks would see batches of their own",
    ),
    "no configuration": ({**ON_64, "strategy": MISSING}, {}, {"batch_size": 4}, "missing.json: No such file"),
    "no folder": ({"default_root_dir": __file__}, {}, {}, "cannot be written"),
}


@pytest.mark.parametrize(("trainer", "emp", "data", "told"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_problem_is_said_in_a_line(tmp_path, trainer, emp, data, told):
    problems = seen_of(write(tmp_path, trainer, data=data, **emp)).problems
    assert any(told in problem for problem in problems), problems


def test_folders_of_one_machine_are_warned_of_on_several(tmp_path, monkeypatch):
    kinds = {"tmpfs": True, "lustre": False, "": False}
    for kind, warned in kinds.items():
        monkeypatch.setattr("emp_callbacks.study.recipe.places.file_system_of", lambda _, kind=kind: kind)
        seen = seen_of(write(tmp_path, ON_64, data={"batch_size": 4}))
        assert bool(seen.warnings) == warned
        assert not seen.problems
