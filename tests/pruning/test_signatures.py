import warnings

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.pruning.signatures import cliff_without_sparsity, criteria_disagree, nearly_all


def test_scores_that_are_nearly_alike_are_named_once_with_a_remedy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3))
    pruner = EMPPruner(net, target="neurons")
    with pytest.warns(UserWarning, match=r"N_eff is up to 0\.9\d\d of N in 0, .*'weight_norm'.*another criterion"):
        pruner.refresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.refresh()


@pytest.mark.parametrize("settings", [{"target": "weights"}, {"target": "neurons", "density": 0.5}])
def test_no_warning_where_scores_differ_or_no_budget_is_asked_for(settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMPPruner(net, **settings).refresh()


def test_what_counts_as_nearly_alike():
    assert nearly_all([("a", 10, 0.94)], "x") == []
    assert nearly_all([("a", 1, 1.0)], "x") == []  # one component is always all
    (text,) = nearly_all([("a", 10, 0.96), ("b", 9, 0.5), ("c", 4, 1.0), ("d", 4, 1.0), ("e", 4, 1.0)], "x", "net")
    assert "up to 1.000 of N in net, a, c, d and 1 more" in text
    assert "deviate by 20%" in text  # sqrt(1 / 0.96 - 1)


def test_a_cliff_without_sparsity():
    assert "prunes 2.0%" in cliff_without_sparsity("net", 0.02, 0.1, 6.4, "points")[0]
    assert "6.4 points just below" in cliff_without_sparsity("net", 0.02, 0.1, 6.4, "points")[0]
    assert cliff_without_sparsity("net", 0.3, 0.1, 6.4, "points") == []
    assert cliff_without_sparsity("net", 0.02, 0.1, 0.4, "points") == []
    assert cliff_without_sparsity("net", 0.02, 3.0, 6.4, "points") == []  # it falls at 1 already


def test_criteria_that_disagree():
    (text,) = criteria_disagree("net", {"taylor": 0.07, "magnitude": 0.59, "wanda": 0.2})
    assert "0.070 by 'taylor' and 0.590 by 'magnitude'" in text
    assert criteria_disagree("net", {"taylor": 0.5, "magnitude": 0.59}) == []
    assert criteria_disagree("net", {"taylor": 0.5}) == []


def test_a_warning_that_is_an_error_comes_after_the_refresh():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, target="neurons", every_n_steps=1)
    net(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="does not discriminate"):
            pruner.step()
    assert pruner.clock.last_position == 1
    assert pruner.last_events[0].step == 1


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_layers_that_keep_nothing_are_named(scope):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 10), nn.Linear(10, 3))
    net[1].weight.data.mul_(1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EMPPruner(net, scope=scope).refresh()
    told = [str(warning.message) for warning in caught]
    assert len(told) == (scope == "global")
    if told:
        assert "nothing is kept of 1.weight, " in told[0]
        assert "scope='tensor'" in told[0]


def test_a_warning_points_to_the_line_that_called_the_pruner():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    by_step = EMPPruner(net, optimizer, target="neurons", every_n_steps=1)
    net(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    idle = EMPPruner(net, optimizer, every_n_epochs=1)
    idle.clock.steps = 1
    by_hand = EMPPruner(nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3)), target="neurons")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        by_step.step()
        by_hand.refresh()
        idle.finalize()
    assert [(one.filename, one.lineno - found[0].lineno) for one in found] == [(__file__, i) for i in range(3)]
