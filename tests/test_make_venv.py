"""What `make` does about an environment that is foreign, half-made, or cannot be filled; no network is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "make_venv.py"
pytestmark = pytest.mark.processes


def make_venv(*words):
    # Without index and links, pip is as good as offline.
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, **settings},
    )
    return done.returncode, done.stderr.splitlines()


def pretend(venv, version):
    """Write what looks like an environment of some version."""
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    python = venv / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)


@pytest.mark.parametrize("is_ours", [False, True])
def test_another_python_is_refused_and_nothing_deleted(is_ours, tmp_path):
    pretend(tmp_path, "3.9")
    if is_ours:
        (tmp_path / ".made-by-make").touch()
    code, (line,) = make_venv(tmp_path, "study", ".installed-study")
    assert code == 1
    assert "is of Python 3.9" in line
    assert ("`make clean` removes it" if is_ours else "move it away") in line
    assert "PYTHON=" not in line, "a Python that is too old is no way out"
    assert (tmp_path / "bin" / "python").exists()
    assert not (tmp_path / ".installed-study").exists()


def test_one_that_is_new_enough_can_be_kept(tmp_path):
    pretend(tmp_path, "3.99")
    code, (line,) = make_venv(tmp_path, "study", ".installed-study")
    assert code == 1
    assert f"or set PYTHON={tmp_path}/bin/python" in line


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes").touch()
    code, (line,) = make_venv(tmp_path, "study", ".installed-study")
    assert code == 1
    assert "is not made by make" in line
    code, (line,) = make_venv(tmp_path, "--remove")
    assert code == 1
    assert "remove it yourself" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_half_made_is_made_again_and_without_an_index_nothing_is_stamped(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".made-by-make").touch()
    (venv / "lib").mkdir()
    for _ in range(2):  # half-made, then whole but older than pyproject.toml
        (venv / ".installed-study").touch()
        code, (line,) = make_venv(venv, "study", ".installed-study")
        assert code == 1
        assert "no network, or no package index" in line
        assert (venv / "bin" / "python").exists()
        assert not (venv / ".installed-study").exists()
    assert make_venv(venv, "--remove") == (0, [])
    assert not venv.exists()


@pytest.mark.parametrize(
    ("error", "says_so"),
    [("WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'", True), ("no wheel", False)],
)
def test_a_network_that_ends_in_the_middle_is_named(error, says_so):
    loaded = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    done = subprocess.CompletedProcess([], 1, stderr=f"{error}\nERROR: No matching distribution found for timm\n")
    with pytest.raises(module.VenvError, match="pip could not install it: ERROR: No matching") as raised:
        module.must(done, "pip could not install it")
    assert str(raised.value).startswith("no network") == says_so
