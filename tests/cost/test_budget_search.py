import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPPruner
from emp_callbacks.backends import detect_backend
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.random_numbers import random_numbers_kept
from emp_callbacks.cost.bracket import Bracket, Tried
from emp_callbacks.cost.budget_search import smallest_budget
from emp_callbacks.layer.mask_mode import Observe
from emp_callbacks.pruning.refresher import Refresher

# ---- the search alone ----------------------------------------------------------------------------------------------


def searched(within, low=1 / 64, high=256.0, evaluations=12, masks=repr):
    """Return the bracket after a search where `within` says of each beta whether it is."""
    bracket = Bracket(low, high, evaluations)
    while (beta := bracket.next()) is not None:
        key = masks(beta).encode()
        if not bracket.knows(key, beta):
            bracket.add(key, Tried(beta, min(beta / 10, 1.0), 0.0, within(beta), beta >= 10))
    return bracket


@pytest.mark.parametrize("edge", [0.02, 0.3, 0.5, 0.9, 1.0, 1.7, 9.0])
def test_the_edge_is_found_from_above_within_two_percent(edge):
    bracket = searched(lambda beta: beta >= edge, evaluations=20)
    assert edge <= bracket.answer.beta <= 1.02 * edge
    assert bracket.answer in bracket.measured
    assert bracket.end == "between"
    assert len(bracket.measured) <= (12 if 0.25 < edge < 2 else 15)


@pytest.mark.parametrize("evaluations", range(1, 13))
def test_no_more_is_measured_than_allowed_and_the_answer_is_measured(evaluations):
    bracket = searched(lambda beta: beta >= 0.3, evaluations=evaluations)
    assert len(bracket.measured) <= evaluations
    assert bracket.answer in bracket.measured
    assert bracket.answer.within
    assert bracket.end == ("between" if evaluations > 2 else "evaluations")


def test_where_nothing_or_everything_passes_the_end_says_so():
    assert searched(lambda beta: True).end == "lowest"
    assert searched(lambda beta: True).answer.beta == 1 / 64
    nothing = searched(lambda beta: False, high=8.0)
    assert (nothing.end, nothing.answer) == ("highest", None)
    assert nothing.measured[-1].beta == 8.0
    nothing = searched(lambda beta: False)
    assert (nothing.end, nothing.answer) == ("everything", None)
    assert nothing.measured[-1].beta == 16.0  # from 10 on all is kept: larger ones are not tried
    assert searched(lambda beta: False, evaluations=2).end == "evaluations"
    assert searched(lambda beta: beta >= 0.3, low=2.0, high=3.0).answer.beta == 2.0


def test_a_budget_that_passes_below_one_that_fails_is_no_answer():
    # Within the tolerance: a lucky island [0.9, 1.05], and all from 3 on. Bisection alone would end on the island.
    bracket = searched(lambda beta: 0.9 <= beta <= 1.05 or beta >= 3, evaluations=20)
    assert 3 <= bracket.answer.beta <= 3.06
    assert any(tried.within and tried.beta < 3 for tried in bracket.measured)
    assert all(tried.within for tried in bracket.measured if tried.beta >= bracket.answer.beta)


def test_betas_that_keep_the_same_are_measured_once():
    bracket = searched(lambda beta: beta >= 0.5, masks=lambda beta: str(math.floor(4 * beta)))
    assert len(bracket.measured) == len({math.floor(4 * tried.beta) for tried in bracket.measured})
    assert bracket.answer.beta == 0.5


# ---- on models -----------------------------------------------------------------------------------------------------


class Distance(nn.Module):
    """Weights, and as loss an offset plus the squares of what was taken from them."""

    def __init__(self, values, offset=1.0):
        super().__init__()
        self.layer = nn.Linear(len(values), 1, bias=False)
        self.layer.weight.data.copy_(values.view(1, -1))
        self.dense, self.offset = values.clone(), offset

    def forward(self, batch):
        return self.offset * batch + (self.layer.weight[0] - self.dense).square().sum()


VALUES = torch.linspace(1.0, 0.1, 20)


def smallest_by_hand(limit, offset=1.0):
    """Return the fewest weights that may be kept, and the loss then."""
    tails = {keep: offset + float(VALUES[keep:].square().sum()) for keep in range(1, 21)}
    return min(((keep, loss) for keep, loss in tails.items() if loss <= limit))


