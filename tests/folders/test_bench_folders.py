"""The benchmark of memory and time: what it measures of a child, and that it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emp_callbacks.cli.main import main

ROOT = Path(__file__).parents[2]
MB = 10**6

pytestmark = pytest.mark.processes


def measured(*words):
    """Return what the benchmark measures of a command, as a process without torch does: a child's peak begins there."""
    script = f"import json, bench_folders; print(json.dumps(bench_folders.measured({list(words)!r})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_the_peak_of_a_child_is_its_own_and_not_what_it_ends_with():
    empty = json.loads(measured(sys.executable, "-c", "pass").stdout)
    grown = json.loads(measured(sys.executable, "-c", "x = b'x' * 300_000_000; del x").stdout)
    assert grown["peak"] - empty["peak"] == pytest.approx(300 * MB, rel=0.05)


def test_a_command_that_fails_is_said_with_what_it_said():
    done = measured(sys.executable, "-c", "import sys; print('no such weights'); sys.exit(3)")
    assert done.returncode
    assert "ended with 3: no such weights" in done.stderr


@pytest.mark.slow
def test_the_benchmark_measures_commands_and_leaves_no_folder_behind(tmp_path):
    out = tmp_path / "folders.json"
    words = ["--quick", "--commands", "inspect", "wanda", "--scratch", str(tmp_path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "benchmarks/bench_folders.py")
    done = subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    told = json.loads(out.read_text())
    assert [row["command"] for row in told["rows"]] == ["inspect", "wanda"]
    for row in told["rows"]:
        assert row["bytes"] == 2 * row["parameters"]
        assert row["peak"] > told["empty_process"]["peak"]
        assert row["allowed"] == 2 * row["block_bytes"] + row["activations"] + 10**9
        assert row["holds"] == (row["peak"] <= row["allowed"])
        assert f"| {row['command']} | {row['seconds']:.1f} |" in done.stdout
    assert list(tmp_path.iterdir()) == [out]


def test_the_other_commands_are_those_of_emp(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_folders
    import make_llama_folder

    options = bench_folders.parsed(["--quick"])
    assert set(options.commands) == {"inspect", "wanda", "magnitude", "perplexity"}
    ((layers, hidden),) = options.folders
    config = make_llama_folder.llama_config(layers=layers, hidden=hidden, vocabulary=options.vocabulary)
    make_llama_folder.write_folder(tmp_path / "model", config, shard_bytes=10**6)
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text()[: options.samples * options.length])
    for command in ("magnitude", "perplexity"):
        _, _, _, *words = bench_folders.command_line(command, tmp_path, options)
        assert main(words) == 0, capsys.readouterr().err
