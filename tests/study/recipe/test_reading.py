import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.slow
def test_one_batch_stays_one_batch_whatever_was_imported_before(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "trainer: {limit_val_batches: 1, limit_test_batches: 1.0, max_epochs: 1}\n"
        "model: {class_path: emp_callbacks.study.recipe.tasks.ImageClassification}\n"
        "data: {class_path: emp_callbacks.study.recipe.data.DigitsData}\n"
    )
    code = (
        "import typing; typing.Optional[typing.Union[float, int]]\n"  # what Optional[Union[int, float]] is from now on
        "from emp_callbacks.study.recipe.recipe import Recipe\n"
        "recipe = Recipe('recipe.yaml', ['--trainer.limit_train_batches=2', '--trainer.val_check_interval', '1'])\n"
        "t = recipe.config.trainer\n"
        "print([t.limit_train_batches, t.limit_val_batches, t.limit_test_batches, t.val_check_interval])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[-2] == "[2, 1, 1.0, 1]"
