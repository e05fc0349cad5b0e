import json

import pytest

from emp_callbacks.cli.main import main
from tests.cli.test_main import write_recipe


def test_a_check_says_what_a_recipe_will_do_and_writes_nothing_but_that(tmp_path, capsys):
    recipe = write_recipe(tmp_path, "trainer", default_root_dir=str(tmp_path / "runs"))
    assert main(["check", "--config", recipe, "--json", str(tmp_path / "seen.json")]) == 0
    shown, seen = capsys.readouterr(), json.loads((tmp_path / "seen.json").read_text())
    assert seen["optimizer_steps"] == 2
    assert seen["pruning"][0]["refreshes"] == [2]
    assert f"{seen['parameters']:,}" in shown.out
    assert "1, after step 2" in shown.out
    assert "without memory (meta)" in shown.out
    assert not shown.err
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml", "seen.json"}


def test_a_profile_that_is_laid_over_a_recipe_counts_and_a_problem_is_a_line_and_exit_code_2(tmp_path, capsys):
    recipe, profile = write_recipe(tmp_path), tmp_path / "cluster.yaml"
    profile.write_text("trainer: {accelerator: gpu, devices: 8, num_nodes: 125, strategy: ddp}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--config", recipe, "--config", str(profile), "--trainer.limit_train_batches", "4"])
    assert stopped.value.code == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emp: problem: ")]
    assert len(problems) == 1
    assert "batch_size=64 on 1000 rank(s) is more than the 1077 training examples" in problems[0]


def test_data_that_take_too_long_are_not_looked_at(tmp_path, capsys, monkeypatch):
    def setup(*_):
        while True:
            pass

    monkeypatch.setattr("emp_callbacks.study.recipe.data.DigitsData.setup", setup)
    assert main(["check", "--config", write_recipe(tmp_path), "--patience", "0.2"]) == 0
    assert "not looked at, to set it up takes more than 0.2 seconds" in capsys.readouterr().out
