"""Reading a forward pass leaves other threads alone."""

import threading

from torch import nn

from emp_callbacks.targets.tracing import traced


class Waiting(nn.Module):
    """Runs what another thread does while it is traced."""

    def __init__(self, meanwhile):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self._meanwhile = [meanwhile]

    def forward(self, inputs):
        other = threading.Thread(target=self._meanwhile[0])
        other.start()
        other.join(10)
        return self.inner(inputs)


def test_a_model_that_another_thread_runs_meanwhile_is_run(recwarn):
    import torch

    model, outputs = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
    expected = model(torch.ones(1, 3))
    graph = traced(Waiting(lambda: outputs.append(model(torch.ones(1, 3)))))
    assert graph is not None
    assert torch.equal(outputs[0], expected)


def test_traces_of_several_threads_leave_nothing_behind():
    call, threads = nn.Module.__call__, []
    for _ in range(8):
        models = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(20)]
        threads.append(threading.Thread(target=lambda models=models: [traced(model) for model in models]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert nn.Module.__call__ is call
