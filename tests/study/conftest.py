import pytest
import torch

from emp_callbacks.study.training import Training


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Train on one thread: nothing here is large, and two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fits(monkeypatch):
    """Count trainings."""
    calls = []
    fit = Training.fit

    def counted(self):
        calls.append(self)
        fit(self)

    monkeypatch.setattr(Training, "fit", counted)
    return calls
