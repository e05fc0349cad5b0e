"""Lightning's averages of weights beside EMP: what is validated, saved and left at the end is masked, in every mode."""

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from emp_callbacks import EMPCallback
from tests.integrations.test_lightning import MODES, data, make_module, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
NEEDS_2_6 = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="Lightning has WeightAveraging from 2.6 on"
)
AVERAGES = {
    "ema": lambda: pl.callbacks.EMAWeightAveraging(decay=0.9),
    "mean": lambda: pl.callbacks.WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1),
}
KINDS = [pytest.param("ema", marks=NEEDS_2_6), pytest.param("mean", marks=NEEDS_2_6), "swa"]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_validated_saved_and_final_weights_obey_the_mask(mode, kind, order, tmp_path):
    module, emp = make_module(pl), EMPCallback(mode=mode, every_n_epochs=1, summary=False)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    callbacks = [emp, AVERAGES[kind]()][::order]
    trainer = make_trainer(pl, tmp_path, [*callbacks, saver], max_epochs=4)
    trainer.fit(module, data(), data(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a checkpoint is made whose weights")  # the average is what the fit leaves
        trainer.save_checkpoint(tmp_path / "after.ckpt")
    mask = emp.masks["net.0.weight"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]["net.0.weight"]
    pruned = int((~mask).sum())
    assert pruned > 0
    assert bool((module.net[0].weight[~mask] == 0).all())
    assert bool((saved[~mask] == 0).all())
    assert module.zeros_at_validation[-1] == pruned


class ByHand(pl.Callback):
    """The same exponential average, of dense values, kept by hand beside a run without averaging callback."""

    def __init__(self, emp):
        self.emp, self.average = emp, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.average is None:
            torch.manual_seed(0)
            self.average = AveragedModel(copy.deepcopy(pl_module.net), avg_fn=get_ema_avg_fn(0.9))
        with self.emp.pruner.dense_weights():
            self.average.update_parameters(pl_module.net)


@NEEDS_2_6
@pytest.mark.parametrize("order", [1, -1])
def test_in_feedback_the_average_is_of_dense_values_and_training_goes_on_as_without_it(order, tmp_path):
    finals = []
    for averaged in (False, True):
        module, emp = make_module(pl), EMPCallback(every_n_epochs=1, summary=False)
        other = AVERAGES["ema"]() if averaged else ByHand(emp)
        make_trainer(pl, tmp_path, [emp, other][::order], max_epochs=3).fit(module, data(), data(1))
        final = module.net if averaged else other.average.module
        mask = emp.masks
        finals.append([p * mask.get(f"net.{name}", torch.tensor(1)) for name, p in final.named_parameters()])
        rows = [(e.step, e.keep, e.n_eff) for e in emp.trajectory]
        finals.append(rows)
    assert finals[1] == finals[3], "the trajectory of the dense weights"
    for a, b in zip(finals[0], finals[2], strict=True):
        torch.testing.assert_close(a, b)


@NEEDS_2_6
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_one_that_never_stopped(mode, tmp_path):
    def run(epochs, **fit):
        module, emp = make_module(pl), EMPCallback(mode=mode, every_n_epochs=1, summary=False)
        saver = ModelCheckpoint(dirpath=tmp_path / f"{mode}{epochs}{bool(fit)}", save_last=True)
        make_trainer(pl, tmp_path, [emp, AVERAGES["ema"](), saver], max_epochs=epochs).fit(
            module, data(), data(1), **fit
        )
        return module, [(e.step, e.keep, e.n_eff) for e in emp.trajectory]

    whole, rows = run(4)
    run(2)
    resumed, again = run(4, ckpt_path=tmp_path / f"{mode}2False" / "last.ckpt")
    assert again == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_an_average_that_is_a_module_of_the_module_is_masked_and_not_pruned(tmp_path):
    module = make_module(pl)
    module.mean = AveragedModel(module.net, avg_fn=get_ema_avg_fn(0.9))
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), lr=0.1)
    module.on_train_batch_end = lambda *_: module.mean.update_parameters(module.net)
    emp = EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [emp]).fit(module, data(), data(1))
    assert list(emp.masks) == ["net.0.weight", "net.2.weight"]
    assert bool((module.mean.module[0].weight[~emp.masks["net.0.weight"]] == 0).all())


class Swaps(pl.Callback):
    """Averages as third parties write them: other weights are copied in for the validation, and out after it."""

    def __init__(self, when):
        self.when, self.own = when, None

    def _in(self, pl_module):
        self.own = [p.detach().clone() for p in pl_module.parameters()]
        for p in pl_module.parameters():
            p.data.copy_(torch.full_like(p, 0.25))

    def on_validation_start(self, trainer, pl_module):
        if self.when == "start":
            self._in(pl_module)

    def on_validation_epoch_start(self, trainer, pl_module):
        if self.when == "epoch_start":
            self._in(pl_module)

    def on_validation_end(self, trainer, pl_module):
        for p, own in zip(pl_module.parameters(), self.own, strict=True):
            p.data.copy_(own)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("when", ["start", "epoch_start"])
@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_weights_that_anyone_swaps_in_for_a_validation_are_masked_and_nothing_is_lost(mode, when, order, tmp_path):
    def run(swaps):
        module, emp = make_module(pl), EMPCallback(mode=mode, every_n_epochs=1, summary=False)
        callbacks = [emp, Swaps(when)][::order] if swaps else [emp]
        make_trainer(pl, tmp_path, callbacks).fit(module, data(), data(1))
        return module, emp

    (plain, _), (module, emp) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert module.zeros_at_validation[-1] == int((~emp.masks["net.0.weight"]).sum())


def test_batch_norm_makes_swa_train_one_epoch_more_which_is_masked_too(tmp_path):
    module = make_module(pl)
    module.net.insert(1, nn.BatchNorm1d(9))
    emp = EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [emp, AVERAGES["swa"]()], max_epochs=4).fit(module, data())
    mask = emp.masks["net.0.weight"]
    assert bool((module.net[0].weight[~mask] == 0).all())
    assert emp.pruner.audit().owner == 0


def test_an_averaging_callback_of_a_lightning_to_come_is_said(tmp_path):
    class StochasticWeightAveraging(pl.Callback):  # which keeps its average elsewhere
        pass

    with pytest.warns(UserWarning, match="StochasticWeightAveraging keeps its average in a way that EMP"):
        make_trainer(pl, tmp_path, [EMPCallback(summary=False), StochasticWeightAveraging()], max_epochs=1).fit(
            make_module(pl), data()
        )
