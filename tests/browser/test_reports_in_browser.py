"""Every kind of report in a real browser: on a telephone and on a wide screen, by day and by night."""

import json
import shutil
from pathlib import Path

import pytest

from emp_callbacks.study.report.page import write_page
from emp_callbacks.study.report.report import write_report, write_trajectory_report
from emp_callbacks.study.studies import PAGES
from tests.study.report.conftest import study_at_points
from tests.study.report.test_report import make_results, refresh

pytestmark = [pytest.mark.processes, pytest.mark.slow]

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python, of the extra dev"
)

HERE = Path(__file__).parent
STORED = HERE.parents[1] / "benchmarks" / "results"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FEW = ("dense", "one_shot", "one_shot_finetune", "training_feedback", "gmp", "fixed_magnitude")


def of_models(folder, *models):
    """Return a stored study of trained models, as if only some of them had been measured."""
    results = json.loads((STORED / folder / "results.json").read_text())
    rows = [row for row in results["rows"] if row["model"] in models]
    return {**results, "models": [m for m in results["models"] if m["arm"] in models], "rows": rows}


def unfinished(results):
    """Return a study of which a run is missing and a fairness check fails: each with a box of its own."""
    del results["runs"][-1]
    results["runs"][0]["init_digest"] = "other"
    return results


def write(kind, folder):
    if kind == "trajectory":
        return write_trajectory_report([refresh(step, 1 - step / 100) for step in (10, 20, 30)], folder, "a run")
    if kind == "compare":
        return write_report(unfinished(make_results()), folder)
    if kind == "compare at points":
        return write_report(study_at_points(FEW, points=(0.4, 0.05), seeds=range(2)), folder)
    models = {"sweep-beta": ("fc2", "gpt"), "compare-criteria": ("fc2", "gpt"), "violations": ("vit",)}
    results = of_models(kind.replace("-", "_"), *models.get(kind, ("gates_gpt",)))
    return write_page(PAGES[kind](results), folder, results)


KINDS = ("compare", "compare at points", "trajectory", *PAGES)


@pytest.fixture(scope="module", params=KINDS)
def report(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs a Chromium, such as Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    yield page
    page.close()


def found_on(page):
    """Return what a reader would trip over, by kind."""
    found = page.evaluate((HERE / "page_checks.js").read_text())
    return {what: where for what, where in found.items() if where}


@pytest.fixture(
    params=[(400, "light"), (400, "dark"), (1400, "light"), (1400, "dark")], ids=lambda at: f"{at[0]}-{at[1]}"
)
def shown(request, page):
    width, scheme = request.param
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    return page


def test_nothing_is_cut_off_faint_small_or_unexplained(shown):
    assert found_on(shown) == {}


# What scrolls depends on the width, contrast on the scheme: two of the four pairs have both.
@pytest.mark.parametrize("shown", [(400, "dark"), (1400, "light")], indirect=True, ids=["400-dark", "1400-light"])
def test_no_serious_finding_of_axe(shown):
    # Folded words and tables are read as well; of a figure, which is one image, what it is called.
    shown.evaluate("() => document.querySelectorAll('details').forEach((e) => { e.open = true })")
    assert serious(shown) == []


def serious(page):
    found = axe.Axe().run(page, context={"exclude": ["svg > *"]}).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write("trajectory", tmp_path_factory.mktemp("small"))


@pytest.fixture
def telephone(browser, small):
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto(small.as_uri())
    yield page
    page.close()


FAULTS = {
    "overflow": "document.querySelector('h1').style.width = '900px'",
    "cut": "document.querySelector('h1').style.cssText = 'width: 9px; overflow: hidden; white-space: nowrap'",
    "cut: no keyboard": "document.querySelectorAll('.scroll').forEach((e) => e.removeAttribute('tabindex'))",
    "cut: no sign": "document.querySelectorAll('.scroll').forEach((e) => { e.style.background = 'none' })",
    "small": "document.querySelectorAll('svg text').forEach((e) => { e.style.fontSize = '6px' })",
    "outside": "document.querySelectorAll('svg text').forEach((e) => e.setAttribute('transform', 'translate(-400 0)'))",
    "faint": "document.querySelectorAll('svg path').forEach((e) => { e.style.stroke = '#f0e442' })",
    "shown": "document.querySelectorAll('svg').forEach((e) => { e.style.display = 'block' })",
    "unexplained": "document.querySelector('.words').remove()",
    "axe": "document.querySelectorAll('svg').forEach((e) => e.removeAttribute('aria-label'))",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_sees_its_fault(fault, telephone):
    assert found_on(telephone) == {}
    telephone.evaluate(FAULTS[fault])
    assert serious(telephone) if fault == "axe" else fault.partition(":")[0] in found_on(telephone)


def test_a_table_is_scrolled_by_keyboard(telephone):
    region = telephone.get_by_role("region", name="Table: Refreshes")
    region.focus()
    telephone.keyboard.press("ArrowRight")
    telephone.wait_for_function("(e) => e.scrollLeft > 0", arg=region.element_handle(), timeout=5000)
