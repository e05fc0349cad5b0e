"""What counts as evidence: each batch once, old batches as sums, modules in evaluation mode, counted positions."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, Ramp, effective_number
from emp_callbacks.layer import MissingEvidence
from emp_callbacks.pruning import evidence as evidence_module
from tests.layer.test_units import make_vit

# ---- each batch once --------------------------------------------------------------------------------------------


class Stubborn(torch.optim.SGD):
    """Raises in the middle of its first step."""

    failed = False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise RuntimeError("once")
        return super().step(closure)


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def backward(net, seed):
    net.zero_grad()
    net(torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def test_a_step_that_raised_and_is_repeated_counts_once():
    net = linear()
    optimizer = Stubborn(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, criterion="taylor")
    backward(net, 0)
    expected = (net.weight * net.weight.grad).detach().abs()
    with pytest.raises(RuntimeError, match="once"):
        optimizer.step()
    optimizer.step()
    torch.testing.assert_close(pruner.scores()["weight"], expected)
    pruner.step()
    backward(net, 1)
    expected = (expected + (net.weight * net.weight.grad).detach().abs()) / 2
    optimizer.step()
    torch.testing.assert_close(pruner.scores()["weight"], expected)


@pytest.mark.parametrize("target", ["weights", "heads"])
def test_a_closure_that_is_called_again_is_the_same_batch(target):
    first = []
    for calls in (1, 4):
        net = make_vit()
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=calls, max_eval=calls)
        pruner = EMPPruner(net, optimizer, target=target, criterion="saliency")
        called = []

        def closure(net=net, optimizer=optimizer, called=called):
            called.append(1)
            optimizer.zero_grad()
            loss = net(torch.ones(2, 1, 8, 8)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert len(called) >= min(calls, 2)
        first.append(pruner.scores())
        assert pruner._refresher.evidence.gathered().total == 1
    for name, scores in first[0].items():
        torch.testing.assert_close(scores, first[1][name])


# ---- old batches as sums ----------------------------------------------------------------------------------------


def train(net, pruner, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        net(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        pruner.step()


def vit_pruner(**settings):
    net = make_vit()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    return net, EMPPruner(net, optimizer, target="heads", criterion="taylor", **settings), optimizer


def test_folded_batches_give_the_same_scores_and_certificates(monkeypatch):
    found = []
    for apart in (3, 100):
        monkeypatch.setattr(evidence_module, "KEPT_APART", apart)
        net, pruner, optimizer = vit_pruner(certify=True, beta=0.7)
        train(net, pruner, optimizer, range(11))
        assert pruner._refresher.evidence.gathered().total == 11
        assert (pruner._refresher.evidence.folded > 0) == (apart == 3)
        scores, (event,) = pruner.scores(), pruner.refresh()
        assert pruner._refresher.evidence.gathered().total == 0
        train(net, pruner, optimizer, range(2))  # what was folded before the refresh is forgotten
        found.append((scores, event, pruner.scores()))
    (folded, ours, after), (apart, expected, expected_after) = found
    for name, scores in expected_after.items():
        torch.testing.assert_close(after[name], scores, rtol=1e-14, atol=0.0)
    for name, scores in apart.items():
        torch.testing.assert_close(folded[name], scores, rtol=1e-14, atol=0.0)
    assert ours.keep == expected.keep < ours.n
    for a, b in zip((ours, *ours.layers), (expected, *expected.layers), strict=True):
        assert a.certificate.bound == pytest.approx(b.certificate.bound, rel=1e-13)
        assert a.certificate.measured == pytest.approx(b.certificate.measured, rel=1e-12)
    assert ours.certificate.measured != 0.0


def test_evidence_without_a_schedule_takes_no_more_room():
    net, pruner, optimizer = vit_pruner()
    sizes = []
    for round_ in range(3):
        train(net, pruner, optimizer, range(64 * round_, 64 * (round_ + 1) + 1 - bool(round_)))
        state = pruner.state_dict()["evidence"]
        sizes.append((len(state["tensors"]), len(state["batches"])))
    assert sizes == [(2 * 2 + 1, 1)] * 3, "of each attention the sums and the last batch, and how many were folded"
    assert pruner._refresher.evidence.gathered().total == 3 * 64 + 1


@pytest.mark.parametrize("stop", [5, 6, 7])
@pytest.mark.parametrize("way", ["memory", "folder"])
def test_a_resume_among_folded_batches_is_bit_equal(stop, way, monkeypatch, tmp_path):
    monkeypatch.setattr(evidence_module, "KEPT_APART", 3)
    net, pruner, optimizer = vit_pruner()
    train(net, pruner, optimizer, range(stop))
    other, again, its_optimizer = vit_pruner()
    other.load_state_dict(net.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if way == "memory":
        again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    else:
        pruner.save(tmp_path)
        again.load(tmp_path)
    train(net, pruner, optimizer, range(stop, 11))
    train(other, again, its_optimizer, range(stop, 11))
    assert again._refresher.evidence.gathered() == pruner._refresher.evidence.gathered()
    for name, scores in pruner.scores().items():
        assert torch.equal(again.scores()[name], scores)


def test_sums_of_states_that_hold_each_batch_by_itself_are_read():
    net, pruner, optimizer = vit_pruner()
    train(net, pruner, optimizer, range(3))
    state = pruner.state_dict()
    tensors = state["evidence"]["tensors"]
    for name in [name for name in tensors if name.endswith(":apart")]:
        rows = tensors.pop(name)
        tensors.update({name.replace("apart", str(batch)): rows[i] for i, batch in enumerate((0, 1, 2))})
    other, again, _ = vit_pruner()
    other.load_state_dict(net.state_dict())
    again.load_state_dict(state)
    for name, scores in pruner.scores().items():
        assert torch.equal(again.scores()[name], scores)


# ---- modules in evaluation mode ---------------------------------------------------------------------------------


class Tuned(nn.Module):
    """Its backbone, with frozen statistics, stays in evaluation mode while it is trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda"},
        {"target": "neurons", "criterion": "activation"},
        {"target": "features"},
        {"target": "features", "criterion": "taylor"},
        {"target": "features", "dynamic": True},
    ],
)
def test_a_module_in_evaluation_mode_is_watched_while_the_model_trains(settings):
    net = Tuned().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, **settings)
    for step in range(2):
        backward(net, step)
        net.eval()
        net(1e3 * torch.ones(4, 5))  # validation is no evidence
        net.train()
        optimizer.step()
        (site, *_) = pruner._refresher.evidence._sites
        key = "count" if "count" in site.statistics() else "samples"
        assert float(site.statistics()[key]) == 8 * (step + 1)
        if step == 0:
            pruner.step()
    events = pruner.step()
    assert not any(event.note for event in events)
    assert {layer.name.removesuffix(".weight") for event in events for layer in event.layers} & {
        "backbone.0",
        "backbone.2",
    }


