import re
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from emp_callbacks import EMPCallback, EMPPruner
from emp_callbacks.pruning.signatures import (
    SAID_OF_A_REFRESH,
    cliff_without_sparsity,
    criteria_disagree,
    emptied_layers,
    nearly_all,
    signatures_of,
    starved_layers,
)
from emp_callbacks.trajectory import LayerStats, PruneEvent


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


def starving(shrunk_to=1e-3):
    """Return two layers alike and one of small weights, of which a few are large."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 10), nn.Linear(10, 20))
    net[1].weight.data.mul_(shrunk_to)
    net[1].weight.data.view(-1)[:4] = 1.0
    return net


@pytest.mark.parametrize(
    ("scope", "remedy"),
    [
        ("global", "(scope='tensor')"),
        ("tensor", "of every layer (min_density=0.3)"),
    ],
)
def test_a_layer_that_keeps_next_to_nothing_is_named_once_with_its_density_and_a_remedy(scope, remedy):
    pruner = EMPPruner(starving(), scope=scope)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.refresh()
        pruner.refresh()
    (told,) = [str(warning.message) for warning in caught]
    assert told.startswith("next to nothing is kept of 1.weight (2 %), where all layers together keep ")
    assert f"{100 * pruner.density:.3g} %" in told
    assert remedy in told
    assert "exclude=['1.weight']" in told
    assert "\n" not in told


def test_rows_of_a_few_huge_scores_starve_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    net[1].weight.data[:, 7] = 100.0  # what Wanda makes of one input that is far larger than the others
    pruner = EMPPruner(net, scope="row")
    with pytest.warns(UserWarning, match=r"kept of 1\.weight \(2\.5 %\), .*of every row \(min_density=0\.2\)"):
        pruner.refresh()


def test_what_counts_as_next_to_nothing():
    def layer(name, n, keep):
        return LayerStats(name=name, n=n, n_eff=0.0, keep=keep, density=keep / n, preserved_mass=1.0)

    wide = layer("wide", 10_000, 5_000)
    assert starved_layers([wide, layer("a", 1_000, 60)], "tensor") == []  # 6 % of a mean of 46 %
    assert "a (4 %)" in starved_layers([wide, layer("a", 1_000, 40)], "tensor")[0]
    assert starved_layers([wide, layer("a", 1_000, 0)], "tensor") == []  # that is another warning
    assert starved_layers([wide, layer("a", 99, 1)], "tensor") == []  # of so few, one or two decide
    assert starved_layers([layer("a", 1_000, 20), layer("b", 10_000, 100)], "tensor") == []  # all are as low
    assert starved_layers([], "tensor") == []
    many = [layer(name, 1_000, keep) for name, keep in zip("abcde", (5, 4, 3, 2, 1), strict=True)]
    assert "kept of e (0.1 %), d (0.2 %), c (0.3 %) and 2 more, " in starved_layers([wide, *many], "tensor")[0]


def test_a_sharp_row_of_attention_is_no_starved_layer():
    def rows(scope, density):
        layer = LayerStats(name="a", n=1_000, n_eff=1.0, keep=1, density=0.001, preserved_mass=1.0)
        other = LayerStats(name="b", n=1_000, n_eff=900.0, keep=900, density=0.9, preserved_mass=1.0)
        numbers = {"step": 0, "epoch": 0, "threshold": 0.0, "churn": 0.0, "regrown": 0, "seconds": 0.0, "note": ""}
        numbers |= {"n": 2_000, "n_eff": 901.0, "n_eff_fraction": 0.45, "keep": 901, "density": density}
        words = {"group": "global", "mode": "feedback", "criterion": "attention_weight", "scope": scope, "beta": 1.0}
        return [PruneEvent(**numbers, **words, preserved_mass=1.0, mass_bound=None, layers=(layer, other))]

    assert list(signatures_of(rows("global", 0.45))) == ["starved"]
    assert signatures_of(rows("sample", 0.45)) == {}
    assert signatures_of([]) == {}


def test_the_study_which_shows_the_figures_silences_what_a_refresh_says():
    from emp_callbacks.study.quiet import _NOISE

    lines = [*nearly_all([("a", 10, 0.96)], "x")]
    stats = [
        LayerStats(name=name, n=1_000, n_eff=1.0, keep=keep, density=0.0, preserved_mass=1.0)
        for name, keep in (("a", 0), ("b", 1), ("c", 900))
    ]
    lines += [*emptied_layers(stats, "x"), *starved_layers(stats, "global")]
    assert len(lines) == 3
    for line in lines:
        assert re.match(SAID_OF_A_REFRESH, line)
        assert any(re.match(noise, line) for noise in _NOISE)


def test_a_fit_says_it_too(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = starving()

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        callbacks=[EMPCallback(every_n_epochs=1, summary=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(), DataLoader(torch.ones(2, 50)))
    told = [str(w.message) for w in caught if "kept" in str(w.message)]
    assert [line.partition(" (2 %)")[0] for line in told] == ["next to nothing is kept of net.1.weight"]
