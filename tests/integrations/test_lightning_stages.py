"""Checkpoints in every stage of a Trainer, several fits, epochs that end in odd ways, several callbacks."""

import copy
import csv
import json
import pickle
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from emp_callbacks import EMPCallback, Trajectory
from tests.distributed import ranks
from tests.integrations.test_lightning import data, make_module, make_trainer, zeros

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
FEATURES = {"target": "features", "beta": 0.5, "evidence_steps": 3}


def evaluated(lr=0.02):
    module = make_module(pl, lr)
    module.losses = []

    def evaluate(batch, batch_idx):
        module.losses.append(float(nn.functional.cross_entropy(module.net(batch[0]), batch[1])))

    module.validation_step = module.test_step = evaluate
    module.predict_step = lambda batch, batch_idx: module.net(batch[0])
    return module


def fit(folder, emp, epochs=3, module=None, **settings):
    module = evaluated() if module is None else module
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(pl, folder, [emp, saver], max_epochs=epochs, **settings)
    trainer.fit(module, data(), data(1))
    return module, trainer


# ---- what test, validate and predict load -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [FEATURES, {**FEATURES, "dynamic": True}])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_new_process_evaluates_behind_the_masks_of_the_checkpoint(stage, settings, tmp_path):
    emp = EMPCallback(**settings, summary=False)
    module, trainer = fit(tmp_path, emp)
    getattr(trainer, stage)(module, data(2), verbose=False)
    wanted = module.losses[-2:]
    other, fresh = evaluated(), EMPCallback(**settings, summary=False)
    getattr(make_trainer(pl, tmp_path, [fresh]), stage)(
        other, data(2), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False
    )
    assert other.losses == wanted
    dense = evaluated()
    dense.load_state_dict(torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)["state_dict"])
    getattr(make_trainer(pl, tmp_path, []), stage)(dense, data(2), verbose=False)
    assert dense.losses != wanted
    assert not other.net[1]._forward_hooks


def attending():
    torch.manual_seed(3)
    module = evaluated()
    attention = timm.layers.Attention(12, num_heads=3)
    module.net = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 12), attention, nn.Flatten(), nn.Linear(36, 4))
    return module


def test_heads_of_every_token_are_dropped_in_a_new_process_and_missed_where_weights_come_alone(tmp_path):
    settings = {"target": "heads", "dynamic": True, "beta": 0.5}
    module, trainer = fit(tmp_path, EMPCallback(**settings, summary=False), module=attending())
    trainer.test(module, data(2), verbose=False)
    wanted, path = module.losses[-2:], tmp_path / "epoch=2.ckpt"
    for callbacks, masked in ([EMPCallback(**settings)], True), ([], False):
        other = attending()
        make_trainer(pl, tmp_path, callbacks).test(other, data(2), ckpt_path=path, verbose=False)
        assert (other.losses == wanted) == masked
    alone = {key: value for key, value in torch.load(path, weights_only=False).items() if key != "callbacks"}
    torch.save(alone, tmp_path / "alone.ckpt")
    with pytest.warns(UserWarning, match="this evaluation runs without masks: masks of heads are no part of the weig"):
        make_trainer(pl, tmp_path, [EMPCallback(**settings)]).test(
            attending(), data(2), ckpt_path=tmp_path / "alone.ckpt", verbose=False
        )


