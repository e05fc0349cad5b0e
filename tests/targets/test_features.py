import copy
import itertools

import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from emp_callbacks import EMPPruner
from emp_callbacks.core.effective_number import effective_number
from emp_callbacks.core.selection import emp_mask
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.targets.features import FeatureForm, FeatureSite, feature_sites
from emp_callbacks.targets.replace_pruned import _ZeroPruned

RULE = KeepRule(beta=1.0).counts
SHAPES = {
    "channel-2d": ("channel", (5, 6)),
    "channel-3d": ("channel", (3, 4, 6)),
    "channel-4d": ("channel", (3, 5, 4, 2)),
    "token": ("token", (3, 5, 4)),
    "patch": ("patch", (3, 2, 4, 6)),
}
each_shape = pytest.mark.parametrize(("axis", "shape"), SHAPES.values(), ids=SHAPES)
each_center = pytest.mark.parametrize("center", ["zero", "mean"])


def places(axis: str, shape: tuple[int, ...]) -> list[tuple]:
    """Index of each feature within one sample of the activation; patches of 2 x 2."""
    whole = slice(None)
    if axis == "channel":
        return [(whole, f) if len(shape) == 3 else (f,) for f in range(shape[1 if len(shape) == 4 else -1])]
    if axis == "token":
        return [(f,) for f in range(shape[1])]
    return [
        (whole, slice(row, row + 2), slice(column, column + 2))
        for row in range(0, shape[2], 2)
        for column in range(0, shape[3], 2)
    ]


def site_of(model: nn.Module, criterion: str = "activation", rule=RULE, **form) -> FeatureSite:
    (site,) = feature_sites(model, None, None, FeatureForm(patch_size=2, **form), criterion, rule)
    site.attach()
    return site


def tanh_model() -> nn.Module:
    return nn.Sequential(nn.Tanh())


def wavy_loss(y: torch.Tensor) -> torch.Tensor:
    """dL/dy = cos(y) / B."""
    return y.sin().sum() / y.shape[0]


# ---- static masks


@each_center
@each_shape
def test_static_mask_and_its_gradient_are_those_of_the_formula(axis, shape, center):
    torch.manual_seed(0)
    at = places(axis, shape)
    mask = torch.arange(len(at)) % 2 == 0
    mean = torch.linspace(-0.5, 0.7, len(at))
    model = tanh_model()
    site = site_of(model, axis=axis, center=center)
    site.install(mask, mean if center == "mean" else None)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    wavy_loss(y).backward()

    by_hand, slope = np.tanh(x.detach().numpy()), 1 - np.tanh(x.detach().numpy()) ** 2
    for sample, sample_slope in zip(by_hand, slope, strict=True):
        for f, place in enumerate(at):
            if not mask[f]:
                sample[place] = mean.double()[f].item() if center == "mean" else 0.0
                sample_slope[place] = 0.0
    np.testing.assert_allclose(y.detach().numpy(), by_hand, rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), np.cos(by_hand) / shape[0] * slope, rtol=1e-12)
    assert site.size == len(at)


@each_center
@pytest.mark.parametrize("criterion", ["activation", "taylor", "saliency"])
@each_shape
def test_static_statistics_are_sums_over_samples_of_what_lies_before_the_mask(axis, shape, criterion, center):
    torch.manual_seed(1)
    at = places(axis, shape)
    model = tanh_model()
    site = site_of(model, criterion, axis=axis, center=center)
    site.observing = True
    mask, mean = torch.arange(len(at)) % 3 != 1, torch.linspace(-0.3, 0.3, len(at), dtype=torch.float64)
    sums = {"samples": 0.0, criterion: np.zeros(len(at)), "value": np.zeros(len(at)), "square": np.zeros(len(at))}
    for batch in range(3):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        wavy_loss(model(x)).backward()
        for sample in np.tanh(x.detach().numpy()):
            sums["samples"] += 1
            for f, place in enumerate(at):
                a = np.asarray(sample[place])
                y = a if batch == 0 or mask[f] else np.full_like(a, mean[f] if center == "mean" else 0.0)
                g = np.cos(y) / shape[0]
                sums["value"][f] += a.mean()
                sums["square"][f] += (a**2).mean()
                sums[criterion][f] += {
                    "activation": np.abs(a).mean(),
                    "taylor": np.abs((a * g).sum()),
                    "saliency": np.abs(g).mean(),
                }[criterion]
        if batch == 0:
            site.install(mask, mean if center == "mean" else None)

    found = site.statistics()
    read = "square" if (criterion, center) == ("activation", "mean") else criterion
    assert set(found) == {"samples", read} | ({"value"} if center == "mean" else set())
    for key, value in found.items():
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.numpy(), sums[key], rtol=1e-10, err_msg=key)


