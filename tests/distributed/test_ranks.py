"""Forked ranks are as different from each other as programs that torchrun starts."""

import os

import numpy as np
import torch

from tests.distributed.ranks import spawn


def tell(rank, world_size, folder):
    torch.save((hash("name"), float(np.random.rand()), os.environ["TOLD_LATE"]), f"{folder}/rank{rank}.pt")


def test_ranks_hash_and_draw_for_themselves_and_have_the_environment_of_now(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    told = []
    for number in range(2):  # the second time from servers that run already
        monkeypatch.setenv("TOLD_LATE", str(number))
        spawn(tell, 2, tmp_path)
        told += [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    hashes, drawn, late = zip(*told, strict=True)
    assert late == ("0", "0", "1", "1")
    assert len(set(drawn)) == 4
    assert hashes[0] != hashes[1]
