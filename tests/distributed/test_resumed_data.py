"""Two ranks resume in the middle of an epoch with the batches that are due, and evaluate every example once."""

import pytest
import torch

from tests.distributed.ranks import spawn
from tests.distributed.test_lightning_strategies import free_port, set_environment

VALIDATED = 201  # in batches of 100: 100 and 1 on one rank, 99 and 1 on the other


def fit(folder, ckpt=None):
    import pytorch_lightning as pl
    from torchmetrics.classification import MulticlassAccuracy

    from emp_callbacks.study.recipe.data import DigitsData

    class Data(DigitsData):
        def load(self):
            parts = super().load()
            return {**parts, "val": torch.utils.data.Subset(parts["val"], range(VALIDATED))}

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.seen = torch.nn.Linear(64, 10), []
            self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, batch_idx):
            images, labels = batch
            self.seen.append(images.sum().item())
            return torch.nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

        def validation_step(self, batch, batch_idx):
            images, labels = batch
            self.accuracy.update(self.net(images.flatten(1)), labels)
            self.log("accuracy", self.accuracy)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    task = Task()
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = pl.Trainer(
        callbacks=[saver], accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, datamodule=Data(batch_size=100, seed=1), ckpt_path=ckpt)
    return {
        "seen": task.seen,
        "weights": {name: weight.detach().clone() for name, weight in task.named_parameters()},
        "accuracy": trainer.callback_metrics["accuracy"].item(),
    }


def accuracy(weights):
    from emp_callbacks.study.recipe.data import DigitsData

    images, labels = DigitsData().load()["val"][:VALIDATED]
    found = torch.nn.functional.linear(images.flatten(1), weights["net.weight"], weights["net.bias"]).argmax(1)
    return (found == labels).float().mean().item()


def resume(rank, world_size, folder, port):
    torch.set_num_threads(1)
    set_environment(rank, world_size, port)
    whole = fit(folder)
    resumed = fit(folder, f"{folder}/step=7.ckpt")
    torch.save({"whole": whole, "resumed": resumed, "alone": accuracy(whole["weights"])}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_resume_within_an_epoch_bit_for_bit(tmp_path):
    spawn(resume, 2, tmp_path, free_port())
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        whole, resumed = rank["whole"], rank["resumed"]
        assert len(whole["seen"]) == 10
        assert resumed["seen"] == whole["seen"][7:]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())
        assert resumed["accuracy"] == whole["accuracy"] == pytest.approx(rank["alone"], abs=1e-6)
    assert ranks[0]["whole"]["seen"] != ranks[1]["whole"]["seen"]
