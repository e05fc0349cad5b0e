"""What the recipes of equal densities promise in their comments."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("equal_density_*.yaml"))
STEPS = {"digits": 320, "gpt": 1200, "resnet": 1712, "vit": 1712}


def test_there_is_a_recipe_for_each_number_of_steps():
    assert [path.stem.removeprefix("equal_density_") for path in RECIPES] == sorted(STEPS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_learning_rate_is_the_best_of_those_tried_with_a_seed_of_no_study(path):
    recipe = yaml.safe_load(path.read_text())
    chosen = json.loads((ROOT / "benchmarks/results/choose_lr" / f"{path.stem}.json").read_text())
    better = max if recipe["study"]["higher_is_better"] else min
    best = better((row for row in chosen["rows"] if row["value"] is not None), key=lambda row: row["value"])
    assert recipe["model"]["init_args"]["lr"] == chosen["best_lr"] == best["lr"]
    assert best not in (chosen["rows"][0], chosen["rows"][-1])  # else the best may lie beyond those tried
    assert chosen["seed"] not in recipe["study"]["seeds"]
    assert chosen["metric"] == recipe["study"]["metric"].replace("test/", "val/")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_training_goes_on_behind_the_last_mask(path):
    recipe = yaml.safe_load(path.read_text())
    steps, settings = STEPS[path.stem.removeprefix("equal_density_")], recipe["trainer"]["callbacks"][0]["init_args"]
    refreshes = range(settings["start"], steps + 1, settings["every_n_steps"])
    assert 16 <= len(refreshes) <= 18
    assert steps - refreshes[-1] >= settings["every_n_steps"] // 4
