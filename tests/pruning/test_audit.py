import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner


def trained(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, stop=1, mode=mode)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(2, 5)).square().mean().backward()
        optimizer.step()
        pruner.step()
    return net, optimizer, pruner


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_every_copy_agrees_after_training(mode):
    _, _, pruner = trained(mode)
    assert pruner.audit().clean
    assert pruner.audit().worst == ""


def test_a_revived_weight_is_found_and_its_parameter_named():
    net, _, pruner = trained("feedback")
    pruned = ~pruner.masks["1.weight"]
    with torch.no_grad():
        net[1].weight[pruned] = 1.0
    audit = pruner.audit()
    assert not audit.clean
    assert (audit.owner, audit.forward, audit.optimizer) == (int(pruned.sum()), 0, 0)
    assert (audit.worst, audit.worst_count) == ("1.weight", int(pruned.sum()))


def test_momentum_behind_the_mask_is_found_where_the_mode_clears_it():
    net, optimizer, pruner = trained("freeze")
    optimizer.state[net[0].weight]["exp_avg"].fill_(1.0)
    pruned = int((~pruner.masks["0.weight"]).sum())
    audit = pruner.audit()
    assert (audit.owner, audit.optimizer, audit.worst) == (0, pruned, "0.weight")


def test_project_counts_what_has_grown_back():
    _, _, pruner = trained("project")
    assert pruner.audit().owner > 0
    pruner.refresh()
    assert pruner.audit().clean


def test_nothing_is_checked_where_nothing_is_applied():
    net = nn.Linear(3, 3)
    pruner = EMPPruner(net, observe_only=True)
    assert pruner.audit().clean
    pruner.refresh()
    assert pruner.audit().clean


def test_copies_are_masked_again_after_an_error_among_dense_weights(monkeypatch):
    net, _, pruner = trained("feedback")
    owners_at_refresh = []
    monkeypatch.setattr(
        pruner._backend, "refresh_copies", lambda: owners_at_refresh.append(int((net[0].weight == 0).sum()))
    )
    with pytest.raises(RuntimeError, match="on purpose"), pruner.dense_weights():
        raise RuntimeError("on purpose")
    assert owners_at_refresh == [0, int((~pruner.masks["0.weight"]).sum())]


def test_dense_weights_are_seen_and_hidden_again():
    net, _, pruner = trained("feedback")
    with pruner.dense_weights():
        assert not pruner.audit().clean
        assert bool((net[0].weight != 0).all())
    assert pruner.audit().clean


def test_weights_that_took_the_place_of_masked_ones_are_counted():
    net, _, pruner = trained("feedback")
    pruned = ~pruner.masks["0.weight"]
    state = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    audit = pruner.audit()
    assert audit.owner == int(pruned.sum()) + int((~pruner.masks["1.weight"]).sum())
