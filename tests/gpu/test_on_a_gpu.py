"""On a CUDA device: masks are those of the CPU, and every mode trains there."""

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional

from emp_callbacks import EMPCallback, EMPPruner
from tests.gpu.common import (
    DEVICE,
    FLOAT32,
    FORMS,
    LOW_PRECISION,
    ON_A_GPU,
    REHEARSAL,
    check_alike,
    forms,
    network,
    trained,
    trained_on_the_cpu,
)

pytestmark = ON_A_GPU
PRECISIONS = {
    "float32": ({}, FLOAT32),
    "autocast": ({"autocast": torch.bfloat16}, LOW_PRECISION),
    "bfloat16": ({"dtype": torch.bfloat16}, LOW_PRECISION),
}


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
@forms(FORMS)
def test_trains_as_on_the_cpu(settings, precision, tolerance):
    ours, cpu = trained(settings, **precision), trained_on_the_cpu(settings, **precision)
    check_alike(ours, cpu, tolerance)
    if "target" not in settings:  # units' masks are few
        assert {mask.device.type for mask in ours.masks.values()} == {DEVICE}


@pytest.mark.parametrize("settings", [*({"scope": scope} for scope in ("global", "tensor", "row")), {"pattern": "2:4"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_scores_give_the_same_masks(settings, dtype):
    masks = []
    for device in (DEVICE, "cpu"):
        model = network().to(dtype).to(device)
        pruner = EMPPruner(model, mode="project", **settings)
        pruner.refresh()
        masks.append({name: mask.cpu() for name, mask in pruner.masks.items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, _):
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader():
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(128, 3, 16, 16), torch.randint(10, (128,)))
    return torch.utils.data.DataLoader(data, batch_size=32)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_lightning_trains_and_resumes(mode, precision, tmp_path):
    if REHEARSAL and precision == "16-mixed":
        pytest.skip("Lightning has 16-mixed on a GPU only")

    def trainer(epochs):
        return pl.Trainer(
            default_root_dir=tmp_path, accelerator="cpu" if REHEARSAL else "gpu", devices=1, max_epochs=epochs,
            precision=precision, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[EMPCallback(every_n_epochs=1, mode=mode)],
        )  # fmt: skip

    first = trainer(2)
    first.fit(Task(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    task, second = Task(), trainer(3)
    second.fit(task, loader(), ckpt_path=tmp_path / "half.ckpt")
    rows = second.callbacks[0].pruner.trajectory.records()
    assert len({row["step"] for row in rows}) == 3
    kept = sum(int(mask.sum()) for mask in second.callbacks[0].pruner.masks.values())
    assert kept == rows[-1]["keep"]
    assert 0.2 < kept / rows[-1]["n"] < 0.9
