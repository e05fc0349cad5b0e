import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from emp_callbacks import effective_number, emp_mask, mass_bound, preserved_mass, tight_mass_bound
from emp_callbacks.core import bounds
from emp_callbacks.core.bounds import tight_mass_bounds


def test_known_values():
    assert mass_bound(2, 4) == pytest.approx(0.5 + 0.5 * math.sqrt(1 / 9))
    assert mass_bound(9, 10) == pytest.approx(0.9)


@pytest.mark.parametrize(("nu", "n"), [(1, 10), (0, 10), (10, 10), (11, 10), (2, 2)])
def test_refused_where_it_does_not_hold(nu, n):
    with pytest.raises(ValueError, match="2 <= nu <= n - 1"):
        mass_bound(nu, n)


def test_never_above_the_preserved_mass_and_nearly_reached():
    generator = torch.Generator().manual_seed(0)
    slack = []
    for _ in range(3000):
        n = int(torch.randint(3, 40, (1,), generator=generator))
        power = 4 * torch.rand(1, generator=generator, dtype=torch.float64)
        scores = torch.rand(n, generator=generator, dtype=torch.float64) ** power
        mask = emp_mask(scores)
        nu = int(mask.sum())
        if 2 <= nu <= n - 1:
            slack.append(preserved_mass(scores, mask) - mass_bound(nu, n))
    assert len(slack) > 2000
    assert min(slack) >= -1e-12


def test_is_tight():
    # One score above n - 1 equal ones, with N_eff = nu exactly: the equality case of the bound.
    n, nu = 20, 7
    spread = math.sqrt((n - nu) / nu / (n - 1))
    scores = torch.full((n,), (1 - spread) / n, dtype=torch.float64)
    scores[0] = 1 - (n - 1) * scores[1]
    assert effective_number(scores) == pytest.approx(nu)
    # At floor(N_eff) = nu exactly the preserved mass exceeds the bound by what one more unit of N_eff would cost.
    assert 0 <= preserved_mass(scores, emp_mask(scores)) - mass_bound(nu, n) < 0.05


# ---- the bound that knows N_eff -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "n", "n_eff"), [(0, 5, 2.0), (6, 5, 2.0), (2, 5, 0.5), (2, 5, 5.1)])
def test_the_tight_bound_refuses_what_cannot_be(keep, n, n_eff):
    with pytest.raises(ValueError, match="must lie in"):
        tight_mass_bound(keep, n, n_eff)


def test_known_values_of_the_tight_bound():
    assert tight_mass_bound(3, 3, 2.0) == 1.0
    assert tight_mass_bound(2, 5, 5.0) == pytest.approx(0.4, abs=1e-5)  # N_eff = n: all are equal
    assert tight_mass_bound(2, 7, 1.0) == pytest.approx(1.0, abs=1e-5)  # one score holds everything
    # One kept of N_eff in [1, 2): down to 1/2, two equal scores, which is why the paper's form fails for nu = 1.
    assert tight_mass_bound(1, 100, 2 - 1e-9) == pytest.approx(0.5, abs=1e-4)
    # N_eff = 4 of 4 equal ones among 9, beta = 1/2: half of their mass, unless one above eight equal ones keeps less.
    assert tight_mass_bound(2, 9, 4.0) == pytest.approx(min(2 / 4, 2 / 9 + 7 / 9 * math.sqrt(5 / (4 * 8))), abs=1e-5)


@pytest.mark.parametrize("n", [3, 4, 7, 30, 1000])
def test_the_papers_bound_is_its_limit(n):
    for nu in range(2, min(n - 1, 12) + 1):
        assert tight_mass_bound(nu, n, nu + 1 - 1e-9) == pytest.approx(mass_bound(nu, n), abs=1e-4)
        for n_eff in np.linspace(nu, nu + 0.999, 7):
            assert tight_mass_bound(nu, n, n_eff) >= mass_bound(nu, n) - 1e-9


ordered = st.integers(2, 14).flatmap(lambda n: st.lists(st.floats(0, 1), min_size=n, max_size=n))


@given(ordered, st.floats(0.05, 3.0), st.sampled_from([0.0, 1.0, 4.0, 12.0]))
def test_no_scores_and_no_beta_fall_below_it(values, beta, power):
    scores = torch.tensor(values, dtype=torch.float64) ** power
    if not bool((scores > 1e-100).any()):
        return
    mask = emp_mask(scores, beta)
    bound = tight_mass_bound(int(mask.sum()), len(scores), effective_number(scores))
    assert preserved_mass(scores, mask) >= bound - 1e-12


def flat_mixture(n, j, k, u):
    """The first j and the first k scores equal, u of the mass on the j."""
    scores = np.zeros(n)
    scores[:k] += (1 - u) / k
    scores[:j] += u / j
    return scores


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_it_is_reached_by_a_mixture_of_two_flat_vectors(n):
    """Brute force over all edges (j, k) that the proof reduces the problem to."""
    for keep in range(1, n):
        for n_eff in np.linspace(1, n, 23)[1:-1]:
            lowest = math.inf
            for j in range(1, int(n_eff) + 1):
                for k in range(math.ceil(n_eff), n + 1):
                    u = math.sqrt((1 / n_eff - 1 / k) / (1 / j - 1 / k)) if j < k else 1.0
                    scores = flat_mixture(n, j, k, u)
                    assert effective_number(torch.from_numpy(scores)) == pytest.approx(n_eff)
                    lowest = min(lowest, float(np.sort(scores)[::-1][:keep].sum()))
            assert tight_mass_bound(keep, n, float(n_eff)) == pytest.approx(lowest, abs=1e-5)


