import pytest
import torch
from torch import nn

from emp_callbacks.targets.kan import kan_nodes
from tests.targets.masked_units import prune


class Spline(nn.Module):
    """A KAN layer with Gaussian bumps for a basis: y_o = sum_i [b_oi silu(x_i) + sum_k c_oik B_k(x_i)]."""

    def __init__(self, inputs: int, outputs: int, coefficients: int = 4) -> None:
        super().__init__()
        self.spline_weight = nn.Parameter(torch.randn(outputs, inputs, coefficients))
        self.base_weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centres = torch.linspace(-1, 1, self.spline_weight.shape[2])
        basis = torch.exp(-((x[..., None] - centres) ** 2))
        return nn.functional.silu(x) @ self.base_weight.T + torch.einsum("bik,oik->bo", basis, self.spline_weight)


class Stack(nn.Module):
    """Layers as a list, like most KAN code has them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def without_nodes(layers, x: torch.Tensor, removed: dict[int, list[int]]) -> torch.Tensor:
    """Sum over the edges that start at nodes that are left, one by one."""
    for depth, layer in enumerate(layers):
        outputs, inputs, coefficients = layer.spline_weight.shape
        centres = torch.linspace(-1, 1, coefficients)
        total = torch.zeros(len(x), outputs)
        for i in range(inputs):
            if i in removed.get(depth - 1, []):
                continue
            basis = torch.exp(-((x[:, i, None] - centres) ** 2))
            for o in range(outputs):
                total[:, o] += layer.base_weight[o, i] * nn.functional.silu(x[:, i])
                total[:, o] += basis @ layer.spline_weight[o, i]
        x = total
    return x


def test_pruned_nodes_add_nothing():
    model = nn.Sequential(Spline(3, 5), Spline(5, 4), Spline(4, 2))
    x = torch.rand(6, 3) * 2 - 1
    with torch.no_grad():
        expected = without_nodes(model, x, {0: [1, 4], 1: [0]})
        assert not torch.allclose(model(x), expected, atol=1e-2), "the nodes matter"
        first, second = kan_nodes(model)
        prune(first, {1, 4})
        prune(second, {0})
        torch.testing.assert_close(model(x), expected)


def test_members_and_names():
    model = Stack(Spline(3, 5), Spline(5, 2))
    (target,) = kan_nodes(model)
    assert (target.name, target.units) == ("layers.0", 5)
    assert target.observed == (model.layers[0], "output")
    assert [(m.weight.name, *m.dims, m.role, m.masked, m.scored) for m in target.members] == [
        ("layers.1.spline_weight", 1, "output", True, True),
        ("layers.1.base_weight", 1, "output", True, False),
        ("layers.0.spline_weight", 0, "input", False, True),
    ]
    assert all(m.unit_of.tolist() == [0, 1, 2, 3, 4] for m in target.members)


def test_attributes_in_order_with_a_norm_between():
    model = nn.Module()
    model.first, model.norm, model.second = Spline(3, 5), nn.LayerNorm(5), Spline(5, 2)
    assert [target.name for target in kan_nodes(model)] == ["first"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Spline(3, 5), nn.Linear(5, 5), Spline(5, 2)),
        nn.Sequential(Spline(3, 5), Spline(4, 2)),
        nn.Sequential(Spline(3, 5)),
        nn.ModuleDict({"one": nn.ModuleList([Spline(3, 5)]), "other": nn.ModuleList([Spline(5, 2)])}),
    ],
    ids=["a dense layer between", "other width", "alone", "other parents"],
)
def test_layers_that_do_not_follow_each_other_have_no_nodes(model):
    with pytest.raises(ValueError, match=r"the KAN layers .* are no such pair"):
        kan_nodes(model)


def test_two_networks_in_a_row_of_blocks_are_not_joined():
    """What lies between blocks is a residual stream as a rule, and no hidden node."""
    model = nn.ModuleList([nn.Sequential(Spline(4, 6), Spline(6, 4)), nn.Sequential(Spline(4, 6), Spline(6, 4))])
    assert [target.name for target in kan_nodes(model)] == ["0.0", "1.0"]


def test_shapes_decide_what_a_kan_layer_is():
    model = nn.Sequential(Spline(3, 5), Spline(5, 2))
    model[1].base_weight = nn.Parameter(torch.randn(5))
    with pytest.raises(ValueError, match="the KAN layers 0 are no such pair"):
        kan_nodes(model)


def test_no_kan_is_an_error():
    with pytest.raises(ValueError, match=r"looked for neighbouring modules with spline_weight.*the model itself \(0\)"):
        kan_nodes(nn.Sequential(nn.Linear(2, 2)))


def test_include_and_exclude():
    model = Stack(Spline(3, 5), Spline(5, 4), Spline(4, 2))
    assert [t.name for t in kan_nodes(model, include=["layers.1"])] == ["layers.1"]
    assert [t.name for t in kan_nodes(model, include=["layers.1.spline_weight"])] == ["layers.0"], "masked there"
    assert [t.name for t in kan_nodes(model, exclude=["layers.1"])] == ["layers.0"]
    with pytest.raises(ValueError, match=r"'layers.2' matches no KAN layer with hidden nodes.*near names: layers.[01]"):
        kan_nodes(model, include=["layers.2"])
    with pytest.raises(ValueError, match=r"leaves no KAN nodes of layers.0, layers.1"):
        kan_nodes(model, exclude=["*"])


def test_a_shared_layer_reads_nobody_twice():
    shared = Spline(4, 4)
    model = nn.Sequential(Spline(3, 4), shared, shared, Spline(4, 2))
    assert [(t.name, t.members[0].weight.name) for t in kan_nodes(model)] == [
        ("0", "1.spline_weight"),
        ("1", "3.spline_weight"),
    ]


def test_sizes_are_those_of_the_unsharded_model():
    model = nn.Sequential(Spline(3, 5), Spline(5, 2))
    full = {parameter: parameter.shape for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    (target,) = kan_nodes(model, full_shape=full.__getitem__)
    assert (target.units, len(target.members[0].unit_of)) == (5, 5)
