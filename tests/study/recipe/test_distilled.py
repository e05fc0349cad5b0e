"""Tasks that learn from a dense model: from a file, from their own beginning, through checkpoints and recipes."""

import copy

import pytest
import pytorch_lightning as pl
import torch
import yaml

from emp_callbacks import Distillation, EMPCallback
from emp_callbacks.study.recipe.data import DigitsData
from emp_callbacks.study.recipe.tasks import ImageClassification, LanguageModel

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Logged(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items() if "train/" in key})


def task(distill):
    torch.manual_seed(0)
    module = ImageClassification("emp_fc2", {"img_size": 8}, lr=0.01)
    module.distill = distill
    return module


def fit(folder, module, resume=None, density=0.1):
    torch.manual_seed(1)
    logged, emp = Logged(), EMPCallback(every_n_epochs=1, stop=1, mode="freeze", density=density, summary=False)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    callbacks = [emp, saver, logged]
    trainer = pl.Trainer(max_epochs=3, callbacks=callbacks, default_root_dir=folder, logger=False, **QUIET)
    trainer.fit(module, DigitsData(batch_size=256), ckpt_path=resume)
    return trainer, logged.rows


def test_the_teacher_is_the_beginning_and_a_resumed_run_has_the_same(tmp_path):
    whole = task(Distillation())
    start = copy.deepcopy(whole.model.state_dict())
    trainer, rows = fit(tmp_path / "whole", whole)
    assert [name for name, _ in whole.named_children()] == [name for name, _ in task(None).named_children()]
    assert rows[0]["train/distillation_loss"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["train/distillation_loss"] > 0.01
    assert "val/distillation_loss" not in trainer.callback_metrics
    held = torch.load(tmp_path / "whole/epoch=0.ckpt", weights_only=False)["emp_teacher"]
    assert all(torch.equal(value, start[name]) for name, value in held.items())
    resumed = task(Distillation())
    fit(tmp_path / "resumed", resumed, resume=tmp_path / "whole/epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_teacher_from_a_checkpoint_draws_the_pruned_model_to_it(tmp_path):
    dense = task(None)
    _, rows = fit(tmp_path / "dense", dense, density=1.0)
    assert "train/distillation_loss" not in rows[-1]
    teacher = tmp_path / "dense/epoch=2.ckpt"
    data = DigitsData(batch_size=256)
    data.setup("fit")
    images, _ = next(iter(data.val_dataloader()))
    away = []
    for distill in (None, Distillation(teacher=teacher, weight=0.9)):
        module = task(distill)
        fit(tmp_path / str(distill is None), module)
        with torch.no_grad():
            away.append(float(Distillation().loss(module.eval()(images), dense.eval()(images))))
        checkpoint = torch.load(tmp_path / str(distill is None) / "epoch=2.ckpt", weights_only=False)
        assert "emp_teacher" not in checkpoint  # it has a file of its own
    assert away[1] < away[0]


def test_a_language_model_learns_too(tmp_path):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "sequence_length": 8, "vocab_size": 32}
    module = LanguageModel(**sizes)
    module.distill = Distillation(temperature=1.0, weight=1.0)
    tokens = torch.randint(0, 32, (8, 9))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4)
    logged = Logged()
    none = {"logger": False, "enable_checkpointing": False, **QUIET}
    pl.Trainer(max_epochs=2, callbacks=[logged], default_root_dir=tmp_path, **none).fit(module, data)
    assert len(logged.rows) == 4
    assert all(row["train/distillation_loss"] == pytest.approx(0.0, abs=1e-4) for row in logged.rows)


def test_a_recipe_says_so(tmp_path):
    from emp_callbacks.study.recipe.parts import open_recipe

    network = {"class_path": "emp_callbacks.study.recipe.tasks.ImageClassification"}
    distill = {"temperature": 4.0, "teacher": "dense.ckpt"}
    settings = {"model": "emp_fc2", "model_args": {"img_size": 8}, "distill": distill}
    data = {"class_path": "emp_callbacks.study.recipe.data.DigitsData"}
    recipe = {"model": network | {"init_args": settings}, "data": data, "trainer": {"max_epochs": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = open_recipe(tmp_path / "recipe.yaml").module
    assert found.distill == Distillation(temperature=4.0, teacher="dense.ckpt")


def test_a_teacher_that_nobody_trained_and_one_that_is_lost_are_refused(tmp_path):
    for kind in (ImageClassification, LanguageModel):
        with pytest.raises(ValueError, match="this one begins untrained"):
            kind(distill=Distillation())
    fit(tmp_path, task(None))
    with pytest.raises(ValueError, match=r"epoch=0.ckpt holds no teacher"):
        fit(tmp_path, task(Distillation()), resume=tmp_path / "epoch=0.ckpt")
