import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

KERNELS = Path(__file__).parents[2] / "emp_callbacks" / "core" / "kernels"
triton = pytest.importorskip("triton", reason="no Triton: its kernels are not used")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.compiler
@pytest.mark.skipif(Version(triton.__version__) < Version("3.4"), reason="another interface of Triton's compiler")
def test_every_kernel_compiles_for_cuda_without_a_device(tmp_path):
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert not done.returncode, done.stderr[-2000:]


def test_every_launch_is_on_the_device_of_its_tensors():
    # Triton launches on the current device, and addresses in a table tell it nothing: on another GPU it would fail.
    launches = 0
    for file in KERNELS.glob("*.py"):
        lines = file.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            if re.match(r"\s+(_[a-z_]+|kernel)\[.+\]\(", line):
                launches += 1
                assert before.strip().startswith("with launching("), f"{file.name}: {line.strip()}"
    assert launches == 11