def test_scores_are_means_over_samples_and_around_a_mean_the_standard_deviation():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 5) * torch.tensor([1.0, 2.0, 3.0, 0.1, 1e-3]) + 100 for _ in range(3)]
    model = nn.Sequential(nn.Softplus(threshold=20))  # the identity above its threshold
    plain, centred = site_of(model), site_of(model, center="mean")
    plain.observing = centred.observing = True
    for batch in batches:
        model(batch)
    values = torch.cat(batches).double().reshape(-1, 5)
    torch.testing.assert_close(plain.scores(plain.statistics()), values.abs().mean(0))
    torch.testing.assert_close(centred.means(centred.statistics()), values.mean(0))
    # one pass at a distance of 1e5 standard deviations from 0
    torch.testing.assert_close(centred.scores(centred.statistics()), values.std(0, correction=0), rtol=1e-5, atol=0)


def test_a_pruned_feature_comes_back_when_its_activation_grows():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    site = site_of(model)
    site.observing = True
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([5.0, 4.0, 0.1])))

    def refresh() -> list[bool]:
        site.reset()
        model(torch.ones(4, 3))
        site.install(emp_mask(site.scores(site.statistics())))
        return site.mask.tolist()

    assert refresh() == [True, True, False]
    assert model(torch.ones(1, 3))[0, 2] == 0
    with torch.no_grad():
        model[0].weight[2, 2] = 6.0
    assert refresh() == [True, False, True]  # N_eff of 5, 4, 6 is 225 / 77
    assert model(torch.ones(1, 3))[0, 2] == 6.0


def test_a_pruned_inf_becomes_a_clean_zero():
    model = nn.Sequential(nn.ReLU())
    site_of(model).install(torch.tensor([True, False]))
    x = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.tolist() == [[1.0, 0.0]]
    assert x.grad.tolist() == [[1.0, 0.0]]


