import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks.cost.curvature import hessian_trace, mean_loss, quadratic_change


@pytest.fixture
def problem():
    """A small network in float64, three batches, and its full Hessian by torch.func."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(3)]
    names = [name for name, _ in net.named_parameters() if name.endswith("weight")]
    parameters = [dict(net.named_parameters())[name] for name in names]

    def losses():
        return (functional.cross_entropy(net(images), labels) for images, labels in batches)

    def of(flat):
        parts = torch.split(flat, [p.numel() for p in parameters])
        values = {name: part.view_as(p) for name, part, p in zip(names, parts, parameters, strict=True)}
        outputs = (torch.func.functional_call(net, values, (images,)) for images, _ in batches)
        return sum(functional.cross_entropy(out, y) for out, (_, y) in zip(outputs, batches, strict=True)) / 3

    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    return losses, parameters, torch.func.grad(of)(flat).detach(), torch.func.hessian(of)(flat).detach()


def test_the_trace_is_that_of_the_full_hessian(problem):
    losses, parameters, _, hessian = problem
    found = hessian_trace(losses, parameters, probes=400)
    exact = float(hessian.trace())
    assert found.low < exact < found.high
    assert found.mean == pytest.approx(exact, rel=0.1)
    assert found.high - found.low < 0.3 * abs(exact)


def test_the_interval_covers_as_often_as_it_says(problem):
    losses, parameters, _, hessian = problem
    exact, covered = float(hessian.trace()), 0
    for seed in range(40):
        found = hessian_trace(losses, parameters, probes=8, seed=seed, confidence=0.8)
        covered += found.low < exact < found.high
    assert 24 <= covered <= 39  # 32 expected, standard deviation 2.5


def test_a_probe_is_the_same_for_every_batch_and_call(problem):
    losses, parameters, _, hessian = problem
    one = hessian_trace(losses, parameters, probes=1, seed=3)
    assert one == hessian_trace(losses, parameters, probes=1, seed=3)
    assert (one.low, one.high) == (None, None)
    signs = torch.Generator().manual_seed(3 << 20)
    z = torch.cat(
        [
            2.0 * torch.randint(0, 2, p.shape, generator=signs, dtype=torch.int8).double().view(-1) - 1
            for p in parameters
        ]
    )
    assert one.mean == pytest.approx(float(z @ hessian @ z), rel=1e-9)


def test_a_step_changes_the_loss_as_gradient_and_hessian_say(problem):
    losses, parameters, gradient, hessian = problem
    step = [1e-3 * torch.randn_like(p) for p in parameters]
    d = torch.cat([s.view(-1) for s in step])
    first, second = quadratic_change(losses, parameters, step)
    assert first == pytest.approx(float(gradient @ d), rel=1e-9)
    assert second == pytest.approx(float(d @ hessian @ d), rel=1e-9)
    before = mean_loss(losses)
    for p, s in zip(parameters, step, strict=True):
        p.data += s
    assert mean_loss(losses) - before == pytest.approx(first + second / 2, rel=1e-4)


def test_attention_that_is_fused_otherwise(monkeypatch):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2)
    images = torch.randn(2, 3, 8, 8)
    weights = [p for name, p in vit.named_parameters() if name.endswith("qkv.weight")]
    assert vit.blocks[0].attn.fused_attn
    assert math.isfinite(hessian_trace(lambda: [vit(images).square().mean()], weights, probes=2).mean)


def test_a_loss_that_is_linear_in_a_weight_has_no_curvature():
    w, v = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert hessian_trace(lambda: [w.sum()], [w, v], probes=2).mean == 0.0
    assert quadratic_change(lambda: [w.sum()], [w], [torch.ones(3)]) == (3.0, 0.0)


def test_gradients_are_left_as_they_were(problem):
    losses, parameters, _, _ = problem
    hessian_trace(losses, parameters, probes=2)
    assert all(p.grad is None for p in parameters)


def test_what_cannot_be_is_said():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="probes must be >= 1"):
        hessian_trace(lambda: [w.sum()], [w], probes=0)
    with pytest.raises(ValueError, match="confidence"):
        hessian_trace(lambda: [w.sum()], [w], confidence=95)
    with pytest.raises(ValueError, match="no batch"):
        hessian_trace(list, [w])
    with pytest.raises(ValueError, match="no batch"):
        mean_loss(list)
    with pytest.raises(RuntimeError, match="depends on none"):
        hessian_trace(lambda: [torch.ones(1, requires_grad=True).sum()], [w])
