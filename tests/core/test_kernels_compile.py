import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

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