def loss_of(model, batch):
    return model(batch)


@pytest.mark.parametrize("tolerance", [0.02, 0.2, 1.0, 3.0])
def test_a_monotone_loss_gives_the_smallest_budget_that_there_is(tolerance):
    found = smallest_budget(Distance(VALUES), [1.0], loss_of, loss_tolerance=tolerance)
    keep, loss = smallest_by_hand(1 + tolerance)
    assert found.density == keep / 20
    assert found.loss == pytest.approx(loss)
    assert found.dense_loss == 1.0
    assert found.limit == 1 + tolerance
    assert found.is_monotone
    assert len(found.tried) <= 12


def test_the_result_was_measured_and_a_pruner_keeps_just_that():
    model = Distance(VALUES)
    seen = []
    found = smallest_budget(model, [1.0], loss_of, loss_tolerance=0.2, on_tried=seen.append)
    assert sorted(seen) == list(found.tried)
    (own,) = [tried for tried in found.tried if tried.beta == found.beta]
    assert (own.density, own.loss, own.within) == (found.density, found.loss, True)
    assert all(tried.within == (tried.loss <= found.limit) for tried in found.tried)
    assert all(not tried.within for tried in found.tried if tried.beta < found.beta)
    pruner = EMPPruner(model, config=found.config)
    pruner.refresh()
    pruner.finalize()
    assert pruner.config.mode == "project"
    assert pruner.density == found.density
    assert float(model(1.0).detach()) == found.loss


def test_no_tolerance_keeps_all_that_the_loss_reads():
    found = smallest_budget(Distance(VALUES), [1.0], loss_of, loss_tolerance=0.0)
    assert (found.density, found.loss) == (1.0, found.dense_loss)
    assert found.end == "between"


def test_a_dense_loss_of_nothing_has_an_absolute_tolerance_and_says_so():
    found = smallest_budget(Distance(VALUES), [0.0], loss_of, loss_tolerance=0.5, loss_floor=0.4)
    assert (found.dense_loss, found.limit) == (0.0, 0.2)
    assert found.density == smallest_by_hand(0.2, offset=0.0)[0] / 20
    assert "relative to loss_floor=0.4" in found.says
    assert smallest_budget(Distance(VALUES), [0.0], loss_of).density == 1.0  # the smallest weight costs 0.01


def test_a_loss_below_0_may_rise_by_a_share_of_its_size():
    found = smallest_budget(Distance(VALUES), [-2.0], loss_of, loss_tolerance=0.1)
    assert found.limit == pytest.approx(-1.8)
    assert found.density == smallest_by_hand(-1.8, offset=-2.0)[0] / 20


def test_losses_are_the_mean_over_batches():
    found = smallest_budget(Distance(VALUES), [1.0, 3.0], loss_of, loss_tolerance=0.1)
    assert found.dense_loss == 2.0
    assert found.limit == pytest.approx(2.2)


def test_a_loss_that_is_not_monotone_is_named():
    def bumpy(model, batch):
        kept = int((model.layer.weight != 0).sum())
        return torch.tensor(1.0 if kept >= 17 or kept == 13 else 2.0)

    model = Distance(VALUES)
    assert round(float(VALUES.sum() ** 2 / VALUES.square().sum())) == 16  # beta = 1 fails, and a lucky 13 passes
    found = smallest_budget(model, [1.0], bumpy, bounds=(0.5, 13.5 / 15.78))
    assert found.density == 13 / 20
    found = smallest_budget(model, [1.0], bumpy)
    assert found.density == 17 / 20


def test_where_even_keeping_everything_fails_it_says_so_and_gives_no_settings():
    calls = iter(range(100))
    found = smallest_budget(Distance(VALUES), [1.0], lambda model, batch: torch.tensor(float(next(calls))))
    assert (found.beta, found.density, found.loss, found.end) == (None, None, None, "everything")
    assert "differs from call to call" in found.says
    with pytest.raises(ValueError, match="differs from call to call"):
        _ = found.config


