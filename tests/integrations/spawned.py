"""A fit in processes of its own, and what the callback of the main process says after it; run as a module."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_callbacks import EMPCallback


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder):
    emp = EMPCallback(summary=False)
    trainer = pl.Trainer(
        callbacks=[emp],
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(24, 6)), 4))
    try:
        emp.trajectory[-1]
    except IndexError as error:
        print(error)


if __name__ == "__main__":
    main(sys.argv[1])
