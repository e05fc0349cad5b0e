"""Cluster files: what sbatch reads of them, where they put things, and that every shipped recipe parses.

That the scripts do on a Slurm what they say is tried with tools/local_slurm.sh.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from emp_callbacks.cli.recipes import shipped_recipes
from emp_callbacks.study.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "recipes" / "cluster"
BATCH = sorted(CLUSTER.glob("*.sbatch"))
SCRIPTS = [*BATCH, CLUSTER / "torchrun.sh"]
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def directives_after_a_command(text):
    """Return the #SBATCH lines that sbatch does not read: those behind the first line that is no comment."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return [line for line in lines[first:] if "#SBATCH" in line]


def directives(text):
    return dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line).groups() for line in re.findall("^#SBATCH.*", text, re.M)
    )


def lacks_a_folder_of_its_own(text):
    """Whether a script trains where another job does, too: a fit takes its folder, and a study is given one."""
    if " emp fit " in text:
        own = re.search(r"^ *RUN=\$\{RUN:-runs/fit-\$(SLURM_JOB_ID|\(date [^)]*\))\}$", text, re.M)
        return not (own and re.search(r'--trainer\.default_root_dir "\$RUN"', text))
    return "--out DIR" not in text


def test_there_are_these_files():
    strategies = {f"{name}.yaml" for name in STRATEGIES}
    scripts = {"torchrun.sh", "slurm_fit.sbatch", "slurm_study.sbatch", "kubernetes.yml"}
    assert {path.name for path in CLUSTER.iterdir()} == strategies | scripts


@pytest.mark.processes
@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "tools" / "local_slurm.sh"], ids=lambda path: path.name)
def test_a_script_is_bash_and_no_directive_stands_behind_a_command(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert directives_after_a_command(script.read_text()) == []
    moved = script.read_text() + "#SBATCH --requeue\n"
    assert directives_after_a_command(moved) == ["#SBATCH --requeue"]


@each_script
def test_a_script_trains_in_a_folder_of_its_own(script):
    text = script.read_text()
    assert not lacks_a_folder_of_its_own(text)
    assert lacks_a_folder_of_its_own(re.sub(r"(--trainer\.default_root_dir|--out) \S+", "", text))
    assert not re.search(r"\brecipes/", text)  # where the package is installed there is no such folder


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_batch_script_asks_for_what_a_preempted_job_needs(script):
    found = directives(script.read_text())
    assert found["signal"] == "SIGUSR1@300"  # no B: the tasks of srun get it, and not the shell
    assert "requeue" in found
    assert found["open-mode"] == "append"  # or a requeued job empties its log
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output"} <= found.keys()
    assert re.search(r'^"\$\{LAUNCH\[@\]\}" emp (fit|compare) ', script.read_text(), re.M)


@pytest.mark.processes
def test_a_fit_goes_on_from_the_newest_checkpoint_and_keeps_two_of_lightnings(tmp_path):
    def start(*words):
        said = subprocess.run(
            ["bash", str(CLUSTER / "slurm_fit.sbatch"), "mine", *words],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "RUN": "run", "STRATEGY": "ddp"} | SLURM,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return said.split()

    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    first = start("--trainer.max_steps", "9")
    assert first[:8] == ["emp", "fit", "--config", "mine", "--config", "cluster/ddp", "--trainer.max_steps", "9"]
    assert first[8:] == ["--trainer.num_nodes", "2", "--trainer.devices", "4", "--trainer.default_root_dir", "run"]
    (tmp_path / "run" / "checkpoints").mkdir()
    for age, name in enumerate(["hpc_ckpt_3.ckpt", "checkpoints/last.ckpt", "hpc_ckpt_2.ckpt", "hpc_ckpt_1.ckpt"]):
        (tmp_path / "run" / name).touch()
        os.utime(tmp_path / "run" / name, (10**9 - age, 10**9 - age))
    given = ["--ckpt_path", "given.ckpt"]
    assert start(*given)[6:10] == [*given, "--ckpt_path", "run/hpc_ckpt_3.ckpt"]
    assert sorted(path.name for path in (tmp_path / "run").glob("hpc*")) == ["hpc_ckpt_2.ckpt", "hpc_ckpt_3.ckpt"]
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    assert start()[6:8] == ["--ckpt_path", "run/checkpoints/last.ckpt"]


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "1",
    "MASTER_ADDR": "n1",
}


