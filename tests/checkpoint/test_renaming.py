"""A state goes on in a model that holds the pruned one as a part of itself, and back."""

import copy

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner

FORMS = {
    "feedback": {"mode": "feedback"},
    "freeze, taylor": {"mode": "freeze", "criterion": "taylor", "evidence_steps": 2},
    "rows, wanda": {"criterion": "wanda", "scope": "row", "evidence_steps": 2},
    "neurons": {"target": "neurons", "criterion": "taylor", "evidence_steps": 2},
    "features": {"target": "features", "evidence_steps": 2},
}


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def run(model, optimizer, pruner, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("into_a_holder", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_goes_on_where_only_a_prefix_of_names_differs(form, into_a_holder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 5))
    model = net if into_a_holder else Holder(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    pruner = EMPPruner(model, optimizer, every_n_steps=2, **FORMS[form])
    run(model, optimizer, pruner, 0, 5)
    inner, states = copy.deepcopy(net.state_dict()), copy.deepcopy((optimizer.state_dict(), pruner.state_dict()))
    run(model, optimizer, pruner, 5, 8)

    other = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 5))
    other.load_state_dict(inner)
    place = Holder(other) if into_a_holder else other
    again = torch.optim.AdamW(place.parameters(), lr=0.05)
    again.load_state_dict(states[0])
    goes_on = EMPPruner(place, again, every_n_steps=2, **FORMS[form])
    goes_on.load_state_dict(states[1])
    run(place, again, goes_on, 5, 8)

    assert [row.keep for row in goes_on.trajectory] == [row.keep for row in pruner.trajectory]
    assert len(pruner.masks) == len(goes_on.masks) > 0
    for ours, theirs in zip(goes_on.masks.values(), pruner.masks.values(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(place.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_another_part_is_still_refused():
    net = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    state = EMPPruner(net[0]).state_dict()
    with pytest.raises(ValueError, match="chosen here and not there"):
        EMPPruner(net).load_state_dict(state)
