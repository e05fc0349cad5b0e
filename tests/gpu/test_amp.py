"""On a CUDA device: steps that a GradScaler skips are none, and fused attention changes nothing."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from emp_callbacks import EMPPruner
from tests.gpu.common import (
    DEVICE,
    IN_FORWARD,
    LOW_PRECISION,
    MODES,
    ON_A_GPU,
    ONCE,
    REHEARSAL,
    batches,
    check_alike,
    check_zero_where_pruned,
    dense_values,
    forms,
    network,
    trained,
)

pytestmark = ON_A_GPU


@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@forms(MODES)
def test_a_step_that_a_scaler_skips_is_none(settings, fused, clips):
    model = network().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    pruner = EMPPruner(model, optimizer, **ONCE, **settings)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, growth_interval=1000)
    data = batches()

    def step(factor=1.0):
        images, labels = next(data)
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss * factor).backward()
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruner.step()

    def state():
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        return weights, dense_values(pruner, model), {name: mask.clone() for name, mask in pruner.masks.items()}

    for _ in range(3):
        step()
    assert pruner.steps == 3
    before = state()
    step(float("inf"))
    assert pruner.steps == 3
    for then, now in zip(before, state(), strict=True):
        assert all(torch.equal(then[name], now[name]) for name in then)
    step()
    assert pruner.steps == 4
    assert any(not torch.equal(before[0][name], value) for name, value in state()[0].items())
    if settings["mode"] != "project":
        check_zero_where_pruned(pruner, model)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=str)
@forms(IN_FORWARD)
def test_fused_attention_changes_nothing(settings, kernel):
    with contextlib.nullcontext() if REHEARSAL else sdpa_kernel(kernel):
        fused = trained(settings, autocast=torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        plain = trained(settings, autocast=torch.bfloat16)
    check_alike(fused, plain, LOW_PRECISION)
