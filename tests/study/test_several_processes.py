"""Cells that two processes train together: one record, the same each time, and that of one process with their batch."""

import json
import os
import sys

import pytest
import yaml

from emp_callbacks.study.comparison import run_study, study_needs
from emp_callbacks.study.horizon import horizon_of
from emp_callbacks.study.recipe.recipe import Recipe
from tests.distributed.ranks import run_command
from tests.study import study_ranks
from tests.study.test_comparison import recipe_text
from tests.study.test_resume import told


def write(folder):
    """Write a recipe of one epoch of twelve steps on two ranks."""
    recipe = yaml.safe_load(recipe_text(arms=["dense", "one_shot", "training_feedback"], seeds=[0]))
    recipe["trainer"] |= {"max_epochs": 1, "devices": 2, "strategy": "ddp", "limit_train_batches": 12}
    recipe["trainer"]["limit_test_batches"] = 1.0
    recipe["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 5}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_make_one_study_and_go_on_with_it_after_a_signal(tmp_path):
    recipe = write(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_command([*torchrun, study_ranks.__file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    whole, resumed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "resumed"))
    assert told(resumed["runs"]) == told(whole["runs"])
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen["told"].startswith("interrupted after 2 of 3 runs")
        assert len(seen["left"]) == 1
    assert whole["environment"]["processes"] == 2
    one = run_study(Recipe(recipe, ["--trainer.devices", "1", "--data.init_args.batch_size", "64"]), tmp_path / "one")
    for together, alone in zip(whole["runs"], one["runs"], strict=True):
        assert together["fingerprint"] != alone["fingerprint"]
        assert together["batches_digest"] != alone["batches_digest"]
        for name in ("init_digest", "steps", "parameters", "data", "flops"):
            assert together[name] == alone[name], name
        assert together["keep"] == pytest.approx(alone["keep"], abs=1)
        # 360 images on two ranks: shares of one size would count none twice, but each rank tests all of them.
        assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        losses = [[point["train/loss"] for point in run["curve"]] for run in (together, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (
            '{"class_path": "pytorch_lightning.strategies.ModelParallelStrategy"}',
            "ModelParallelStrategy may shard the model",
        ),
        ("ddp_spawn", "DDPStrategy starts 2 processes by fork or spawn"),
    ],
    ids=["sharded", "spawned"],
)
def test_what_shards_or_forks_is_refused_before_anything_is_made(strategy, words, tmp_path, fits):
    with pytest.raises(ValueError, match=rf"{words}.*add --trainer\.strategy ddp"):
        run_study(Recipe(write(tmp_path), ["--trainer.strategy", strategy]), tmp_path / "out")
    assert not fits
    assert not (tmp_path / "out").exists()


def test_cells_side_by_side_are_not_of_several_processes(tmp_path):
    with pytest.raises(ValueError, match=r"recipe asks for 2: add --trainer\.devices 1"):
        study_needs(Recipe(write(tmp_path)), tmp_path / "out")


def test_an_epoch_is_as_long_as_each_ranks_share(tmp_path):
    every = ["--trainer.limit_train_batches", "1.0"]
    assert horizon_of(Recipe(write(tmp_path), every), 0.25).steps == 1077 // 2 // 32