def test_predictions_too(tmp_path):
    emp = EMPCallback(**FEATURES, summary=False)
    module, trainer = fit(tmp_path, emp)
    wanted = trainer.predict(module, data(1))
    got = make_trainer(pl, tmp_path, [EMPCallback(**FEATURES)]).predict(
        evaluated(), data(1), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert torch.equal(got[0], wanted[0])


@pytest.mark.parametrize(
    "settings",
    [
        FEATURES,
        {**FEATURES, "dynamic": True},
        {**FEATURES, "observe_only": True},
        {**FEATURES, "apply": "training"},
        {},
    ],
)
def test_weights_alone_are_said_where_masks_are_no_part_of_them(settings, tmp_path, recwarn):
    def said():
        told = [str(warning.message) for warning in recwarn if "holds no EMP state" in str(warning.message)]
        recwarn.clear()
        return told

    emp, saver = EMPCallback(**settings, summary=False), ModelCheckpoint(tmp_path, "{epoch}", save_weights_only=True)
    module, trainer = evaluated(), make_trainer(pl, tmp_path, [emp, saver])
    trainer.fit(module, data(), data(1))
    trainer.test(module, data(2), verbose=False)
    assert said() == []
    weights, named = tmp_path / "epoch=2.ckpt", emp.config.target == "features" and emp.config.masks_evaluation
    trainer.test(module, data(2), ckpt_path=weights, verbose=False)
    here = said()
    fresh = make_trainer(pl, tmp_path, [EMPCallback(**settings)])
    fresh.validate(evaluated(), data(2), ckpt_path=weights, verbose=False)
    elsewhere = said()
    assert len(here) == len(elsewhere) == (1 if named else 0)
    if named:
        assert "this evaluation runs behind the masks of the last fit, which may be others than its own" in here[0]
        assert "this evaluation runs without masks: masks of features are no part of the weights." in elsewhere[0]
        assert elsewhere[0].endswith("Load a checkpoint that was saved with save_weights_only=False")
    fresh.validate(evaluated(), data(2), verbose=False)
    assert said() == []


def test_an_earlier_checkpoint_is_tested_behind_its_own_masks(tmp_path):
    emp = EMPCallback(**FEATURES, summary=False)
    module, trainer = fit(tmp_path, emp, epochs=4)
    trainer.test(module, data(2), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    got = module.losses[-2:]
    other = evaluated()
    make_trainer(pl, tmp_path, [EMPCallback(**FEATURES)]).test(
        other, data(2), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
    )
    assert other.losses == got


def test_what_an_evaluation_restored_never_leaks_into_a_fit(tmp_path):
    fit(tmp_path / "old", EMPCallback(summary=False), epochs=4)
    emp, module = EMPCallback(summary=False), evaluated()
    trainer = make_trainer(pl, tmp_path, [emp], max_epochs=2)
    trainer.validate(module, data(1), ckpt_path=tmp_path / "old/epoch=3.ckpt", verbose=False)
    with torch.no_grad():
        module.net[0].weight.fill_(0.5)
    trainer.fit(module, data())
    assert [(e.step, e.epoch) for e in emp.trajectory] == [(5, 0), (10, 1)]


def test_folds_start_clean(tmp_path):
    alone, together = [], EMPCallback(summary=False)
    for fold in range(2):
        emp = EMPCallback(summary=False)
        module, _ = fit(tmp_path / f"a{fold}", emp)
        alone.append((emp.masks, [(e.step, e.keep) for e in emp.trajectory]))
        module, trainer = fit(tmp_path / f"b{fold}", together)
        trainer.test(module, data(1), ckpt_path=tmp_path / f"b{fold}/epoch=1.ckpt", verbose=False)
        masks, rows = alone[-1]
        assert [(e.step, e.keep) for e in together.trajectory] == rows
        assert all(torch.equal(together.masks[name], mask) for name, mask in masks.items())


class BrokenData(pl.LightningDataModule):
    def test_dataloader(self):
        raise OSError("disk")


def evaluation_that_fails(folder, emp, checkpoint):
    with pytest.raises(OSError, match="disk"):
        make_trainer(pl, folder, [emp]).test(evaluated(), datamodule=BrokenData(), ckpt_path=checkpoint)


def evaluation_without_batches(folder, emp, checkpoint):
    make_trainer(pl, folder, [emp], limit_test_batches=0).test(evaluated(), data(1), ckpt_path=checkpoint)


def resume_that_fails(folder, emp, checkpoint):
    module = evaluated()
    module.configure_optimizers = lambda: torch.optim.AdamW([module.net[0].weight], lr=0.02)
    with pytest.raises(ValueError, match="doesn't match the size"):
        make_trainer(pl, folder, [emp], max_epochs=9).fit(module, data(), ckpt_path=checkpoint)


def fit_with_nothing_left(folder, emp, checkpoint):
    make_trainer(pl, folder, [emp], max_epochs=4).fit(evaluated(), data(), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:.*Total length of")
@pytest.mark.parametrize(
    "stage", [evaluation_that_fails, evaluation_without_batches, resume_that_fails, fit_with_nothing_left]
)
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_a_stage_that_failed_or_had_no_batch_leaves_nothing_to_the_next_fit(mode, stage, tmp_path):
    fit(tmp_path / "old", EMPCallback(mode=mode, summary=False), epochs=4)
    emp, module = EMPCallback(mode=mode, summary=False), evaluated()
    stage(tmp_path, emp, tmp_path / "old/epoch=3.ckpt")
    fit(tmp_path / "new", emp, epochs=2, module=module)
    alone, alike = EMPCallback(mode=mode, summary=False), evaluated()
    fit(tmp_path / "alone", alone, epochs=2, module=alike)
    assert [e.step for e in emp.trajectory] == [5, 10]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), alike.parameters(), strict=True))