@each_center
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"dynamic": True},
        {"gradient": "straight_through"},
        {"dynamic": True, "choose": "gumbel", "gradient": "straight_through", "rescale": True},
    ],
    ids=str,
)
def test_the_activation_keeps_its_dtype(center, form):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    site = site_of(model, center=center, **form)
    site.active = site.observing = True
    if not site.form.dynamic:
        site.install(torch.tensor([True, False, True, True]), torch.zeros(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16
    assert model(torch.randn(2, 4)).dtype == torch.float32


def test_a_new_mask_is_copied_into_the_one_in_use():
    model = tanh_model()
    site = site_of(model, center="mean")
    site.install(torch.tensor([True, False]), torch.zeros(2))
    held, place = site.mask, site.mask.data_ptr()
    given = torch.tensor([False, True])
    site.install(given, torch.tensor([0.25, 0.5]))
    given[:] = True
    assert site.mask is held
    assert site.mask.data_ptr() == place
    assert model(torch.full((1, 2), 9.0)).tolist() == [[0.25, pytest.approx(1.0)]]


@pytest.mark.parametrize(
    ("form", "mask", "mean", "words"),
    [
        ({"dynamic": True}, torch.ones(2, dtype=torch.bool), None, "dynamic"),
        ({}, torch.ones(2), None, "must be bool"),
        ({}, torch.ones(3, dtype=torch.bool), None, r"shape \(3,\), must be \(2,\)"),
        ({"center": "mean"}, torch.ones(2, dtype=torch.bool), None, "needs the mean"),
        ({"center": "mean"}, torch.ones(2, dtype=torch.bool), torch.zeros(3), r"mean .* \(3,\), must be \(2,\)"),
    ],
)
def test_install_refuses_what_cannot_be_meant(form, mask, mean, words):
    model = tanh_model()
    site = site_of(model, **form)
    model(torch.randn(3, 2))
    with pytest.raises((ValueError, TypeError), match=words):
        site.install(mask, mean)
    assert site.mask is None


# ---- dynamic masks


def choose_by_hand(a: torch.Tensor, at: list[tuple], center: str) -> tuple[torch.Tensor, list[bool], torch.Tensor]:
    """One sample: its mean over features at each position, which features it keeps, and their scores."""
    features = torch.stack([a[place] for place in at])
    mean = features.mean(0) if center == "mean" else torch.zeros_like(features[0])
    scores = torch.stack([(feature - mean).abs().mean() for feature in features]).detach()
    return mean, emp_mask(scores).tolist(), scores


@each_center
@each_shape
def test_each_sample_is_masked_by_its_own_scores(axis, shape, center):
    torch.manual_seed(2)
    at = places(axis, shape)
    model = tanh_model()
    site = site_of(model, axis=axis, center=center, dynamic=True)
    site.observing = site.active = True
    x = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y = model(x)
    wavy_loss(y).backward()

    sums = {"samples": 0.0, "n_eff": 0.0, "keep": 0.0, "mass": 0.0, "not_finite": 0.0}
    rows, choices = [], set()
    for a in torch.tanh(twin):
        mean, kept, scores = choose_by_hand(a, at, center)
        masked = a.clone()
        for f, place in enumerate(at):
            if not kept[f]:
                masked[place] = mean
        rows.append(masked)
        choices.add(tuple(kept))
        sums["samples"] += 1
        sums["n_eff"] += effective_number(scores)
        sums["keep"] += sum(kept)
        sums["mass"] += float(scores[torch.tensor(kept)].sum() / scores.sum())
    by_hand = torch.stack(rows)
    wavy_loss(by_hand).backward()
    torch.testing.assert_close(y, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    assert len(choices) > 1, "samples choose for themselves"
    assert {k: v.item() for k, v in site.statistics().items()} == pytest.approx(sums, rel=1e-10)


def test_ties_are_kept_by_lowest_index_and_equal_scores_all_stay():
    model = nn.Sequential(nn.ReLU())
    site = site_of(model, dynamic=True)
    site.active = True
    x = torch.tensor([[3.0, 1.0, 3.0, 3.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert model(x).tolist() == [[3.0, 0.0, 3.0, 3.0], [pytest.approx(0.1)] * 4, [0.0] * 4]
    tied = torch.tensor([[2.0, 1.0, 1.0, 1.0]])  # N_eff = 25 / 7
    assert model(tied).tolist() == [[2.0, 1.0, 1.0, 0.0]]


def test_beta_of_the_rule_counts():
    model = nn.Sequential(nn.ReLU())
    site = site_of(model, rule=KeepRule(beta=0.5).counts, dynamic=True)
    site.active = site.observing = True
    assert model(torch.tensor([[4.0, 3.0, 3.0, 2.0]])).count_nonzero() == 1  # N_eff = 144 / 38
    assert site.statistics()["keep"] == 1


def test_before_it_is_active_a_dynamic_site_only_counts():
    model = tanh_model()
    site = site_of(model, dynamic=True)
    x = torch.randn(4, 6)
    site.observing = True
    assert torch.equal(model(x), x.tanh())
    assert site.statistics()["samples"] == 4
    seen = site.statistics()["keep"]
    site.active = True
    assert model(x).count_nonzero() == seen
    site.active = site.observing = False
    assert torch.equal(model(x), x.tanh())
    assert site.statistics()["samples"] == 8


def test_a_sample_with_nan_or_inf_is_kept_whole_and_counted_apart():
    model = nn.Sequential(nn.ReLU())
    site = site_of(model, dynamic=True)
    site.active = site.observing = True
    x = torch.tensor([[1.0, torch.nan, 0.0, 5.0], [1.0, torch.inf, 0.0, 5.0], [0.0, 0.0, 0.1, 5.0]])
    torch.testing.assert_close(model(x)[:2], x[:2], equal_nan=True)
    found = site.statistics()
    assert found["not_finite"] == 2
    assert found["samples"] == 1
    assert all(torch.isfinite(value) for value in found.values())


# ---- drawn, rescaled, straight through, in training only


def test_features_are_drawn_without_replacement_in_proportion_to_their_scores():
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    model = nn.Sequential(nn.ReLU())
    site = site_of(
        model, rule=lambda n_eff, size, nonzero: torch.full_like(n_eff, 2).long(), dynamic=True, choose="gumbel"
    )
    site.active = site.observing = True
    samples = 20_000
    torch.manual_seed(0)
    pairs = (model(scores.expand(samples, 5)) > 0).double()
    p, together = scores / scores.sum(), pairs.T @ pairs
    squares, mass = 0.0, 0.0
    for i, j in itertools.combinations(range(4), 2):
        expected = samples * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))  # i then j, or j then i
        squares += float((together[i, j] - expected) ** 2 / expected)
        mass += float(together[i, j] * (p[i] + p[j]))
    assert squares < 20.5  # chi-square of 5 degrees of freedom exceeds it once in 1000
    assert (pairs.sum(1) == 2).all()
    assert not pairs[:, 4].any()
    found = site.statistics()
    assert (found["samples"], found["keep"]) == (samples, 2 * samples)
    assert found["mass"] == pytest.approx(mass, rel=1e-9)


def test_draws_follow_the_seed_and_evaluation_takes_the_top():
    model, top = tanh_model(), tanh_model()
    site, other = site_of(model, dynamic=True, choose="gumbel"), site_of(top, dynamic=True)
    site.active = other.active = True
    x = torch.linspace(-2, 2, 60).sin().view(6, 10)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal((draws[2] != 0).sum(1), (top(x) != 0).sum(1))
    before = torch.get_rng_state()
    assert torch.equal(model.eval()(x), top(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_of_training_leave_evaluation_dense(dynamic):
    model = tanh_model()
    site = site_of(model, dynamic=dynamic, apply="training")
    site.active = True
    if not dynamic:
        site.install(torch.arange(6) % 2 == 0)
    x = torch.linspace(-2, 2, 18).view(3, 6)
    for _ in range(2):
        assert (model.train()(x) == 0).any()
        assert torch.equal(model.eval()(x), x.tanh())
    site.observing = site.in_eval = True
    assert torch.equal(model(x), x.tanh())
    assert site.statistics()["samples"] == 3


@each_center
@pytest.mark.parametrize("dynamic", [False, True])
@each_shape
def test_straight_through_every_feature_has_the_gradient_of_the_masked_output(axis, shape, dynamic, center):
    torch.manual_seed(0)
    found = []
    x = torch.randn(shape, dtype=torch.float64)
    for gradient in ("masked", "straight_through"):
        model = tanh_model()
        site = site_of(model, axis=axis, center=center, dynamic=dynamic, gradient=gradient)
        site.active = True
        if not dynamic:
            features = len(places(axis, shape))
            site.install(torch.arange(features) % 2 == 0, torch.linspace(-0.5, 0.7, features))
        found.append((model(x.requires_grad_()), x))
    (masked, _), (y, x) = found
    assert torch.equal(y, masked)
    (slope,) = torch.autograd.grad(wavy_loss(y), x)
    by_hand = np.cos(y.detach().numpy()) / shape[0] * (1 - np.tanh(x.detach().numpy()) ** 2)
    np.testing.assert_allclose(slope.numpy(), by_hand, rtol=1e-12)
    assert not torch.equal(slope, torch.autograd.grad(wavy_loss(masked), x)[0])


def test_straight_through_a_pruned_inf_is_a_clean_zero():
    model = nn.Sequential(nn.ReLU())
    site_of(model, gradient="straight_through").install(torch.tensor([True, False]))
    x = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.tolist() == [[1.0, 0.0]]
    assert x.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("criterion", ["activation", "taylor", "saliency"])
def test_straight_through_the_statistics_and_their_positions_are_the_same(criterion):
    found = []
    for gradient in ("masked", "straight_through"):
        model = tanh_model()
        site = site_of(model, criterion, gradient=gradient)
        site.observing, site.positions = True, torch.tensor([[True, True, False], [True, False, False]])
        site.install(torch.tensor([True, False, True, False]))
        wavy_loss(model(torch.linspace(-2, 1, 24).view(2, 3, 4).requires_grad_())).backward()
        found.append(site.statistics())
    assert found[0]["samples"] == 2
    assert found[0][criterion].min() > 0
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


@each_center
@each_shape
def test_rescaled_the_distances_from_what_is_pruned_add_up_as_before(axis, shape, center):
    torch.manual_seed(2)
    at = places(axis, shape)
    model = tanh_model()
    site_of(model, axis=axis, center=center, dynamic=True, rescale=True).active = True
    x = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y = model(x)
    wavy_loss(y).backward()
    rows = []
    for a in torch.tanh(twin):
        mean, kept, scores = choose_by_hand(a, at, center)
        factor, masked = scores.sum() / scores[torch.tensor(kept)].sum(), a.clone()
        for f, place in enumerate(at):
            masked[place] = mean + factor * (a[place] - mean) if kept[f] else mean
        rows.append(masked)
        assert factor > 1
    wavy_loss(torch.stack(rows)).backward()
    torch.testing.assert_close(y, torch.stack(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    if center == "zero":
        torch.testing.assert_close(y.abs().sum(), x.tanh().abs().sum())


def test_samples_without_scores_are_not_rescaled_and_half_precision_is_not_lost():
    model = nn.Sequential(nn.ReLU())
    site_of(model, dynamic=True, rescale=True).active = True
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, torch.inf, 0.5], [1.0, torch.nan, 0.5]])
    torch.testing.assert_close(model(x), x, rtol=0, atol=0, equal_nan=True)
    a = torch.tensor([[100.0, 100.0, 0.9]], dtype=torch.bfloat16)  # in bfloat16 the factor itself, 1.0045, were 1.0078
    assert model(a).tolist() == [[100.5, 100.5, 0.0]]


def test_rows_of_masks_of_training_say_that_evaluation_is_dense():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    for settings, said in (
        ({}, False),
        ({"apply": "training"}, True),
        ({"apply": "training", "observe_only": True}, False),
    ):
        pruner = EMPPruner(net, target="features", dynamic=True, **settings)
        dense = net(x)
        (row,) = pruner.refresh()
        assert ("evaluation is dense" in row.note) == said
        assert row.density < 1
        assert torch.equal(net.eval()(x), dense) == (not pruner.config.masks_evaluation)
        net.train()
        pruner.detach()


# ---- when statistics are gathered


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("criterion", "form"),
    [
        ("activation", {}),
        ("taylor", {}),
        ("taylor", {"gradient": "straight_through"}),
        ("activation", {"dynamic": True}),
        ("activation", {"dynamic": True, "choose": "gumbel", "rescale": True}),
    ],
)
def test_recomputed_activations_count_once(criterion, form, reentrant):
    found = {}
    for kind in (None, reentrant):
        model = Checkpointed(kind)
        site = site_of(model, criterion, center="mean", **form)
        site.observing = site.active = True
        if not site.form.dynamic:
            site.install(torch.arange(6) % 2 == 0, torch.ones(6))
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        model(x).square().mean().backward()
        found[kind] = {**site.statistics(), "grad": model.inner[0].weight.grad}
    assert found[None]["samples"] == 3
    for key, value in found[None].items():
        torch.testing.assert_close(found[reentrant][key], value, msg=key)


def test_in_eval_only_on_request():
    model = tanh_model()
    site = site_of(model)
    site.observing = True
    model.eval()(torch.randn(3, 2))
    assert site.statistics()["samples"] == 0
    site.in_eval = True
    with torch.inference_mode():
        model(torch.randn(3, 2))
    model.train()(torch.randn(2, 2))
    assert site.statistics()["samples"] == 5, "sums born in inference mode still grow"


def test_the_mask_works_in_eval_and_inference():
    model = tanh_model()
    site_of(model).install(torch.tensor([True, False]))
    with torch.inference_mode():
        assert model.eval()(torch.ones(1, 2))[0, 1] == 0


def test_gradient_criteria_count_samples_whose_gradient_came():
    model = tanh_model()
    site = site_of(model, "saliency")
    site.observing = True
    with torch.no_grad():
        model(torch.randn(3, 2))
    model(torch.randn(3, 2))
    assert site.statistics()["samples"] == 0
    model(torch.randn(3, 2, requires_grad=True)).sum().backward()
    assert site.statistics()["samples"] == 3


def test_reset_forgets():
    model = tanh_model()
    site = site_of(model)
    site.observing = True
    model(torch.ones(3, 2))
    site.reset()
    assert site.statistics()["samples"] == 0
    assert site.statistics()["activation"].tolist() == [0.0, 0.0]
    model(torch.ones(2, 2))
    assert site.statistics()["samples"] == 2


def test_statistics_before_a_forward_say_what_to_do():
    with pytest.raises(RuntimeError, match="no forward pass has reached '0'"):
        site_of(tanh_model()).statistics()


# ---- hooks


def test_detach_leaves_nothing_behind_and_attach_is_idempotent():
    model = tanh_model()
    before = dict(model[0].__dict__)
    site = site_of(model)
    site.attach()
    assert len(model[0]._forward_hooks) == 1
    site.install(torch.tensor([False, True]))
    assert model(torch.ones(1, 2))[0, 0] == 0
    site.detach()
    site.detach()
    assert model[0].__dict__ == before
    assert not model[0]._forward_hooks
    assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 2).tanh())
    assert not model.state_dict()


def test_attach_works_again_after_somebody_cleared_all_hooks():
    model = tanh_model()
    site = site_of(model)
    site.install(torch.tensor([False, True]))
    model[0]._forward_hooks.clear()
    assert model(torch.ones(1, 2))[0, 0] != 0
    site.attach()
    assert model(torch.ones(1, 2))[0, 0] == 0
    model[0]._forward_hooks = type(model[0]._forward_hooks)()
    site.attach()
    assert model(torch.ones(1, 2))[0, 0] == 0
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.compiler
def test_a_copy_of_the_model_keeps_its_mask_and_has_its_own_site():
    model = tanh_model()
    site = site_of(model)
    site.install(torch.tensor([False, True]))
    twin = copy.deepcopy(model)
    site.install(torch.tensor([True, True]))
    site.observing = True
    model(torch.ones(3, 2))
    assert twin(torch.ones(1, 2))[0, 0] == 0
    twin_site = next(iter(twin[0]._forward_hooks.values())).__self__
    twin_site.observing = True
    assert torch.compile(twin, backend="eager", fullgraph=True)(torch.ones(1, 2))[0, 0] == 0
    assert site.statistics()["samples"] == 3
    assert twin_site.statistics()["samples"] == 1


# ---- torch.compile

DRAWN = {"dynamic": True, "choose": "gumbel", "rescale": True, "gradient": "straight_through", "apply": "training"}


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("criterion", "form"),
    [
        ("activation", {}),
        ("activation", {"center": "mean"}),
        ("taylor", {"center": "mean"}),
        ("taylor", {"center": "mean", "gradient": "straight_through", "apply": "training"}),
        ("activation", {"dynamic": True, "center": "mean"}),
        ("activation", DRAWN),
    ],
)
def test_compiled_code_is_whole_gives_the_same_and_does_not_grow(criterion, form):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(5, 5), nn.GELU())])
    model = copy.deepcopy(plain)
    sites, twins = (feature_sites(m, None, None, FeatureForm(**form), criterion, RULE) for m in (model, plain))
    for site in [*sites, *twins]:
        site.attach()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for first in range(4):
        run_observed_and_not(compiled, sites)
        run_observed_and_not(plain, twins)
        graphs.append(counter.frame_count)
        for site, twin in zip(sites, twins, strict=True):
            torch.testing.assert_close(site.statistics(), twin.statistics())
            prune(site, first)
            prune(twin, first)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert graphs[1] == graphs[-1], f"graphs after each round: {graphs}"
    for site in [*sites, *twins]:
        site.detach()
    torch.testing.assert_close(compiled(torch.ones(1, 5)), plain(torch.ones(1, 5)), msg="after detach")


