"""The scripts of examples/ as a new user runs them: from the wheel, in an empty folder, on small local data."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emp_callbacks.core.packing import unpack_bits
from tests.distributed.ranks import run_command

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder to import from that holds what the wheel does."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=120, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(script, folder, installed, options, ranks=1):
    shutil.copy(ROOT / "examples" / script, folder)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    given = [word for key, value in options.items() for word in (f"--{key}", value) if word is not None]
    words = [sys.executable, *(torchrun if ranks > 1 else []), script, *map(str, given)]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = run_command(words, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "emp_callbacks" not in done.stderr.replace(str(installed), "")  # none of our warnings
    return done.stdout


def rows(folder):
    return [json.loads(line) for line in (folder / "emp_trajectory.jsonl").read_text().splitlines()]


def kept(rows):
    return [(row["step"], row["keep"]) for row in rows]


def zeros_of(weights, state):
    """Check that a file's weights obey the masks of a checkpoint; return how many are 0."""
    pruned = 0
    for name, packed in state["masks"].items():
        flat = weights[name].flatten()
        mask = unpack_bits(packed, len(flat))
        assert not flat[~mask].any()
        pruned += int((~mask).sum())
    return pruned


def test_gpt(installed, tmp_path):
    (tmp_path / "tokens").mkdir()
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 200, dtype=np.uint8).astype(np.uint16)
    for name in ("train", "val"):
        text.tofile(tmp_path / f"tokens/{name}.bin")
    small = {
        "steps": 6, "layers": 1, "heads": 2, "width": 16, "length": 16, "batch-size": 2, "eval-every": 3, "warmup": 2,
        "emp-every": 2, "emp-mode": "freeze", "emp-criterion": "taylor",
    }  # fmt: skip
    printed = run("gpt_train.py", tmp_path, installed, small)
    assert "step 6/6" in printed
    whole = torch.load(tmp_path / "out/step-6.pt", weights_only=True)
    assert zeros_of(load_file(tmp_path / "out/model/model.safetensors"), whole["emp"]) > 500
    run("gpt_train.py", tmp_path, installed, small | {"resume": "out/step-3.pt", "out": "again"})
    again = torch.load(tmp_path / "again/step-6.pt", weights_only=True)
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())
    assert kept(rows(tmp_path / "again")) == kept(rows(tmp_path / "out"))
    run("gpt_train.py", tmp_path, installed, small | {"out": "two"}, ranks=2)
    alone, shared = rows(tmp_path / "out"), rows(tmp_path / "two")
    assert [row["step"] for row in shared] == [2, 4, 6]
    assert [row["n_eff"] for row in shared] == pytest.approx([row["n_eff"] for row in alone], rel=1e-3)


def test_timm(installed, tmp_path):
    small = {
        "demo": None, "epochs": 2, "batch-size": 240, "emp-every": 2, "mixup": 0.2, "layer-decay": 0.75,
        "channels-last": None, "emp-mode": "freeze", "emp-min-density": 0.2, "model": "test_resnet", "amp": None,
    }  # fmt: skip
    printed = run("timm_train.py", tmp_path, installed, small)
    assert "epoch 2/2" in printed
    whole = torch.load(tmp_path / "out/epoch-2.pt", weights_only=True)
    for name in ("model", "ema"):
        assert zeros_of(load_file(tmp_path / f"out/{name}.safetensors"), whole["emp"]) > 1000
    shutil.copytree(tmp_path / "out/digits", tmp_path / "again/digits")
    run("timm_train.py", tmp_path, installed, small | {"resume": "out/epoch-1.pt", "out": "again"})
    again = torch.load(tmp_path / "again/epoch-2.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], value) for name, value in whole[part].items())
    assert kept(rows(tmp_path / "again")) == kept(rows(tmp_path / "out"))