def test_a_copy_of_a_watched_module_does_not_take_the_model_with_it():
    net = Tuned()
    pruner = EMPPruner(net, target="features")
    (site,) = pruner._refresher.evidence._sites
    pruner._refresher.evidence.count_positions(torch.ones(2, 3))
    assert site.root is net
    twin = copy.deepcopy(net.backbone)
    copied = next(iter(twin[2]._forward_hooks.values())).__self__
    assert copied.root is copied.module is twin[2]
    assert copied.positions is None


# ---- positions --------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.act, self.down = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)

    def forward(self, ids):
        return self.down(self.act(self.up(self.embed(ids))))


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 1]])


def unpadded():
    """The same samples one by one, without their padding."""
    return [row[row > 0][None] for row in IDS]


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda", "certify": True},
        {"target": "neurons", "criterion": "activation"},
        {"target": "features"},
        {"target": "features", "center": "mean"},
        {"target": "features", "criterion": "taylor"},
        {"target": "features", "criterion": "saliency", "center": "mean"},
    ],
    ids=str,
)
def test_padding_is_no_evidence_where_positions_say_so(settings):
    found = []
    for batches in ([IDS], unpadded()):
        net = Tokens().double()
        pruner = EMPPruner(net, **settings)
        for ids in batches:
            pruner._refresher.evidence.count_positions((ids > 0).long() if len(batches) == 1 else None)
            net(ids).square().sum().backward()
        found.append([site.statistics() for site in pruner._refresher.evidence._sites])
    assert found[0]
    for ours, expected in zip(*found, strict=True):
        assert ours.keys() == expected.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], msg=f"{key}: {value} and {expected[key]}")


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_rows_that_are_positions_count_as_samples_each(criterion):
    found = []
    for mask in (IDS > 0, None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        pruner = EMPPruner(net, target="features", criterion=criterion)
        pruner._refresher.evidence.count_positions(mask)
        x = torch.linspace(-2, 2, 48).view(12, 4)
        net(x if mask is not None else x[(IDS > 0).flatten()]).square().sum().backward()
        found.append(pruner._refresher.evidence._sites[0].statistics())
    assert float(found[0]["samples"]) == 9
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


def test_a_backward_pass_counts_the_positions_of_its_own_forward():
    sums = []
    for later in (None, torch.ones(3, 4)):
        net = Tokens()
        pruner = EMPPruner(net, target="features", criterion="taylor")
        evidence = pruner._refresher.evidence
        evidence.count_positions(IDS > 0)
        loss = net(IDS).square().sum()
        if later is not None:
            evidence.count_positions(later)
        loss.backward()
        sums.append(evidence._sites[0].statistics()["taylor"])
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"criterion": "wanda"}, True),
        ({"target": "features"}, True),
        ({"target": "features", "axis": "token"}, False),
        ({"target": "features", "dynamic": True}, False),
        ({"criterion": "taylor"}, False),
    ],
)
def test_positions_are_read_only_where_and_when_they_change_something(settings, reads):
    net = Tokens()
    near = EMPPruner(net, **settings)
    assert near._refresher.evidence.reads_positions == reads
    far = EMPPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), every_n_steps=9, evidence_steps=1, **settings)
    assert not far._refresher.evidence.reads_positions