@pytest.mark.compiler
def test_compiled_code_draws_again_what_it_recomputes():
    torch._dynamo.reset()
    found = []
    for compiled in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)):
        model = Checkpointed(reentrant=False)
        site_of(model, dynamic=True, choose="gumbel").active = True
        net, x = compiled(model), torch.linspace(-1, 1, 120).view(30, 4).requires_grad_()
        model.inner(x)  # the site learns its size
        torch.manual_seed(1)
        net(x).square().mean().backward()
        found.append(model.inner[0].weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.compiler
def test_blocks_compiled_one_by_one_share_their_graphs():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.GELU()) for _ in range(10)])
    sites = feature_sites(model, None, None, FeatureForm(), "taylor", RULE)
    for block, site in zip(model, sites, strict=True):
        site.attach()
        block.compile(backend=counter)
    run_observed_and_not(model, sites)
    run_observed_and_not(model, sites)
    # before and after the size is known and not observing, each for inputs with and without gradient
    assert counter.frame_count <= 6
    assert [site.statistics()["samples"].item() for site in sites] == [8.0] * 10
    assert len({float(site.scores(site.statistics()).sum()) for site in sites}) == 10, "each has its own"


def run_observed_and_not(model: nn.Module, sites: list[FeatureSite]) -> None:
    model.zero_grad()
    torch.manual_seed(0)
    for observing in (True, False):
        for site in sites:
            site.observing = observing
        model(torch.linspace(-2, 2, 20).view(4, 5)).square().mean().backward()


