"""In a rehearsal the accelerator's path runs, on the CPU's tensors."""

import pytest

from emp_callbacks.core import device
from tests.gpu.common import REHEARSAL


@pytest.fixture(autouse=True)
def accelerator_path(monkeypatch):
    if REHEARSAL:
        monkeypatch.setattr(device, "_AT_ONCE", frozenset())
