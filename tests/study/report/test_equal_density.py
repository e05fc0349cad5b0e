import copy
import math
import re

import pytest
from scipy import stats

from emp_callbacks.study.report import plots
from emp_callbacks.study.report.arm_results import (
    arm_names,
    at_middle_point,
    check_results,
    first_training_arm,
    label_of,
    middle_point,
    missing_runs,
    summarise,
)
from emp_callbacks.study.report.convergence import convergence
from emp_callbacks.study.report.equal_density import equal_density
from emp_callbacks.study.report.findings import findings
from emp_callbacks.study.report.metric_density import plot_metric_against_density, spread_out
from emp_callbacks.study.report.report import write_report
from emp_callbacks.study.report.statistics import holm
from tests.study.report.test_report import Page, png_size, terminal

FEW = ("dense", "one_shot", "training_feedback", "training_freeze", "rigl", "fixed_magnitude")


def row_of(results, label):
    return next(row for row in equal_density(results) if row.label == label)


def with_values(results, values):
    """Sets the metric of (arm, "one_shot" for its pair) -> values by seed, at every point."""
    for run in results["runs"]:
        if run["arm"] in values:
            run["metrics"]["test/accuracy"] = values[run["arm"]][run["seed"]]
        if run["matched"] and "one_shot" in values:
            run["matched"]["metrics"]["test/accuracy"] = values["one_shot"][run["seed"]]
    return results


def test_rows_go_from_the_highest_point_to_the_lowest_without_dense(at_points):
    rows = equal_density(at_points(FEW, points=(0.1, 0.6), seeds=range(2)))
    assert [row.label for row in rows] == [f"{arm} @ {point}" for point in (0.6, 0.1) for arm in FEW[1:]]
    assert [row.point for row in rows] == [0.6] * 5 + [0.1] * 5


def test_a_row_by_hand(at_points):
    results = with_values(
        at_points(("dense", "training_freeze"), points=(0.1,), seeds=range(3)),
        {"training_freeze": [0.80, 0.82, 0.84], "one_shot": [0.79, 0.80, 0.84]},
    )
    row = row_of(results, "training_freeze @ 0.1")
    assert (row.metric.mean, row.metric.sd) == pytest.approx((0.82, 0.02))
    assert row.density.mean == pytest.approx(0.09)
    assert row.one_shot.metric == pytest.approx(0.81)
    assert row.one_shot.density == pytest.approx(0.09)
    assert row.one_shot.difference.mean == pytest.approx(0.01)
    assert row.one_shot.difference.p_value == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.0], 0).pvalue)
    assert row.compression == pytest.approx(20_000 / 1_800)
    assert row.inference == pytest.approx((2 * 1_800 + 100) / 40_000)
    assert row.training == pytest.approx(1.0)
    assert row.explored == pytest.approx(0.18)


def test_figures_that_one_run_lacks_are_not_averaged_over_the_others(at_points):
    results = at_points(("dense", "rigl"), points=(0.1,), seeds=range(3))
    results["runs"][-1].update(flops=None, explored=None, keep=None)
    row = row_of(results, "rigl @ 0.1")
    assert (row.compression, row.inference, row.training, row.explored) == (None, None, None, None)
    assert row.one_shot.difference.n == 2, "a run that does not say how much it keeps has no pair"


def test_the_pair_is_the_same_count_and_not_the_same_point(at_points):
    results = at_points(FEW, points=(0.1,), seeds=range(3))
    expected = row_of(results, "rigl @ 0.1").one_shot
    for run in results["runs"]:
        run["matched"] = None  # the one_shot runs of the point keep the same count
    found = row_of(results, "rigl @ 0.1").one_shot
    assert (found.metric, found.difference.p_value) == (expected.metric, expected.difference.p_value)
    assert row_of(results, "training_freeze @ 0.1").one_shot is None, "it keeps fewer"
    assert row_of(results, "one_shot @ 0.1").one_shot is None


def test_a_pair_of_another_count_is_left_out(at_points):
    results = at_points(("dense", "one_shot", "rigl"), points=(0.1,), seeds=range(3))
    last = results["runs"][-1]
    last["matched"]["keep"] += last["n"] // 1000  # what floors in many groups may lose
    assert row_of(results, "rigl @ 0.1").one_shot.difference.n == 3
    last["matched"]["keep"] += 1
    assert row_of(results, "rigl @ 0.1").one_shot.difference.n == 2


def test_without_any_pair_there_is_no_table(at_points):
    results = at_points(FEW, points=(0.1,), seeds=range(2))
    for run in results["runs"]:
        run["matched"] = None
    results["runs"] = [run for run in results["runs"] if run["arm"] != "one_shot"]
    assert equal_density(results) == []
    assert "At equal density" not in terminal(results)


