"""What EMP guarantees about the score mass that it keeps."""

from __future__ import annotations

import math


def mass_bound(nu: int, n: int) -> float:
    """Return the lower bound on the preserved mass when the nu = floor(N_eff) highest of n scores are kept.

    s_eff >= nu/n + (n - nu)/n * sqrt((n - nu - 1) / ((nu + 1)(n - 1))) for 2 <= nu <= n - 1 at beta = 1; tight.

    Args:
        nu: Keep count at beta = 1, in components.
        n: Number of scores, in components.

    Returns:
        A fraction in (0, 1].

    Raises:
        ValueError: nu lies outside [2, n - 1], where the bound does not hold.

    Source: arXiv:2509.25606, lower bound on the preserved effective mass.

    Example:
        >>> round(mass_bound(2, 4), 4)
        0.6667
    """
    if not 2 <= nu <= n - 1:
        raise ValueError(f"the mass bound holds for 2 <= nu <= n - 1; got nu={nu}, n={n}")
    return nu / n + (n - nu) / n * math.sqrt((n - nu - 1) / ((nu + 1) * (n - 1)))
