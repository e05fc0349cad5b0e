"""EMPHook around real DeepSpeed engines: skipped steps, checkpoints, epochs, refusals, and the engine given back."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.ranks import spawn
from tests.distributed.zero_ranks import batch, closing, deepspeed_ranks, make_engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def run_steps(engine, rank, world_size, first, last):
    for step in range(first, last):
        x, y = batch(step, 0)
        x = x[rank::world_size].to(next(engine.module.parameters()).dtype)
        engine.backward(nn.functional.mse_loss(engine(x).float(), y[rank::world_size]))
        engine.step()


# ---- on the ranks -----------------------------------------------------------------------------------------------


def overflow(deepspeed, rank, world_size, stage):
    """Train in fp16, on a CPU of which DeepSpeed is told that it can; the third step, a refresh due, overflows."""
    from deepspeed.accelerator import get_accelerator

    from emp_callbacks.integrations.deepspeed import EMPHook

    get_accelerator().is_fp16_supported = lambda: True
    engine = make_engine(deepspeed, stage, "fp16", 1, {})
    hook = EMPHook(engine, every_n_steps=3)
    hook.pruner.refresh()
    for step in range(8):
        x, y = batch(step, 0)
        loss = nn.functional.mse_loss(engine(x[rank::world_size].half()).float(), y[rank::world_size])
        before = closing(hook)["weights"]
        engine.backward(loss * (1e30 if step == 2 else 1))
        engine.step()
        assert engine.was_step_applied() == (step != 2)
        assert hook.pruner.audit().clean, step
        after = closing(hook)["weights"]
        assert (step == 2) == all(torch.equal(after[name], before[name]) for name in before)
    hook.finalize()
    return [event.step for event in hook.trajectory], hook.pruner.steps, engine.global_steps


def resume(deepspeed, rank, world_size, folder, stage, dtype, mode):
    """Train 12 steps, saved after 7; an engine that did something else meanwhile loads, and trains the last 5."""
    from emp_callbacks.integrations.deepspeed import EMPHook

    settings = {"every_n_steps": 3, "mode": mode}
    whole = make_engine(deepspeed, stage, dtype, 1, {})
    hook = EMPHook(whole, **settings)
    run_steps(whole, rank, world_size, 0, 7)
    whole.save_checkpoint(folder)
    run_steps(whole, rank, world_size, 7, 12)
    resumed = make_engine(deepspeed, stage, dtype, 1, {})
    other = EMPHook(resumed, **settings)
    owners = [w.segment.owner for w in other.pruner._weights]
    run_steps(resumed, rank, world_size, 20, 24)
    resumed.load_checkpoint(folder)
    updated = [id(tensor) for tensor in other.pruner._backend._layout.owners()]
    assert all(id(owner) in updated for owner in owners), "loading keeps the owners"
    assert other.pruner.audit().clean
    run_steps(resumed, rank, world_size, 7, 12)
    one, two = closing(hook), closing(other)
    hook.finalize()
    other.finalize()
    equal = all(torch.equal(one[key][name], two[key][name]) for key in ("masks", "weights") for name in one[key])
    return [row[0] for row in one["rows"]], one["rows"] == two["rows"], equal


def manners(deepspeed, rank, world_size, folder):
    from emp_callbacks.integrations.deepspeed import EMPHook

    engine = make_engine(deepspeed, 2, "fp32", 1, {})
    engine.save_checkpoint(folder)
    hook = EMPHook(engine, every_n_epochs=1)
    run_steps(engine, rank, world_size, 0, 2)
    assert not hook.trajectory
    assert len(hook.end_epoch()) == 1
    assert hook.density < 1
    with pytest.raises(FileNotFoundError, match="saved without EMP"):
        engine.load_checkpoint(folder)
    state = hook.state_dict()
    run_steps(engine, rank, world_size, 2, 4)
    hook.end_epoch()
    hook.load_state_dict(state)
    assert hook.pruner.epochs == 1
    hook.finalize()
    hook.finalize()
    assert not {"step", "save_checkpoint", "load_checkpoint"} & set(vars(engine))
    assert "step" not in vars(engine.optimizer)
    run_steps(engine, rank, world_size, 4, 5)
    assert hook.pruner.steps == 2


def refusals(deepspeed):
    from emp_callbacks.integrations.deepspeed import EMPHook

    engine = make_engine(deepspeed, 2, "fp32", 1, {})
    engine.module.extra = nn.Linear(3, 3)
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match=r"no given optimizer updates it: extra.weight"):
            hook = EMPHook(engine)
    else:
        hook = EMPHook(engine)
    assert "extra.weight" not in hook.masks
    hook.finalize()
    with pytest.raises(ValueError, match=r"does not update 'extra.weight'.*exclude it"):
        EMPHook(engine, include=["extra.weight"])
    engine = make_engine(deepspeed, 3, "fp32", 1, {})
    for holder, name, value, message in [
        (engine.optimizer, "swap_optimizer", True, r"NVMe; offload to the CPU"),
        (engine.optimizer, "partial_offload", 0.5, r"ratio: 1"),
        (engine, "zenflow", True, r"remove zenflow"),
        (engine, "has_moe_layers", True, r"MoE"),
        (engine, "pipeline_parallelism", True, r"use ZeRO"),
        (engine, "basic_optimizer", object(), r"not a torch.optim.Optimizer"),
    ]:
        old = getattr(holder, name, None)
        setattr(holder, name, value)
        with pytest.raises(NotImplementedError, match=message):
            EMPHook(engine)
        setattr(holder, name, old)


SAVED = [(0, "bf16", "feedback"), (1, "bf16", "feedback"), (2, "fp32", "freeze"), (3, "fp32", "feedback")]


def everything(rank, world_size, folder):
    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        found = {"overflow": [overflow(deepspeed, rank, world_size, stage) for stage in range(4)]}
        found["resume"] = [resume(deepspeed, rank, world_size, f"{folder}/{case[0]}", *case) for case in SAVED]
        manners(deepspeed, rank, world_size, f"{folder}/dense")
        refusals(deepspeed)
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each rank found; that the engine behaved is asserted on the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(everything, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


# ---- here -------------------------------------------------------------------------------------------------------


def test_a_refresh_due_on_an_overflowed_step_is_late_not_lost(found):
    for rank in found:
        assert rank["overflow"] == [([0, 3, 6], 7, 8)] * 4


def test_an_engine_checkpoint_resumes_bit_for_bit(found):
    for rank in found:
        assert rank["resume"] == [([3, 6, 9, 12], True, True)] * len(SAVED)
