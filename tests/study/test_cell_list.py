"""The list of cells without the recipe's parser: the same names, or none where more than the study decides."""

import subprocess
import sys

import pytest
import yaml

from emp_callbacks.study.cell_list import listed_cells
from emp_callbacks.study.comparison import study_cells
from emp_callbacks.study.recipe.recipe import Recipe
from tests.study.test_comparison import write

ARMS = ["random", "one_shot", "training_feedback", "dense", "small_dense"]


@pytest.mark.parametrize(
    "options", [[], ["--study.seeds", "[3]"], ["--study.points=[0.5, 0.1]", "--trainer.max_steps", "9"]]
)
def test_the_cells_are_those_of_the_whole_recipe(options, tmp_path):
    file = write(tmp_path, arms=ARMS)
    assert listed_cells([file], options) == study_cells(Recipe(file, options))


def test_what_is_laid_over_a_recipe_counts(tmp_path):
    file, over = write(tmp_path, arms=ARMS), tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"study": {"arms": ["dense"], "seeds": [7]}}))
    assert listed_cells([file, over], []) == ["dense:7"]
    assert listed_cells([file, over], ["--study.seeds", "[8]"]) == ["dense:8"]


@pytest.mark.parametrize(
    ("study", "options"),
    [
        ({}, []),  # the default arms, of which those stay that go with the recipe
        ({"arms": ["dense", "dens"]}, []),
        ({"arms": ["dense"], "seeds": ["0"]}, []),
        ({"arms": ["dense"], "points": [2]}, []),
        ({"arms": ["dense"]}, ["--study", "file.yaml"]),
        ({"arms": ["dense"]}, ["--study.arms+", "one_shot"]),
    ],
)
def test_what_the_study_alone_does_not_say_is_left_to_the_parser(study, options, tmp_path):
    assert listed_cells([write(tmp_path, **study)], options) is None


@pytest.mark.processes
def test_the_command_imports_nothing_heavy(tmp_path):
    file = write(tmp_path, arms=ARMS)
    script = f"""
import sys
from emp_callbacks.cli.main import main
main(["compare", "--config", {str(file)!r}, "--list-cells"])
assert not {{"torch", "pytorch_lightning", "numpy", "jsonargparse"}} & sys.modules.keys(), "heavy"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == listed_cells([file], [])
