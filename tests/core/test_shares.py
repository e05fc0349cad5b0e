import pytest

from emp_callbacks.core.shares import erk_factor, layer_densities


def test_erdos_renyi_kernel_of_a_convolution():
    assert erk_factor((64, 32, 3, 3)) == (64 + 32 + 3 + 3) / (64 * 32 * 9)


@pytest.mark.parametrize("density", [1.0, 0.7, 0.3, 0.05])
def test_all_layers_together_keep_the_density_and_none_is_above_one(density):
    shapes = [(10, 4), (100, 100), (64, 32, 3, 3), (1, 3)]
    sizes = [40, 10_000, 18_432, 3]
    factors = [erk_factor(shape) for shape in shapes]
    found = layer_densities(sizes, factors, density)
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    assert max(found) <= 1.0
    below = [d / f for d, f in zip(found, factors, strict=True) if d < 1.0]
    assert below == pytest.approx(below[:1] * len(below)), "in proportion to the factors"
    assert all(d == 1.0 or d / f == pytest.approx(below[0]) for d, f in zip(found, factors, strict=True))


def test_what_dense_layers_cannot_hold_goes_to_the_others_until_all_are_dense():
    assert layer_densities([10, 10, 80], [1.0, 0.5, 0.0], 0.15) == [1.0, 0.5, 0.0]
    assert layer_densities([10, 10, 80], [1.0, 0.5, 0.0], 0.5) == [1.0, 1.0, 0.0]
