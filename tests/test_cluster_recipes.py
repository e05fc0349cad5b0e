"""The cluster files are parsed; the single-node form runs on two CPU processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ranks

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "recipes" / "cluster"
SCRIPTS = sorted([*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")])


def test_there_are_scripts_and_configs():
    assert {path.name for path in CLUSTER.iterdir()} == {
        "torchrun.sh",
        "slurm_fit.sbatch",
        "slurm_study.sbatch",
        "deepspeed_zero2.json",
        "deepspeed_zero3.json",
    }


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_name_recipes_that_exist(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    text = script.read_text()
    for recipe in re.findall(r"recipes/[\w/.]+\.(?:yaml|json|sh|sbatch)", text):
        assert (ROOT / recipe).is_file(), recipe
    assert len(re.findall(r"^# -{60,}|^# --- edit", text, flags=re.MULTILINE)) == 2


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configs_are_what_deepspeed_accepts(stage):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    read = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed").DeepSpeedConfig
    settings = json.loads((CLUSTER / f"deepspeed_zero{stage}.json").read_text())
    config = read({**settings, "train_micro_batch_size_per_gpu": 1})
    assert config.zero_optimization_stage == stage


def test_the_study_script_counts_the_cells_of_its_recipe(monkeypatch, capsys):
    from emp_callbacks.cli.main import main

    assert main(["compare", "--config", str(ROOT / "recipes/gpt_stdlib.yaml"), "--list-cells"]) == 0
    cells = capsys.readouterr().out.split()
    text = (CLUSTER / "slurm_study.sbatch").read_text()
    first, then = (range(int(a), int(b) + 1) for a, b in re.findall(r"--array=(\d+)-(\d+)", text))
    followers = [i for i, cell in enumerate(cells, start=1) if cell.startswith(("fixed", "random"))]
    assert [*first, *then] == list(range(1, len(cells) + 1))
    assert list(then) == followers


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_trains_on_two_processes(strategy, tmp_path):
    binaries = Path(sys.executable).parent
    if not (binaries / "torchrun").exists() or shutil.which("bash") is None:
        pytest.skip("torchrun is not installed beside this Python")
    tiny = ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    tiny += ["--model.init_args.n_layer", "1", "--model.init_args.n_embd", "16", "--trainer.val_check_interval", "4"]
    tiny += [
        "--data.init_args.max_bytes",
        "60000",
        "--trainer.logger",
        "false",
        "--trainer.callbacks.every_n_steps",
        "2",
    ]
    environment = {**os.environ, "STRATEGY": strategy, "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    run = tmp_path / "run"
    words = ["bash", str(CLUSTER / "torchrun.sh"), *tiny, "--trainer.default_root_dir", str(run)]
    done = ranks.run_command(words, written=run, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "emp_trajectory.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
