"""The comparison of the arms, and the page of a study, in a narrow terminal."""

import io

import pytest
from rich.console import Console

from emp_callbacks.study.report.page import Grid, Page, Section
from emp_callbacks.study.report.terminal import comparison_table, print_page
from tests.study.report.test_report import FINAL, make_results


def shown(width, draw):
    console = Console(file=io.StringIO(), width=width)
    draw(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    return text


@pytest.mark.parametrize("width", [80, 60])
def test_every_arm_keeps_its_name_its_difference_and_its_verdict(width):
    text = shown(width, lambda console: console.print(comparison_table(make_results())))
    names = "".join(line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith(" "))
    assert all(arm in names for arm in FINAL)  # a long one is folded
    assert "80.07" in text
    assert "[79.88, 80.26]" in text
    assert "worse" in text
    assert "seconds; widen the terminal, or set COLUMNS (report.html has them)" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 60])
def test_a_study_prints_words_whole_and_says_which_columns_it_left_out(width):
    betas = [f"beta {beta:g}" for beta in (0.5, 0.75, 1, 1.25, 1.5, 2)]
    row = ["fc2_long", "weights x magnitude, global", *["\u22124.52 [\u22125.10, \u22123.94]"] * len(betas)]
    grid = Grid(headers=["model", "pruned", *betas], rows=[row], texts=2)
    page = Page(
        title="t", summary="s", headline="h", findings=["f"], warnings=["w"], sections=[Section(heading="x", grid=grid)]
    )
    text = shown(width, lambda console: print_page(page, console))
    kept = text.count("\u22124.52\n") + text.count("\u22124.52 ")
    assert 1 <= kept < len(betas)
    assert text.count("[\u22125.10, \u22123.94]") == kept
    assert f"columns: {', '.join(betas[kept:])}; widen" in " ".join(text.split())
    assert "fc2_long" in text
