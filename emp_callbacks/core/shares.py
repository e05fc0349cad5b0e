"""How a density is shared among layers, where they do not compete for it."""

from __future__ import annotations

from collections.abc import Sequence


def erk_factor(shape: Sequence[int]) -> float:
    """Return the relative density that Erdos-Renyi-Kernel gives a weight: sum of its dimensions over their product.

    Args:
        shape: Of the weight, such as (outputs, inputs, height, width).

    Source: Evci et al., "Rigging the Lottery", arXiv:1911.11134, section 3; after Mocanu et al., arXiv:1707.04780.

    Examples:
        >>> erk_factor((10, 20))
        0.15
    """
    product = 1
    for size in shape:
        product *= size
    return sum(shape) / product


def layer_densities(sizes: Sequence[int], factors: Sequence[float], density: float) -> list[float]:
    """Return densities in proportion to the factors, none above 1, that keep `density` of all components together.

    Args:
        sizes: Components of each layer, shape (L,), >= 1.
        factors: Relative density of each layer, shape (L,), >= 0; not all 0.
        density: Fraction of all components to keep, in (0, 1].

    Returns:
        A fraction in [0, 1] for each layer. Where layers of a factor above 0 cannot hold as many, all of these are
        dense and less is kept.

    Source: the rule of arXiv:1911.11134, appendix: what would be above 1 is dense, the rest is scaled up.

    Examples:
        >>> layer_densities([10, 100], [1.0, 0.1], density=0.5)  # 55 of 110: 10 + 45
        [1.0, 0.45]
    """
    dense: set[int] = set()
    wanted = density * sum(sizes)
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense and factors[i] > 0]
        left = wanted - sum(sizes[i] for i in dense)
        weight = sum(sizes[i] * factors[i] for i in rest)
        scale = left / weight if weight else 0.0
        over = {i for i in rest if scale * factors[i] > 1.0}
        if not over:
            return [1.0 if i in dense else min(1.0, max(0.0, scale * factors[i])) for i in range(len(sizes))]
        dense |= over
