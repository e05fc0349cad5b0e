"""A fit that was interrupted goes on with the batch that is due: equal, bit for bit, to one that was not."""

import functools
import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from emp_callbacks import EMPCallback
from emp_callbacks.study.recipe.data import DigitsData
from emp_callbacks.study.recipe.loading import (
    EpochSampler,
    EvenBatches,
    ResumableLoader,
    evaluation_loader,
    training_loader,
)

BATCHES = 5  # of 200 in an epoch of 1,077


class Task(pl.LightningModule):
    """Notes what it trains on, and saves in the middle of the steps named."""

    def __init__(self, save_within=None, folder=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen, self.rates, self.validated = nn.Linear(64, 10), [], [], []
        self.save_within, self.folder = save_within, folder

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, self.global_step, images.sum().item()))
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        if self.global_step == self.save_within:
            self.trainer.save_checkpoint(f"{self.folder}/within.ckpt")
        return nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.current_epoch, self.global_step, batch_idx, len(batch[1])))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder, saver=None, ckpt=None, data=None, save_within=None, **settings):
    task = Task(save_within, folder)
    emp = EMPCallback(every_n_steps=4, summary=False)
    trainer = pl.Trainer(
        callbacks=[emp, *([saver] if saver else [])], accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saver is not None,
        num_sanity_val_steps=0, default_root_dir=folder, **{"max_epochs": 3, **settings},
    )  # fmt: skip
    trainer.fit(task, datamodule=data or DigitsData(batch_size=200, seed=1), ckpt_path=ckpt)
    task.refreshes = [event.step for event in emp.trajectory]
    return task


def assert_goes_on(resumed, whole, steps_done):
    left = len(whole.seen) - steps_done
    assert 0 < left < len(whole.seen)
    assert resumed.seen == whole.seen[-left:]
    assert resumed.rates == whole.rates[-left:]
    assert resumed.refreshes == whole.refreshes
    assert resumed.validated == whole.validated[-len(resumed.validated) :]
    assert torch.equal(resumed.net.weight, whole.net.weight)


every_7_steps = functools.partial(ModelCheckpoint, filename="{step}", every_n_train_steps=7, save_top_k=-1)
every_epoch = functools.partial(ModelCheckpoint, filename="{step}", every_n_epochs=1, save_top_k=-1)
after_the_epoch = functools.partial(every_epoch, save_on_train_epoch_end=True)


@pytest.mark.parametrize(
    ("saver", "step", "settings"),
    [
        pytest.param(every_7_steps, 7, {}, id="within-an-epoch"),
        pytest.param(every_7_steps, 7, {"max_epochs": None, "max_steps": 13}, id="within-an-epoch-max-steps"),
        pytest.param(every_epoch, 5, {}, id="epoch-validated"),
        pytest.param(after_the_epoch, 5, {}, id="epoch-end"),
        pytest.param(after_the_epoch, 5, {"max_epochs": None, "max_steps": 13}, id="epoch-end-max-steps"),
    ],
)
def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path, saver, step, settings):
    whole = fit(tmp_path, saver(tmp_path), **settings)
    assert_goes_on(fit(tmp_path, ckpt=tmp_path / f"step={step}.ckpt", **settings), whole, step)


@pytest.mark.processes
def test_batches_that_workers_fetched_ahead_are_not_lost(tmp_path):
    whole = fit(tmp_path)
    with_workers = functools.partial(DigitsData, batch_size=200, seed=1, num_workers=2)
    fit(tmp_path, every_7_steps(tmp_path), data=with_workers())
    assert_goes_on(fit(tmp_path, ckpt=tmp_path / "step=7.ckpt", data=with_workers()), whole, 7)


@pytest.mark.processes
def test_workers_begin_with_the_order_of_the_epoch_that_is_resumed(tmp_path):
    whole = fit(tmp_path, after_the_epoch(tmp_path))
    data = DigitsData(batch_size=200, seed=1, num_workers=1)
    assert_goes_on(fit(tmp_path, ckpt=tmp_path / "step=5.ckpt", data=data), whole, 5)


def test_a_batch_in_hand_when_a_signal_saved_is_done_again(tmp_path):
    whole = fit(tmp_path, save_within=7)
    assert_goes_on(fit(tmp_path, ckpt=tmp_path / "within.ckpt"), whole, 7)


def test_accumulated_steps_resume_and_one_cut_in_two_is_said(tmp_path):
    whole = fit(tmp_path, every_7_steps(tmp_path), accumulate_grad_batches=2, save_within=1, max_epochs=6)
    resumed = fit(tmp_path, ckpt=tmp_path / "step=7.ckpt", accumulate_grad_batches=2, max_epochs=6)
    assert_goes_on(resumed, whole, 2 * BATCHES + 2)  # 7 steps: twice 3 of an epoch, and 1 of 2 batches
    cut = r"resumed after 3 batches of an epoch, within an optimizer step: the gradients of its first 1 batch"
    with pytest.warns(UserWarning, match=cut):
        fit(tmp_path, ckpt=tmp_path / "within.ckpt", accumulate_grad_batches=2, max_epochs=1)


