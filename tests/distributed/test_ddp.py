"""Two and three real gloo processes give exactly the masks of one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner
from tests.distributed.ranks import process_group, spawn


def make_net():
    torch.manual_seed(0)
    # double precision: averaging gradients over ranks then differs from one process by 1e-16, far from any tie
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double()


def train(rank, world_size, settings):
    net = make_net()
    model = DistributedDataParallel(net) if world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=3, **settings)
    for step in range(10):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x[rank::world_size]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        pruner.step()
    return {
        "masks": pruner.masks,
        "weights": [p.detach() for p in net.parameters()],
        "rows": [(e.group, e.n, e.keep, e.density, e.churn, e.regrown) for e in pruner.trajectory],
        "n_eff": [e.n_eff for e in pruner.trajectory],
        "mass": [e.preserved_mass for e in pruner.trajectory],
    }


def train_rank(rank, world_size, folder, settings):
    with process_group(rank, world_size, folder):
        torch.save(train(rank, world_size, settings), f"{folder}/rank{rank}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_training_gives_the_masks_of_one_process(world_size, mode, tmp_path):
    settings = {"mode": mode, "scope": "tensor" if mode == "project" else "global"}
    spawn(train_rank, world_size, tmp_path, settings)
    alone = train(0, 1, settings)
    for rank in range(world_size):
        ours = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, mask in alone["masks"].items():
            assert torch.equal(ours["masks"][name], mask)
        assert ours["rows"] == alone["rows"]
        assert ours["n_eff"] == pytest.approx(alone["n_eff"], rel=1e-12)
        assert ours["mass"] == pytest.approx(alone["mass"], rel=1e-12)
        for weight, other in zip(ours["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)


def tied_weights(scope, dtype):
    """Many equal magnitudes, sizes that no number of ranks divides, one tensor of a single weight."""
    torch.manual_seed(1)
    net = nn.ModuleList([nn.Linear(13, 7, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(5, 3, bias=False)])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 2).round())
        net[1].weight.fill_(1.0)
    net = net.to(dtype)
    pruner = EMPPruner(net, scope=scope)
    events = pruner.refresh()
    return {name: mask.clone() for name, mask in pruner.masks.items()}, [(e.keep, e.threshold, e.n_eff) for e in events]


CASES = [(s, d) for s in ("global", "tensor", "row") for d in (torch.float16, torch.float32, torch.float64)]


def ties_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        torch.save([tied_weights(*case) for case in CASES], f"{folder}/rank{rank}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ties_and_odd_sizes_are_cut_as_in_one_process(world_size, tmp_path):
    spawn(ties_rank, world_size, tmp_path)
    for rank in range(world_size):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for case, (masks, rows) in zip(CASES, results, strict=True):
            alone_masks, alone_rows = tied_weights(*case)
            assert rows == alone_rows
            for name, mask in masks.items():
                assert torch.equal(mask, alone_masks[name]), case


def trouble_rank(rank, world_size, folder):
    messages = {}
    with process_group(rank, world_size, folder):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        pruner = EMPPruner(net)
        if rank == 1:
            net[1].weight.data[3, 3] = float("nan")  # the part that rank 1 counts
        try:
            pruner.refresh()
        except FloatingPointError as error:
            messages["nan"] = str(error)
        torch.manual_seed(0)
        drifted = nn.Linear(4, 4)
        pruner = EMPPruner(drifted)
        if rank == 1:
            drifted.weight.data.neg_().mul_(torch.arange(1.0, 17.0).view(4, 4))
        before = drifted.weight.detach().clone()
        try:
            pruner.refresh()
        except RuntimeError as error:
            messages["drift"] = str(error)
        assert torch.equal(drifted.weight, before)
    torch.save(messages, f"{folder}/rank{rank}.pt")


def test_trouble_on_one_rank_is_an_error_on_all(tmp_path):
    spawn(trouble_rank, 2, tmp_path)
    for rank in range(2):
        messages = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert "'1.weight' (rank 1)" in messages["nan"]
        assert "ranks [1] computed another mask than rank 0 for 'weight'" in messages["drift"]


def lightning_rank(rank, world_size, folder, port):
    import pytorch_lightning as pl

    from emp_callbacks import EMPCallback

    torch.set_num_threads(1)
    if world_size > 1:
        keys = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        keys |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "emp"}
        os.environ.update({key: str(value) for key, value in keys.items()})

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            x = torch.randn(
                12, 7, generator=torch.Generator().manual_seed(self.trainer.global_step), dtype=torch.float64
            )
            return self.net(x[rank::world_size]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    callback = EMPCallback(every_n_epochs=1, summary=False)
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[callback],
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=folder,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4 * world_size), 1))
    trainer.save_checkpoint(f"{folder}/{world_size}.ckpt")
    rows = len(Path(folder, "emp_trajectory.jsonl").read_text().splitlines()) if rank == 0 else 3
    result = {"masks": callback.masks, "steps": [e.step for e in callback.trajectory], "rows": rows}
    torch.save(result, f"{folder}/rank{rank}-of-{world_size}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def test_lightning_ddp_gives_the_masks_of_one_process(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    spawn(lightning_rank, 2, tmp_path / "two", port)
    spawn(lightning_rank, 1, tmp_path / "one", port)
    alone = torch.load(tmp_path / "one" / "rank0-of-1.pt", weights_only=True)
    assert alone["steps"] == [4, 8, 12]
    for rank in range(2):
        ours = torch.load(tmp_path / "two" / f"rank{rank}-of-2.pt", weights_only=True)
        assert ours["steps"] == alone["steps"]
        assert ours["rows"] == 3
        for name, mask in alone["masks"].items():
            assert torch.equal(ours["masks"][name], mask)
