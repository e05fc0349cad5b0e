"""On a CUDA device: masks are those of the CPU, every mode trains there, and a refresh's time is printed (-s)."""

import time

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPCallback, EMPPruner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file ran"),
]
FORMS = [
    {"mode": "feedback"},
    {"mode": "project"},
    {"mode": "freeze"},
    {"scope": "tensor"},
    {"scope": "row"},
    {"criterion": "wanda", "scope": "row"},
    {"criterion": "taylor"},
    {"target": "heads", "criterion": "taylor"},
    {"target": "neurons"},
    {"target": "features"},
    {"target": "features", "dynamic": True},
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=10
    )


def trained(device: str, settings: dict) -> tuple[list[float], dict, EMPPruner]:
    """Return losses, masks and pruner after six steps with a refresh after each second one."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = EMPPruner(model, optimizer, every_n_steps=2, **settings)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(6):
        images = torch.randn(32, 3, 16, 16, generator=generator).to(device)
        labels = torch.randint(10, (32,), generator=generator).to(device)
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, pruner.masks, pruner


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_trains_as_on_the_cpu(settings):
    ours, masks, pruner = trained("cuda", settings)
    expected, cpu_masks, cpu = trained("cpu", settings)
    assert ours == pytest.approx(expected, rel=2e-3)
    assert masks.keys() == cpu_masks.keys()
    assert all(mask.is_cuda for mask in masks.values()) or "target" in settings  # units' masks are few
    for name, mask in masks.items():
        # Sums on the two devices differ in the last bit: a component at the threshold may fall the other way.
        assert (mask.cpu() != cpu_masks[name]).float().mean() <= max(2e-3, 1.01 / mask.numel()), name
    rows, cpu_rows = pruner.trajectory.records(), cpu.trajectory.records()
    assert [row["n_eff"] for row in rows] == pytest.approx([row["n_eff"] for row in cpu_rows], rel=2e-3)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_scores_give_the_same_masks(scope, dtype):
    masks = []
    for device in ("cuda", "cpu"):
        model = network().to(dtype).to(device)
        pruner = EMPPruner(model, scope=scope, mode="project")
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
    def trainer(epochs):
        return pl.Trainer(
            default_root_dir=tmp_path, accelerator="gpu", devices=1, max_epochs=epochs, precision=precision,
            logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[EMPCallback(every_n_epochs=1, mode=mode)],
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


def test_time_of_a_refresh(capsys):
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).cuda()
    weights = sum(p.numel() for p in model.parameters())
    with capsys.disabled():
        for scope in ("global", "tensor", "row"):
            pruner = EMPPruner(model, scope=scope)
            pruner.refresh()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            for _ in range(3):
                pruner.refresh()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / 3
            peak = torch.cuda.max_memory_allocated() - before
            print(
                f"\n{torch.cuda.get_device_name()}: refresh of {weights / 1e6:.0f} M float32 weights, scope={scope}: "
                f"{seconds * 1e3:.1f} ms, {4 * weights / seconds / 1e9:.0f} GB/s of weights, "
                f"{peak / 2**20:.0f} MiB above"
            )
            assert seconds < 60
            pruner.detach()
