"""The statistics of `emp gates`, by hand."""

import math

import pytest
import torch
from scipy import stats

from emp_callbacks.study.gates.comparisons import Arms, adapts_at, bends, best_learned, planned, verdict
from emp_callbacks.study.gates.findings import page
from emp_callbacks.study.gates.token_counts import highest, partial_spearman, spread_evenly
from emp_callbacks.study.report.statistics import paired_difference

SEEDS = (0, 1, 2, 3)
NOISE = (0.001, -0.002, 0.002, -0.001)


def arm(seed, name, keep, loss, val=None, draw=0):
    return {
        "kind": "arm", "seed": seed, "arm": name, "keep": keep, "draw": draw, "test_loss": loss,
        "val_loss": loss if val is None else val, "kept": list(range(keep)), "curve": [[100, loss + 1], [300, loss]],
        "gated_steps": 200, "expected": float(keep), "spearman": 0.5, "seconds": 1.0,
    }  # fmt: skip


def results(**losses):
    """Return results of 16 heads, of which EMP keeps 10; `losses` are those of arms, above 2 nats."""
    rows = []
    for seed, noise in zip(SEEDS, NOISE, strict=True):
        rows.append({"kind": "model", "seed": seed, "n": 16, "keep": 10})
        rows.append(arm(seed, "Z", 16, 1.9))
        for at, (name, above) in enumerate(losses.items()):
            test, val = above if isinstance(above, tuple) else (above, above)
            rows.append(arm(seed, name.replace("_", "'"), 10, 2 + test + (at + 1) * noise, 2 + val))
        for keep, loss in ((2, 3.0), (4, 2.5), (8, 2.1), (12, 1.95)):
            rows.append(arm(seed, "F", keep, loss + noise))
        for variant, loss in (("B1", 2.2), ("B2", 2.25), ("B3", 2.21), ("B4", 2.4), ("B4'", 2.3), ("B5", 3.0)):
            for beta in (0.5, 0.75, 1.0):
                own = loss + (0.02 if beta == 1.0 and variant == "B3" else 0.0) + noise * (variant != "B1")
                rows.append({
                    "kind": "by_token", "seed": seed, "beta": beta, "variant": variant, "test_loss": own,
                    "heads": 4 * beta, "dense_loss": 1.9, "spearman": 0.1, "partial_spearman": 0.1, "seconds": 1.0,
                })  # fmt: skip
    model = {"arm": "toy", "seconds": 60.0}
    settings = {"margin": 0.005, "steps": 300, "gated_steps": 200, "lr_share": 1 / 3}
    return {"models": [model], "rows": rows, "settings": settings}


def test_planned_comparisons_are_paired_t_tests_with_holm():
    arms = Arms(results(B=0.0, D=0.03, E=0.0, E_=0.04, F=(0.02, 0.06), G=(0.05, 0.05)))
    found = {test.name: test for test in planned(arms, 0.005)}
    # In order B, D, E, E', F: the n-th arm has n times the noise, so that E - D is once the noise above -0.03.
    differences = [-0.03 + noise for noise in NOISE]
    p1 = stats.ttest_1samp(differences, 0.0).pvalue
    assert found["P1"].difference.mean == pytest.approx(-0.03)
    assert found["P1"].difference.p_value == pytest.approx(p1)
    # E has the lowest validation loss and twice B's noise besides.
    assert found["P2"].says.startswith("E - B")
    p2 = stats.ttest_1samp([2 * noise for noise in NOISE], 0.0).pvalue
    assert found["P2"].difference.p_value == pytest.approx(p2)
    ordered = sorted(test.difference.p_value for test in found.values())
    adjusted = [3 * ordered[0], max(3 * ordered[0], 2 * ordered[1]), max(2 * ordered[1], ordered[2])]
    assert sorted(test.difference.p_holm for test in found.values()) == pytest.approx(adjusted)
    assert (found["P1"].verdict, found["P2"].verdict) == ("better", "not decided")


