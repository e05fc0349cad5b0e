"""The import contracts hold, and are seen to fail on what they forbid."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")

PLANTED = {
    "upward": ("core/packing.py", "from emp_callbacks.layer import segment", "layer"),
    "upward, for type checking only": (
        "schedule.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from emp_callbacks.pruning import pruner",
        "schedule",
    ),
    "between rooms on one line": ("integrations/deepspeed.py", "from emp_callbacks.cost import curvature", "cost"),
    "a circle in a room": ("study/once/results.py", "from emp_callbacks.study.once import beta_sweep", "No cycles"),
    "a framework in the core": ("pruning/audit.py", "import scipy", "scipy"),
    "a room that no line names": ("new_room/__init__.py", '"""New."""', "new_room"),
}


def linted(folder):
    return subprocess.run([str(LINTER), "--no-cache"], capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if not LINTER.exists():
        pytest.skip("import-linter is not installed")
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "emp_callbacks", folder / "emp_callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.processes
def test_the_contracts_hold(tree):
    done = linted(tree)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_breaks_a_contract(planted, tree):
    file, line, named = PLANTED[planted]
    path = tree / "emp_callbacks" / file
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        done = linted(tree)
        assert done.returncode == 1, done.stdout
        assert named in done.stdout.partition("Broken contracts")[2]
    finally:
        if before is None:
            shutil.rmtree(path.parent)
        else:
            path.write_text(before)


def test_rooms_stay_small():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "emp_callbacks").rglob("*.py")}
    assert max(lengths.values()) <= 350, max(lengths, key=lengths.get)