def test_a_resume_after_one_that_failed_goes_on(tmp_path):
    wanted, _ = fit(tmp_path / "old", EMPCallback(summary=False), epochs=4)
    emp, module = EMPCallback(summary=False), evaluated()
    resume_that_fails(tmp_path, emp, tmp_path / "old/epoch=1.ckpt")
    make_trainer(pl, tmp_path, [emp], max_epochs=4).fit(module, data(), ckpt_path=tmp_path / "old/epoch=1.ckpt")
    assert [e.step for e in emp.trajectory] == [5, 10, 15, 20]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted.parameters(), strict=True))


def test_a_resume_with_nothing_left_to_train_stands_for_its_module(tmp_path):
    emp = EMPCallback(**FEATURES, summary=False)
    module, trainer = fit(tmp_path, emp)
    trainer.test(module, data(2), verbose=False)
    wanted = module.losses[-2:]
    resumed, again = EMPCallback(**FEATURES, summary=False), evaluated()
    trainer = make_trainer(pl, tmp_path, [resumed], max_epochs=3)
    trainer.fit(again, data(), ckpt_path=tmp_path / "epoch=2.ckpt")
    for _ in range(2):
        trainer.test(again, data(2), verbose=False)
        assert again.losses[-2:] == wanted
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert emp.state_key in torch.load(tmp_path / "again.ckpt", weights_only=False)["callbacks"]


def test_a_learning_rate_finder_brings_no_masks_of_another_module(tmp_path):
    emp = EMPCallback(summary=False)
    fit(tmp_path, emp)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    trainer = make_trainer(pl, tmp_path, [emp, finder])
    trainer.fit(evaluated(), data())
    # One row an epoch; under Lightning 2.5 the first is shorter by the finder's own batches.
    assert [e.step for e in emp.trajectory] == [trainer.global_step - 10, trainer.global_step - 5, trainer.global_step]


def test_weights_replaced_between_two_fits_are_said_and_are_the_dense_values(tmp_path):
    emp = EMPCallback(summary=False)
    module, _ = fit(tmp_path, emp, module=evaluated(lr=0.0))
    new = torch.randn(9, 6)
    with torch.no_grad():
        module.net[0].weight.copy_(new)
    trainer = make_trainer(pl, tmp_path, [emp], max_epochs=1)
    with pytest.warns(UserWarning, match=r"others than the last fit left \('net.0.weight'.*use a new EMPCallback"):
        trainer.fit(module, data())
    with emp.pruner.dense_weights():
        assert torch.equal(module.net[0].weight, new)
    assert emp.pruner.steps == 20, "the clock goes on"


