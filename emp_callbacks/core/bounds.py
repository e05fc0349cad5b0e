"""What EMP guarantees about the score mass that it keeps, and what theory says of the loss that it may cost.

Letters: N scores, nu of them kept, w_i = |s_i| / sum |s|, s_eff the sum of the kept w_i, rho = nu / N; for magnitude
scores theta are the weights before pruning, d their change, H the Hessian of the loss at theta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import FLOOR_SLACK


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

    Source: arXiv:2509.25606, theorem 4.2. It follows from `tight_mass_bound` as N_eff rises to nu + 1.

    Examples:
        >>> round(mass_bound(2, 4), 4)
        0.6667
    """
    if not 2 <= nu <= n - 1:
        raise ValueError(f"the mass bound holds for 2 <= nu <= n - 1; got nu={nu}, n={n}; use tight_mass_bound")
    return nu / n + (n - nu) / n * math.sqrt((n - nu - 1) / ((nu + 1) * (n - 1)))


def tight_mass_bound(keep: int, n: int, n_eff: float) -> float:
    """Return the least share of the mass that the `keep` highest of n scores hold, if their effective number is n_eff.

    Holds for every keep count, so for every beta, fixed density or guard, and is reached by some scores. At beta = 1
    it is sharper than `mass_bound`, which knows the floor of N_eff only. Proof: docs/certificates.md.

    Args:
        keep: Number of kept scores, in [1, n].
        n: Number of scores, in components.
        n_eff: Effective number of the scores, in components, in [1, n] up to rounding.

    Returns:
        A fraction in (0, 1]; lower by what a relative error of 1e-12 in `n_eff` can do.

    Raises:
        ValueError: `keep` or `n_eff` lies outside its range.

    Examples:
        >>> round(tight_mass_bound(2, 4, 2.5), 4)  # mass_bound(2, 4) allows for N_eff up to 3
        0.7236
        >>> round(tight_mass_bound(1, 4, 2.5), 4)  # beta = 0.5
        0.4387
    """
    if not 1 <= keep <= n:
        raise ValueError(f"keep must lie in [1, n={n}], got {keep}")
    if not 1 - 1e-9 <= n_eff <= n * (1 + 1e-9):
        raise ValueError(f"n_eff must lie in [1, n={n}], got {n_eff}")
    one = torch.tensor([n_eff], dtype=torch.float64)
    return float(tight_mass_bounds(torch.tensor([keep]), n, one)[0])


def tight_mass_bounds(keep_g: Tensor, n: int | Tensor, n_eff_g: Tensor) -> Tensor:
    """Return `tight_mass_bound` for each of G groups of n scores, shape (G,), float64; 1 where all are kept.

    The scores with one N_eff that leave the least mass to the highest `keep` lie on an edge between two flat ones, of
    which the first j and the first k are equal and the rest 0; only three edges (j, k) can be the lowest.

    Args:
        keep_g: Shape (G,), int64, each in [1, n].
        n: Number of scores in each group; or of each, shape (G,), int64.
        n_eff_g: Shape (G,), float64, each in [1, n].
    """
    keep = keep_g.double()
    everything = torch.as_tensor(n, dtype=torch.float64).expand_as(n_eff_g)
    n_eff = (n_eff_g.double() * (1 + FLOOR_SLACK)).clamp(min=1.0).minimum(everything)
    above, below = n_eff.ceil(), n_eff.floor()
    impossible = torch.full_like(n_eff, torch.inf)
    edges = (
        _edge(torch.ones_like(n_eff), everything, keep, n_eff),
        torch.where(keep < above, _edge(torch.ones_like(n_eff), above, keep, n_eff), impossible),
        torch.where(keep < below, _edge(below, above, keep, n_eff), impossible),
    )
    return torch.stack(edges).amin(0).masked_fill(keep_g >= n, 1.0)


def _edge(j: Tensor, k: Tensor, keep: Tensor, n_eff: Tensor) -> Tensor:
    """Return the mass of the `keep` highest where u of the mass is equal on j scores, the rest of it on k, j <= k.

    sum w^2 = 1/k + u^2 (1/j - 1/k) gives u for the wanted N_eff.
    """
    width = 1 / j - 1 / k
    u = torch.where(width > 0, ((1 / n_eff - 1 / k) / width).clamp(0.0, 1.0).sqrt(), 1.0)
    return u * (keep / j).clamp(max=1.0) + (1 - u) * (keep / k).clamp(max=1.0)


