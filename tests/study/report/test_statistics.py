import copy
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from emp_callbacks.study.report.arm_results import missing_runs, summarise
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.report.fairness import fairness_checks
from emp_callbacks.study.report.statistics import (
    Equivalence,
    PairedDifference,
    equivalence,
    holm,
    mean_interval,
    metric_range,
    paired_difference,
    verdict,
)

ACCURACY = {
    "dense": [0.98, 0.97, 0.99],
    "one_shot": [0.96, 0.95, 0.965],
    "training_feedback": [0.97, 0.965, 0.98],
    "fixed_magnitude": [0.96, 0.96, 0.96],
    "random": [0.70, 0.69, 0.705],
}
# The t quantile has a closed form with 2 degrees of freedom: 4.3027 for a 95 % interval.
T_975_2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))
DENSITY = {"dense": 1.0, "one_shot": 0.60}


def make_results(accuracy=ACCURACY, metric="test/accuracy", higher_is_better=True):
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "metrics": {metric: value, "test/loss": 0.1},
            "density": DENSITY.get(arm, 0.61),
            "steps": 40,
            "seconds": 2.0 + seed,
            "init_digest": f"init{seed}",
            "batches_digest": f"batches{seed}",
        }
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    study = {"metric": metric, "higher_is_better": higher_is_better, "reference": "one_shot"}
    return {"schema": 1, "study": {**study, "arms": list(accuracy), "seeds": [0, 1, 2]}, "runs": runs}


# Validation accuracy at the steps 10, 20 and 40, of two seeds.
CURVES = {
    "dense": [(0.2, 0.4, 0.8), (0.4, 0.6, 1.0)],
    "one_shot": [(0.2, 0.4, 0.8), (0.4, 0.6, 1.0)],
    "training_feedback": [(0.4, 0.6, 0.9), (0.5, 0.9, 0.95)],
    "training_freeze": [(0.0, 0.2, 0.4), (0.1, 0.3, 0.6)],
}


def with_curves(curves=CURVES, metric="accuracy", higher_is_better=True):
    results = make_results(
        {arm: [0.9] * len(seeds) for arm, seeds in curves.items()}, f"test/{metric}", higher_is_better
    )
    for run in results["runs"]:
        values = curves[run["arm"]][run["seed"]]
        run["curve"] = [{"step": s, f"val/{metric}": v} for s, v in zip((10, 20, 40), values, strict=True)]
    return results


def without(results, *keys):
    kept = [run for run in results["runs"] if (run["arm"], run["seed"]) not in keys]
    return {**results, "runs": kept}


def row_of(results, arm):
    return next(row for row in summarise(results) if row.arm == arm)


def test_mean_interval_by_hand():
    # Mean 2, standard deviation 1, standard error 1 / sqrt(3).
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.n == 3
    # scipy 1.11 has 10 digits of the quantile
    assert interval.high - 2.0 == pytest.approx(T_975_2 / math.sqrt(3), rel=1e-9)
    assert 2.0 - interval.low == pytest.approx(interval.high - 2.0, rel=1e-12)


def test_mean_interval_of_another_confidence():
    # t(0.95, 1) = 6.313751..., standard error of [0, 2] = 1
    assert mean_interval([0.0, 2.0], confidence=0.9).high == pytest.approx(1.0 + 6.313751514675043)


