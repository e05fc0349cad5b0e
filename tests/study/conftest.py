import pytest

from emp_callbacks.study.training import Training


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
