"""What `make gpu` runs is rehearsed on the CPU: a GPU is at hand for minutes, too few to look for a typo."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = {"refresh", "steps", "launches", "memory"}
CONTESTANTS = {"freeze", "feedback", "project", "rewire", "features", "torch prune"}

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = run("benchmarks/bench_gpu.py", "--rehearse", "--out", str(out))
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_part_of_the_benchmark_runs(rehearsal):
    _, record = rehearsal
    assert {"card", "command", "date", "machine", "cuda", "rehearsal", "parts"} <= record.keys()
    assert record["rehearsal"]
    assert record["parts"].keys() == PARTS
    for part in record["parts"].values():
        assert part["rows"]
        assert not part["failed"]
        assert all({"what", "value", "unit", "target", "at_least", "met"} == row.keys() for row in part["rows"])


def test_every_contestant_masks(rehearsal):
    parts = rehearsal[1]["parts"]
    densities = {}
    for variant, figures in parts["steps"]["figures"].items():
        assert figures.keys() == CONTESTANTS | {"no pruning"}
        densities |= {f"{variant}: {name}": each["density"] for name, each in figures.items() if name != "no pruning"}
    for name, figures in parts["refresh"]["figures"].items():
        densities |= {f"{name}, {form}": each["density"] for form, each in figures["refresh"].items()}
    densities |= {f"memory, {mode}": each["density"] for mode, each in parts["memory"]["figures"].items()}
    assert all(0 < density < 1 for density in densities.values()), densities
    # torch's own pruning has EMP's masks, and so the same density.
    assert densities["autocast: torch prune"] == pytest.approx(densities["autocast: freeze"], abs=1e-3)


def test_targets_stand_beside_the_figures(rehearsal):
    printed, record = rehearsal
    rows = [row for part in record["parts"].values() for row in part["rows"] if row["target"] is not None]
    targets = {row["target"] for row in rows}
    assert targets == {6.0, 20.0, 1.01, 1.02, 0.0, 1.1, 5.1}
    assert printed.count("target >= ") + printed.count("target <= ") == len(rows)


def test_the_benchmark_refuses_where_no_gpu_is():
    done = run("benchmarks/bench_gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout


def test_what_make_gpu_lacks_is_said_in_one_line(monkeypatch):
    monkeypatch.delenv("EMP_GPU_REHEARSAL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:  # of a text: Python writes it to stderr and exits with 1
        runpy.run_path(str(ROOT / "tools/gpu_ready.py"), run_name="__main__")
    assert left.value.code.startswith("make gpu: ")
    assert "\n" not in left.value.code
    assert "sees no CUDA device" in left.value.code


def test_tests_for_a_gpu_run_without_plugins_of_pytest():
    """As `make gpu` runs them, with no pytest-timeout and no hypothesis; those of one mode, which pass every helper."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:timeout", "-p", "no:hypothesispytest"]
    # Rows and bfloat16 take minutes on a CPU, and go through nothing that others do not, nor does a model that is not
    # wrapped; a step that is skipped goes through all lines with a fused optimizer and with clipping.
    few = "feedback and not lightning and not row-feedback and not bfloat16 and not plain"
    few += " and (not skips or (fused and clips))"
    chosen = ["-m", "gpu and not compiler", "-k", few, "--import-mode=importlib", "-q"]
    done = run("-m", "pytest", "tests/gpu", *options, *chosen, EMP_GPU_REHEARSAL="cpu")
    assert not done.returncode, done.stdout + done.stderr
    assert "passed" in done.stdout
