"""Shards on an accelerator's path, on two and three real gloo processes, give exactly the masks of one CPU process."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.accelerator import accelerator_path
from tests.distributed.ranks import process_group, spawn
from tests.distributed.sharded_net import WAYS
from tests.distributed.test_fsdp import train

CASES = [(way, mode, "global") for way in ("fsdp2", "fsdp1", "ddp") for mode in ("feedback", "freeze")]


def on_a_rank(rank, world_size, folder):
    WAYS["ddp"] = DistributedDataParallel
    with process_group(rank, world_size, folder), accelerator_path():
        torch.save({case: train(rank, world_size, *case) for case in CASES}, f"{folder}/rank{rank}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_gives_the_masks_of_one_process(world_size, tmp_path):
    spawn(on_a_rank, world_size, tmp_path)
    alone = {mode: train(0, 1, "alone", mode, "global") for mode in ("feedback", "freeze")}
    for rank in range(world_size):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for way, mode, scope in CASES:
            ours, expected = found[way, mode, scope], alone[mode]
            for name, mask in expected["masks"].items():
                assert torch.equal(ours["masks"][name], mask), (way, mode, name)
            for values in ("weights", "momentum"):
                for name, value in expected[values].items():
                    torch.testing.assert_close(ours[values][name], value, rtol=0, atol=1e-10)
            assert ours["violations"] == 0
            assert all(ours["clean"])