def test_the_best_gates_are_chosen_on_validation_text_whatever_the_test_says():
    arms = Arms(results(B=0.0, D=(0.5, 0.01), E=(0.0, 0.02), F=(-1.0, 0.03), G=(-2.0, 0.04), E_=(-3.0, 0.0)))
    assert best_learned(arms, "K1") == "D"


def test_the_knee_is_the_difference_of_two_slopes_of_counts_an_eighth_away():
    arms = Arms(results(B=0.0, D=0.0, E=0.0, E_=0.0, F=0.0, G=0.0))
    curve = arms.curve(0)
    assert sorted(curve) == [2, 4, 8, 10, 12, 16]
    k1, below, above = curve[10], curve[8], curve[12]
    by_hand = ((below - k1) / 2 - (k1 - above) / 2) * 2
    assert bends(curve, 16)[10] == pytest.approx(by_hand)
    mean = sum(bends(arms.curve(seed), 16)[10] for seed in SEEDS) / 4
    assert planned(arms, 0.005)[2].difference.mean == pytest.approx(-mean)


def test_a_neighbour_that_is_too_near_makes_no_slope():
    # 17 is one head above 16: below it the slope is that down to 8.
    assert bends({8: 3.0, 16: 9.0, 17: 2.1, 24: 1.4}, 32)[17] == pytest.approx(((3.0 - 2.1) / 9 - 0.7 / 7) * 4)


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([-0.05, -0.06, -0.05, -0.06], "better"),
        ([0.05, 0.06, 0.05, 0.06], "worse"),
        ([0.001, -0.001, 0.002, -0.002], "no benefit"),
        ([0.01, -0.01, 0.02, -0.02], "not decided"),
        ([0.004, -0.004, 0.003, -0.003], "not decided"),  # the mean is 0, and the interval ends beyond 0.005
        ([0.01], "not decided"),
    ],
)
def test_verdicts(differences, says):
    found = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert verdict(found, 0.005) == says


def test_nothing_measured_is_said():
    assert verdict(None, 0.005) == "not measured"


def test_a_count_by_token_is_useful_only_beyond_the_margin_of_both_controls():
    arms = Arms(results(B=0.0))
    # B3 is 0.01 above B1, and its interval ends 0.0029 nearer: beyond 0.005, not beyond 0.008.
    assert adapts_at(arms, 0.005) == [0.5, 0.75, 1.0]
    assert adapts_at(arms, 0.008) == [1.0]
    assert adapts_at(arms, 0.03) == []


def test_the_page_says_what_the_planned_tests_say():
    told = page(results(B=0.0, D=0.03, E=0.0, E_=0.04, F=(0.02, 0.06), G=(0.05, 0.05)))
    assert "EMP is an initialisation of gates" in told.headline
    assert "learned gates beside EMP's heads: not decided" in told.headline
    told = page(results(B=0.0, D=0.03, E=0.0, E_=0.0, F=(0.02, 0.06), G=(0.05, 0.05)))
    assert "EMP is not shown to be an initialisation of gates" in told.headline


def test_the_highest_heads_of_each_token_are_kept():
    scores = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]])
    assert highest(scores, torch.tensor([2, 1])).tolist() == [[False, True, True], [True, False, False]]


def test_counts_spread_evenly_have_the_sum_and_differ_by_one():
    counts = spread_evenly(1003, 100, torch.Generator().manual_seed(0))
    assert counts.sum() == 1003
    assert set(counts.tolist()) == {10, 11}


def test_partial_correlation_is_that_of_what_the_ranks_leave_of_each_other():
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(200, generator=generator)
    one, other = (given + 0.5 * torch.rand(200, generator=generator) for _ in range(2))
    ranks = [torch.from_numpy(stats.rankdata(values)) for values in (one, other, given)]
    left = [values - stats.linregress(ranks[2], values).slope * ranks[2] for values in ranks[:2]]
    assert partial_spearman(one, other, given) == pytest.approx(stats.pearsonr(*left).statistic)
    assert abs(partial_spearman(one, other, given)) < 0.2 < stats.spearmanr(one, other).statistic
    assert math.isnan(partial_spearman(one, given, given))
