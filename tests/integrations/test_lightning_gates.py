"""Learned gates in a Trainer: validation shows them hardened, checkpoints carry them, a fit ends in masks."""

import csv

import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_callbacks import EMPCallback, Trajectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "in_chans": 1, "num_classes": 5}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = timm.create_model("vit_tiny_patch16_224", **SIZES)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("test/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 8, 8, generator=generator), torch.randint(0, 5, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def gates(**settings):
    fixed = {"target": "heads", "criterion": "taylor", "evidence_steps": 2, "gate_warmup": 2, "mode": "freeze"}
    return EMPCallback(gates="hard_concrete", density=0.5, summary=False, **fixed, **settings)


def fit(folder, callback, epochs, ckpt_path=None, **settings):
    module = Module()
    saver = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[callback, saver], **settings,
    )  # fmt: skip
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, callback = tmp_path_factory.mktemp("whole"), gates()
    return folder, callback, *fit(folder, callback, 4, logger=CSVLogger(folder, name="logs"))


def test_a_fit_ends_in_masks_and_its_last_validation_saw_them(whole):
    folder, callback, module, trainer = whole
    assert [event.step for event in callback.trajectory] == [3, 6, 9, 12, 12], "the last one hardens"
    assert all(event.gates is not None for event in callback.trajectory)
    assert sum(int(mask.sum()) for mask in callback.masks.values()) == 4
    assert "hardened" in callback.trajectory[-1].note
    shown = float(trainer.callback_metrics["val/loss"])
    (again,) = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=folder
    ).validate(module, data(), verbose=False)
    assert again["val/loss"] == pytest.approx(shown, abs=1e-6), "without the callback: the masks are in the weights"
    rows = Trajectory.read(folder / "logs/version_0/emp_trajectory.jsonl")
    assert [row.gates for row in rows] == [row.gates for row in callback.trajectory]
    with (folder / "logs/version_0/metrics.csv").open() as file:
        logged = [row["emp/gates_expected"] for row in csv.DictReader(file) if row.get("emp/gates_expected")]
    assert [float(value) for value in logged] == pytest.approx(
        [*{row.step: row.gates.expected for row in rows}.values()], abs=1e-4
    )


def test_a_fit_that_goes_on_from_gates_that_learned_equals_one_that_never_stopped(whole, tmp_path):
    folder, callback, module, _ = whole
    resumed = gates()
    other, _ = fit(tmp_path, resumed, 4, ckpt_path=folder / "saved/epoch=1.ckpt", logger=False)
    assert torch.equal(resumed.pruner.gates.log_alpha, callback.pruner.gates.log_alpha)
    for (name, mine), theirs in zip(other.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_test_of_such_a_checkpoint_sees_the_hardened_gates(whole):
    folder, *_ = whole
    path = folder / "saved/epoch=1.ckpt"

    def tested(callbacks):
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=callbacks,
            default_root_dir=folder,
        )  # fmt: skip
        return trainer.test(Module(), data(), ckpt_path=path, verbose=False)[0]["test/loss"]

    module = Module()
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["state_dict"])
    (gates_of,) = [one["gates"] for key, one in state["callbacks"].items() if key.startswith("EMPCallback")]
    flat = sorted(value for values in gates_of["log_alpha"].values() for value in values)
    open_ = 4 if gates_of["steps"] >= gates_of["warmup"] else 8
    with torch.no_grad():
        for name, values in gates_of["log_alpha"].items():
            closed = [value < flat[-open_] for value in values]
            module.get_submodule(name).proj.weight[:, torch.tensor(closed).repeat_interleave(4)] = 0.0
        losses = [nn.functional.cross_entropy(module.eval().net(x), y) for x, y in data()]
    assert tested([gates()]) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)
    assert tested([]) != pytest.approx(float(torch.stack(losses).mean()), abs=1e-5), "the weights alone are dense"
