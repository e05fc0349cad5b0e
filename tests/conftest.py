"""What holds for every test: tests/process_guard.py watches, tests/extensions.py builds what DeepSpeed needs."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.extensions import ExtensionBuild
from tests.process_guard import ProcessGuard

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported


def pytest_configure(config):
    # Registered by hand, because a conftest's hooks do not see the doctests, which lie outside of its folder.
    config.pluginmanager.register(ProcessGuard(), "process-guard")
    config.pluginmanager.register(ExtensionBuild(), "extension-build")
    # Programs of this environment, such as ninja and torchrun, are found although nobody activated it.
    os.environ.pop("COLUMNS", None)  # pytest-xdist gives its workers 80: tables would be another width there
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


@pytest.fixture
def shm_comm(pytestconfig):
    """Ask for the C++ extension that DeepSpeed's own start compiles; skip where it cannot be built."""
    build = pytestconfig.pluginmanager.get_plugin("extension-build")
    if build.missing:
        pytest.skip(build.missing)
    build.make_ready()
    if build.failure:
        pytest.fail(build.failure, pytrace=False)


@pytest.fixture(params=["cpu", "accelerator"])
def either_path(request):
    """Run a test on a CPU's own path and, with the same tensors, on an accelerator's; the name of which."""
    from tests.accelerator import accelerator_path

    with accelerator_path() if request.param == "accelerator" else contextlib.nullcontext():
        yield request.param
