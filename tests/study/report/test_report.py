import copy
import io
import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from emp_callbacks.cli.main import main
from emp_callbacks.study.report import plots
from emp_callbacks.study.report.arm_results import summarise
from emp_callbacks.study.report.metric_format import MetricFormat
from emp_callbacks.study.report.report import headline, write_report, write_trajectory_report
from emp_callbacks.study.report.styles import FAMILIES, STYLES, arm_style
from emp_callbacks.study.report.terminal import comparison_table

FINAL = {
    "dense": (0.98, 1.0),
    "one_shot": (0.95, 0.60),
    "one_shot_dynamic": (0.93, 0.40),
    "training_feedback": (0.97, 0.61),
    "training_project": (0.965, 0.15),
    "training_freeze": (0.80, 0.05),
    "training_dynamic": (0.94, 0.40),
    "fixed_magnitude": (0.969, 0.61),
    "random": (0.94, 0.61),
}
STEPS = (10, 20, 30)


def refresh(step, density, mode="feedback", group="global"):
    layers = [
        {"name": f"net.{i}.weight", "n": n, "n_eff": density * n, "keep": int(density * n),
         "density": density, "preserved_mass": 0.9}
        for i, n in ((0, 1000), (2, 1500))
    ]  # fmt: skip
    return {
        "step": step, "epoch": step // 10, "group": group, "mode": mode, "criterion": "magnitude",
        "scope": "global", "beta": 1.0, "n": 2500, "n_eff": density * 2500, "n_eff_fraction": density,
        "keep": int(density * 2500), "threshold": 0.01, "density": density, "preserved_mass": 0.9,
        "mass_bound": None, "churn": 0.1, "regrown": 2, "seconds": 0.01, "note": "", "layers": layers,
    }  # fmt: skip


def trajectory_of(arm, density):
    if arm == "dense":
        return [refresh(step, 0.62, "observe") for step in STEPS]
    return [refresh(step, density) for step in (STEPS[-1:] if arm == "one_shot" else STEPS)]


