"""A Slurm that is played by its environment variables and an scontrol that notes what it is told."""

import os
import signal
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_callbacks.integrations.lightning_requeue import RequeueBetweenSteps


class Halves(pl.LightningModule):
    """Gets the signal when the optimizer has stepped and Lightning has not counted that yet."""

    def __init__(self, signalled_in):
        super().__init__()
        self.layer, self._signalled_in, self._steps = nn.Linear(2, 1), signalled_in, 0

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()

    def optimizer_step(self, *args, **settings):
        super().optimizer_step(*args, **settings)
        self._steps += 1
        if self._steps == self._signalled_in:
            os.kill(os.getpid(), signal.SIGUSR1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Return what fits Halves in a folder, as a task of Slurm does."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/told\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("shutil.which", lambda _: None)  # else Lightning warns where Slurm is really installed
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "fit", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    def run(*callbacks, steps=8, signalled_in=None, accumulate=1):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))
        model = Halves(signalled_in)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, batch_size=2))
        return model.layer.weight.detach()

    return run


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*(num_workers|not resumable|logging interval)")
def test_a_signal_in_the_middle_of_a_step_is_answered_when_it_has_ended(fit, tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    fit(RequeueBetweenSteps(every_n_steps=2), signalled_in=3, accumulate=2)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    (path,) = tmp_path.glob("hpc_ckpt_*")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4  # the first after the third at which it asks
    path.unlink()
    expected = fit(steps=4, accumulate=2)
    assert torch.equal(saved["state_dict"]["layer.weight"], expected)


def test_a_rank_without_the_signal_answers_with_those_that_have_it(monkeypatch):
    answered = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: answered.append(number))
    try:
        asked = []

        def reduce_boolean_decision(decision, all):
            asked.append((decision, all))
            return len(asked) == 2  # another rank's, the second time

        strategy = SimpleNamespace(reduce_boolean_decision=reduce_boolean_decision)
        trainer = SimpleNamespace(global_step=0, strategy=strategy)
        callback = RequeueBetweenSteps(every_n_steps=1)
        callback.on_train_start(trainer, None)
        for step in (1, 1, 2, 3):
            trainer.global_step = step
            callback.on_train_batch_end(trainer, None, None, None, 0)
            assert answered == [signal.SIGUSR1] * (step >= 2)
        assert asked == [(False, False)] * 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_number_of_steps_is_checked():
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        RequeueBetweenSteps(every_n_steps=0)
