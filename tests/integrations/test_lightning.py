import csv
import dataclasses
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_callbacks import EMPCallback, EMPConfig, Trajectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
FLAVOURS = ["pytorch_lightning", "lightning.pytorch"]
MODES = ["feedback", "project", "freeze"]
RESUMED = {mode: {"mode": mode} for mode in MODES} | {
    "features": {"target": "features", "evidence_steps": 3, "beta": 0.8},
    "dynamic": {"target": "features", "dynamic": True, "beta": 0.8},
    "taylor": {"criterion": "taylor", "evidence_steps": 2},
    "wanda": {"criterion": "wanda"},
    "neurons": {"target": "neurons", "criterion": "activation", "mode": "freeze"},
}


@pytest.fixture(params=FLAVOURS)
def pl(request):
    return importlib.import_module(request.param)


def data(batches: int = 5) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8 * batches, 6, generator=generator), torch.randint(0, 4, (8 * batches,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def make_module(pl, lr=0.02, manual=False):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
            self.automatic_optimization = not manual
            self.zeros_at_validation = []

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch, index):
            self.zeros_at_validation.append(int((self.net[0].weight == 0).sum()))
            self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.1)

    return Module()


def make_trainer(pl, folder, callbacks, **settings):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=callbacks, **{**defaults, **settings})


def zeros(module) -> int:
    return int((module.net[0].weight == 0).sum())


# ---- events and order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_one_line_in_a_trainer(pl, mode, tmp_path):
    callback = EMPCallback(every_n_epochs=1, mode=mode, summary=False)
    module = make_module(pl)
    make_trainer(pl, tmp_path, [callback]).fit(module, data(), data(1))
    assert isinstance(callback, pl.Callback)
    assert [(e.step, e.epoch) for e in callback.trajectory] == [(5, 0), (10, 1), (15, 2)]
    pruned = int((~callback.masks["net.0.weight"]).sum())
    assert zeros(module) == pruned > 0
    assert module.zeros_at_validation[-1] == pruned, "validation sees the mask of its own epoch"
    assert module.zeros_at_validation[0] > 0
    assert len(Trajectory.read(tmp_path / "emp_trajectory.jsonl")) == 3


def test_the_default_is_once_an_epoch():
    assert EMPCallback().config == EMPConfig(every_n_epochs=1)


@pytest.mark.parametrize(
    ("settings", "trainer", "steps"),
    [
        ({"every_n_steps": 4}, {}, [4, 8, 12]),
        ({"every_n_steps": 4, "start": 2, "stop": 6}, {}, [2, 6]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [10, 20]),
        ({"every_n_epochs": 1, "start": 3}, {}, [15]),
        ({"every_n_epochs": 1}, {"accumulate_grad_batches": 2}, [3, 6, 9]),
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2}, [2, 4, 6, 8]),
        ({"every_n_epochs": 1}, {"limit_train_batches": 2}, [2, 4, 6]),
        ({"every_n_steps": 5}, {"max_steps": 7, "max_epochs": -1}, [5]),
        ({"every_n_steps": 5, "mode": "project"}, {"max_steps": 7, "max_epochs": -1}, [5, 7]),
        ({"every_n_steps": 4, "mode": "project"}, {"max_epochs": 2}, [4, 8, 10]),
    ],
)
def test_schedule_counts_optimizer_steps_and_epochs(settings, trainer, steps, tmp_path):
    pl = importlib.import_module(FLAVOURS[0])
    callback = EMPCallback(summary=False, **settings)
    make_trainer(pl, tmp_path, [callback], **trainer).fit(make_module(pl), data())
    assert [e.step for e in callback.trajectory] == steps


def test_validation_in_the_middle_of_an_epoch_sees_masked_weights(pl, tmp_path):
    callback = EMPCallback(every_n_epochs=1, summary=False)
    module = make_module(pl)
    make_trainer(pl, tmp_path, [callback], val_check_interval=2, max_epochs=2).fit(module, data(), data(1))
    assert len(module.zeros_at_validation) == 4
    assert all(module.zeros_at_validation[2:])