@pytest.mark.parametrize("values", [[0.5], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_without_spread_or_with_values_that_are_not_finite(values):
    interval = mean_interval(values)
    assert (interval.low, interval.high, interval.n) == (None, None, len(values))


@pytest.mark.parametrize(("values", "confidence", "words"), [([], 0.95, "at least one"), ([1.0, 2.0], 95, "got 95")])
def test_mean_interval_refuses(values, confidence, words):
    with pytest.raises(ValueError, match=words):
        mean_interval(values, confidence)


def test_paired_difference_by_hand_and_against_scipy():
    values, reference = {0: 0.97, 1: 0.965, 2: 0.98}, {0: 0.96, 1: 0.95, 2: 0.965}
    found = paired_difference(values, reference)
    d = np.array([0.01, 0.015, 0.015])
    error = d.std(ddof=1) / math.sqrt(3)
    t = d.mean() / error
    assert found.mean == pytest.approx(d.mean())
    assert found.low == pytest.approx(d.mean() - T_975_2 * error)
    # With 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2).
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    twin = stats.ttest_rel(list(values.values()), list(reference.values()))
    assert found.p_value == pytest.approx(twin.pvalue, rel=1e-9)


def test_pairs_go_by_seed_and_not_by_order():
    ordered = paired_difference({0: 1.0, 1: 5.0, 2: 9.5}, {0: 0.0, 1: 4.5, 2: 8.0})
    assert paired_difference({2: 9.5, 0: 1.0, 1: 5.0}, {1: 4.5, 2: 8.0, 0: 0.0}) == ordered
    assert ordered.mean == pytest.approx(1.0)


def test_only_common_seeds_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 99.0}, {0: 0.5, 1: 1.0, 3: -99.0})
    assert (found.n, found.mean) == (2, 0.75)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


ONE_IMAGE_OF_360 = (
    # What a logged float32 accuracy gives where one test image of 360 more is right, in each of three seeds.
    {0: 0.9694444537162781, 1: 0.9722222089767456, 2: 0.980555534362793},
    {0: 0.9722222089767456, 1: 0.9750000238418579, 2: 0.9833333492279053},
    -1 / 360,
)


@pytest.mark.parametrize(
    ("values", "reference", "mean"),
    [
        ({0: 0.3, 1: 0.2, 2: 0.5}, {0: 0.2, 1: 0.1, 2: 0.4}, 0.1),
        ({0: 0.2, 1: 0.1, 2: 0.4}, {0: 0.2, 1: 0.1, 2: 0.4}, 0.0),
        ONE_IMAGE_OF_360,
        (*({seed: 100 * v for seed, v in side.items()} for side in ONE_IMAGE_OF_360[:2]), -100 / 360),
    ],
)
def test_equal_differences_have_neither_interval_nor_p_value_and_give_no_warning(values, reference, mean):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(values, reference)
    assert (found.low, found.high, found.p_value, found.n) == (None, None, None, 3)
    assert found.mean == pytest.approx(mean, rel=1e-4)
    assert verdict(found, higher_is_better=True) == "undecided"


def test_a_difference_of_one_step_in_one_seed_is_variance():
    values, reference, _ = ONE_IMAGE_OF_360
    found = paired_difference({**values, 2: values[2] - 1 / 360}, reference)
    assert found.p_value == pytest.approx(0.0572, abs=1e-4)  # -1, -1, -2 steps: t = -4
    assert found.low < found.mean < found.high


def test_small_metrics_that_differ_are_not_rounding():
    losses, reference = {0: 0.0011, 1: 0.0012, 2: 0.0013}, {0: 0.0010, 1: 0.0012, 2: 0.0011}
    assert paired_difference(losses, reference).p_value is not None


@pytest.mark.parametrize("reference", [1.0, math.inf, math.nan])
def test_a_diverged_run_is_not_dropped_silently(reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference({0: math.inf, 1: 1.0}, {0: reference, 1: 1.0})
    assert math.isnan(found.mean)
    assert found.p_value is None
    assert found.n == 2


def test_the_standard_deviation_is_that_of_a_sample():
    assert mean_interval([1.0, 2.0, 3.0]).sd == 1.0
    assert mean_interval([1.0]).sd is None
    assert paired_difference({0: 1.0, 1: 3.0}, {0: 1.0, 1: 1.0}).sd == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("test/accuracy", [0.0, 1.0, math.nan], (0.0, 1.0)),
        ("test/accuracy", [97.0], (-math.inf, math.inf)),  # in percent
        ("test/perplexity", [1.0, 1e4], (1.0, math.inf)),
        ("val/loss", [0.0, math.inf], (0.0, math.inf)),
        ("val/loss", [-0.5], (-math.inf, math.inf)),  # a likelihood
        ("test/score", [0.5], (-math.inf, math.inf)),
    ],
)
def test_range_of_a_metric(metric, values, expected):
    assert metric_range(metric, values) == expected


