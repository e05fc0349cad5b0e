"""What the tests on a GPU share: one small network, one way to train it, and how waits for the device are seen.

EMP_GPU_REHEARSAL=cpu runs the files on the CPU, to find what is wrong in them before a GPU is at hand: the path of
accelerators on the CPU's tensors, beside the CPU's own path. Nothing is then seen to wait, and a captured step is
called again instead of replayed.
"""

import os
import warnings
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import emp_callbacks.core.device
from emp_callbacks import EMPPruner

DEVICE = os.environ.get("EMP_GPU_REHEARSAL", "cuda")
REHEARSAL = DEVICE == "cpu"
WIDTH, DEPTH = (16, 1) if REHEARSAL else (64, 3)  # Triton's interpreter takes its time for every weight and tensor
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.processes,  # Triton starts a compiler
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="no CUDA device: nothing of this file ran"),
]

MODES = {
    "feedback": {"mode": "feedback"},
    "project": {"mode": "project"},
    "freeze": {"mode": "freeze"},
    "rewire": {"mode": "rewire", "density": 0.5},
}
SCOPES = {"tensor": {"scope": "tensor"}, "row": {"scope": "row"}}
PATTERNS = {"pattern": {"pattern": "2:4"}, "pattern, rewire": {"pattern": "2:4", "mode": "rewire"}}
CRITERIA = {
    "wanda": {"criterion": "wanda", "scope": "row"},
    "taylor": {"criterion": "taylor"},
}
FEATURES = {
    "features": {"target": "features"},
    "features, dynamic": {"target": "features", "dynamic": True},
}
UNITS = {
    "heads": {"target": "heads", "criterion": "taylor"},
    "heads, freeze": {"target": "heads", "criterion": "taylor", "mode": "freeze"},
    "heads, gates": {"target": "heads", "criterion": "taylor", "gates": "hard_concrete", "gate_warmup": 2},
    "heads, top-K gates": {"target": "heads", "gates": "top_k", "density": 0.5, "gate_warmup": 2},
    "neurons": {"target": "neurons"},
    "neurons, project": {"target": "neurons", "mode": "project"},
}
EDGES = {"attention edges": {"target": "attention_edges"}}
IN_FORWARD = {
    **FEATURES,
    "features, freeze": {"target": "features", "mode": "freeze"},
    "heads, dynamic": {"target": "heads", "dynamic": True},
    **EDGES,
}
FORMS = {**MODES, **SCOPES, **PATTERNS, **CRITERIA, **UNITS, **IN_FORWARD}
ONCE = {"every_n_steps": 2, "stop": 2}  # one refresh, after the second step, and none after it
BEGUN = {"every_n_steps": 50, "start": 2}  # gates learn from the second step on


def forms(table):
    return pytest.mark.parametrize("settings", list(table.values()), ids=list(table))


def network(depth=DEPTH):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=WIDTH, depth=depth, num_heads=4, num_classes=10
    )


def batches(device=DEVICE, dtype=torch.float32):
    """Yield images and labels, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    while True:
        images = torch.randn(32, 3, 16, 16, generator=generator)
        yield images.to(device, dtype), torch.randint(10, (32,), generator=generator).to(device)


class Run(NamedTuple):
    losses: list[float]
    masks: dict[str, torch.Tensor]
    pruner: EMPPruner
    model: nn.Module


def trained_on_the_cpu(settings, **options):
    """Train as `trained` does, in the way of a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emp_callbacks.core.device, "_AT_ONCE", {"cpu"})
        return trained(settings, "cpu", **options)


def trained(
    settings, device=DEVICE, *, dtype=torch.float32, autocast=None, depth=DEPTH, wrap=lambda model: model, step=None
):
    """Train for six steps with a refresh after each second one.

    Args:
        settings: Of the pruner.
        device: Where.
        dtype: Of the weights.
        autocast: dtype of the forward pass, if it has its own.
        depth: Blocks of the network.
        wrap: What is trained, made of the network.
        step: What makes the step of an optimizer; None: its own `step`.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = wrap(network(depth).to(device, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = EMPPruner(model, optimizer, every_n_steps=2, **settings)
    make_step = optimizer.step if step is None else step(optimizer)
    losses, data = [], batches(device, dtype)
    for _ in range(6):
        images, labels = next(data)
        with nullcontext() if autocast is None else torch.autocast(device, dtype=autocast):
            loss = functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        make_step()
        optimizer.zero_grad()
        pruner.step()
        losses.append(float(loss.detach()))
    if pruner.gates is not None:
        pruner.close()
    return Run(losses, pruner.masks, pruner, model)


class Tolerance(NamedTuple):
    """How far two runs may be apart: losses and N_eff relatively, and the share of mask bits that differ.

    A component at the threshold may fall the other way.
    """

    loss: float = 2e-3
    n_eff: float = 2e-3
    bits: float = 2e-3


# bfloat16 keeps eight bits: on one device it is up to half of this away from float32, with Taylor scores.
LOW_PRECISION = Tolerance(loss=5e-3, n_eff=6e-2, bits=1e-1)
FLOAT32 = Tolerance()


def check_alike(ours, other, tolerance=FLOAT32):
    """Check that two runs took the same way."""
    assert ours.losses == pytest.approx(other.losses, rel=tolerance.loss)
    assert ours.masks.keys() == other.masks.keys()
    for name, mask in ours.masks.items():
        differs = (mask.cpu() != other.masks[name].cpu()).float().mean()
        assert differs <= max(tolerance.bits, 1.01 / mask.numel()), name
    rows, others = ours.pruner.trajectory.records(), other.pruner.trajectory.records()
    assert [row["n_eff"] for row in rows] == pytest.approx([row["n_eff"] for row in others], rel=tolerance.n_eff)
    pruned = [row["density"] < 1 for row in rows]
    # Edges: a row tells what the steps before it kept, and before the first refresh that was everything.
    assert any(pruned) or "attention" in rows[0]["criterion"]


def check_zero_where_pruned(pruner, model):
    """Check that what the masks prune is 0, and that they prune."""
    parameters = dict(model.named_parameters())
    masks = pruner.weight_masks
    assert sum(int((~mask).sum()) for mask in masks.values())
    for name, mask in masks.items():
        assert not parameters[name].detach()[~mask].any(), name


def dense_values(pruner, model):
    """Return copies of all parameters as the optimizer sees them."""
    with pruner.dense_weights():
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def no_waiting():
    """Raise where the host waits for the device; see torch.cuda.set_sync_debug_mode."""
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def count_waits(work):
    """Return how often the host waits for the device in a call; None where no device is."""
    if REHEARSAL:
        work()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)