def prune(site: FeatureSite, feature: int) -> None:
    site.reset()
    if site.form.dynamic:
        site.active = True
    else:
        mean = torch.full((5,), 0.1 * feature) if site.form.center == "mean" else None
        site.install(torch.arange(5) != feature, mean)


# ---- outputs


class Pair(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return (x, "more") if not self.wrong else ["no tensor"]


def test_of_a_tuple_the_first_is_masked():
    model = nn.Sequential(Pair())
    (site,) = feature_sites(model, ["0"], None, FeatureForm(), "activation", RULE)
    site.attach()
    site.install(torch.tensor([True, False]))
    first, more = model(torch.ones(1, 2))
    assert first.tolist() == [[1.0, 0.0]]
    assert more == "more"


def test_other_outputs_are_refused_by_name():
    model = nn.Sequential(Pair(wrong=True))
    (site,) = feature_sites(model, ["0"], None, FeatureForm(), "activation", RULE)
    site.attach()
    with pytest.raises(TypeError, match=r"'0' \(Pair\) returns list"):
        model(torch.ones(1, 2))


def test_a_size_that_changes_names_module_sizes_and_remedy():
    model = tanh_model()
    site_of(model, axis="token")
    model(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match=r"module '0' \(Tanh\) gave 5 features .* and 7 now.*exclude it"):
        model(torch.randn(2, 7, 3))


def test_a_mask_from_a_checkpoint_is_checked_at_the_first_forward():
    model = tanh_model()
    site_of(model).install(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="gave 2 features"):
        model(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("axis", "shape", "words"),
    [
        ("patch", (1, 2, 4, 5), "does not tile the output of '0', 4 x 5"),
        ("patch", (1, 2, 4), r"axis='patch' needs an output \(B, C, H, W\), '0' gave \(1, 2, 4\)"),
        ("token", (2, 3), r"axis='token' needs an output \(B, T, C\)"),
        ("channel", (3,), r"axis='channel' needs"),
    ],
)
def test_shapes_without_that_axis_are_refused(axis, shape, words):
    model = tanh_model()
    site_of(model, axis=axis)
    with pytest.raises(ValueError, match=words):
        model(torch.randn(shape))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"axis": "row"}, {"center": "median"}, {"patch_size": 0}, {"patch_size": 2.0}, {"dynamic": "yes"}),
        *(
            {"apply": "test"},
            {"choose": "gumbel"},
            {"gradient": None},
            {"rescale": "no", "dynamic": True},
            {"rescale": True},
        ),
    ],
)
def test_forms_are_checked(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        FeatureForm(**wrong)


# ---- which modules


def names(model: nn.Module, include=None, exclude=None) -> list[str]:
    return [site.name for site in feature_sites(model, include, exclude, FeatureForm(), "activation", RULE)]


def test_activation_modules_are_found_by_default():
    resnet = timm.create_model("resnet18", num_classes=2)
    assert names(resnet, exclude=["layer*"]) == ["act1"]
    assert len(names(resnet)) == 17
    efficient = names(timm.create_model("efficientnet_b0", num_classes=2))
    assert "bn1.act" in efficient
    assert not any("gate" in name for name in efficient), "gates are not features"
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    assert names(vit) == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10, n_positions=8))
    assert names(gpt2) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


