import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from scipy.interpolate import BSpline
from torch.nn import functional

from emp_callbacks.study.recipe.networks import KAN, FullyConnected, KANLinear, bspline_basis

SMALL = {"num_classes": 10, "in_chans": 1, "img_size": 8}
WIDTHS = {
    "emp_fc2": [100],
    "emp_fc5": [1000, 600, 300, 100],
    "emp_fc12": [1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100],
}


@pytest.mark.parametrize(("grid_size", "order"), [(5, 3), (1, 3), (4, 2), (3, 1), (3, 0)])
def test_basis_is_scipys(grid_size, order):
    grid = KANLinear(1, 1, grid_size, order).grid.double()
    x = torch.linspace(-3, 3, 401, dtype=torch.float64)
    ours = bspline_basis(x, grid, order).numpy()
    assert ours.shape == (401, grid_size + order)
    for k, values in enumerate(ours.T):
        # basis_element knows one spline by its own knots; outside of them it is 0.
        knots = grid[k : k + order + 2].numpy()
        inside = (x.numpy() >= knots[0]) & (x.numpy() < knots[-1])
        theirs = np.where(inside, BSpline.basis_element(knots, extrapolate=False)(x.numpy()), 0.0)
        np.testing.assert_allclose(values, theirs, atol=1e-12)


def test_basis_adds_up_to_one_inside_the_grid_only():
    layer = KANLinear(1, 1, grid_size=5, spline_order=3)
    inside = torch.linspace(-1, 1, 101)
    torch.testing.assert_close(bspline_basis(inside, layer.grid, 3).sum(-1), torch.ones(101))
    outside = torch.tensor([-1.5, 1.5])
    assert (bspline_basis(outside, layer.grid, 3).sum(-1) < 0.9).all()


def test_grid_is_uniform_extended_and_not_saved():
    layer = KANLinear(2, 3, grid_size=4, spline_order=3, grid_range=(-2, 2))
    torch.testing.assert_close(layer.grid, torch.arange(-5.0, 6.0))
    assert set(layer.state_dict()) == {"spline_weight", "base_weight"}


def test_kan_layer_against_a_double_loop():
    torch.manual_seed(0)
    layer = KANLinear(3, 2, grid_size=5, spline_order=3)
    torch.nn.init.normal_(layer.spline_weight)  # as large as the base
    assert layer.spline_weight.shape == (2, 3, 8)
    assert layer.base_weight.shape == (2, 3)
    x = torch.randn(4, 3)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for o in range(2):
        for i in range(3):
            spline = BSpline(layer.grid.double().numpy(), layer.spline_weight[o, i].detach().double().numpy(), 3)
            for b in range(4):
                value = float(x[b, i])
                inside = layer.grid[0].item() <= value < layer.grid[-1].item()
                silu = value / (1 + np.exp(-value))
                # scipy's splines hold on the inner knots only: more knots with zero coefficients make them all inner.
                expected[b, o] += layer.base_weight[o, i].item() * silu + (_padded(spline)(value) if inside else 0.0)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


def _padded(spline):
    step = spline.t[1] - spline.t[0]
    before, after = spline.t[0] - step * np.arange(3, 0, -1), spline.t[-1] + step * np.arange(1, 4)
    return BSpline(np.r_[before, spline.t, after], np.r_[np.zeros(3), spline.c, np.zeros(3)], 3)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_kan_layer_keeps_leading_dimensions(leading):
    assert KANLinear(3, 2)(torch.randn(*leading, 3)).shape == (*leading, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid_size": 0}, "grid_size >= 1 .* got 0"),
        ({"spline_order": -1}, "spline_order >= 0, got 5 and -1"),
        ({"grid_range": (1, 1)}, r"low < high, got \[1, 1\]"),
    ],
)
def test_kan_layer_names_a_bad_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        KANLinear(3, 2, **settings)


@pytest.mark.parametrize(("name", "hidden"), WIDTHS.items())
def test_fully_connected_networks_have_the_papers_widths(name, hidden):
    model = timm.create_model(name, num_classes=10, in_chans=1)
    shapes = [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert shapes == list(zip([*hidden, 10], [784, *hidden], strict=True))
    assert len(shapes) == int(name.removeprefix("emp_fc"))
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_fully_connected_network_against_its_formula():
    torch.manual_seed(0)
    model = timm.create_model("emp_fc5", **SMALL)
    x = torch.randn(3, 1, 8, 8)
    state, value = model.state_dict(), x.reshape(3, 64)
    for name in ("fc1", "fc2", "fc3", "fc4"):
        value = (value @ state[f"{name}.weight"].T + state[f"{name}.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), value @ state["head.weight"].T + state["head.bias"])


def test_kan_shapes():
    model = timm.create_model("emp_kan", num_classes=7, in_chans=3, img_size=4, grid_size=6)
    layers = [layer for layer in model.modules() if isinstance(layer, KANLinear)]
    assert [tuple(layer.spline_weight.shape) for layer in layers] == [(64, 48, 9), (7, 64, 9)]
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 7)


@pytest.mark.parametrize("name", [*WIDTHS, "emp_kan"])
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = functional.cross_entropy(model(images), labels)
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert functional.cross_entropy(model(images), labels) < before


def test_widths_can_be_set():
    assert isinstance(model := timm.create_model("emp_fc2", widths=[16], **SMALL), FullyConnected)
    assert model.fc1.weight.shape == (16, 64)
    assert isinstance(model := timm.create_model("emp_kan", widths=[4, 5], **SMALL), KAN)
    assert [layer.out_features for layer in model][1:] == [4, 5, 10]


def test_errors_name_value_and_remedy():
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("emp_fc2", pretrained=True)
    with pytest.raises(TypeError, match="img_sise"):
        timm.create_model("emp_fc2", img_sise=8)
    with pytest.raises(ValueError, match=r"shape \(1, 28, 28\).*in_chans=1, img_size=8"):
        timm.create_model("emp_fc2", **SMALL)(torch.randn(2, 1, 28, 28))


def test_a_saved_kan_can_be_loaded():
    first, second = (timm.create_model("emp_kan", **SMALL) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


@pytest.mark.processes
def test_transformers_is_not_imported():
    code = "import sys, emp_callbacks.study.recipe.networks; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
