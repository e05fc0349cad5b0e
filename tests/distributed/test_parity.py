"""The same model, data and seeds give the same masks at every refresh, whoever drives the loop, on one rank or two."""

import json
import os
import zlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.distributed.ranks import process_group, spawn

pytest.importorskip("accelerate", reason="accelerate comes with emp-callbacks[hf]")
import accelerate
import lightning.fabric
import pytorch_lightning as pl
import transformers

from emp_callbacks import EMPCallback, EMPPruner, EMPTrainerCallback

STEPS, ROWS = 6, 12
SETTINGS = {"every_n_steps": 2, "criterion": "taylor", "evidence_steps": 1, "mode": "project"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 5)).double()

    def forward(self, x):
        return {"loss": self.net(x).square().mean()}


def data():
    x = torch.randn(STEPS * ROWS, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [{"x": row} for row in x]


def batches(rank, ranks):
    """Yield this rank's part of each batch of ROWS rows: neighbours, as Accelerate deals them out."""
    size = ROWS // ranks
    rows = torch.stack([one["x"] for one in data()])
    yield from (rows[at + rank * size : at + (rank + 1) * size] for at in range(0, len(rows), ROWS))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def plain(rank, ranks, folder):
    model = Net()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = optimizer_of(model)
    pruner = EMPPruner(wrapped, optimizer, **SETTINGS)
    for x in batches(rank, ranks):
        optimizer.zero_grad()
        wrapped(x)["loss"].backward()
        optimizer.step()
        pruner.step()


def with_accelerate(rank, ranks, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    pruner = EMPPruner(model, optimizer, **SETTINGS)
    for x in batches(rank, ranks):
        optimizer.zero_grad()
        accelerator.backward(model(x)["loss"])
        optimizer.step()
        pruner.step()


def with_fabric(rank, ranks, folder):
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    model = Net()
    model, optimizer = fabric.setup(model, optimizer_of(model))
    pruner = EMPPruner(model, optimizer, **SETTINGS)
    for x in batches(rank, ranks):
        optimizer.zero_grad()
        fabric.backward(model(x)["loss"])
        optimizer.step()
        pruner.step()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net().net

    def training_step(self, x, batch_idx):
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return optimizer_of(self)


def with_lightning(rank, ranks, folder):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[EMPCallback(**SETTINGS, summary=False)],
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(Module(), DataLoader(list(batches(rank, ranks)), batch_size=None))


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def with_hugging_face(rank, ranks, folder):
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=ROWS // ranks,
        num_train_epochs=1,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        ddp_backend="gloo" if ranks > 1 else None,
    )
    model = Net()
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = InOrder(model, arguments, train_dataset=data(), optimizers=(optimizer, constant))
    EMPTrainerCallback.attach(trainer, **SETTINGS, summary=False)
    trainer.train()


HOSTS = {
    "plain": plain,
    "Accelerate": with_accelerate,
    "Fabric": with_fabric,
    "Lightning": with_lightning,
    "Hugging Face": with_hugging_face,
}


def masks_of_each_refresh(train, *args):
    """Train and return what every refresh kept, as (step, digest of all masks)."""
    found, original = [], EMPPruner.step

    def step(self, **kwargs):
        events = original(self, **kwargs)
        if events:
            masks = b"".join(mask.cpu().numpy().tobytes() for mask in self.masks.values())
            found.append([events[0].step, zlib.crc32(masks), *self.masks])
        return events

    EMPPruner.step = step
    try:
        train(*args)
    finally:
        EMPPruner.step = original
    return found


def ranks(rank, world_size, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29557", TORCHELASTIC_RUN_ID="emp",
    )  # fmt: skip
    with process_group(rank, world_size, folder):
        found = {host: masks_of_each_refresh(train, rank, world_size, folder) for host, train in HOSTS.items()}
        if rank == 0:
            with open(f"{folder}/found.json", "w") as file:
                json.dump(found, file)


def test_every_host_makes_the_same_masks_on_one_process_and_on_two(tmp_path):
    alone = {host: masks_of_each_refresh(train, 0, 1, str(tmp_path)) for host, train in HOSTS.items()}
    expected = alone["plain"]
    assert [step for step, *_ in expected] == [2, 4, 6]
    assert len({digest for _, digest, *_ in expected}) == 3  # they move
    assert alone == dict.fromkeys(HOSTS, expected)
    spawn(ranks, 2, tmp_path)
    assert json.loads((tmp_path / "found.json").read_text()) == dict.fromkeys(HOSTS, expected)