def test_manual_optimization_gives_the_same_masks(pl, tmp_path):
    masks = []
    for manual in (False, True):
        callback = EMPCallback(every_n_steps=4, summary=False)
        make_trainer(pl, tmp_path, [callback]).fit(make_module(pl, manual=manual), data())
        masks.append(callback.masks)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [{"gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}, {"precision": "64-true"}])
def test_clipping_and_mixed_precision(mode, extra, tmp_path):
    pl = importlib.import_module(FLAVOURS[0])
    callback = EMPCallback(every_n_steps=4, mode=mode, summary=False)
    module = make_module(pl)
    make_trainer(pl, tmp_path, [callback], **extra).fit(module, data())
    mask = callback.masks["net.0.weight"]
    assert 0 < callback.pruner.density < 1
    assert bool((module.net[0].weight[~mask] == 0).all())


def test_freeze_masks_gradients_before_lightning_clips_them(tmp_path):
    pl = importlib.import_module(FLAVOURS[0])
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append((module.net[0].weight.grad[~callback.masks["net.0.weight"]] == 0).all().item())

    callback = EMPCallback(every_n_steps=4, mode="freeze", summary=False)
    make_trainer(pl, tmp_path, [Watch(), callback], gradient_clip_val=0.05).fit(make_module(pl), data())
    assert all(seen)


# ---- checkpoints --------------------------------------------------------------------------------------------------


def full_state(callback, module, trainer):
    rows = [dataclasses.replace(e, seconds=0.0) for e in callback.trajectory]
    with callback.pruner.dense_weights():
        dense = {name: p.detach().clone() for name, p in module.named_parameters()}
    return dense, module.state_dict(), callback.masks, rows, trainer.optimizers[0].state_dict()["state"]


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", [{"every_n_epochs": 1}, {"every_n_steps": 3}])
def test_resume_from_every_epoch_equals_the_run_that_never_stopped(pl, mode, schedule, tmp_path):
    def run(folder, ckpt=None, **trainer_settings):
        callback = EMPCallback(mode=mode, summary=False, **schedule)
        saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
        module = make_module(pl)
        trainer = make_trainer(pl, folder, [callback, saver], max_epochs=4, **trainer_settings)
        trainer.fit(module, data(), data(1), ckpt_path=ckpt)
        return callback, module, trainer

    whole = full_state(*run(tmp_path / "whole"))
    for epoch in (0, 2):
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed = full_state(*run(tmp_path / f"from{epoch}", checkpoint, num_sanity_val_steps=1))
        for one, two in zip(whole, resumed, strict=True):
            assert same(one, two)


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_resume_from_any_step_equals_the_run_that_never_stopped(settings, tmp_path):
    pl = importlib.import_module(FLAVOURS[0])

    def run(folder, ckpt=None):
        callback = EMPCallback(**settings, summary=False, every_n_steps=3)
        saver = pl.callbacks.ModelCheckpoint(
            dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        module = make_module(pl)

        def training_step(batch, batch_idx):
            # The batch is a function of the step: Lightning does not restore a loader's place within an epoch.
            generator = torch.Generator().manual_seed(module.trainer.global_step)
            x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
            return nn.functional.cross_entropy(module.net(x), y)

        module.training_step = training_step
        trainer = make_trainer(pl, folder, [callback, saver], max_steps=8, max_epochs=-1)
        trainer.fit(module, data(), ckpt_path=ckpt)
        return full_state(callback, module, trainer)

    whole = run(tmp_path / "whole")
    for stop in range(1, 8):
        resumed = run(tmp_path / f"from{stop}", tmp_path / "whole" / f"step={stop}.ckpt")
        for one, two in zip(whole, resumed, strict=True):
            assert same(one, two), stop


def test_the_checkpoint_holds_masked_weights_and_loads_without_unpickling(pl, tmp_path):
    callback = EMPCallback(summary=False)
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, [callback])
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert int((saved["state_dict"]["net.0.weight"] == 0).sum()) == zeros(module) > 0
    (state,) = (value for key, value in saved["callbacks"].items() if key.startswith("EMPCallback"))
    assert set(state["masks"]) == {"net.0.weight", "net.2.weight"}


def test_resume_in_another_mode_is_refused(pl, tmp_path):
    trainer = make_trainer(pl, tmp_path, [EMPCallback(summary=False)])
    trainer.fit(make_module(pl), data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = make_trainer(pl, tmp_path, [EMPCallback(mode="freeze", summary=False)], max_epochs=5)
    with pytest.raises(ValueError, match="trained with mode='feedback', this run has mode='freeze'"):
        other.fit(make_module(pl), data(), ckpt_path=tmp_path / "end.ckpt")


def test_emp_on_a_run_that_began_without_it(pl, tmp_path):
    dense = make_trainer(pl, tmp_path, [], max_epochs=2)
    dense.fit(make_module(pl), data())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    callback = EMPCallback(summary=False)
    make_trainer(pl, tmp_path, [callback], max_epochs=4).fit(make_module(pl), data(), ckpt_path=tmp_path / "dense.ckpt")
    assert [(e.step, e.epoch) for e in callback.trajectory] == [(15, 2), (20, 3)]


def test_a_second_fit_goes_on(pl, tmp_path):
    callback = EMPCallback(summary=False)
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, [callback], max_epochs=2)
    trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data())
    assert [e.step for e in callback.trajectory] == [5, 10, 15, 20]
    other = make_module(pl)
    make_trainer(pl, tmp_path, [callback], max_epochs=1).fit(other, data())
    assert [e.step for e in callback.trajectory] == [5], "another module starts anew"


# ---- what the user sees -------------------------------------------------------------------------------------------


def test_every_logger_gets_every_refresh(pl, tmp_path):
    logged = []

    class Recorder(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    loggers = [pl.loggers.CSVLogger(tmp_path, name="csv", version=0), Recorder(tmp_path, name="own", version=0)]
    callback = EMPCallback(scope="tensor", summary=False)
    make_trainer(pl, tmp_path, [callback], logger=loggers, log_every_n_steps=1).fit(make_module(pl), data(), data(1))
    densities = [sum(e.keep for e in callback.trajectory[i : i + 2]) / 90 for i in (0, 2, 4)]
    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["emp/density"]]
    assert [int(row["step"]) for row in rows] == [4, 9, 14], "where Lightning puts val_loss of the same moment"
    assert [float(row["emp/density"]) for row in rows] == pytest.approx(densities)
    assert float(rows[-1]["emp/density/net.2.weight"]) == pytest.approx(callback.trajectory[-1].density)
    seen = [(step, metrics) for step, metrics in logged if "emp/density" in metrics]
    assert [step for step, _ in seen] == [4, 9, 14]
    assert [metrics["emp/density"] for _, metrics in seen] == pytest.approx(densities)
    assert all("emp/n_eff" in metrics for _, metrics in seen)
    assert (tmp_path / "csv/version_0/emp_trajectory.jsonl").exists()


def test_density_stands_in_the_rich_progress_bar(pl, tmp_path):
    texts = []

    class Bar(pl.callbacks.RichProgressBar):
        def get_metrics(self, trainer, module):
            metrics = super().get_metrics(trainer, module)
            texts.append(metrics)
            return metrics

    callback = EMPCallback(summary=False)
    trainer = make_trainer(pl, tmp_path, [callback, Bar()], enable_progress_bar=True)
    trainer.fit(make_module(pl), data())
    assert "emp/density" not in texts[0]
    assert texts[-1]["emp/density"] == pytest.approx(callback.pruner.density, abs=1e-3)


def test_the_layer_table_is_printed_at_the_end(pl, tmp_path, capsys):
    make_trainer(pl, tmp_path, [EMPCallback()]).fit(make_module(pl), data())
    printed = capsys.readouterr().out
    assert "net.0.weight" in printed
    assert "density" in printed
    make_trainer(pl, tmp_path, [EMPCallback(summary=False)]).fit(make_module(pl), data())
    assert "net.0.weight" not in capsys.readouterr().out


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_the_layer_table_stands_below_the_bar(pl, bar, tmp_path, monkeypatch):
    drawn = getattr(pl.callbacks, bar)()
    running = []

    def print_summary():
        live = drawn.progress.live.is_started if bar == "RichProgressBar" else not drawn.train_progress_bar.disable
        running.append(live)

    callback = EMPCallback()
    monkeypatch.setattr(callback, "print_summary", print_summary)
    make_trainer(pl, tmp_path, [callback, drawn], enable_progress_bar=True).fit(make_module(pl), data())
    assert running == [False]


def test_a_warning_points_at_the_line_that_calls_the_trainer(pl, tmp_path, recwarn):
    module = make_module(pl)
    with torch.no_grad():
        module.net[0].weight.fill_(1.0)
    trainer = make_trainer(pl, tmp_path, [EMPCallback(summary=False, scope="tensor")])
    trainer.fit(module, data())
    (told,) = [warning for warning in recwarn if "does not discriminate" in str(warning.message)]
    assert told.filename == __file__


# ---- trouble ------------------------------------------------------------------------------------------------------


def test_an_exception_in_training_leaves_no_hooks(pl, tmp_path):
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 8:
                raise RuntimeError("broken on purpose")

    callback = EMPCallback(summary=False, mode="freeze")
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, [callback, Break()])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trainer.fit(module, data())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not module.net[0].weight._post_accumulate_grad_hooks
    assert len(Trajectory.read(tmp_path / "emp_trajectory.jsonl")) == 1