def test_holm_runs_over_all_comparisons_of_the_table(at_points):
    rows = equal_density(at_points(FEW, points=(0.2, 0.1), seeds=range(4)))
    found = [against.difference for row in rows for against in (row.one_shot, row.best) if against]
    assert len(found) == 2 * 4 + 2  # each arm with one-shot; feedback also with the best arm
    assert [d.p_holm for d in found] == pytest.approx(holm([d.p_value for d in found]))
    tosts = [against.equivalence for row in rows for against in (row.one_shot, row.best) if against]
    assert [t.p_holm for t in tosts] == pytest.approx(holm([t.p_value for t in tosts]))
    assert any(t.p_holm > t.p_value for t in tosts)


def test_the_best_arm_has_the_same_density_and_a_count_set_in_advance(at_points):
    results = at_points(("dense", "one_shot", "training_feedback", "training_project", "rigl", "gmp"), (0.1,), range(3))
    values = {"training_feedback": [0.80, 0.81, 0.83], "rigl": [0.84, 0.86, 0.88], "gmp": [0.83, 0.84, 0.85],
              "one_shot": [0.95, 0.96, 0.98], "training_project": [0.9, 0.9, 0.9]}  # fmt: skip
    best = row_of(with_values(results, values), "training_feedback @ 0.1").best
    assert (best.label, best.metric) == ("rigl @ 0.1", pytest.approx(0.86))
    assert best.difference.mean == pytest.approx(-0.14 / 3)
    assert row_of(results, "rigl @ 0.1").best is None
    results["study"]["higher_is_better"] = False
    assert row_of(results, "training_feedback @ 0.1").best.label == "gmp @ 0.1"
    results["study"]["higher_is_better"] = True
    for run in results["runs"]:
        if run["arm"] == "rigl":
            run["density"] += 0.0051
    assert row_of(results, "training_feedback @ 0.1").best.label == "gmp @ 0.1"
    results["runs"] = [run for run in results["runs"] if (run["arm"], run["seed"]) != ("gmp", 0)]
    assert row_of(results, "training_feedback @ 0.1").best.difference.n == 2


def test_a_rival_that_diverged_or_lacks_seeds_is_not_the_best(at_points):
    results = at_points(("dense", "one_shot", "training_feedback", "rigl", "gmp"), (0.1,), range(3))
    with_values(results, {"rigl": [math.nan] * 3})
    assert row_of(results, "training_feedback @ 0.1").best.label == "gmp @ 0.1"
    with_values(results, {"rigl": [1.0] * 3})
    results["runs"] = [run for run in results["runs"] if (run["arm"], run["seed"]) != ("rigl", 0)]
    assert row_of(results, "training_feedback @ 0.1").best.label == "gmp @ 0.1"


def test_equal_differences_give_neither_p_nor_verdict(at_points):
    results = with_values(
        at_points(("dense", "rigl"), points=(0.1,), seeds=range(3)),
        {"rigl": [0.80, 0.81, 0.82], "one_shot": [0.79, 0.80, 0.81]},
    )
    against = row_of(results, "rigl @ 0.1").one_shot
    assert (against.difference.p_value, against.difference.p_holm, against.equivalence) == (None, None, None)
    assert against.verdict == "undecided"


def test_findings_say_first_what_speaks_against_emp(at_points):
    results = at_points(FEW)
    said = findings(equal_density(results), results)
    starts = [sentence.split(":")[0] for sentence in said]
    assert starts[:2] == [
        "Worse than one_shot at equal density",
        "Worse than the best fixed-density arm at equal density",
    ]
    assert starts.index("Better than one_shot at equal density") > 1
    assert re.search(r"^Worse than one_shot.*training_freeze at .*0.05 \(\u2212[\d.]+\spoints\)\.$", said[0])
    assert "training_feedback at 0.05 (" in said[1]
    assert "to rigl)" in said[1]
    shown = terminal(results)
    assert shown.index("At equal density") < shown.index("Worse than one_shot") < shown.index("Better than one_shot")
    assert shown.index("Better than one_shot") < shown.index("test/accuracy (%), higher is better")


