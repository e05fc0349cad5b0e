"""What figures look like within a page: their text, colours and words for those who do not see them."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from emp_callbacks.study.once.plots import COLORS, OTHER
from emp_callbacks.study.report import plots
from emp_callbacks.study.report.metric_density import error_scale
from emp_callbacks.study.report.page import grouped
from emp_callbacks.study.report.seen import SEEN, trajectory_seen
from emp_callbacks.study.report.styles import CARD, DARK_CARD, OTHER_STYLES, STYLES, contrast, for_dark
from emp_callbacks.study.report.svg import Drawings
from emp_callbacks.study.report.words import WORDS, words_in
from tests.study.report.test_report import make_results, refresh

ALL_COLORS = {style.color for style in (*STYLES.values(), *OTHER_STYLES)} | {*COLORS.values(), *OTHER}


@pytest.mark.parametrize("color", sorted(ALL_COLORS))
def test_lines_are_told_from_the_page_by_day_and_by_night(color):
    assert contrast(color, CARD) >= 3
    assert contrast(for_dark(color), DARK_CARD) >= 3


def small_figure(narrow):
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.set_yticks([0.123456], ["0.123456"])
    axes.plot([0, 1], [0.123456, 0.2], color="#0072b2")
    axes.set_title('12.345 <b> & "narrow"' if narrow else "12.345 wide")
    return figure


def test_what_a_figure_says_is_what_the_page_says():
    drawings = Drawings()
    html, _ = drawings.picture(small_figure, lambda: 'seen "<i>"')
    for text in ("0.123456", "12.345 wide", "12.345 &lt;b&gt; &amp; "):
        assert f">{text}" in html
    assert html.count('aria-label="seen &quot;&lt;i&gt;&quot;"') == 2
    assert not re.search(r'="[^"]*\d\.\d{2}', html)  # of places, a tenth
    assert "#0072b2" not in html
    light, dark = drawings.css().split("@media")
    assert "--k0072b2:#0072b2" in light
    assert f"--k0072b2:{for_dark('#0072b2')}" in dark


def test_drawings_of_a_page_share_styles_and_no_name():
    drawings = Drawings()
    both = "".join(drawings.picture(small_figure, str)[0] for _ in range(2))
    names = re.findall(r' id="(\w+)"', both)
    assert len(names) == len(set(names))
    assert set(re.findall(r'class="(s\d+)"', both)) == set(re.findall(r"\.(s\d+)\{", drawings.css()))


def test_the_axis_of_accuracies_has_the_log_scale_of_the_error():
    axes = Figure().subplots()
    error_scale(axes, "y", 10.0, 99.0)
    place = axes.transData.transform([(0, accuracy) for accuracy in (0.0, 90.0, 99.0)])[:, 1]
    assert place[1] - place[0] == pytest.approx(place[2] - place[1])
    assert np.all(np.diff(sorted(axes.get_yticks())) > 0)
    assert axes.get_ylim() == pytest.approx((10.0, 99.0))


def test_what_is_seen_names_each_arm_with_where_it_begins_and_ends():
    results = make_results(("dense", "one_shot", "training_project"), seeds=(0, 1))
    assert "training_project 96.6" in SEEN["metric_density.png"](results)
    assert "training_project goes from 0.15 to 0.15" in SEEN["n_eff.png"](results)
    assert "training_project goes from 1.00 to 0.15" in SEEN["density.png"](results)
    assert re.search(r"dense goes from 32\.\d % to 98\.\d %", SEEN["learning_curves.png"](results))
    told = trajectory_seen([refresh(10, 0.9), refresh(20, 0.3), refresh(30, 0.6)])
    assert "density goes from 0.900 to 0.600, with a low of 0.300" in told
    assert "of the layers, net.0.weight ends at density 0.600" in told


def test_curves_are_framed_by_the_second_half_of_the_training():
    results = make_results(("dense", "training_feedback"), seeds=(0, 1))
    low, high = plots.plot_learning_curves(results).axes[0].get_ylim()
    assert 50 < low < 70  # two thirds of 98 %, which is the value at step 20 of 30; a third lies below
    assert high > 98


def test_one_remedy_is_one_box():
    boxes = grouped(["a is flat: try b", "c is flat: try b", "d is empty: fill it", "alone"])
    assert [(box["what"], box["remedy"]) for box in boxes] == [
        (["a is flat.", "c is flat."], "Try b."), (["d is empty."], "Fill it."), (["alone."], "")
    ]  # fmt: skip


def test_a_page_explains_the_words_that_it_uses_and_no_others():
    assert [word for word, _ in words_in("N_eff / N; test/perplexity; p (Holm)")] == [
        "N", "N_eff", "p", "Holm", "perplexity"
    ]  # fmt: skip
    assert all(meaning.endswith(".") for _, meaning in WORDS.values())