def test_bounds_that_hold_no_answer_are_named():
    found = smallest_budget(Distance(VALUES), [1.0], loss_of, loss_tolerance=0.0, bounds=(0.1, 0.5))
    assert (found.beta, found.end) == (None, "highest")
    assert "raise bounds" in found.says
    found = smallest_budget(Distance(VALUES), [1.0], loss_of, loss_tolerance=1e9, bounds=(0.1, 0.5))
    assert (found.beta, found.end) == (0.1, "lowest")
    assert "lowest bound" in found.says
    found = smallest_budget(Distance(VALUES), [1.0], loss_of, loss_tolerance=1e9, evaluations=2)
    assert found.end == "evaluations"
    assert "2 evaluations were used up" in found.says


def test_a_masked_loss_of_nan_is_not_within_and_a_dense_one_is_refused():
    found = smallest_budget(
        Distance(VALUES), [1.0], lambda m, b: torch.tensor(1.0 if bool(m.layer.weight.all()) else math.nan)
    )
    assert found.density == 1.0
    with pytest.raises(FloatingPointError, match="the dense loss is nan"):
        smallest_budget(Distance(VALUES), [math.nan], loss_of)


# ---- nothing is changed --------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Dropout, batch statistics, a buffer that every forward writes and replaces, random numbers of three kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.last(self.drop(self.norm(self.first(x)).relu())) * (1 + 0.1 * noise)


BATCHES = [(torch.randn(16, 6, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 3) for i in range(2)]


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def everything_of(model):
    """Return all that a search must leave alone, as plain values."""
    numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    hooks = [
        len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]
    buffers = [id(buffer) for buffer in model.buffers()]
    return numbers, state, grads, hooks, buffers, [m.training for m in model.modules()]


def assert_same(before, after):
    for name, value in before[1].items():
        assert torch.equal(value.view(-1).view(torch.uint8), after[1][name].view(-1).view(torch.uint8)), name
    assert all(before[2][name] is after[2][name] for name in before[2])
    assert [before[0], *before[3:]] == [after[0], *after[3:]]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_search_leaves_everything_as_it_was(criterion, fails):
    torch.manual_seed(0)
    model = Restless()
    model.norm.eval()
    model.last.weight.data[0, 0] = -0.0
    cross_entropy(model, BATCHES[0]).backward()
    before, seen = everything_of(model), []

    def loss(model, batch):
        seen.append((model.training, model.drop.training))
        if fails and len(seen) > 8:
            raise KeyError("in the middle")
        return cross_entropy(model, batch)

    if fails:
        with pytest.raises(KeyError):
            smallest_budget(model, BATCHES, loss, criterion=criterion)
    else:
        assert smallest_budget(model, BATCHES, loss, criterion=criterion).beta is not None
    assert set(seen) == {(False, False)}
    assert_same(before, everything_of(model))


def test_the_same_call_finds_the_same():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Restless()
    found = smallest_budget(model, BATCHES, cross_entropy, loss_tolerance=0.05)
    assert smallest_budget(copy.deepcopy(model), BATCHES, cross_entropy, loss_tolerance=0.05).tried == found.tried


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_every_evaluation_draws_the_same_random_numbers(criterion):
    found = smallest_budget(Restless(), BATCHES, cross_entropy, bounds=(250.0, 256.0), criterion=criterion)
    assert found.tried[-1].everything
    assert found.tried[-1].loss == found.dense_loss


def test_another_pruner_of_the_model_is_left_in_force():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin_pruner = EMPPruner(twin, twin_optimizer, every_n_steps=1)
    for step in range(3):
        for net, opt, own in ((model, optimizer, pruner), (twin, twin_optimizer, twin_pruner)):
            opt.zero_grad()
            cross_entropy(net, BATCHES[0]).backward()
            opt.step()
            own.step()
            if net is model:
                smallest_budget(model, BATCHES, cross_entropy)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)), step
    assert all(torch.equal(mask, twin_pruner.masks[name]) for name, mask in pruner.masks.items())


# ---- criteria, targets, scopes -------------------------------------------------------------------------------------


def restore(numbers):
    torch.set_rng_state(numbers[0])
    random.setstate(numbers[1])
    np.random.set_state(numbers[2])