@pytest.mark.parametrize(("sign", "told"), [(-1, True), (1, False)])
def test_a_loss_that_the_adjustment_hides_is_told_before_what_is_better(sign, told, at_points):
    results = at_points(("dense", "one_shot", "training_feedback", "rigl", "set"), points=(0.1,), seeds=range(3))
    values = {"one_shot": [0.8, 0.8, 0.8], "training_feedback": [0.8 + sign * d for d in (0.01, 0.014, 0.02)],
              "rigl": [0.80, 0.81, 0.79], "set": [0.81, 0.80, 0.79]}  # fmt: skip
    rows = equal_density(with_values(results, values))
    difference = next(row for row in rows if row.label == "training_feedback @ 0.1").one_shot.difference
    assert difference.p_value < 0.05 < difference.p_holm
    words = "Worse than one_shot at equal density before the adjustment for all comparisons, not after it: "
    said = findings(rows, results)
    assert [sentence.startswith(words) for sentence in said].count(True) == told
    if told:
        better = next(place for place, sentence in enumerate(said) if "better than" in sentence)
        assert next(place for place, sentence in enumerate(said) if sentence.startswith(words)) < better


def test_findings_name_one_shot_where_the_study_has_no_such_arm(at_points):
    results = at_points(("dense", "training_feedback"), points=(0.1,), seeds=range(3))
    results["study"]["reference"] = "dense"
    said = findings(equal_density(results), results)
    assert said
    assert all("one_shot" in sentence and "dense" not in sentence for sentence in said)


def test_findings_without_a_loss_say_so_and_name_the_margin(at_points):
    results = at_points(("dense", "one_shot", "training_feedback"), points=(0.1,), seeds=range(4))
    same = {"training_feedback": [0.80, 0.81, 0.82, 0.831], "one_shot": [0.80, 0.81, 0.82, 0.83]}
    said = findings(equal_density(with_values(results, same)), results)
    assert said[0] == "No EMP arm is shown to be worse than one_shot at equal density."
    assert said[-1].startswith("Equivalent to one_shot at equal density, within ±0.50\u00a0points: training_feedback")
    results["study"]["margin"] = None
    assert findings(equal_density(results), results)[-1].startswith("No difference shown against one_shot")


def test_labels_of_one_arm_do_not_mix_points(at_points):
    results = at_points(FEW, points=(0.6, 0.1), seeds=range(3))
    assert arm_names(results)[:3] == ["dense", "one_shot @ 0.6", "one_shot @ 0.1"]
    rows = {row.arm: row for row in summarise(results)}
    assert rows["rigl @ 0.6"].density.mean == pytest.approx(0.6)
    assert rows["rigl @ 0.6"].reference == "one_shot @ 0.6"
    ours = [run["metrics"]["test/accuracy"] for run in results["runs"] if label_of(run) == "rigl @ 0.1"]
    theirs = [run["metrics"]["test/accuracy"] for run in results["runs"] if label_of(run) == "one_shot @ 0.1"]
    assert rows["rigl @ 0.1"].difference.mean == pytest.approx((sum(ours) - sum(theirs)) / 3)
    assert rows["dense"].difference is None
    with pytest.raises(ValueError, match=r"'rigl @ 0\.6', seed 0 occurs 2 times"):
        check_results({**results, "runs": [*results["runs"], next(r for r in results["runs"] if r["arm"] == "rigl")]})


def test_missing_runs_are_those_of_each_point(at_points):
    results = at_points(("dense", "one_shot", "rigl", "set"), points=(0.6, 0.1), seeds=range(2))
    kept = [run for run in results["runs"] if run["arm"] != "set" and (label_of(run), run["seed"]) != ("rigl @ 0.1", 1)]
    assert missing_runs({**results, "runs": kept}) == [("rigl @ 0.1", 1), ("set", 0), ("set", 1)]


def test_curves_are_those_of_the_middle_point(at_points):
    results = at_points(FEW)
    assert middle_point(results) == 0.2
    assert {run["point"] for run in at_middle_point(results)["runs"]} == {None, 0.2}
    assert [row.arm for row in convergence(results).arms] == [
        "dense", "training_feedback @ 0.2", "training_freeze @ 0.2", "rigl @ 0.2", "fixed_magnitude @ 0.2"
    ]  # fmt: skip
    assert first_training_arm(at_middle_point(results)) == "training_feedback @ 0.2"
    for draw in (plots.plot_n_eff, plots.plot_density, plots.plot_learning_curves):
        figure = draw(results)
        axes = figure.axes[0]
        assert figure.get_suptitle().endswith("at density 0.2")
        assert {line.get_label() for line in axes.get_lines()} <= {
            "dense", "last of dense (mean)", "one_shot @ 0.2", *(f"{arm} @ 0.2" for arm in FEW)
        }  # fmt: skip


def drawn(results):
    figure = plot_metric_against_density(results)
    return figure, [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes if axes.get_visible()]


