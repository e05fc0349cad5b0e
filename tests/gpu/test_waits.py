"""On a CUDA device: the host waits for it nowhere between two refreshes, and a few times in one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPPruner
from tests.gpu.common import (
    BEGUN,
    DEVICE,
    FORMS,
    ON_A_GPU,
    ONCE,
    REHEARSAL,
    batches,
    count_waits,
    forms,
    network,
    no_waiting,
)

pytestmark = ON_A_GPU
MOST_WAITS = 12  # in one refresh
FEW, MANY = (1, 2) if REHEARSAL else (4, 16)  # layers


@pytest.mark.skipif(REHEARSAL, reason="nothing waits on a CPU")
def test_waiting_is_seen():
    value = torch.ones(1, device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        value.item()
    assert count_waits(lambda: [value.item(), value.nonzero()]) >= 2
    assert count_waits(lambda: value + 1) == 0


@forms(FORMS)
def test_nothing_waits_between_refreshes(settings):
    model = network().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pruner = EMPPruner(model, optimizer, **(BEGUN if "gates" in settings else ONCE), **settings)
    data = batches()
    given = [next(data) for _ in range(7)]

    def step(images, labels):
        functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()

    for images, labels in given[:3]:  # the refresh, and the first step after it
        step(images, labels)
    assert pruner.trajectory
    with no_waiting():
        for images, labels in given[3:]:
            step(images, labels)
    assert pruner.steps == len(given)


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_waits_of_a_refresh_do_not_grow_with_the_layers(scope, mode, capsys):
    waits = {}
    for layers in (FEW, MANY):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(128, 128, device=DEVICE) for _ in range(layers)))
        pruner = EMPPruner(model, scope=scope, mode=mode)
        pruner.refresh()
        waits[layers] = count_waits(pruner.refresh)
        assert pruner.density < 1
    with capsys.disabled():
        print(f"\nwaits of a refresh, scope={scope}, mode={mode}: {waits}")
    if not REHEARSAL and scope != "row":
        assert waits[MANY] == waits[FEW] <= MOST_WAITS
