"""`emp submit` with an sbatch that writes down what it is told."""

import re
import subprocess

import pytest

from emp_callbacks.cli.main import main
from emp_callbacks.study.submission import levels
from tests.cli.test_main import write_recipe

SBATCH = """\
#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done > "{folder}/call-$(ls {folder} | grep -c call)"
case "$*" in *{refused}*) echo "sbatch: error: {refused} is not for you" >&2; exit 1;; esac
expr 100 + "$(ls {folder} | grep -c call)"
"""
FIRST = ["dense:0", "training_freeze:0", "dense:1", "training_freeze:1"]
THEN = ["random:0", "random:1"]
STUDY = {"seeds": [0, 1], "arms": ["dense", "one_shot", "training_freeze", "random"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a recipe, and with an sbatch on the PATH."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, "study", **STUDY)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "sbatch").write_text(SBATCH.format(folder=tmp_path, refused="--account=theirs"))
    (binaries / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    return tmp_path


def calls(folder):
    """Return what each call of sbatch was told."""
    return [path.read_text().splitlines() for path in sorted(folder.glob("call-*"))]


@pytest.mark.processes
def test_a_study_is_arrays_that_follow_each_other_and_a_merge(folder, capsys):
    words = ["--array", "--gpus", "1", "--time", "60", "--account", "mine", "--throttle", "3", "--sbatch=--qos=low"]
    assert main(["submit", "--config", "recipe.yaml", *words, "--out", "out", "--model.init_args.lr", "0.01"]) == 0
    assert capsys.readouterr().out == "job 101: 4 trainings\njob 102: 2 trainings\njob 103: merge and report\n"
    first, then, merge = calls(folder)
    options = ["--parsable", "--time=60", "--account=mine", "--gpus-per-node=1", "--ntasks-per-node=1", "--qos=low"]
    assert first[:7] == [*options, "--array=1-4%3"]
    assert then[:9] == [*options, "--array=5-6%3", "--dependency=afterok:101", "--kill-on-invalid-dep=yes"]
    assert merge[:9] == [*options, "--array=0", "--dependency=afterok:102", "--kill-on-invalid-dep=yes"]
    script, cells, *rest = first[7:]
    assert script.endswith("recipes/cluster/slurm_study.sbatch")
    assert rest == ["--config", "recipe.yaml", "--out", "out", "--model.init_args.lr", "0.01"]
    assert first[7:] == then[9:] == merge[9:]
    assert (folder / cells).read_text().split() == FIRST + THEN


@pytest.mark.processes
def test_the_same_command_again_submits_what_is_left(folder, capsys):
    assert main(["compare", "--config", "recipe.yaml", "--out", "out", "--only", "training_freeze:0"]) == 0
    assert main(["submit", "--config", "recipe.yaml", "--out", "out", "--array"]) == 0
    first, then, merge = calls(folder)
    assert "--array=1,3-5" in first  # random:0, too: what it needs is finished
    assert "--array=6" in then
    assert "--array=0" in merge


@pytest.mark.processes
def test_a_refusal_of_sbatch_is_one_line_that_names_the_jobs_before(folder, capsys):
    refused = ["submit", "--config", "recipe.yaml", "--account", "theirs"]
    assert main(refused) == 2
    message = capsys.readouterr().err
    assert message == "emp: sbatch refused the job of training: sbatch: error: --account=theirs is not for you\n"
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("--account=theirs", "afterok"))
    assert main(["submit", "--config", "recipe.yaml", "--array", "--out", "out"]) == 2
    assert capsys.readouterr().err.endswith("; submitted before it, and waiting: scancel 102\n")


@pytest.mark.processes
def test_a_dry_run_and_a_machine_without_slurm_show_the_lines_and_the_script(folder, monkeypatch, capsys):
    words = ["submit", "--config", "recipe.yaml", "--array", "--out", "out", "--study.seeds", "[0, 1]"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not (folder / "out").exists()
    assert calls(folder) == []
    lines = [line for line in shown.splitlines() if line.startswith("JOB")]
    assert "\n#SBATCH --requeue\n" in shown
    subprocess.run(["bash", "-c", "\n".join(lines)], check=True)
    assert main(words) == 0
    told = [[re.sub(r"afterok:\d+", "afterok:N", word) for word in call] for call in calls(folder)]
    assert len(told) == 6
    assert told[:3] == told[3:]
    capsys.readouterr()
    (folder / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    assert main(words) == 2
    again = capsys.readouterr()
    assert again.err == "emp: there is no sbatch on this machine: nothing was submitted; the lines above do it\n"
    assert [line for line in again.out.splitlines() if line.startswith("JOB")] == lines


@pytest.mark.processes
def test_a_training_is_one_job(folder, capsys):
    words = ["submit", "--config", "recipe.yaml", "--config", "cluster/ddp", "--gpus", "0", "--nodes", "2"]
    assert main([*words, "--ckpt_path", "a.ckpt", "--trainer.devices", "3"]) == 0
    assert capsys.readouterr().out == "job 101: training\n"
    (told,) = calls(folder)
    assert told[:4] == ["--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=3"]
    assert told[4].endswith("recipes/cluster/slurm_fit.sbatch")
    assert told[5:] == ["recipe.yaml", "--config", "cluster/ddp", "--trainer.devices", "3", "--ckpt_path", "a.ckpt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_epoch", "3"], "did you mean '--trainer.max_epochs'"),
        (["--gpu", "3"], "unknown option '--gpu'"),
        (["--throttle", "3"], "--throttle is for a study: add --array"),
        (["--out", "x"], "--out is for a study: add --array"),
        (["--array", "--ckpt_path", "a.ckpt"], "--ckpt_path is for one training"),
        (
            ["--array", "--gpus", "4"],
            "trainer.devices=1, and its jobs have 4: add --gpus 1, or --trainer.devices 4",
        ),
        (
            ["--array", "--nodes", "2"],
            "trainer.num_nodes=1, and its jobs have 2: add --nodes 1, or --trainer.num_nodes 2",
        ),
        (["--script", "none.sbatch"], "script none.sbatch does not exist"),
        (["--array", "--out", "bin"], "bin is not empty and was not written by emp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_run_is_not_submitted(words, said, folder, capsys):
    assert main(["submit", "--config", "recipe.yaml", *words]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert calls(folder) == []


def test_trainings_wait_for_those_that_are_not_finished():
    assert levels({"c": ["b"], "b": ["a"], "a": ["finished"], "d": []}) == [["a", "d"], ["b"], ["c"]]