def make_run(arm, seed, metric="test/accuracy"):
    level, density = FINAL.get(arm, (0.9, 0.5))
    wobble = ((7 * seed + len(arm)) % 5) / 2000
    value = level + wobble if metric.endswith("accuracy") else 20 / level + wobble
    validation = metric.replace("test/", "val/")
    return {
        "arm": arm, "seed": seed, "metrics": {metric: value, "test/loss": 0.1}, "density": density,
        "n": 2500, "keep": int(2500 * density), "n_eff": 2500 * density, "steps": 30,
        "refreshes": 3, "seconds": 1.5, "trajectory": trajectory_of(arm, density),
        "curve": [{"step": s, "epoch": s // 10, validation: value * s / 30} for s in STEPS],
        "init_digest": f"init{seed}", "batches_digest": f"batch{seed}", "fingerprint": "f" * 16,
    }  # fmt: skip


def make_results(arms=tuple(FINAL), seeds=(3, 14, 15), metric="test/accuracy"):
    higher = metric.endswith("accuracy")
    return {
        "schema": 1,
        "study": {"recipe": "recipes/quick.yaml", "metric": metric, "higher_is_better": higher,
                  "reference": "one_shot", "arms": list(arms), "seeds": list(seeds)},
        "environment": {"torch": "9.8.7", "date": "2026-11-21"},
        "runs": [make_run(arm, seed, metric) for arm in arms for seed in seeds],
    }  # fmt: skip


class Page(HTMLParser):
    """Tags, addresses and visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = write_report(make_results(), tmp_path_factory.mktemp("report"))
    return path, Page(path.read_text(encoding="utf-8"))


def read_page(results, folder, monkeypatch):
    """Return the page without drawing: most tests read words only."""
    monkeypatch.setattr(plots, "STUDY_PLOTS", {})
    return Page(write_report(results, folder).read_text(encoding="utf-8"))


def terminal(results):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(results))
    return console.export_text()


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_pngs_beside_the_report_are_real_and_of_readme_size(written):
    path, _ = written
    assert path.name == "report.html"
    names = {"n_eff.png", "metric_density.png", "density.png", "learning_curves.png"}
    assert {png.name for png in path.parent.glob("*.png")} == names
    for name in names:
        data = (path.parent / name).read_bytes()
        assert png_size(data) == (1200, 675)
        assert 10_000 < len(data) < 400_000


def test_report_opens_offline_with_the_images_inside(written):
    path, page = written
    assert page.tags.count("svg") == 2 * 4  # for wide pages and for narrow ones
    html = path.read_text(encoding="utf-8")
    within = re.findall(r' id="(\w+)"', html)
    assert len(within) == len(set(within))
    assert {address.removeprefix("#") for address in page.addresses} <= set(within)
    assert set(re.findall(r"url\(#(\w+)\)", html)) <= set(within)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"http|//|@import|url\([^#]", html)


def test_report_names_every_arm_seed_and_condition(written):
    _, page = written
    for word in (*FINAL, "recipes/quick.yaml", "9.8.7", "net.2.weight", "Same initial weights"):
        assert word in page.text
    rows = re.findall(r"([a-z_]+) (3|14|15) [\d.]+ 0\.1000 ", page.text)
    assert sorted(rows) == sorted((arm, str(seed)) for arm in FINAL for seed in (3, 14, 15))
    assert "failed" not in page.text
    assert "Unfinished" not in page.text


def test_plain_answer_comes_from_the_numbers(tmp_path, monkeypatch):
    results = make_results(("one_shot", "training_feedback"), seeds=(0, 1, 2))
    for run, value in zip(results["runs"], [0.95, 0.96, 0.97, 0.96, 0.9705, 0.98], strict=True):
        run["metrics"]["test/accuracy"] = value
    page = read_page(results, tmp_path, monkeypatch)
    assert "training_feedback is better than one_shot." in page.text
    # differences 1.00, 1.05, 1.00 points: mean 1.0167, half width 4.3027 * 0.05 / 3 = 0.0717
    assert "difference to one_shot +1.02 points [+0.94, +1.09], p <0.001" in page.text
    assert "97.02 % [" in page.text
    assert "Its density is 0.010 above that of one_shot." in page.text


def test_no_difference_is_said_with_the_number_of_seeds(tmp_path, monkeypatch):
    results = make_results(("one_shot", "training_feedback"), seeds=(0, 1, 2))
    for run, value in zip(results["runs"], [0.95, 0.96, 0.97, 0.96, 0.95, 0.98], strict=True):
        run["metrics"]["test/accuracy"] = value
    page = read_page(results, tmp_path, monkeypatch)
    assert "training_feedback against one_shot: no difference that these 3 seeds can show." in page.text


@pytest.mark.parametrize(("factor", "word"), [(0.5, "better"), (2.0, "worse")])
def test_lower_perplexity_is_better_everywhere(factor, word, tmp_path, monkeypatch):
    results = make_results(("one_shot", "training_feedback"), (0, 1, 2), "test/perplexity")
    for run in results["runs"]:
        scale = factor if run["arm"] == "training_feedback" else 1.0
        run["metrics"]["test/perplexity"] = scale * (20 + 0.01 * run["seed"])
    page = read_page(results, tmp_path, monkeypatch)
    assert f"training_feedback is {word} than one_shot." in page.text
    assert "lower test/perplexity is better" in page.text
    assert "%" not in page.text.replace("95 %", "")
    shown = terminal(results)
    assert "lower is better" in shown
    assert word in shown
    assert plots.plot_learning_curves(results).axes[0].get_ylabel() == "val/perplexity, lower is better"


def test_failed_check_and_missing_run_are_prominent(tmp_path, monkeypatch):
    results = make_results(("one_shot", "training_feedback", "random"))
    results["runs"][4]["init_digest"] = "other"
    del results["runs"][8]
    page = read_page(results, tmp_path, monkeypatch)
    answer = page.text.index("training_feedback against one_shot")
    assert page.text.index("1 fairness check failed") < answer
    assert page.text.index("Unfinished study: 1 planned run missing. random (seed 15).") < answer
    assert "\u2717 failed" in page.text


def test_names_are_escaped_in_html_and_terminal(tmp_path):
    results = make_results(("one_shot", "training_feedback", "<b>bold</b> [red]$x$"), seeds=(0, 1))
    path = write_report(results, tmp_path)
    html = path.read_text(encoding="utf-8")
    assert "<b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "<b>bold</b> [red]$x$" in terminal(results)


def test_single_seed_and_single_arm(tmp_path, monkeypatch):
    page = read_page(make_results(seeds=(0,)), tmp_path, monkeypatch)
    assert "undecided (one seed in common, no test possible)" in page.text
    assert "(one seed, no interval)" in page.text
    assert "nan" not in page.text
    alone = make_results(("one_shot",))
    assert headline(alone, summarise(alone)) == "No arm that prunes during training was compared with another arm."


def test_identical_differences_and_diverged_runs_are_said(tmp_path, monkeypatch):
    results = make_results(("one_shot", "training_feedback"))
    for run in results["runs"]:
        run["metrics"]["test/accuracy"] = 0.5
    page = read_page(results, tmp_path, monkeypatch)
    assert "undecided (the same result in all 3 seeds)" in page.text
    for run in results["runs"][3:]:
        run["metrics"]["test/accuracy"] = 0.75
    assert "is the same in all seeds, so no interval and no p" in " ".join(terminal(results).split())
    assert (
        "the same difference in all 3 seeds, so no interval and no p" in read_page(results, tmp_path, monkeypatch).text
    )
    results["runs"][-1]["metrics"]["test/accuracy"] = math.nan
    assert "a run has no finite metric" in read_page(results, tmp_path, monkeypatch).text


def test_terminal_table_has_all_numbers():
    shown = terminal(make_results())
    line = next(line for line in shown.splitlines() if "training_freeze" in line)
    # 80.05, 80.15 and 80.00: standard deviation 0.0764, half width 4.3027 * 0.0764 / sqrt(3) = 0.19
    assert "80.07 [79.88, 80.26]" in line
    assert "0.050" in line
    assert "worse" in line
    assert "reference" in next(line for line in shown.splitlines() if line.startswith("one_shot "))


def test_convergence_is_shown_where_curves_were_recorded(tmp_path, monkeypatch):
    results = make_results(("dense", "one_shot", "training_feedback"), seeds=(0, 1, 2))
    for run in results["runs"]:
        last = 0.96 if run["arm"] == "training_feedback" else 0.9 + run["seed"] / 100
        run["curve"] = [
            {"step": step, "val/accuracy": value, "val/loss": 0.5, "train/loss": 0.25}
            for step, value in ((10, 0.5), (20, 0.7), (30, last))
        ]
    shown = terminal(results)
    below = shown[shown.index("Convergence: mean of val/accuracy (%) over the training") :]
    assert "first step \u2265\u00a091.00\u00a0%" in below
    assert "one_shot" not in below
    # (0.5 + 0.7 + 0.96) / 3, and +0.05 / 3 more than dense on average
    line = next(line for line in below.splitlines() if "training_feedback" in line)
    for words in ("72.00 [72.00, 72.00]", "+1.67", "3 of 3", "+0.2500"):
        assert words in line
    assert "2 of 3" in next(line for line in below.splitlines() if "dense" in line and "reference" in line)
    page = read_page(results, tmp_path, monkeypatch)
    assert "Convergence arm mean val/accuracy (%)" in page.text
    assert "training_feedback 72.00 [72.00, 72.00] +1.67" in page.text
    for run in results["runs"]:
        run["curve"] = []
    assert "Convergence" not in terminal(results)
    assert "Convergence" not in read_page(results, tmp_path, monkeypatch).text


def test_a_dynamic_arm_is_shown_against_the_same_done_once(tmp_path, monkeypatch):
    results = make_results(("one_shot", "one_shot_dynamic", "training_dynamic"), seeds=(0, 1, 2))
    for run in results["runs"][6:]:
        run["metrics"]["test/accuracy"] = 0.9 + run["seed"] / 100
    line = next(line for line in terminal(results).splitlines() if "against one_shot_dynamic" in line)
    assert "\u22122.0" in line
    page = read_page(results, tmp_path, monkeypatch)
    assert "Against one_shot_dynamic, which does the same once: \u22122.0" in page.text
    assert len(re.findall("against one_shot_dynamic", page.text)) == 1


def test_learning_curves_are_those_of_trainings_and_show_where_dense_ends():
    lines = {line.get_label(): line for line in plots.plot_learning_curves(make_results()).axes[0].get_lines()}
    assert set(lines) == {*FINAL, "last of dense (mean)"} - {"one_shot", "one_shot_dynamic"}
    ends = [100 * run["curve"][-1]["val/accuracy"] for run in make_results(("dense",))["runs"]]
    assert list(lines["last of dense (mean)"].get_ydata()) == pytest.approx([sum(ends) / 3] * 2)


def test_only_accuracies_are_written_in_percent():
    results = make_results()
    assert MetricFormat.of(results).value(0.5) == "50.00\u00a0%"
    results["study"]["metric"] = "test/loss"  # also within [0, 1]
    assert MetricFormat.of(results).value(0.5) == "0.5000"


def test_refused_results_write_nothing(tmp_path):
    results = make_results()
    results["study"]["metric"] = "test/unknown"
    with pytest.raises(ValueError, match="test/unknown"):
        write_report(results, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_colour_per_arm_in_every_figure():
    results = make_results(seeds=(0, 1))
    for draw in (plots.plot_n_eff, plots.plot_density, plots.plot_learning_curves):
        lines = {line.get_label(): line.get_color() for line in draw(results).axes[0].get_lines()}
        assert lines
        lines.pop("last of dense (mean)", None)
        assert all(color == arm_style(arm).color for arm, color in lines.items())
    assert len({style.color for style in STYLES.values()}) == len(STYLES)
    for family in FAMILIES.values():
        assert len({style.marker for style in family.values()}) == len(family)


def test_density_starts_at_one_and_observed_arms_are_not_drawn_as_pruned():
    lines = {line.get_label(): line for line in plots.plot_density(make_results()).axes[0].get_lines()}
    assert "dense" not in lines
    assert list(lines["one_shot"].get_xdata()) == [0, 30]
    assert list(lines["one_shot"].get_ydata()) == [1.0, 0.60]
    assert "dense" in {line.get_label() for line in plots.plot_n_eff(make_results()).axes[0].get_lines()}


def test_a_dollar_in_a_name_is_no_formula():
    results = make_results(("a$x$",), seeds=(0,))
    assert plots.plot_n_eff(results).axes[0].get_lines()[0].get_label() == r"a\$x\$"


def test_band_runs_from_lowest_to_highest_seed():
    results = make_results(("training_feedback",), seeds=(0, 1))
    results["runs"][1]["trajectory"] = [refresh(step, 0.81) for step in STEPS]
    axes = plots.plot_n_eff(results).axes[0]
    assert axes.get_lines()[0].get_ydata() == pytest.approx([0.71] * 3)
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.61, 0.81))


def test_groups_of_one_refresh_are_weighted_by_their_size():
    small, large = refresh(10, 0.2, group="a"), refresh(10, 0.6, group="b")
    small["n"], large["n"] = 100, 300
    assert plots.group_series([small, large], "density") == pytest.approx({10: 0.5})


def test_plots_without_any_record(tmp_path):
    results = make_results(("dense",), seeds=(0,))
    results["runs"][0].update(trajectory=[], curve=[])
    assert write_report(results, tmp_path).is_file()


def test_trajectory_report(tmp_path):
    records = [refresh(step, 1 - step / 100) for step in STEPS]
    path = write_trajectory_report(records, tmp_path, "run <1>")
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "run &lt;1&gt;" in html
    assert "data:image/png;base64," in html  # the map of layers
    assert png_size((tmp_path / "trajectory.png").read_bytes())[0] == 1200
    for word in ("net.0.weight", "0.9000", "2,500", "N_eff 1,750.0 of 2,500 components"):
        assert word in page.text
    assert len(plots.plot_trajectory(records).axes) == 4  # three panels and a colour bar
    bare = [{**record, "layers": []} for record in copy.deepcopy(records)]
    assert len(plots.plot_trajectory(bare).axes) == 2


def test_trajectory_of_one_refresh_and_of_none(tmp_path):
    assert plots.plot_trajectory([refresh(10, 0.5)]).axes
    with pytest.raises(ValueError, match="no refresh"):
        write_trajectory_report([], tmp_path / "new", "empty")
    assert not (tmp_path / "new").exists()


@pytest.mark.processes
def test_report_imports_neither_pyplot_nor_torch():
    code = (
        "import sys, types\n"
        "for name in ('emp_callbacks', 'emp_callbacks.study'):\n"
        "    package = types.ModuleType(name)\n"
        "    package.__path__ = [sys.argv[1] + '/' + name.replace('.', '/')]\n"
        "    sys.modules[name] = package\n"
        "import emp_callbacks.study.report.report\n"
        "found = {'torch', 'pytorch_lightning', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    root = plots.__file__.rpartition("/emp_callbacks/")[0]
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_certificates_and_the_tight_bound_stand_beside_what_was_measured(tmp_path):
    record = {**refresh(10, 0.6), "beta": 1.0, "tight_mass_bound": 0.6123}
    errors = {"kind": "output_error", "bound": 3.0, "measured": 1.0, "scale": 10.0, "tightness": 0.5}
    record["layers"] = [{**record["layers"][0], "certificate": errors}, {**record["layers"][1], "certificate": None}]
    page = write_trajectory_report([record], tmp_path, "a run").read_text()
    assert "0.6123" in page
    assert "output error &le;" in page
    assert "30.0%" in page
    assert "10.0%" in page
    older = write_trajectory_report([refresh(10, 0.6)], tmp_path, "a run").read_text()
    assert "output error" not in older


@pytest.mark.parametrize(("fraction", "said"), [(0.97, True), (0.6, False)])
def test_a_criterion_that_does_not_discriminate_is_said_on_top(fraction, said, tmp_path):
    records = [{**refresh(step, fraction), "beta": 1.0, "n_eff_fraction": fraction} for step in (10, 20)]
    page = write_trajectory_report(records, tmp_path, "a run").read_text()
    assert ("does not discriminate here" in page) is said
    fixed = [{**record, "beta": None} for record in records]
    assert "does not discriminate here" not in write_trajectory_report(fixed, tmp_path, "a run").read_text()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("study",), None),
        (("study",), "nope"),
        (("study", "higher_is_better"), None),
        (("runs",), {}),
        (("runs", 0), "x"),
        (("runs", 0, "metrics"), [1]),
        (("runs", 0, "metrics", "test/accuracy"), "x"),
        (("runs", 0, "density"), None),
        (("runs", 0, "trajectory", 0, "n"), "x"),
        (("runs", 0, "trajectory", 0, "layers"), 3),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else repr(value),
)
def test_results_of_another_shape_are_one_line_and_nothing_is_written(place, value, tmp_path, capsys):
    results = make_results(arms=("one_shot", "training_feedback"))
    held = results
    for key in place[:-1]:
        held = held[key]
    if value is None:
        del held[place[-1]]
    else:
        held[place[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("emp: ")
    assert str(tmp_path / "results.json") in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": "x"}, "line 2: n must be a number, got 'x'"),
        ({"group": 3}, "line 2: group must be a text, got 3"),
        ({"note": None}, "line 2: note must be a text, got None"),
        ({"layers": [{"name": "a"}]}, "line 2"),
        ({"colour": "red"}, "line 2"),
        ({"n": 0, "n_eff_fraction": True}, "line 2: n_eff_fraction must be a number, got True"),
    ],
)
def test_a_row_of_another_shape_is_named(change, words, tmp_path, capsys):
    rows = [refresh(1, 0.5), {**refresh(2, 0.5), **change}, refresh(3, 0.5)]
    file = tmp_path / "emp_trajectory.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{file}, {words}" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["results.json", "emp_trajectory.jsonl"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]\n[]\n", b"{}\n{}\n"])
def test_a_file_that_is_something_else_is_named(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / name) in message
    assert message.count("\n") == 1