@pytest.mark.parametrize("stop", [None, 1])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_a_checkpoint_of_weights_that_are_not_the_masks_is_said(mode, stop, tmp_path):
    emp = EMPCallback(mode=mode, stop=stop, summary=False)
    module, trainer = fit(tmp_path, emp, epochs=4)
    trainer.test(module, data(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    with pytest.warns(UserWarning, match=r"a checkpoint is made whose weights \('net.*are not those"):
        trainer.save_checkpoint(tmp_path / "mixed.ckpt")


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_a_restore_in_the_middle_of_a_fit_takes_effect_at_once(mode, tmp_path):
    class Finder(pl.Callback):
        """What a learning-rate finder does: it saves, trains to see how the loss moves, and restores."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "sweep.ckpt")
                (optimizer,) = trainer.optimizers
                for batch in data():
                    optimizer.zero_grad()
                    (10 * nn.functional.cross_entropy(pl_module.net(batch[0]), batch[1])).backward()
                    optimizer.step()
                restore = trainer._checkpoint_connector
                restore.resume_start(tmp_path / "sweep.ckpt")
                restore.restore_model()
                restore.restore_callbacks()
                restore.restore_optimizers_and_schedulers()
                restore.resume_end()

    def run(find):
        module, emp = evaluated(), EMPCallback(mode=mode, summary=False)
        make_trainer(pl, tmp_path, [emp, *([Finder()] if find else [])], max_epochs=3).fit(module, data(), data(1))
        with emp.pruner.dense_weights():
            return emp, [p.detach().clone() for p in module.parameters()]

    (plain, dense), (found, after) = run(False), run(True)
    assert [(e.step, e.keep) for e in found.trajectory] == [(e.step, e.keep) for e in plain.trajectory]
    assert all(torch.equal(a, b) for a, b in zip(dense, after, strict=True))


@pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint")
@pytest.mark.parametrize("at", [5, 6])
@pytest.mark.parametrize(
    "settings",
    [
        *({"mode": mode, "every_n_steps": 3} for mode in ("feedback", "project", "freeze")),
        {"every_n_epochs": 1},
        {"every_n_steps": 5},
        {**FEATURES, "every_n_steps": 3},
        {**FEATURES, "every_n_epochs": 1},
        {"criterion": "taylor", "evidence_steps": 2, "every_n_steps": 3},
    ],
)
def test_a_checkpoint_between_a_step_and_the_end_of_its_batch_loses_nothing(settings, at, tmp_path):
    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    class ByStep(Importable):
        def training_step(self, batch, batch_idx):
            generator = torch.Generator().manual_seed(self.trainer.global_step)
            x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
            return nn.functional.cross_entropy(self.net(x), y)

    ends = []
    for checkpoint in (None, tmp_path / "between.ckpt"):
        emp, module = EMPCallback(**settings, summary=False), ByStep()
        trainer = make_trainer(pl, tmp_path, [Saver(), emp], num_sanity_val_steps=1)
        trainer.fit(module, data(), data(1), ckpt_path=checkpoint)
        ends.append(([(e.step, e.epoch, e.keep) for e in emp.trajectory], [p.detach() for p in module.parameters()]))
    (rows, wanted), (again, got) = ends
    assert again == rows
    assert rows
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


# ---- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"summary": 3}, "summary must be True or False, got 3"),
        ({"summary": "no"}, "summary must be True or False, got 'no'"),
        ({"name": 3}, r"name must be a string that can be part of a file's name \(no slashes\) or None, got 3"),
        ({"name": "a/b"}, r"name must be a string that can be part of a file's name \(no slashes\) or None, got 'a/b'"),
        ({"trajectory_path": 3}, "trajectory_path must be a path, a URL or None, got 3"),
        ({"trajectory_path": b"rows"}, "trajectory_path must be a path, a URL or None, got b'rows'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(argument, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EMPCallback(**argument)


# ---- which state is whose -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "include", [["net.2.weight", "net.0.weight"], ("net.0.weight", "net.2.weight"), ["net.*.weight"]]
)
def test_the_same_choice_in_other_words_finds_its_state(include, tmp_path):
    fit(tmp_path, EMPCallback(include=["net.0.weight", "net.2.weight"], summary=False))
    emp = EMPCallback(include=include, summary=False)
    make_trainer(pl, tmp_path, [emp], max_epochs=4).fit(evaluated(), data(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [e.step for e in emp.trajectory] == [5, 10, 15, 20]


def test_another_choice_is_an_error_not_a_new_beginning(tmp_path):
    fit(tmp_path, EMPCallback(summary=False))
    emp = EMPCallback(include=["net.0.weight"], summary=False)
    with pytest.raises(ValueError, match="the same model, include and exclude"):
        make_trainer(pl, tmp_path, [emp], max_epochs=4).fit(evaluated(), data(), ckpt_path=tmp_path / "epoch=2.ckpt")


def test_callbacks_side_by_side_have_names_files_and_states_of_their_own(tmp_path):
    def both():
        return [EMPCallback(target="neurons", density=0.5, summary=False), EMPCallback(summary=False)]

    module, pair, logger = evaluated(), both(), pl.loggers.CSVLogger(tmp_path, version=0)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    make_trainer(pl, tmp_path, [*pair, saver], logger=logger, log_every_n_steps=1).fit(module, data(), data(1))
    kept = pair[0].pruner.weight_masks["net.0.weight"] & pair[1].masks["net.0.weight"]
    assert torch.equal(module.net[0].weight != 0, kept)
    folder = tmp_path / "lightning_logs/version_0"
    for callback, name in zip(pair, ("neurons", "weights"), strict=True):
        lines = (folder / f"emp_trajectory_{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["keep"] for line in lines] == [e.keep for e in callback.trajectory]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [float(r["emp/weights/keep"]) for r in rows if r["emp/weights/keep"]] == [
        float(e.keep) for e in pair[1].trajectory
    ]
    again = both()
    make_trainer(pl, tmp_path, again, max_epochs=4).fit(evaluated(), data(), ckpt_path=tmp_path / "last.ckpt")
    for before, after in zip(pair, again, strict=True):
        assert [*after.trajectory[:3]] == [*before.trajectory]
        assert [e.step for e in after.trajectory] == [5, 10, 15, 20]


def test_named_callbacks_find_their_states_with_other_settings(tmp_path):
    def both(beta):
        settings = {"observe_only": True, "every_n_steps": 2, "summary": False}
        return [EMPCallback(beta=beta, name="low", **settings), EMPCallback(beta=2 * beta, name="high", **settings)]

    first, second = both(0.5), both(0.6)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    make_trainer(pl, tmp_path, [*first, saver], max_epochs=1).fit(evaluated(), data())
    make_trainer(pl, tmp_path, second, max_epochs=2).fit(evaluated(), data(), ckpt_path=tmp_path / "last.ckpt")
    for before, after, beta in zip(first, second, (0.6, 1.2), strict=True):
        assert [*after.trajectory[:2]] == [*before.trajectory]
        assert [(e.step, e.beta) for e in after.trajectory[2:]] == [(6, beta), (8, beta), (10, beta)]


def test_callbacks_that_differ_in_the_criterion_alone_may_stand_side_by_side(tmp_path):
    pair = [EMPCallback(observe_only=True, criterion=c, summary=False) for c in ("magnitude", "random")]
    make_trainer(pl, tmp_path, pair, max_epochs=1).fit(evaluated(), data())
    assert [len(c.trajectory) for c in pair] == [1, 1]
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "emp_trajectory_weights.jsonl",
        "emp_trajectory_weights-2.jsonl",
    }


def by_the_module(trainer, module):
    module.configure_callbacks = lambda: [EMPCallback(beta=2.0), EMPCallback(beta=2.0)]


def one_by_one(trainer, module):
    trainer.callbacks += [EMPCallback(beta=2.0), EMPCallback(beta=2.0)]


@pytest.mark.parametrize("give", [by_the_module, one_by_one])
def test_callbacks_that_nothing_tells_apart_are_refused_with_the_remedy(give, tmp_path):
    trainer, module = make_trainer(pl, tmp_path, []), evaluated()
    give(trainer, module)
    message = (
        r"two EMPCallbacks have the same settings \(EMPCallback\[\].*'beta': 2.0\}\), so a checkpoint cannot tell them "
        r"apart: give each a name of its own, EMPCallback\(name='first', ...\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data())


# ---- epochs and steps ---------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self):
        self.epoch = -1

    def __iter__(self):
        self.epoch += 1
        yield from (batch for batch in data(0 if self.epoch == 1 else 4) or ())


def skips(module):
    module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx >= 3 else None
    return module, data(10), [3, 6, 9]


def streams(module):
    return module, DataLoader(Stream(), batch_size=None), [4, 4, 8]


def iterates(module):
    cls = type(module)

    class Iterates(cls):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    module.__class__ = Iterates
    return module, data(5), [5, 10, 15]


@pytest.mark.filterwarnings("ignore:.*was reported")
@pytest.mark.filterwarnings("ignore:.*`batch_size`")
@pytest.mark.parametrize("make", [skips, iterates])
def test_epochs_end_when_the_trainer_says_so(make, tmp_path):
    module, loader, steps = make(make_module(pl))
    emp = EMPCallback(summary=False)
    trainer = make_trainer(pl, tmp_path, [emp])
    trainer.fit(module, loader, data(1))
    assert [(e.step, e.epoch) for e in emp.trajectory] == [(s, i) for i, s in enumerate(steps)]
    assert emp.pruner.epochs == trainer.current_epoch == 3


def test_manual_accumulation_refreshes_before_each_validation(tmp_path):
    module = make_module(pl, manual=True)

    def training_step(batch, batch_idx):
        optimizer = module.optimizers()
        module.manual_backward(nn.functional.cross_entropy(module.net(batch[0]), batch[1]))
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    module.training_step = training_step
    emp = EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [emp]).fit(module, data(10), data(1))
    assert [(e.step, e.epoch) for e in emp.trajectory] == [(2, 0), (4, 1), (6, 2)]
    assert module.zeros_at_validation[0] == emp.trajectory[0].layers[0].n - emp.trajectory[0].layers[0].keep > 0


@pytest.mark.parametrize("batches", [{0: 1, 3: 4}])
def test_evidence_is_gathered_in_epochs_of_any_length(batches, tmp_path):
    emp = EMPCallback(criterion="taylor", evidence_steps=3, summary=False)
    scheduler = pl.callbacks.GradientAccumulationScheduler(batches)
    make_trainer(pl, tmp_path, [emp, scheduler], max_epochs=5).fit(make_module(pl), data(8))
    assert [e.step for e in emp.trajectory] == [8, 16, 24, 26, 28]


def test_two_optimizers_share_one_axis_with_the_trainers_own_metrics(tmp_path):
    module = make_module(pl, manual=True)
    module.other = nn.Linear(6, 4)

    def training_step(batch, batch_idx):
        for optimizer, net in zip(module.optimizers(), (module.net, module.other), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            module.manual_backward(loss)
            optimizer.step()
        module.log("train_loss", loss)

    module.training_step = training_step
    module.configure_optimizers = lambda: [torch.optim.SGD(m.parameters(), lr=0.01) for m in (module.net, module.other)]
    logger = pl.loggers.CSVLogger(tmp_path, version=0)
    emp = EMPCallback(every_n_steps=5, summary=False)
    trainer = make_trainer(pl, tmp_path, [emp], logger=logger, log_every_n_steps=1, max_epochs=2)
    trainer.fit(module, data(10))
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").open()))
    axis = {key: [int(r["step"]) for r in rows if r[key]] for key in ("train_loss", "emp/density")}
    assert axis["train_loss"] == list(range(20))
    assert axis["emp/density"] == [4, 9, 14, 19]
    assert [e.step for e in emp.trajectory] == [5, 10, 15, 20]
    assert (emp.pruner.steps, trainer.global_step) == (20, 40)


def test_a_schedule_that_asked_for_nothing_is_told_in_the_trainers_words(tmp_path):
    emp = EMPCallback(every_n_epochs=5, summary=False)
    with pytest.warns(UserWarning, match=r"Trainer stopped before the first refresh \(max_epochs=2, max_steps=-1\)"):
        make_trainer(pl, tmp_path, [emp], max_epochs=2).fit(make_module(pl), data())


def test_refreshes_that_were_late_to_the_end_are_told_as_late_only(tmp_path, recwarn):
    emp, module = EMPCallback(**FEATURES, every_n_steps=3, summary=False), make_module(pl).eval()
    make_trainer(pl, tmp_path, [emp], max_epochs=2).fit(module, data())
    told = [str(warning.message) for warning in recwarn]
    assert len(emp.trajectory) == 0
    assert sum("the refresh due at step 3 is late: nothing passed 'net.1'" in message for message in told) == 1
    assert not [message for message in told if "asked for no refresh" in message]


# ---- what others see ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [True, False])
def test_values_can_be_monitored_whatever_bars_there_are(bar, tmp_path, capsys):
    emp = EMPCallback(summary=False)
    others = [
        EarlyStopping(monitor="emp/n_eff", patience=5),
        ModelCheckpoint(
            dirpath=tmp_path,
            monitor="emp/density",
            filename="{emp/density:.3f}",
            auto_insert_metric_name=False,
            save_top_k=-1,
        ),
    ]
    make_trainer(pl, tmp_path, [*others, emp], enable_progress_bar=bar).fit(make_module(pl), data(), data(1))
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"{e.density:.3f}" for e in emp.trajectory}
    capsys.readouterr()


def test_early_stopping_ends_with_projected_weights(tmp_path):
    module = make_module(pl)
    emp = EMPCallback(mode="project", every_n_steps=4, summary=False)
    stopper = EarlyStopping(monitor="val/loss", mode="max", patience=1)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    make_trainer(pl, tmp_path, [emp, stopper, saver], max_epochs=9).fit(module, data(), data(1))
    assert zeros(module) == int((~emp.masks["net.0.weight"]).sum()) > 0


def test_the_table_says_what_is_left_out(tmp_path, capsys):
    module = make_module(pl)
    emp = EMPCallback()
    make_trainer(pl, tmp_path, [emp], max_epochs=1).fit(module, data())
    assert [one.name for one in emp.left_out] == ["net.0.bias", "net.2.bias"]
    assert "not pruned: 12.6% of all weights (a vector: bias, norm or scale: 100%)" in capsys.readouterr().out


class Finetuning(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=1)


def updating_what_is_not_frozen():
    module = make_module(pl)
    module.configure_optimizers = lambda: torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=0.02
    )
    return module


@pytest.mark.filterwarnings("ignore:left out of pruning")
def test_a_resume_that_finds_a_thawed_layer_frozen_says_so(tmp_path):
    def trainer():
        callbacks = [EMPCallback(summary=False), Finetuning(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        return make_trainer(pl, tmp_path, callbacks)

    trainer().fit(updating_what_is_not_frozen(), data(), data(1))
    message = (
        r"the checkpoint's masks belong to other parameters: net.0.weight is masked there and not chosen here: .* What "
        r"is frozen now, or in no optimizer yet \(layers that were thawed during that run\), must be thawed"
    )
    with pytest.raises(ValueError, match=message):
        trainer().fit(updating_what_is_not_frozen(), data(), data(1), ckpt_path=tmp_path / "epoch=1.ckpt")


@pytest.mark.filterwarnings("ignore:left out of pruning")
def test_a_backbone_that_is_thawed_is_pruned(tmp_path):
    module = updating_what_is_not_frozen()
    emp = EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [emp, Finetuning()]).fit(module, data(), data(1))
    assert [e.n for e in emp.trajectory] == [36, 90, 90]
    assert zeros(module) == int((~emp.masks["net.0.weight"]).sum()) > 0


def test_optimizers_made_anew_in_the_middle_are_followed(tmp_path):
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    module, emp = make_module(pl), EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [emp, Anew()]).fit(module, data(), data(1))
    assert [e.step for e in emp.trajectory] == [5, 10, 15]
    assert module.zeros_at_validation[-1] == zeros(module) == int((~emp.masks["net.0.weight"]).sum())


def test_copies_of_the_callback_are_its_settings_only():
    emp = EMPCallback(beta=1.5)
    assert copy.deepcopy(emp).state_key == emp.state_key
    with pytest.raises(IndexError, match="this callback has no rows"):
        emp.trajectory[-1]


class Importable(pl.LightningModule):
    """A module of a class that pickle finds by its name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03)


class Copier(pl.Callback):
    """Copies an EMPCallback in the second epoch or in its validation, and goes on copying until the epoch is over."""

    def __init__(self, emp, duplicate, hook):
        self.emp, self.duplicate = emp, duplicate
        setattr(self, hook, self.look)

    def look(self, trainer, pl_module, *_):
        if trainer.current_epoch == 1:
            self.copy = self.duplicate(self.emp)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("settings", [{"mode": mode} for mode in ("feedback", "project", "freeze")] + [FEATURES])
def test_a_copy_made_during_a_fit_keeps_the_record_and_begins_its_own(settings, duplicate, hook, tmp_path):
    settings = {**settings, "every_n_steps": 3, "summary": False}
    emp = EMPCallback(**settings)
    copier = Copier(emp, duplicate, hook)
    make_trainer(pl, tmp_path, [emp, copier]).fit(Importable(), data(), data(1))
    assert [e.step for e in emp.trajectory if e.group == emp.trajectory[0].group][:5] == [3, 6, 9, 12, 15]
    assert [(e.step, e.keep) for e in copier.copy.trajectory] == [
        (e.step, e.keep) for e in emp.trajectory if e.step < 10
    ]
    fresh, modules = EMPCallback(**settings), [Importable(), Importable()]
    for module, callback in zip(modules, (copier.copy, fresh), strict=True):
        make_trainer(pl, tmp_path, [callback], max_epochs=2).fit(module, data(), data(1))
    assert [(e.step, e.keep) for e in copier.copy.trajectory] == [(e.step, e.keep) for e in fresh.trajectory]
    assert fresh.masks
    assert all(torch.equal(copier.copy.masks[n], mask) for n, mask in fresh.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))


