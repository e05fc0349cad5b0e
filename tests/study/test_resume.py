"""A training that is cut off and taken up again ends as the one that was left alone, bit for bit."""

import os
import signal

import pytest
import pytorch_lightning as pl
import torch

from emp_callbacks.study.comparison import StudyInterrupted, run_study
from emp_callbacks.study.recipe.recipe import Recipe
from tests.study.test_comparison import write

ARMS = ["dense", "training_feedback", "sap"]
SETTINGS = ["--trainer.max_epochs", "3", "--model.init_args.model_args.drop_rate", "0.2"]


class CutOff(pl.Callback):
    """Sends this process a signal, or raises, at a step of the last arm."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.how()


def study(folder, *options, cut=None, arm=None, monkeypatch=None):
    """Run the study, with `cut` among the callbacks of one arm."""
    recipe = Recipe(folder / "recipe.yaml", [*SETTINGS, *options])
    if cut is not None:
        build = Recipe.build

        def with_cut(self, edit, **settings):
            here = f"/{arm}-seed" in str(settings.get("default_root_dir", ""))
            build(self, (lambda own: [*edit(own), cut]) if here else edit, **settings)

        monkeypatch.setattr(Recipe, "build", with_cut)
    try:
        return run_study(recipe, folder / "out")
    finally:
        if monkeypatch is not None:
            monkeypatch.undo()


def told(found):
    """Everything that a study found but the time that it took."""
    if isinstance(found, dict):
        return {name: told(value) for name, value in found.items() if name != "seconds"}
    return [told(value) for value in found] if isinstance(found, list) else found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder, arms=ARMS, seeds=[0])
    return study(folder)


def kill():
    raise RuntimeError("cut off")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("arm", "step"), [("dense", 2), ("training_feedback", 3), ("sap", 5)])
def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(arm, step, undisturbed, tmp_path, monkeypatch):
    write(tmp_path, arms=ARMS, seeds=[0])
    often = ("--study.checkpoint_every", "0")
    with pytest.raises(RuntimeError, match="cut off"):
        study(tmp_path, *often, cut=CutOff(step + 1, kill), arm=arm, monkeypatch=monkeypatch)
    (checkpoint,) = (tmp_path / "out" / "runs").rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == step
    assert told(study(tmp_path)["runs"]) == told(undisturbed["runs"])
    assert not list((tmp_path / "out").rglob("*.ckpt"))


def test_sigterm_saves_at_the_next_step_and_the_next_call_goes_on(undisturbed, tmp_path, monkeypatch):
    write(tmp_path, arms=ARMS, seeds=[0])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StudyInterrupted, match="after 1 of 3 runs; run the same command again"):
        study(tmp_path, cut=CutOff(4, terminate), arm="training_feedback", monkeypatch=monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is before
    (checkpoint,) = (tmp_path / "out" / "runs").rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] in (4, 5)
    assert told(study(tmp_path)["runs"]) == told(undisturbed["runs"])


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, arms=["dense"], seeds=[0])
    with pytest.raises(StudyInterrupted):
        study(tmp_path, cut=CutOff(4, terminate), arm="dense", monkeypatch=monkeypatch)
    (checkpoint,) = (tmp_path / "out" / "runs").rglob("*.ckpt")
    again = study(tmp_path, "--model.init_args.lr", "0.02")
    assert again["runs"][0]["steps"] == 9
    assert len(again["runs"][0]["curve"]) == 3
    assert not checkpoint.exists()