def test_intervals_end_where_the_metric_does():
    free = mean_interval([0.9, 1.0])
    assert free.high > 1
    cut = mean_interval([0.9, 1.0], within=(0.0, 1.0))
    assert (cut.mean, cut.low, cut.high, cut.sd) == (free.mean, free.low, 1.0, free.sd)
    assert mean_interval([0.0, 0.1], within=(0.0, 1.0)).low == 0.0
    difference = paired_difference({0: 0.1, 1: 0.9}, {0: 0.5, 1: 0.5}, within=(0.0, 1.0))
    assert (difference.low, difference.high) == (-1.0, 1.0)
    results = make_results({"dense": [0.9, 1.0, 0.9], "one_shot": [0.5, 0.6, 0.55]})
    assert row_of(results, "dense").metric.high == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.4, -0.4, 2.0])
def test_equivalence_is_two_one_sided_t_tests(shift):
    values = [0.1 + shift, -0.2 + shift, 0.15 + shift, 0.05 + shift]
    found = equivalence(paired_difference(dict(enumerate(values)), dict.fromkeys(range(4), 0.0)), margin=0.5)
    low = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    high = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(low, high))
    assert found.shown is (shift == 0.0)


def test_nothing_is_equivalent_without_a_test():
    assert equivalence(paired_difference({0: 0.5}, {0: 0.5}), 0.1) is None
    assert equivalence(paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}), 0.1) is None
    assert equivalence(paired_difference({0: math.nan, 1: 0.6}, {0: 0.5, 1: 0.6}), 0.1) is None


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_a_margin_is_a_positive_number(margin):
    with pytest.raises(ValueError, match="must be a positive number"):
        equivalence(paired_difference({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.6}), margin)