def test_a_module_copied_with_its_callback_goes_on_from_there(tmp_path):
    ends = []
    for stop in (False, True):
        emp, kept = EMPCallback(every_n_steps=3, summary=False), []

        class Pair(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    kept.append(copy.deepcopy((emp, pl_module)))  # noqa: B023

        module = evaluated()
        make_trainer(pl, tmp_path, [emp, Pair()], max_epochs=2).fit(module, data())
        emp, module = kept[0] if stop else (emp, module)
        make_trainer(pl, tmp_path, [emp], max_epochs=1).fit(module, data())
        with emp.pruner.dense_weights():
            ends.append(([e.step for e in emp.trajectory], [p.detach().clone() for p in module.parameters()]))
    (steps, wanted), (again, got) = ends
    assert steps == again == [3, 6, 9, 12, 15]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.compiler
@pytest.mark.parametrize("settings", [FEATURES, {"criterion": "wanda"}])
def test_a_compiled_model_is_masked_from_the_sanity_check_on(settings, tmp_path):
    losses = []
    for compiled in (False, True):
        module = evaluated()
        if compiled:
            module.net = torch.compile(module.net, backend="eager")
        emp = EMPCallback(**{"evidence_steps": 3, **settings}, summary=False)
        for _ in range(2):
            trainer = make_trainer(pl, tmp_path, [emp], num_sanity_val_steps=1)
            trainer.fit(module, data(), data(1))
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0])