@pytest.mark.compiler
def test_patterns_name_any_module_and_wrappers_do_not_show():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    vit.blocks[1].compile()
    vit.blocks[0] = torch.compile(vit.blocks[0], backend="eager")
    assert names(vit, ["blocks.?"]) == ["blocks.0", "blocks.1"]
    (first, _) = feature_sites(vit, ["blocks.?"], None, FeatureForm(), "activation", RULE)
    assert type(first.module).__name__ == "Block"
    assert names(vit, exclude=["blocks.1*"]) == ["blocks.0.mlp.act"]


def test_a_shared_module_is_one_site_under_any_of_its_names():
    act = nn.ReLU()
    model = nn.ModuleDict({"first": act, "second": act})
    assert names(model) == ["first"]
    assert names(model, ["second"]) == ["first"]


def test_what_is_not_found_is_answered_with_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Flatten())
    with pytest.raises(ValueError, match=r"no activation modules found in Sequential, .*1 \(Flatten\).*include="):
        names(model)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    with pytest.raises(ValueError, match=r"'blocks.\*.mlp.acts' matches no module; near names: .*mlp.act"):
        names(vit, ["blocks.*.mlp.acts"])
    with pytest.raises(ValueError, match="criterion 'magnitude' reads no activations"):
        feature_sites(vit, None, None, FeatureForm(), "magnitude", RULE)