def test_metric_against_density_is_one_line_per_arm_in_percent(at_points):
    results = at_points(FEW)
    figure, (lines,) = drawn(results)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "test/accuracy (%), higher is better\n(the error on a log scale)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.05", "0.1", "0.2", "0.4", "0.6"]
    aside = spread_out([arm for arm in FEW if arm != "dense"])["rigl"]
    assert list(lines["rigl"].get_xdata()) == pytest.approx([aside * at for at in (0.05, 0.1, 0.2, 0.4, 0.6)])
    rows = {row.arm: row for row in summarise(results)}
    assert lines["rigl"].get_ydata()[0] == pytest.approx(100 * rows["rigl @ 0.05"].metric.mean)
    assert lines["dense (mean, 95 %)"].get_ydata()[0] == pytest.approx(100 * rows["dense"].metric.mean)
    widths = {label: line.get_linewidth() for label, line in lines.items() if not label.startswith("_")}
    assert widths.pop("one_shot") > 2 * max(widths.values())


def test_error_bars_are_the_intervals(at_points):
    results = at_points(("dense", "rigl"), points=(0.1,), seeds=range(3))
    interval = summarise(results)[1].metric
    axes = plot_metric_against_density(results).axes[0]
    vertical = [c.get_segments()[0] for c in axes.collections if len(c.get_segments()) == 1]
    heights = [sorted(segment[:, 1]) for segment in vertical if segment[0, 0] == segment[1, 0]]
    assert [100 * interval.low, 100 * interval.high] == pytest.approx(heights[0])


def test_many_arms_are_split_by_family_and_each_panel_has_the_baselines(at_points):
    figure, panels = drawn(at_points(seeds=range(2)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "EMP during training", "Pruned after dense training", "Other sparse training", "Fixed density and random"
    ]  # fmt: skip
    assert all({"one_shot", "dense (mean, 95 %)"} <= set(lines) for lines in panels)
    assert "training_feedback" in panels[0]
    assert "training_feedback" not in panels[1]


def test_a_perplexity_that_explodes_is_on_a_log_scale(at_points):
    results = at_points(FEW, seeds=range(2), metric="test/perplexity")
    assert plot_metric_against_density(results).axes[0].get_yscale() == "log"
    assert plot_metric_against_density(at_points(FEW, (0.6, 0.4), seeds=range(2))).axes[0].get_yscale() == "linear"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from tests.study.report.conftest import study_at_points

    folder = tmp_path_factory.mktemp("report")
    path = write_report(study_at_points(FEW, seeds=range(3)), folder)
    return folder, Page(path.read_text(encoding="utf-8"))


def test_the_table_and_the_picture_at_equal_density_are_the_first(page):
    folder, html = page
    text = html.text
    places = [text.index(words) for words in (
        "worse than one_shot", "At equal density: difference to one-shot", "Comparison Comparison arm", " Plots ",
    )]  # fmt: skip
    assert places == sorted(places)
    assert text.index("metric_density.png") < text.index("n_eff.png")
    assert png_size((folder / "metric_density.png").read_bytes()) == (1200, 675)
    assert "Convergence at density 0.2, the middle point" in text
    assert "failed" not in text


def test_the_rows_of_the_table_hold_all_figures(page, at_points):
    _, html = page
    row = row_of(at_points(FEW, seeds=range(3)), "rigl @ 0.1")
    cells = re.search(r"rigl @ 0\.1 (0\.100 .*?) fixed_magnitude @ 0\.1", html.text).group(1).split()
    mean, sd, other = (f"{100 * value:.2f}" for value in (row.metric.mean, row.metric.sd, row.one_shot.metric))
    assert cells[:5] == ["0.100", mean, "±", sd, other]
    assert cells[-4:] == ["10.0\u00d7", "0.10\u00d7", "0.46\u00d7", "0.20"]
    assert "vs rigl" in html.text
    assert "two one-sided t-tests place the difference within ±0.50 points" in html.text


def test_arms_are_described_once_by_their_summary(page):
    from emp_callbacks.study.arms import ARMS

    assert page[1].text.count(ARMS["training_freeze"].summary) == 1
    told = ARMS["rigl"].summary if "rigl" in ARMS else "an arm of this recipe"
    assert f" rigl {told} " in page[1].text


def test_earlier_results_have_neither_points_nor_pairs(at_points, tmp_path):
    results = copy.deepcopy(at_points(FEW, points=(0.6,), seeds=range(2)))
    for name in ("points", "margin", "healing"):
        del results["study"][name]
    for run in results["runs"]:
        for name in ("point", "matched", "explored", "flops", "parameters", "differs"):
            run.pop(name, None)
    text = Page(write_report(results, tmp_path).read_text(encoding="utf-8")).text
    assert "At equal density" not in text
    assert re.search(r"training_feedback (against|is \w+ than) one_shot", text)