def test_positions_that_do_not_fit_an_activation_are_all_counted():
    net = Tokens()
    pruner = EMPPruner(net, criterion="wanda", include=["up.weight"])
    pruner._refresher.evidence.count_positions(torch.zeros(2, 4))
    net(IDS)
    (site,) = pruner._refresher.evidence._sites
    assert float(site.statistics()["count"]) == 12
    for wrong, error in ((torch.ones(3), ValueError), ([[1]], TypeError)):
        with pytest.raises(error, match=r"shape \(B, T\)"):
            pruner._refresher.evidence.count_positions(wrong)


# ---- nested tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("settings", [{"criterion": "wanda"}, {"target": "features"}], ids=str)
def test_nested_tensors_are_watched_and_masked_sample_by_sample(settings, layout):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double()
    samples = [torch.randn(length, 4, dtype=torch.float64) for length in (3, 1, 5)]
    pruner = EMPPruner(net, beta=0.5, **settings)
    (site, *_) = pruner._refresher.evidence._sites
    with torch.no_grad():
        net(torch.nested.nested_tensor(samples, layout=layout))
        ours = site.statistics()
        site.reset()
        for sample in samples:
            net(sample[None])
        for key, value in ours.items():
            torch.testing.assert_close(value, site.statistics()[key])
        pruner.refresh()
        assert 0 < pruner.density < 1
        out = net(torch.nested.nested_tensor(samples, layout=layout))
        for row, sample in zip(out.unbind(), samples, strict=True):
            torch.testing.assert_close(row, net(sample[None])[0])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_masked_nested_tensor_can_be_added_to_what_it_came_from(layout):
    net = nn.Sequential(nn.Tanh())
    pruner = EMPPruner(net, target="features", beta=0.5)
    x = torch.nested.nested_tensor([torch.rand(length, 4) for length in (3, 1)], layout=layout)
    net(x)
    pruner.refresh()
    kept = pruner.masks["0"]
    for row, before in zip((x + net(x)).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(row, before + before.tanh() * kept)


# ---- the rule of dynamic sites ----------------------------------------------------------------------------------


def test_samples_choose_by_the_beta_of_the_last_refresh_that_succeeded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 40), nn.Tanh())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    beta = Ramp(first=1.0, last=0.2, until=2)
    pruner = EMPPruner(net, optimizer, target="features", dynamic=True, every_n_steps=1, beta=beta, tolerance=0.0)
    x = torch.randn(3, 5)
    n_eff = [effective_number(row) for row in net(x).detach()]
    for expected in (0.6, 0.2):
        net(x).sum().backward()
        optimizer.step()
        pruner.step()
        assert (net(x) != 0).sum(1).tolist() == [int(expected * n) for n in n_eff]
    before = (net(x) != 0).sum(1).tolist()
    pruner._refresher.evidence.release()
    with pytest.raises(MissingEvidence):
        pruner._refresher.run(0, 0, 0, contextlib.nullcontext())  # where beta would be 1
    assert (net(x) != 0).sum(1).tolist() == before


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_sparse_gradients_of_an_embedding_are_read_and_masked_as_dense_ones(criterion, mode):
    masks = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(12, 8, sparse=sparse), nn.Flatten(), nn.Linear(24, 4, bias=False))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        pruner = EMPPruner(
            net, optimizer, include=["0.weight"], every_n_steps=2, mode=mode, criterion=criterion, evidence_steps=2
        )
        for step in range(6):
            optimizer.zero_grad()
            net(torch.arange(step, step + 6).reshape(2, 3)).square().mean().backward()
            optimizer.step()
            pruner.step()
        pruned = ~pruner.masks["0.weight"]
        assert mode == "project" or bool((net[0].weight[pruned] == 0).all())
        masks.append((pruner.masks["0.weight"], net[0].weight.detach().clone()))
    assert torch.equal(masks[0][0], masks[1][0])
    torch.testing.assert_close(masks[0][1], masks[1][1])
