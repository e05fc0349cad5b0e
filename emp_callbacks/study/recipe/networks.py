"""Networks of the EMP paper (arXiv:2509.25606) as timm models: emp_fc2, emp_fc5, emp_fc12 and emp_kan.

Widths are those of the authors' code (github.com/noMushroomw/Effective-model-pruning). Importing this module makes
the names known to `timm.create_model`. None of them has pretrained weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["KAN", "FullyConnected", "KANLinear", "bspline_basis", "emp_fc2", "emp_fc5", "emp_fc12", "emp_kan"]

# What timm.create_model hands to every model: where pretrained weights would come from.
_TIMM_SETTINGS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class FlattenImages(nn.Module):
    """Images (B, C, H, W) -> vectors (B, C * H * W).

    Args:
        in_chans: Channels C.
        img_size: Height and width.

    Raises:
        ValueError: An image has another number of values.
    """

    def __init__(self, in_chans: int, img_size: int) -> None:
        super().__init__()
        self.in_chans, self.img_size = in_chans, img_size
        self.out_features = in_chans * img_size * img_size

    def forward(self, images: Tensor) -> Tensor:
        vectors = images.flatten(1)
        if vectors.shape[1] != self.out_features:
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])}, but the network was built for in_chans={self.in_chans}, "
                f"img_size={self.img_size}; set both to those of the data"
            )
        return vectors


class FullyConnected(nn.Sequential):
    """Linear layers fc1, fc2, ... with ReLU between them and a linear head, on flattened images.

    Images (B, in_chans, img_size, img_size) -> logits (B, num_classes). Torch's own initialisation.

    Args:
        widths: Neurons of each hidden layer.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        img_size: Height and width of the images.
    """

    def __init__(self, widths: Sequence[int], num_classes: int = 10, in_chans: int = 1, img_size: int = 28) -> None:
        super().__init__()
        self.flatten = FlattenImages(in_chans, img_size)
        for i, (inputs, outputs) in enumerate(pairwise([self.flatten.out_features, *widths]), start=1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            self.add_module(f"relu{i}", nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)


def bspline_basis(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """Return the values of all B-splines of one order, by the Cox-de Boor recursion on all of them at once.

    Inside the grid, from knot `order` to knot M - 1 - `order`, they add up to 1; beyond the last knot they are 0.

    Args:
        x: Points, floating, any shape.
        grid: Knots, strictly increasing, shape (M,), in x's dtype.
        order: Degree of the pieces, >= 0; 3 for cubic splines.

    Returns:
        Values in [0, 1], shape (*x.shape, M - 1 - order), in x's dtype.

    Examples:
        >>> bspline_basis(torch.tensor([0.25]), torch.arange(-1.0, 3.0), order=1)
        tensor([[0.7500, 0.2500]])
    """
    x = x.unsqueeze(-1)
    basis = ((x >= grid[:-1]) & (x < grid[1:])).to(x.dtype)
    for degree in range(1, order + 1):
        rising = (x - grid[: -degree - 1]) / (grid[degree:-1] - grid[: -degree - 1])
        falling = (grid[degree + 1 :] - x) / (grid[degree + 1 :] - grid[1:-degree])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


class KANLinear(nn.Module):
    """A layer of learned functions on the edges (Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv:2404.19756).

    y_o = sum_i [ base_weight[o, i] * silu(x_i) + sum_k spline_weight[o, i, k] * B_k(x_i) ], where the B_k are
    B-splines on one uniform grid, extended by `spline_order` knots at each end. Shapes: (*, in) -> (*, out).

    Args:
        in_features: Inputs.
        out_features: Outputs.
        grid_size: Intervals of the grid, >= 1.
        spline_order: Degree of the splines, >= 0; 3 for cubic ones.
        grid_range: First and last point of the grid; outside, the splines fade to 0 and the base stays.

    Attributes:
        spline_weight: Coefficients, shape (out, in, grid_size + spline_order).
        base_weight: Factors of silu, shape (out, in).
        grid: Knots, shape (grid_size + 2 * spline_order + 1,); not part of the state_dict.

    Raises:
        ValueError: grid_size, spline_order or grid_range is out of range.
    """

    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if grid_size < 1 or spline_order < 0:
            raise ValueError(f"need grid_size >= 1 and spline_order >= 0, got {grid_size} and {spline_order}")
        low, high = grid_range
        if low >= high:
            raise ValueError(f"grid_range must be [low, high] with low < high, got [{low}, {high}]")
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        knots = torch.arange(-spline_order, grid_size + spline_order + 1)
        self.register_buffer("grid", low + knots * ((high - low) / grid_size), persistent=False)
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, grid_size + spline_order))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the base as torch's Linear does, and small splines that add little to it."""
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.normal_(self.spline_weight, std=0.1 / math.sqrt(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        basis = bspline_basis(x, self.grid, self.spline_order)
        splines = functional.linear(basis.flatten(-2), self.spline_weight.flatten(1))
        return functional.linear(functional.silu(x), self.base_weight) + splines

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"grid_size={self.grid_size}, spline_order={self.spline_order}"
        )


class KAN(nn.Sequential):
    """KANLinear layers kan1, kan2, ... on flattened images; the last one gives the logits.

    Images (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Args:
        widths: Nodes of each hidden layer.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        img_size: Height and width of the images.
        grid_size: See `KANLinear`, also for `spline_order` and `grid_range`; one for all layers.
        spline_order: Degree of the splines.
        grid_range: Choose it so that it holds most pixel values.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.flatten = FlattenImages(in_chans, img_size)
        sizes = [self.flatten.out_features, *widths, num_classes]
        for i, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"kan{i}", KANLinear(inputs, outputs, grid_size, spline_order, grid_range))


@register_model
def emp_fc2(pretrained: bool = False, **settings: Any) -> FullyConnected:
    """Two weight layers: 100 hidden neurons and the head. Settings: see `FullyConnected`."""
    return FullyConnected(**_own(pretrained, settings, widths=(100,)))


@register_model
def emp_fc5(pretrained: bool = False, **settings: Any) -> FullyConnected:
    """Five weight layers: hidden widths 1000-600-300-100. Settings: see `FullyConnected`."""
    return FullyConnected(**_own(pretrained, settings, widths=(1000, 600, 300, 100)))


@register_model
def emp_fc12(pretrained: bool = False, **settings: Any) -> FullyConnected:
    """Twelve weight layers: eleven hidden ones that fall from 1000 to 100. Settings: see `FullyConnected`."""
    widths = (1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100)
    return FullyConnected(**_own(pretrained, settings, widths=widths))


@register_model
def emp_kan(pretrained: bool = False, **settings: Any) -> KAN:
    """Two KAN layers with 64 hidden nodes. Settings: see `KAN`."""
    return KAN(**_own(pretrained, settings, widths=(64,)))


def _own(pretrained: bool, settings: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the network's settings without timm's own."""
    if pretrained:
        raise ValueError("the networks of the EMP paper have no pretrained weights: leave pretrained=False")
    return {**defaults, **{name: value for name, value in settings.items() if name not in _TIMM_SETTINGS}}