def curvature_bound(trace: float, distance_sq: float) -> float:
    """Return Tr(H) ||d||^2 / 2, the most that a quadratic loss with H >= 0 can rise from its minimum over a step d.

    Args:
        trace: Tr(H), in units of the loss per squared weight.
        distance_sq: ||d||_2^2, in squared weights.
    """
    return trace * distance_sq / 2


def distance_loss_bound(trace: float, distance_sq: float, keep: int, n: int) -> float:
    """Return (1 - rho) / (2 n rho) * Tr(H) ||d||^2: Zhang et al.'s lemma solved for the change of the loss.

    The lemma says down to which density a sublevel set of a quadratic loss, H >= 0, still holds *some* sparse weights,
    for a random subspace. It says so with high probability, not always, and of the best weights, not of those that one
    mask leaves: measured losses may lie above. It is `curvature_bound` times (1 - rho) / (n rho).

    Args:
        trace: Tr(H) over the scored weights, in units of the loss per squared weight.
        distance_sq: ||theta - theta_masked||_2^2.
        keep: Kept weights nu, in [1, n].
        n: Scored weights.

    Source: Zhang et al. (2023), arXiv:2306.05857, lemma 3.1; arXiv:2509.25606, section 4.
    """
    rho = keep / n
    return (1 - rho) / (2 * n * rho) * trace * distance_sq


def asymptotic_loss_bound(trace: float, l1_norm: float, keep: int, n: int) -> float:
    """Return ||theta||_1^2 Tr(H) (1 - rho)^4 / (2 rho) * (1 - sqrt((1 - rho) / (n rho)))^2, for n to infinity.

    The paper puts ||d||_2^2 <= ||theta||_1^2 (1 - s_eff)^2 (n - nu) and its mass bound into `distance_loss_bound`. The
    factor n - nu is not needed (||d||_2 <= ||d||_1), which makes this n - nu times as large as it could be.

    Args:
        trace: Tr(H) over the scored weights.
        l1_norm: ||theta||_1 of the scored weights.
        keep: Kept weights nu, in [1, n].
        n: Scored weights.

    Source: arXiv:2509.25606, equation 5.
    """
    return trace * l1_norm**2 * _asymptotic_factor(keep, n)


def inverse_trace_loss_bound(trace: float, l1_norm: float, keep: int, n: int) -> float:
    """Return `asymptotic_loss_bound` with Tr(H) in the denominator, as a summary of the paper prints it.

    The derivation puts Tr(H) in the numerator: this form falls as the loss gets sharper. It is here to be measured.

    Raises:
        ValueError: Tr(H) is 0.
    """
    if trace == 0:
        raise ValueError("Tr(H) = 0 cannot stand in a denominator; is the loss a function of the scored weights?")
    return l1_norm**2 / trace * _asymptotic_factor(keep, n)


def _asymptotic_factor(keep: int, n: int) -> float:
    rho = keep / n
    return (1 - rho) ** 4 / (2 * rho) * (1 - math.sqrt((1 - rho) / (n * rho))) ** 2


def norm_loss_bound(trace: float, l1_norm: float, keep: int, n: int, n_eff: float) -> float:
    """Return `distance_loss_bound` with ||d||^2 replaced by the most that N_eff and ||theta||_1 allow.

    A pruned w_i is at most the mean of the kept ones, s_eff / nu, and together they are 1 - s_eff, so
    ||d||_2^2 <= ||theta||_1^2 (1 - s_eff) min(s_eff / nu, 1 - s_eff), with s_eff >= `tight_mass_bound`. What the
    paper's equation 5 gives without its needless factor, and for every n.

    Args:
        trace: Tr(H) over the scored weights.
        l1_norm: ||theta||_1 of the scored weights.
        keep: Kept weights nu, in [1, n].
        n: Scored weights.
        n_eff: Effective number of |theta|.
    """
    return distance_loss_bound(trace, l1_norm**2 * pruned_square_bound(keep, n, n_eff), keep, n)


def pruned_square_bound(keep: int, n: int, n_eff: float) -> float:
    """Return an upper bound on the sum of w_i^2 over the pruned scores, a fraction of (sum |s|)^2."""
    least = tight_mass_bound(keep, n, n_eff)
    # s (1 - s) / nu falls beyond s = 1/2, and 1 - s always.
    spread = max(least, 0.5)
    return min(spread * (1 - spread) / keep, (1 - least) ** 2)