# ---- per token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [{}, {"choose": "gumbel", "rescale": True, "gradient": "straight_through"}])
@pytest.mark.parametrize("center", ["zero", "mean"])
def test_each_token_chooses_its_own_channels(center, drawn):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8).exp() * torch.randn(8)
    outputs = []
    for shape, per in (((3, 5, 8), "token"), ((15, 8), "sample")):
        module = nn.Identity()
        form = FeatureForm(dynamic=True, per=per, center=center, **drawn)
        site = FeatureSite("site", module, form, "activation", lambda n_eff, size, nonzero: n_eff.floor().long())
        site.attach()
        site.active = site.observing = True
        torch.manual_seed(1)
        outputs.append((module(x.reshape(shape)).reshape(15, 8), site.statistics()))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1].keys() == outputs[1][1].keys()
    assert all(torch.equal(value, outputs[1][1][key]) for key, value in outputs[0][1].items())
    assert float(outputs[0][1]["samples"]) == 15


def test_only_a_choice_per_token_is_blind_to_later_tokens():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_layer=2, n_head=2, n_embd=16, n_positions=8)).eval()
    one = torch.randint(0, 20, (4, 8))
    other = one.clone()
    other[:, 5:] = torch.randint(0, 20, (4, 3))
    moved = {}
    for per in ("token", "sample"):
        pruner = EMPPruner(model, target="features", dynamic=True, per=per, beta=0.5)
        model(one)
        pruner.refresh()
        with torch.no_grad():
            moved[per] = float((model(one).logits - model(other).logits)[:, :5].abs().max())
        pruner.finalize()
    assert moved["token"] < 1e-5
    assert moved["sample"] > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zeroing_is_where_in_value_gradient_and_second_gradient(dtype):
    values = torch.tensor([[1.5, torch.inf, -2.0], [torch.nan, 3.0, -0.0]], dtype=dtype).T  # not contiguous
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    found = []
    for zeroed in (lambda x: _ZeroPruned.apply(x, mask), lambda x: torch.where(mask, x, 0.0)):
        x, direction = values.clone().requires_grad_(), torch.ones_like(values).requires_grad_()
        output = zeroed(x)
        (gradient,) = torch.autograd.grad(output, x, direction, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), direction)
        found.append((output.detach(), gradient.detach(), second))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 1), (1, 0), (None, 0), (0, None)])
