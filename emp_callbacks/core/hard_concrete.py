"""Gates that are open or closed at random and yet have gradients: the hard concrete distribution.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312,
section 2.2; with the temperature of Voita et al., arXiv:1905.09418, whose gates are those of attention heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 0.33
LOW, HIGH = -0.1, 1.1
"""Between which the concrete distribution is stretched; what lies outside of [0, 1] is cut off."""
OPEN = 2.2
"""log alpha of a gate that begins open: it is so with a probability of 0.95, and can still learn."""
MOST_CERTAIN = 0.99
"""A gate that begins more certain than this, either way, would have next to no gradient."""
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return gates in [0, 1], of which some are exactly 0 or 1 (equations 10 and 11); differentiable by `log_alpha`.

    Args:
        log_alpha: Location of each gate, floating, any shape.
        uniform: Independent numbers in (0, 1), same shape.
    """
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return stretched((log_alpha + noise) / TEMPERATURE)


def stretched(logit: Tensor) -> Tensor:
    """Return the gate whose concrete value has this logit: stretched beyond [0, 1], then cut off there."""
    gate: Tensor = (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
    return gate


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(gate > 0) (equation 12), same shape."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_of(probability: Tensor) -> Tensor:
    """Return the log alpha with which a gate is open with a probability in (0, 1), same shape."""
    log_alpha: Tensor = torch.logit(probability) + _SHIFT
    return log_alpha


def binary_entropy(probability: Tensor) -> Tensor:
    """Return how undecided each gate is, in bits: 1 where it is open half of the time, 0 where always or never."""
    other = 1.0 - probability
    nats: Tensor = torch.special.xlogy(probability, probability) + torch.special.xlogy(other, other)
    return -nats / math.log(2.0)


def proportional_probabilities(scores: Tensor, expected: float) -> Tensor:
    """Return probabilities in proportion to scores, whose sum is the expected number of open gates.

    None is above `MOST_CERTAIN` or below what is left to 1: the others then share the rest. Scores that are all 0 say
    nothing: all gates get the same.

    Args:
        scores: Shape (N,), >= 0.
        expected: Number of open gates, held within [1 - MOST_CERTAIN, MOST_CERTAIN] * N.

    Returns:
        Shape (N,), float64.

    Examples:
        >>> proportional_probabilities(torch.tensor([4.0, 2.0, 2.0]), 1.0).tolist()
        [0.5, 0.25, 0.25]
    """
    wanted = min(max(expected / len(scores), 1.0 - MOST_CERTAIN), MOST_CERTAIN) * len(scores)
    shares = scores.double().abs()
    shares = shares / shares.max() if bool(shares.any()) else torch.ones_like(shares)

    def at(factor: float) -> Tensor:
        return (factor * shares).clamp(1.0 - MOST_CERTAIN, MOST_CERTAIN)

    low, high = 0.0, 1.0 / float(shares[shares > 0].min())
    if float(at(high).sum()) < wanted:  # those of score 0 have to open, too
        shares = shares + 1e-3
        high = 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(at(middle).sum()) < wanted else (low, middle)
    return at(high)