def test_nan_weights_name_the_parameter_and_the_step(pl, tmp_path):
    with pytest.raises(FloatingPointError, match=r"'net.0.weight' \(rank 0\).*at step 5; no mask was changed"):
        make_trainer(pl, tmp_path, [EMPCallback(summary=False)]).fit(make_module(pl, lr=1e30), data())


def test_a_pattern_that_matches_nothing_stops_the_fit_before_training(pl, tmp_path):
    callback = EMPCallback(include=["nett.0.weight"], summary=False)
    with pytest.raises(ValueError, match=r"near names: net.0.weight"):
        make_trainer(pl, tmp_path, [callback]).fit(make_module(pl), data())


def test_a_folder_that_is_a_file_stops_the_fit_before_training(pl, tmp_path):
    (tmp_path / "rows").write_text("mine")
    callback = EMPCallback(trajectory_path=tmp_path / "rows" / "emp.jsonl", summary=False)
    module = make_module(pl)
    before = module.net[0].weight.detach().clone()
    with pytest.raises(OSError, match="rows"):
        make_trainer(pl, tmp_path, [callback]).fit(module, data())
    assert torch.equal(module.net[0].weight, before)
    assert (tmp_path / "rows").read_text() == "mine"


def test_an_unknown_way_of_sharding_is_refused(pl):
    from types import SimpleNamespace

    from emp_callbacks.integrations.lightning_strategy import check_strategy

    with pytest.raises(NotImplementedError, match="EMPCallback does not support XLAStrategy"):
        check_strategy(SimpleNamespace(strategy=type("XLAStrategy", (), {})()))
    check_strategy(SimpleNamespace(strategy=type("FSDPStrategy", (), {})()))


@pytest.mark.processes
def test_works_where_only_the_package_lightning_is_installed():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('pytorch_lightning') else real(name, *a)\n"
        "from emp_callbacks import EMPCallback\n"
        "print([c.__module__.split('.')[0] for c in EMPCallback.__bases__[2:]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['lightning']", done.stderr