def test_another_split_of_the_epoch_is_said_in_its_middle_and_not_at_its_end(tmp_path):
    fit(tmp_path, every_7_steps(tmp_path))
    fit(tmp_path, every_epoch(tmp_path), max_epochs=2)
    changed = r"resumed after 2 batches of an epoch with batch_size 200 -> 100, seed 1 -> 2: .* resume with the old"
    with pytest.warns(UserWarning, match=changed):
        fit(tmp_path, ckpt=tmp_path / "step=7.ckpt", data=DigitsData(batch_size=100, seed=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resumed after")
        fit(tmp_path, ckpt=tmp_path / "step=5.ckpt", data=DigitsData(batch_size=100, seed=2), max_epochs=2)


def test_the_place_is_of_the_fit_that_resumes_and_of_no_other_loader(tmp_path):
    first = {}

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if not first:
                for name, loader in {
                    "another": trainer.datamodule.train_dataloader(),
                    "its": trainer.train_dataloader,
                }.items():
                    first[name] = next(iter(loader))[0].sum().item()

    whole = fit(tmp_path, every_7_steps(tmp_path))
    resumed = Task()
    trainer = pl.Trainer(callbacks=[Looks()], accelerator="cpu", logger=False, max_epochs=3, default_root_dir=tmp_path,
                         enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning: the checkpoint has a callback that this fit has not
        trainer.fit(resumed, datamodule=DigitsData(batch_size=200, seed=1), ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.seen[0] == whole.seen[7]
    assert first["another"] == whole.seen[0][-1]  # its sampler was told no epoch
    assert first["its"] == whole.seen[BATCHES][-1]


def test_a_loader_beside_a_longer_one_resumes_in_the_pass_that_it_is_in(tmp_path):
    class Both(DigitsData):
        def train_dataloader(self):
            longer = training_loader(self._parts["train"], 100, trainer=self.trainer, seed=2, collate_fn=self.collate)
            return [super().train_dataloader(), longer]

        @staticmethod
        def collate(batch):
            return batch

    class Sums(Task):
        def training_step(self, batches, batch_idx):
            for images, _ in batches:
                self.seen.append(images.sum().item())
            return self.net.weight.sum()

    def sums(ckpt=None):
        task, saver = Sums(), every_7_steps(tmp_path)
        trainer = pl.Trainer(callbacks=[saver], accelerator="cpu", logger=False, max_epochs=1, limit_val_batches=0,
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(task, datamodule=Both(batch_size=200, seed=1), ckpt_path=ckpt)
        return task.seen

    whole = sums()
    assert len(whole) == 20
    assert whole[4::2][:3] == whole[14::2]  # the shorter one's second pass: the same order
    assert sums(tmp_path / "step=7.ckpt") == whole[14:]


def test_a_loader_without_a_trainer_is_a_dataloader():
    sampler = EpochSampler(range(10), num_replicas=1, rank=0, seed=0)
    loader = ResumableLoader(range(10), 4, sampler=sampler, drop_last=True)
    assert len(loader) == len(list(loader)) == 2
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in loader]
    sampler.set_epoch(1)
    assert list(sampler) != list(EpochSampler(range(10), num_replicas=1, rank=0, seed=0))


# --- evaluation ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [2, 3, 7])
@pytest.mark.parametrize("size", [4, 9, 13, 25])
def test_every_example_is_evaluated_once_in_as_many_batches_on_each_rank(size, batch_size, ranks):
    parts = [list(sampler) for sampler in (EvenBatches(range(size), batch_size, ranks, rank) for rank in range(ranks))]
    assert len({len(part) for part in parts}) == 1
    most = math.ceil(size / ranks)
    assert len(parts[0]) == len(EvenBatches(range(size), batch_size, ranks, 0)) == math.ceil(most / batch_size)
    batches = [batch for part in parts for batch in part]
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert sorted(index for batch in batches for index in batch) == list(range(size))


@pytest.mark.parametrize(("size", "batch_size"), [(2, 4), (4, 1)])
def test_an_evaluation_that_cannot_be_shared_out_says_so(size, batch_size):
    with pytest.raises(ValueError, match=rf"{size} examples .* batches of {batch_size} .* 3 ranks: choose a larger"):
        EvenBatches(range(size), batch_size, 3, 0)


def test_lightnings_overfitting_takes_the_examples_in_order(tmp_path):
    data = DigitsData(batch_size=200, seed=1)
    task = fit(tmp_path, data=data, overfit_batches=1, max_epochs=2)
    assert task.seen[0][-1] == task.seen[1][-1] == data._parts["train"][range(200)][0].sum().item()
    assert [len(batch[1]) for batch in evaluation_loader(data._parts["val"], 200, trainer=None)] == [200, 160]
