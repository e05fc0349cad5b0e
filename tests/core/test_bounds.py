import math

import pytest
import torch

from emp_callbacks import effective_number, emp_mask, mass_bound, preserved_mass


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
