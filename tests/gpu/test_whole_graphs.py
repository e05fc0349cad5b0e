"""On a CUDA device: a whole training step in a CUDA graph works as without, or is refused in one line.

The file is the last of its folder: a capture that fails may leave the device's allocator unusable.
"""

from contextlib import nullcontext

import torch
from torch.nn import functional

from emp_callbacks import EMPPruner
from tests.gpu.common import (
    DEVICE,
    IN_FORWARD,
    MODES,
    ON_A_GPU,
    ONCE,
    REHEARSAL,
    batches,
    check_zero_where_pruned,
    dense_values,
    forms,
    network,
)

pytestmark = ON_A_GPU
STEPS = 3


class Training:
    """One network, its pruner, and a step on the same batch each time."""

    def __init__(self, settings):
        self.model = network().to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, capturable=not REHEARSAL)
        self.pruner = EMPPruner(self.model, self.optimizer, **ONCE, **settings)
        self.images, self.labels = next(batches())
        self.stream = None if REHEARSAL else torch.cuda.Stream()

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def warm_up(self):
        """Refresh, and step on the stream that captures: a capture asks for that."""
        with nullcontext() if REHEARSAL else torch.cuda.stream(self.stream):
            for _ in range(4):
                self.step()
                self.pruner.step()
        if not REHEARSAL:
            torch.cuda.synchronize()
        assert self.pruner.trajectory

    def captured(self):
        """Return what replays a step; None where it is refused in one line of ours."""
        if REHEARSAL:
            return self.step
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
        except Exception as error:
            if is_refusal(error):
                return None
            raise
        finally:
            torch.cuda.set_stream(stream)  # which a capture that failed does not put back
        return graph.replay


def is_refusal(error):
    """Whether an error says in one line that CUDA graphs are not supported, and is none of CUDA's own."""
    told = str(error)
    return "CUDA graph" in told and "\n" not in told.strip() and not told.startswith("CUDA error")


def check_same(ours, twin):
    expected = dense_values(twin.pruner, twin.model)
    for name, value in dense_values(ours.pruner, ours.model).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )


@forms({**MODES, **IN_FORWARD})
def test_a_captured_step_is_a_step_or_refused(settings, capsys):
    ours, twin = Training(settings), Training(settings)
    ours.warm_up()
    twin.warm_up()
    before = dense_values(ours.pruner, ours.model)
    replay = ours.captured()
    if replay is None:
        return report(settings, "refused", capsys)
    for _ in range(STEPS):
        replay()
        twin.step()
    after = dense_values(ours.pruner, ours.model)
    assert all(not torch.equal(before[name], after[name]) for name in ours.pruner.weight_masks)
    check_same(ours, twin)
    if settings.get("mode") in ("feedback", "freeze", "rewire") and "target" not in settings:
        check_zero_where_pruned(ours.pruner, ours.model)
    return report(settings, "works", capsys)


@forms({name: MODES[name] for name in ("feedback", "project", "freeze")})
def test_a_captured_step_follows_a_refresh_or_is_refused(settings, capsys):
    ours, twin = Training(settings), Training(settings)
    ours.warm_up()
    twin.warm_up()
    replay = ours.captured()
    if replay is None:
        return report(settings, "refused, also before a refresh", capsys)
    for _ in range(STEPS):
        replay()
        twin.step()
    try:
        ours.pruner.refresh()
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        return report(settings, "a refresh after it is refused", capsys)
    twin.pruner.refresh()
    for _ in range(STEPS):
        replay()
        twin.step()
    check_same(ours, twin)
    if settings["mode"] != "project":
        check_zero_where_pruned(ours.pruner, ours.model)
    return report(settings, "works over a refresh", capsys)


def report(settings, what, capsys):
    with capsys.disabled():
        print(f"\na step in a CUDA graph, {settings}: {what}")
