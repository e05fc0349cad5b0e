import math

import pytest
import torch

from emp_callbacks import EffectiveNumber, effective_number


def test_batches_add_up():
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    metric = EffectiveNumber()
    for batch in scores.split(30):
        metric.update(batch)
    assert float(metric.compute()) == pytest.approx(effective_number(scores), rel=1e-14)
    metric.reset()
    metric.update(torch.zeros(3))
    assert float(metric.compute()) == 0.0


def test_states_of_two_ranks_add_up():
    one, two, both = EffectiveNumber(), EffectiveNumber(), EffectiveNumber()
    one.update(torch.tensor([1.0, 2.0]))
    two.update(torch.tensor([3.0]))
    both.update(torch.tensor([1.0, 2.0, 3.0]))
    one._reduce_states({"moments": two.moments})
    assert float(one.compute()) == float(both.compute())
    assert one._reductions["moments"].__name__ == "dim_zero_sum"


def test_half_precision_and_shapes():
    metric = EffectiveNumber()
    metric.update(torch.full((50, 40), 300.0, dtype=torch.float16))
    assert float(metric.compute()) == pytest.approx(2000)


def test_bad_scores_leave_the_sums_alone():
    metric = EffectiveNumber()
    metric.update(torch.ones(4))
    with pytest.raises(FloatingPointError, match="1 of 2 scores are NaN or Inf"):
        metric.update(torch.tensor([math.nan, 1.0]))
    with pytest.raises(TypeError, match="scores must be float16"):
        metric.update(torch.tensor([1, 2]))
    assert float(metric.compute()) == 4.0