@pytest.mark.parametrize(
    ("settings", "gradients"),
    [
        ({"scope": "tensor"}, False),
        ({"scope": "row"}, False),
        ({"criterion": "wanda", "scope": "row"}, False),
        ({"criterion": "taylor"}, True),
        ({"criterion": "saliency"}, True),
        ({"target": "neurons"}, False),
        ({"target": "neurons", "criterion": "activation"}, False),
        ({"include": ["first.*"], "min_density": 0.3}, False),
    ],
)
def test_a_refresh_at_the_result_keeps_what_was_measured(settings, gradients):
    torch.manual_seed(0)
    model = Restless().eval()
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = smallest_budget(model, BATCHES, cross_entropy, loss_tolerance=0.05, **settings)
    assert found.density < 1
    pruner = EMPPruner(model, config=found.config)
    for batch in BATCHES:
        with torch.set_grad_enabled(gradients):
            loss = cross_entropy(model, batch)
        if gradients:
            loss.backward()
            pruner.collect()
            model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that is hardly one
        pruner.refresh()
    assert pruner.density == pytest.approx(found.density)
    with torch.no_grad(), random_numbers_kept():
        restore(numbers)
        measured = sum(float(cross_entropy(model, batch)) for batch in BATCHES) / 2
    assert measured == pytest.approx(found.loss, rel=1e-5)


def test_a_layer_of_which_nothing_is_known_is_kept_whole_as_a_refresh_keeps_it():
    torch.manual_seed(0)
    model = Restless()
    model.unused = nn.Linear(8, 8)
    found = smallest_budget(model, BATCHES, cross_entropy, loss_tolerance=0.05, criterion="wanda")
    pruner = EMPPruner(model.eval(), config=found.config)
    for batch in BATCHES:
        cross_entropy(model, batch)
    pruner.refresh()
    assert bool(pruner.masks["unused.weight"].all())
    assert pruner.density == found.density < 1


def refresher_of(model, **settings):
    return Refresher(EMPConfig(**settings), Observe(), detect_backend(model, None))


def test_masks_that_every_sample_makes_for_itself_are_no_selection():
    with pytest.raises(ValueError, match="every sample or query row has masks of its own"):
        refresher_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), target="features", dynamic=True).selections()


@pytest.mark.parametrize("target", ["weights", "neurons"])
def test_a_selection_changes_no_mask(target):
    refresher = refresher_of(Restless(), target=target)
    chosen = refresher.selections()(0.5)
    assert chosen.keep < chosen.n
    assert all(layer.mask is None for layer in refresher.layers)


def test_scores_are_computed_once(monkeypatch):
    from emp_callbacks.criteria.magnitude import Magnitude

    calls, score = [], Magnitude.score
    monkeypatch.setattr(Magnitude, "score", lambda self, layer: calls.append(layer.name) or score(self, layer))
    found = smallest_budget(Restless(), BATCHES, cross_entropy)
    assert len(found.tried) > 3
    assert calls == ["first.weight", "last.weight"]


def test_the_record_is_plain_json():
    import json

    settings = EMPConfig(scope="tensor", include=["layer.*"], every_n_epochs=1)
    record = smallest_budget(Distance(VALUES), [1.0], loss_of, config=settings).record()
    assert json.loads(json.dumps(record)) == record
    assert (record["criterion"], record["scope"], record["include"]) == ("magnitude", "tensor", ["layer.*"])
    assert record["tried"][0].keys() == {"beta", "density", "loss", "within", "everything"}
    assert record["says"].startswith("beta = ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_tolerance": -0.1}, "loss_tolerance must be"),
        ({"loss_tolerance": math.nan}, "loss_tolerance must be"),
        ({"loss_floor": 0.0}, "loss_floor must be"),
        ({"bounds": (2.0, 1.0)}, "bounds must be"),
        ({"bounds": (0.0, 1.0)}, "beta must be"),
        ({"evaluations": 0}, "evaluations must be"),
        ({"beta": 0.5}, "beta=0.5 is what smallest_budget looks for"),
        ({"density": 0.5}, "density=0.5 is what smallest_budget looks for"),
        ({"pattern": "2:4"}, "pattern='2:4' is what smallest_budget looks for"),
        ({"tolerance": 0.01}, "the rise of the loss is loss_tolerance"),
        ({"target": "features"}, "masked in the forward pass"),
        ({"target": "attention_edges"}, "masked in the forward pass"),
        ({"target": "heads", "dynamic": True}, "'heads' with dynamic=True is masked in the forward pass"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        smallest_budget(Restless(), BATCHES, cross_entropy, **settings)


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        smallest_budget(Restless(), [], cross_entropy)