@pytest.mark.processes
def test_a_task_of_a_study_takes_its_line_of_the_cells_and_task_0_merges(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "cells.txt").write_text("dense:0\nrandom:0\n")
    words = ["bash", str(CLUSTER / "slurm_study.sbatch"), "cells.txt", "--config", "mine", "--out", "out"]
    compare = "emp compare --config mine --out out"
    for task, code, said in ((0, 0, compare), (2, 0, f"{compare} --only random:0"), (3, 2, "cells.txt has no line 3")):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(words, env=environment | SLURM, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("cluster/")])
def test_every_shipped_recipe_parses(name):
    recipe = Recipe(shipped_recipes()[name], called=name)
    assert recipe.resolved()["model"]["class_path"]


def test_a_strategy_is_laid_over_any_recipe():
    for name in STRATEGIES:
        over = Recipe(shipped_recipes()["gpt_stdlib"], ["--config", str(CLUSTER / f"{name}.yaml")]).resolved()[
            "trainer"
        ]
        strategy = over["strategy"]
        assert over["max_steps"] == 1800
        found = strategy if isinstance(strategy, str) else strategy["class_path"].rpartition(".")[2]
        assert found == {"ddp": "ddp", "fsdp2": "FSDP2Strategy"}.get(name, "ZeRODeepSpeedStrategy")


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_accepts_the_strategies_settings(stage):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    read = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed").DeepSpeedConfig
    strategy = yaml.safe_load((CLUSTER / f"zero{stage}.yaml").read_text())["trainer"]["strategy"]
    config = read({**strategy["init_args"]["config"], "train_micro_batch_size_per_gpu": 1})
    assert config.zero_optimization_stage == stage


def test_the_kubernetes_job_starts_as_many_pods_and_processes_as_its_training_expects():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = dict(word[2:].partition("=")[::2] for word in container["args"] if word.startswith("--"))
    assert {spec["completions"], spec["parallelism"]} == {int(words["nnodes"])} == {int(words["trainer.num_nodes"])}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(words["nproc-per-node"]) == int(words["trainer.devices"])
    assert service["metadata"]["name"] == pod["subdomain"]
    assert words["rdzv-endpoint"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert words["config"] in shipped_recipes()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.processes
def test_torchrun_restarts_workers_that_go_on_from_the_last_checkpoint(tmp_path):
    def start(*words, **environment):
        return subprocess.run(
            ["bash", str(CLUSTER / "torchrun.sh"), *words],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PROCESSES": "2", **environment},
            capture_output=True,
            text=True,
        )

    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    words = start("mine", "--trainer.max_steps", "9", RUN="run", STRATEGY="zero3").stdout.split()
    at = words.index("emp")
    assert words[:at] == [
        "--standalone",
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        "--no-python",
    ]
    assert words[at + 2 : at + 6] == ["--config", "mine", "--config", "cluster/zero3"]
    assert words[-4:] == ["--trainer.default_root_dir", "run", "--ckpt_path", "last"]
    assert re.search(r" runs/fit-\d{8}-\d{6} --ckpt_path last$", start("mine").stdout.strip())
    several = start("mine", NODES="2", RENDEZVOUS="n1:29400", RUN="shared/fit").stdout
    assert several.startswith("--rdzv-backend c10d --rdzv-endpoint n1:29400 --rdzv-id fit --nnodes 2 ")
    assert "RUN: a folder that all nodes see" in start("mine", NODES="2", RENDEZVOUS="n1:29400").stderr
