"""EMPCallback under Lightning's sharding strategies on two real gloo ranks: same rows as one process, exact resume."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.ranks import spawn

WIDTHS = (17, 33, 9)


def set_environment(rank, world_size, port):
    keys = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    keys |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "emp"}
    os.environ.update({key: str(value) for key, value in keys.items()}, DS_ACCELERATOR="cpu")


def make_strategy(name):
    from pytorch_lightning import strategies

    from emp_callbacks.study.recipe.strategies import FSDP2Strategy, ZeRODeepSpeedStrategy

    if name == "fsdp2":
        return FSDP2Strategy()
    if name == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        class CPUFSDPStrategy(strategies.FSDPStrategy):  # Lightning's own insists on CUDA
            def _setup_model(self, model):
                return FullyShardedDataParallel(
                    module=model,
                    mixed_precision=self.mixed_precision_config,
                    sharding_strategy=self.sharding_strategy,
                    device_id=torch.device("cpu"),
                    **self.kwargs,
                )

        return CPUFSDPStrategy(state_dict_type="sharded")

    return ZeRODeepSpeedStrategy(stage=int(name[-1]))


def make_module(pl, world_size, rank):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:]))

        def configure_model(self):
            if getattr(self, "device_mesh", None) is not None:
                from torch.distributed.fsdp import fully_shard

                mesh = self.device_mesh["data_parallel"]
                for layer in (self.net[0], self.net[2], self.net):
                    fully_shard(layer, mesh=mesh)

        def training_step(self, batch, batch_idx):
            generator = torch.Generator().manual_seed(self.trainer.global_step)
            x = torch.randn(12, WIDTHS[0], generator=generator)
            return self.net(x[rank::world_size]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.net(torch.ones(2, WIDTHS[0])).square().mean(), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)

    return Module()


def fit(pl, name, folder, world_size, rank, mode, ckpt=None, epochs=3):
    from emp_callbacks import EMPCallback

    callback = EMPCallback(every_n_epochs=1, mode=mode, summary=False)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    # Freeze is where clipping and accumulation meet the mask; Lightning's FSDP1 cannot clip by norm.
    hard = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3} if mode == "freeze" else {}
    trainer = pl.Trainer(
        **hard,
        max_epochs=epochs,
        callbacks=[callback, saver],
        accelerator="cpu",
        devices=world_size,
        strategy=make_strategy(name) if world_size > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=folder,
    )
    trainer.fit(
        make_module(pl, world_size, rank),
        torch.utils.data.DataLoader(torch.zeros(4 * world_size), 1),
        torch.utils.data.DataLoader(torch.zeros(world_size), 1),
        ckpt_path=ckpt,
    )
    audit = callback.pruner.audit()
    return {
        "rows": [(e.step, e.epoch, e.n, e.keep) for e in callback.trajectory],
        "n_eff": [e.n_eff for e in callback.trajectory],
        "clean": audit.clean or mode == "project",
        "masks": {name: mask.clone() for name, mask in callback.masks.items()},
    }


def run_rank(rank, world_size, folder, name, mode, port):
    import pytorch_lightning as pl

    torch.set_num_threads(1)
    if world_size > 1:
        set_environment(rank, world_size, port)
    whole = fit(pl, name, f"{folder}/whole", world_size, rank, mode)
    ckpt = f"{folder}/whole/epoch=0.ckpt"
    resumed = fit(pl, name, f"{folder}/resumed", world_size, rank, mode, ckpt) if world_size > 1 else whole
    torch.save({"whole": whole, "resumed": resumed}, f"{folder}/rank{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    rows = {}
    for mode in ("feedback", "freeze"):
        folder = tmp_path_factory.mktemp(mode)
        spawn(run_rank, 1, folder, "auto", mode, 0)
        rows[mode] = torch.load(folder / "rank0.pt", weights_only=True)["whole"]
    return rows


@pytest.mark.parametrize(("name", "mode"), [("fsdp2", "feedback"), ("fsdp1", "feedback"), ("fsdp2", "freeze")])
def test_rows_of_one_process_and_an_exact_resume(name, mode, alone, tmp_path):
    compare_with_one_process(name, mode, alone, tmp_path)


@pytest.mark.parametrize(
    ("name", "mode"), [("zero1", "feedback"), ("zero2", "feedback"), ("zero3", "feedback"), ("zero2", "freeze")]
)
def test_deepspeed_has_rows_of_one_process_and_an_exact_resume(name, mode, alone, shm_comm, tmp_path):
    compare_with_one_process(name, mode, alone, tmp_path)


def compare_with_one_process(name, mode, alone, tmp_path):
    spawn(run_rank, 2, tmp_path, name, mode, free_port())
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        whole, resumed = result["whole"], result["resumed"]
        assert whole["rows"] == alone[mode]["rows"]
        assert whole["n_eff"] == pytest.approx(alone[mode]["n_eff"], rel=1e-4)
        assert whole["clean"]
        assert resumed["clean"]
        assert resumed["rows"] == whole["rows"]
        assert resumed["n_eff"] == whole["n_eff"]
        for parameter, mask in whole["masks"].items():
            assert torch.equal(resumed["masks"][parameter], mask)
    lines = (tmp_path / "resumed" / "emp_trajectory.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ([2, 4, 6] if mode == "freeze" else [4, 8, 12])
