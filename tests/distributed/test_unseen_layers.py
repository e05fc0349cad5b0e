"""Layers that some ranks or none have seen: all ranks decide alike, as one process that sees everything."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner
from emp_callbacks.layer import MissingEvidence
from tests.distributed.ranks import process_group, spawn

SETTINGS = {
    "wanda": {"criterion": "wanda"},
    "taylor": {"criterion": "taylor", "scope": "tensor"},
    "neurons": {"target": "neurons", "criterion": "activation"},
    "neurons-taylor": {"target": "neurons", "criterion": "taylor", "scope": "global"},
    "features": {"target": "features", "center": "mean"},
    "features-taylor": {"target": "features", "criterion": "taylor", "scope": "global"},
    "features-random": {"target": "features", "criterion": "random"},
    "features-dynamic": {"target": "features", "dynamic": True},
}
UNSEEN = {"wanda": "experts.2.2.weight", "neurons": "experts.2.0"}


class Experts(nn.Module):
    """Expert 0 takes the rows of rank 0 of two, expert 1 those of rank 1, expert 2 none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x, chosen):
        h, out = self.first(x), x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out.index_put((chosen == i,), expert(h[chosen == i]))
        return out


def train(rank, world_size, name, folder=None):
    net = Experts().double()
    model = DistributedDataParallel(net, find_unused_parameters=True) if world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    pruner = EMPPruner(model, optimizer, every_n_steps=4, evidence_steps=3, beta=0.8, **SETTINGS[name])
    for step in range(9):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        chosen = torch.arange(12) % 2
        optimizer.zero_grad()
        model(x[rank::world_size], chosen[rank::world_size]).square().mean().backward()
        optimizer.step()
        pruner.step()
        if step in (2, 5) and folder:  # inside a window; in the first, no rank knows all features
            pruner.save(f"{folder}/{name}")
            pruner.load(f"{folder}/{name}")
    density = pruner.density if rank == 0 else None  # one rank alone may ask
    return {
        "masks": pruner.masks,
        "rows": [(e.group, e.n, e.keep, e.density, e.churn, e.note) for e in pruner.trajectory],
        "n_eff": [e.n_eff for e in pruner.trajectory],
        "density": density,
    }


def never_called(rank):
    """What every rank raises where no layer has evidence, and what is left as it was."""
    pruner = EMPPruner(Experts(), target="features")
    with pytest.raises(MissingEvidence) as raised:
        pruner.refresh()
    return raised.value.layer, len(pruner.trajectory)


def on_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        found = {name: train(rank, world_size, name, folder) for name in SETTINGS}
        torch.save((found, never_called(rank)), f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unseen")
    spawn(on_rank, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_that_one_rank_or_none_has_seen(name, ranks):
    alone = train(0, 1, name)
    assert any(keep < n for _, n, keep, *_ in alone["rows"]), "a mask that keeps all compares nothing"
    assert any("experts.2" in note for *_, note in alone["rows"])
    for found, _ in ranks:
        ours = found[name]
        assert ours["rows"] == alone["rows"]
        assert ours["n_eff"] == pytest.approx(alone["n_eff"], rel=1e-5)
        assert ours["masks"].keys() == alone["masks"].keys()
        for layer, mask in alone["masks"].items():
            assert torch.equal(ours["masks"][layer], mask), layer
    assert ranks[0][0][name]["density"] == alone["density"]
    if name in UNSEEN:
        assert bool(alone["masks"][UNSEEN[name]].all())


def test_without_any_evidence_all_ranks_raise(ranks):
    assert [told for _, told in ranks] == [("experts.0.1", 0)] * 2