@pytest.mark.parametrize(
    ("p", "tost", "expected"),
    [
        (0.01, Equivalence(1.0, 0.001), "better"),
        (0.5, Equivalence(1.0, 0.001), "equivalent"),
        (0.5, Equivalence(1.0, 0.001, p_holm=0.06), "no difference shown"),
        (0.5, Equivalence(1.0, 0.06), "no difference shown"),
        (0.5, None, "no difference shown"),
        (None, Equivalence(1.0, 0.001), "undecided"),
    ],
)
def test_a_shown_difference_comes_before_equivalence(p, tost, expected):
    assert verdict(PairedDifference(0.1, 0.0, 0.2, 3, p, p), True, tost) == expected


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.4 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.4; the third is lifted to the second.
    assert holm([0.03, 0.4, 0.01, None, 0.02]) == pytest.approx([0.06, 0.4, 0.04, None, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


@pytest.mark.parametrize(
    ("mean", "higher", "expected"),
    [(0.1, True, "better"), (-0.1, True, "worse"), (0.1, False, "worse"), (-0.1, False, "better")],
)
def test_verdict_knows_the_direction(mean, higher, expected):
    assert verdict(PairedDifference(mean, 0.0, 0.0, 3, 0.001, 0.004), higher) == expected


def test_the_verdict_rests_on_the_adjusted_p():
    difference = PairedDifference(0.1, 0.01, 0.19, 3, p_value=0.02, p_holm=0.08)
    assert verdict(difference, higher_is_better=True) == "no difference shown"


def test_summary_of_a_full_study():
    rows = summarise(make_results())
    assert [row.arm for row in rows] == list(ACCURACY)
    feedback = rows[2]
    assert feedback.metric == mean_interval(ACCURACY["training_feedback"])
    assert feedback.density.mean == pytest.approx(0.61)
    assert (feedback.seeds, feedback.seconds) == ((0, 1, 2), 3.0)
    assert rows[1].difference is None
    assert rows[1].verdict is None
    raw = [row.difference.p_value for row in rows if row.difference]
    assert [row.difference.p_holm for row in rows if row.difference] == pytest.approx(holm(raw))


def test_lower_is_better_turns_better_and_worse():
    assert row_of(make_results(), "random").difference.mean < 0
    perplexity = {
        "one_shot": [20.0, 21.0, 22.0],
        "training_feedback": [10.0, 11.1, 12.0],
        "random": [40.0, 41.1, 42.0],
    }
    results = make_results(perplexity, "test/perplexity", higher_is_better=False)
    assert row_of(results, "training_feedback").verdict == "better"
    assert row_of(results, "random").verdict == "worse"


def test_interrupted_study():
    results = without(make_results(), ("training_feedback", 1), ("random", 0), ("random", 1), ("random", 2))
    feedback = row_of(results, "training_feedback")
    assert (feedback.seeds, feedback.difference.n) == ((0, 2), 2)
    assert "random" not in [row.arm for row in summarise(results)]
    assert missing_runs(results) == [("training_feedback", 1), ("random", 0), ("random", 1), ("random", 2)]
    assert missing_runs(make_results()) == []


def test_study_without_its_reference():
    results = without(make_results(), *[("one_shot", seed) for seed in range(3)])
    assert all(row.difference is None and row.verdict is None for row in summarise(results))


def test_single_seed():
    row = row_of(make_results({arm: values[:1] for arm, values in ACCURACY.items()}), "training_feedback")
    assert (row.metric.low, row.difference.n, row.difference.p_value) == (None, 1, None)
    assert row.verdict == "undecided"


def test_refused_results():
    results = make_results()
    unknown = {**results, "study": {**results["study"], "metric": "test/acuracy"}}
    with pytest.raises(ValueError, match=r"test/acuracy.*test/accuracy, test/loss"):
        summarise(unknown)
    with pytest.raises(ValueError, match="no runs"):
        summarise({**results, "runs": []})
    with pytest.raises(ValueError, match="schema 2"):
        summarise({**results, "schema": 2})
    with pytest.raises(ValueError, match="'dense', seed 0 occurs 2 times"):
        summarise({**results, "runs": results["runs"] + results["runs"][:1]})


def check_named(results, word):
    return next(check for check in fairness_checks(results) if word in check.name)


def test_fair_study_passes_all_checks():
    checks = fairness_checks(make_results())
    assert len(checks) == 4
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("value", ["other", None])
@pytest.mark.parametrize(
    ("key", "word"), [("init_digest", "weights"), ("batches_digest", "batches"), ("steps", "steps")]
)
def test_each_fairness_check_fails_alone(key, word, value):
    results = copy.deepcopy(make_results())
    results["runs"][7][key] = value  # training_feedback, seed 1
    failed = [check for check in fairness_checks(results) if not check.passed]
    assert len(failed) == 1
    assert word in failed[0].name
    assert "seed 1" in failed[0].detail
    assert "training_feedback" in failed[0].detail


def test_different_seeds_may_differ():
    digests = {run["init_digest"] for run in make_results()["runs"]}
    assert len(digests) == 3
    assert check_named(make_results(), "weights").passed


@pytest.mark.parametrize(
    ("density", "passed"), [(0.615, True), (0.605, True), (0.6151, False), (0.6, False), (math.nan, False)]
)
def test_matched_density_within_half_a_percent(density, passed):
    results = copy.deepcopy(make_results())
    results["runs"][-1]["density"] = density
    check = check_named(results, "density")
    assert check.passed is passed
    assert passed or "random, seed 2" in check.detail


def test_matched_density_needs_something_to_match():
    results = without(make_results(), ("training_feedback", 2))
    check = check_named(results, "density")
    assert not check.passed
    assert "seed 2: no training arm" in check.detail
    unmatched = {arm: ACCURACY[arm] for arm in ("dense", "one_shot")}
    assert len(fairness_checks(make_results(unmatched))) == 3


def test_convergence_by_hand():
    found = convergence(with_curves())
    assert (found.metric, found.baseline, found.target) == ("val/accuracy", "dense", pytest.approx(0.9))
    rows = {row.arm: row for row in found.arms}
    assert list(rows) == ["dense", "training_feedback", "training_freeze"], "one_shot has the curve of dense"
    # dense: (10 * 0.2 + 10 * 0.4 + 20 * 0.8) / 40 = 0.55, and 0.75
    assert rows["dense"].area.mean == pytest.approx(0.65)
    # feedback: 0.7 and 0.825; differences 0.15 and 0.075
    assert rows["training_feedback"].difference.mean == pytest.approx(0.1125)
    # freeze: 0.25 and 0.4; differences -0.3 and -0.35
    assert rows["training_freeze"].difference.mean == pytest.approx(-0.325)
    p = {arm: stats.ttest_1samp(d, 0).pvalue for arm, d in {"a": [0.15, 0.075], "b": [-0.3, -0.35]}.items()}
    assert rows["training_feedback"].difference.p_holm == pytest.approx(p["a"])
    assert rows["training_freeze"].difference.p_holm == pytest.approx(2 * p["b"])
    assert (rows["dense"].difference, rows["dense"].verdict) == (None, None)
    steps = {arm: (row.reached, row.seeds, row.first_step and row.first_step.mean) for arm, row in rows.items()}
    assert steps == {"dense": (1, 2, 40.0), "training_feedback": (2, 2, 30.0), "training_freeze": (0, 2, None)}


def test_convergence_of_a_perplexity_goes_down():
    curves = {"dense": [(9.0, 5.0, 4.0)] * 3, "training_feedback": [(8.0, 4.0 + i / 10, 3.0) for i in range(3)]}
    row = convergence(with_curves(curves, "perplexity", higher_is_better=False)).arms[1]
    assert row.verdict == "better"
    assert (row.reached, row.first_step.mean) == (3, pytest.approx((20 + 40 + 40) / 3))


def test_convergence_without_dense_training_compares_with_nothing():
    curves = {arm: CURVES[arm] for arm in ("training_feedback", "training_freeze")}
    found = convergence(with_curves(curves))
    assert (found.baseline, found.target) == (None, None)
    assert [(row.difference, row.reached, row.first_step) for row in found.arms] == [(None, 0, None)] * 2
    # one_shot alone has the curve of the dense training that it came from
    assert (
        convergence(with_curves({arm: CURVES[arm] for arm in ("one_shot", "training_freeze")})).baseline == "one_shot"
    )


def test_convergence_needs_curves_and_takes_the_gap_where_it_is():
    results = make_results()
    assert convergence(results) is None
    results = with_curves()
    assert all(row.gap is None for row in convergence(results).arms)
    for run in results["runs"]:
        run["curve"][-1].update({"val/loss": 0.5 + run["seed"], "train/loss": 0.25})
    assert convergence(results).arms[0].gap.mean == pytest.approx(0.75)
    del results["runs"][0]["curve"]
    assert convergence(results).arms[0].seeds == 1


def test_an_arm_is_also_compared_with_the_one_that_does_the_same_once():
    accuracy = {
        "one_shot": [0.90, 0.92, 0.91],
        "one_shot_dynamic": [0.80, 0.84, 0.83],
        "training_dynamic": [0.86, 0.89, 0.89],
    }
    row = row_of(make_results(accuracy), "training_dynamic")
    against = stats.ttest_1samp([0.06, 0.05, 0.06], 0).pvalue
    others = [stats.ttest_1samp(d, 0).pvalue for d in ([-0.1, -0.08, -0.08], [-0.04, -0.03, -0.02])]
    expected = holm([*others, against])
    assert row.once == "one_shot_dynamic"
    assert row.once_difference.mean == pytest.approx(0.17 / 3)
    assert [row.difference.p_holm, row.once_difference.p_holm] == pytest.approx(expected[1:])
    assert row.once_verdict == "better"
    assert row_of(make_results(accuracy), "one_shot_dynamic").once is None
    results = make_results(accuracy)
    results["study"]["reference"] = "one_shot_dynamic"
    assert row_of(results, "training_dynamic").once is None