@pytest.mark.parametrize(("keep", "n", "n_eff"), [(3, 8, 3.4), (2, 8, 5.5), (5, 8, 3.4), (1, 6, 1.7), (4, 6, 4.0)])
def test_an_optimiser_does_not_get_below_it_and_gets_there(keep, n, n_eff):
    """Adversarial scores: minimise the kept mass over all scores with this N_eff, from many starts."""
    generator = np.random.default_rng(0)
    constraints = [
        {"type": "eq", "fun": lambda w: w.sum() - 1},
        {"type": "eq", "fun": lambda w: (w**2).sum() - 1 / n_eff},
        {"type": "ineq", "fun": lambda w: w[:-1] - w[1:]},  # highest first
    ]
    lowest = math.inf
    for _ in range(16):
        start = np.sort(generator.dirichlet(np.full(n, 10.0 ** generator.uniform(-1, 1))))[::-1]
        found = minimize(lambda w: w[:keep].sum(), start, bounds=[(0, 1)] * n, constraints=constraints, method="SLSQP")
        if found.success:
            assert found.fun >= tight_mass_bound(keep, n, n_eff) - 1e-6
            lowest = min(lowest, found.fun)
    assert lowest == pytest.approx(tight_mass_bound(keep, n, n_eff), abs=1e-3)


def test_gradient_ascent_on_real_scores_does_not_break_it():
    """A thousand scores pushed towards less kept mass at beta = 0.5 and 1.5: the bound follows them."""
    for beta in (0.5, 1.0, 1.5):
        torch.manual_seed(0)
        logits = torch.randn(1000, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        gaps = []
        for _ in range(150):
            scores = logits.exp()
            mask = emp_mask(scores.detach(), beta)
            share = scores[mask].sum() / scores.sum()
            bound = tight_mass_bound(int(mask.sum()), 1000, effective_number(scores.detach()))
            gaps.append(float(share.detach()) - bound)
            optimizer.zero_grad()
            (share - bound).backward()
            optimizer.step()
        assert min(gaps) >= -1e-12
        assert gaps[-1] < gaps[0]


def test_rows_are_bounded_as_each_by_itself():
    keep, n_eff = torch.tensor([1, 2, 3, 5, 2]), torch.tensor([1.5, 2.5, 3.0, 4.5, 4.9], dtype=torch.float64)
    each = [tight_mass_bound(int(k), 5, float(m)) for k, m in zip(keep, n_eff, strict=True)]
    assert tight_mass_bounds(keep, 5, n_eff).tolist() == pytest.approx(each)


# ---- what theory says of the loss -----------------------------------------------------------------------------------


def test_loss_bounds_by_hand():
    # rho = 1/2, n = 4: (1 - rho) / (2 n rho) = 1/8.
    assert bounds.distance_loss_bound(3.0, 2.0, keep=2, n=4) == pytest.approx(3 * 2 / 8)
    assert bounds.curvature_bound(3.0, 2.0) == 3.0
    factor = 0.5**4 / 1 * (1 - math.sqrt(0.5 / 2)) ** 2
    assert bounds.asymptotic_loss_bound(3.0, 5.0, keep=2, n=4) == pytest.approx(75 * factor)
    assert bounds.inverse_trace_loss_bound(3.0, 5.0, keep=2, n=4) == pytest.approx(25 / 3 * factor)
    with pytest.raises(ValueError, match="denominator"):
        bounds.inverse_trace_loss_bound(0.0, 5.0, keep=2, n=4)


def test_the_lemma_is_jensens_inequality_for_the_spectrum():
    """1 - rho = mean of 2 eps / (2 eps + lambda d^2): the eps that solves it is at most what the trace alone gives."""
    generator = np.random.default_rng(0)
    n, keep, distance_sq = 50, 20, 1.7
    for _ in range(30):
        spectrum = generator.gamma(0.3, size=n)
        low, high = 0.0, 1e6
        for _ in range(200):
            eps = (low + high) / 2
            free = np.mean(2 * eps / (2 * eps + spectrum * distance_sq))
            low, high = (eps, high) if free < 1 - keep / n else (low, eps)
        assert eps <= bounds.distance_loss_bound(spectrum.sum(), distance_sq, keep, n) * (1 + 1e-9)
    flat = np.full(n, 0.4)
    eps = bounds.distance_loss_bound(flat.sum(), distance_sq, keep, n)
    assert 2 * eps / (2 * eps + 0.4 * distance_sq) == pytest.approx(1 - keep / n)


@given(ordered, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_norm_form_is_above_the_distance_form(values, beta):
    weights = torch.tensor(values, dtype=torch.float64) ** 3
    if not bool((weights > 1e-90).any()):
        return
    mask = emp_mask(weights, beta)
    keep, n, l1 = int(mask.sum()), len(weights), float(weights.sum())
    distance_sq = float(weights[~mask].square().sum())
    near = bounds.distance_loss_bound(1.0, distance_sq, keep, n)
    assert near <= bounds.norm_loss_bound(1.0, l1, keep, n, effective_number(weights)) * (1 + 1e-9) + 1e-300
    assert bounds.pruned_square_bound(keep, n, effective_number(weights)) * l1**2 >= distance_sq * (1 - 1e-9)