@pytest.mark.parametrize("positions", ["attention_mask", "mask", None])
def test_padding_in_the_batch_is_no_evidence(positions, tmp_path):
    class Sequences(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)
            # Sizes that differ, but less than those of the inputs.
            self.net.weight = nn.Parameter(torch.linspace(1, 2, 8).view(2, 4))

        def training_step(self, batch, batch_idx):
            return self.net(batch["x"])[:, 0].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    x = torch.zeros(8, 3, 4)
    x[:, 0, :2] = 1.0  # the one position that counts reads two inputs
    x[:, 1:, 2:] = 9.0  # padding
    mask = torch.tensor([1, 0, 0]).expand(8, 3)
    key = positions or "attention_mask"
    loader = DataLoader([{"x": one, key: m} for one, m in zip(x, mask, strict=True)], batch_size=4)
    emp = EMPCallback(criterion="wanda", positions=positions, density=0.5, summary=False)
    make_trainer(pl, tmp_path, [emp], max_epochs=1).fit(Sequences(), loader)
    kept = emp.masks["net.weight"].sum(0)
    if positions is None:
        assert kept.tolist() == [0, 0, 2, 2]
    else:
        assert kept.tolist() == [2, 2, 0, 0]


@pytest.mark.slow
@pytest.mark.processes
def test_after_spawned_training_the_callback_says_where_its_results_are(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tests.integrations.spawned", run]
    done = ranks.run_command(command, written=run, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the rows are in {run}/emp_trajectory.jsonl" in " ".join(done.stderr.split()), done.stderr
    assert "this callback has no rows" in done.stdout
    assert [e.step for e in Trajectory.read(run / "emp_trajectory.jsonl")] == [3, 6]


def test_a_fit_without_batches_leaves_nothing_behind(tmp_path):
    module, emp = evaluated(), EMPCallback(**FEATURES, summary=False)
    make_trainer(pl, tmp_path, [emp], limit_train_batches=0, num_sanity_val_steps=1).fit(module, data(), data(1))
    assert not module.net[1]._forward_hooks
    assert emp.pruner is None or not emp.pruner._keeper.attached