def test_zeroing_under_vmap_is_that_of_each_row(in_dims):
    values = torch.linspace(-1, 1, 9).view(3, 3).sin()
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    by_row = [
        [whole] * 3 if dim is None else whole.unbind(dim) for whole, dim in zip((values, mask), in_dims, strict=True)
    ]
    expected = torch.stack([torch.where(kept, row, 0.0) for row, kept in zip(*by_row, strict=True)])
    assert torch.equal(torch.func.vmap(_ZeroPruned.apply, in_dims)(values, mask), expected)


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@each_center
def test_gradients_of_single_samples_can_be_taken_of_a_pruned_model(center, gradient):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    site = site_of(model, center=center, gradient=gradient)
    samples = torch.randn(5, 4)
    model(samples)
    site.install(torch.arange(6) % 2 == 0, torch.full((6,), 0.5) if center == "mean" else None)
    weights = dict(model.named_parameters())

    def loss(values, sample):
        return torch.func.functional_call(model, values, sample[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, samples)
    for i, sample in enumerate(samples):
        alone = torch.autograd.grad(loss(weights, sample), weights.values())
        torch.testing.assert_close([each[i] for each in found.values()], list(alone))
    assert bool(found["0.weight"][:, 1::2].any()) == (gradient == "straight_through")
    assert found["0.weight"][:, 0::2].any()
