"""A rank that dies in training: the checkpoint is whole, and the resumed run has no doubled or missing row."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from emp_callbacks import EMPPruner, Trajectory
from tests.distributed.ranks import process_group, spawn

STEPS, EVERY, SAVE_AT, DIE_AT = 12, 2, 6, 9


def train(rank, world_size, folder, start, die):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double()
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=EVERY, trajectory_path=f"{folder}/rows.jsonl")
    if start:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        states = {"model": model_state, "optimizer": optimizer_state}
        dist.checkpoint.load(states, checkpoint_id=f"{folder}/checkpoint")
        set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        pruner.load(f"{folder}/checkpoint/emp")
    for step in range(start, STEPS):
        if die and rank == 1 and step == DIE_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x[rank::world_size]).square().mean().backward()
        optimizer.step()
        pruner.step()
        if step + 1 == SAVE_AT and not start:
            model_state, optimizer_state = get_state_dict(net, optimizer)
            states = {"model": model_state, "optimizer": optimizer_state}
            dist.checkpoint.save(states, checkpoint_id=f"{folder}/checkpoint")
            pruner.save(f"{folder}/checkpoint/emp")
    weights = [parameter.full_tensor().detach() for parameter in net.parameters()]
    return {"masks": pruner.masks, "weights": weights, "rows": [(e.step, e.keep, e.n_eff) for e in pruner.trajectory]}


def run_rank(rank, world_size, folder, start, die):
    with process_group(rank, world_size, folder):
        torch.save(train(rank, world_size, folder, start, die), f"{folder}/rank{rank}.pt")


def test_a_killed_rank_loses_nothing_that_the_checkpoint_held(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    spawn(run_rank, 2, whole, 0, False)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        spawn(run_rank, 2, broken, 0, True)
    (broken / "store").unlink()
    assert not list(broken.glob("rank*.pt"))
    assert [e.step for e in Trajectory.read(broken / "rows.jsonl")] == [2, 4, 6, 8]
    spawn(run_rank, 2, broken, SAVE_AT, False)
    for rank in range(2):
        one, two = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for folder in (whole, broken))
        assert one["rows"] == two["rows"]
        for name, mask in one["masks"].items():
            assert torch.equal(mask, two["masks"][name])
        for weight, other in zip(one["weights"], two["weights"], strict=True):
            assert torch.equal(weight, other)
    assert [e.step for e in Trajectory.read(broken / "rows.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert Path(broken / "rows.jsonl.1").exists(), "the row that the checkpoint did not know is set aside, not lost"
