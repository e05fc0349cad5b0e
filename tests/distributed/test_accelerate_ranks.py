"""EMPPruner after `accelerator.prepare`, and in Fabric, on gloo ranks: masks of one process, exact resume."""

import inspect
import json
import os

import pytest
import torch
from torch import nn

from tests.distributed.accelerated import local, take_cpus_for_gpus
from tests.distributed.ranks import process_group, spawn

accelerate = pytest.importorskip("accelerate", reason="accelerate comes with emp-callbacks[hf]")

from accelerate import FullyShardedDataParallelPlugin  # noqa: E402

from emp_callbacks import EMPPruner  # noqa: E402

STEPS, MIDDLE = 6, 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 5)).double()


def batch(step, micro, rank, ranks):
    x = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + micro))
    return x[rank::ranks]


class AccelerateLoop:
    """A loop in Accelerate's style: accumulate, backward, clip, save_state and load_state."""

    def __init__(self, kind, settings):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        accelerate.state.GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(
            cpu=kind in ("alone", "ddp"), gradient_accumulation_steps=2, **plugin(kind)
        )
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if kind.startswith("zero"):
            from deepspeed.accelerator import get_accelerator

            # Where a CPU computes in half precision, ZeRO-3 refuses float64 parameters; elsewhere it takes them.
            get_accelerator().is_fp16_supported = lambda: False
            self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 6
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.pruner = EMPPruner(self.model, self.optimizer, every_n_steps=2, **settings)
        self.accelerator.register_for_checkpointing(self.pruner)

    def run(self, first, last, rank, ranks):
        for step in range(first, last):
            for micro in range(2):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(batch(step, micro, rank, ranks)).square().mean())
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.pruner.step()

    def save(self, folder):
        self.accelerator.save_state(folder)

    def load(self, folder):
        self.accelerator.load_state(folder)


class FabricLoop:
    """A loop in Fabric's style."""

    def __init__(self, kind, settings):
        from lightning.fabric import Fabric

        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        strategy = {"fabric": "ddp", "fabric fsdp2": sharded_fabric()}[kind] if ranks > 1 else "auto"
        self.fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
        self.fabric.launch()
        model = self.fabric.setup_module(net())
        self.model, self.optimizer = model, self.fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.02))
        self.pruner = EMPPruner(self.model, self.optimizer, every_n_steps=2, **settings)

    def run(self, first, last, rank, ranks):
        for step in range(first, last):
            for micro in range(2):
                with self.fabric.no_backward_sync(self.model, enabled=micro == 0):
                    self.fabric.backward(self.model(batch(step, micro, rank, ranks)).square().mean() / 2)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.1, error_if_nonfinite=False)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.pruner.step()

    @property
    def state(self):
        return {"model": self.model, "optimizer": self.optimizer, "emp": self.pruner}

    def save(self, folder):
        self.fabric.save(f"{folder}.ckpt", self.state)

    def load(self, folder):
        state = self.state
        self.fabric.load(f"{folder}.ckpt", state)
        if state["emp"] is not self.pruner:  # sharding strategies hand over what they do not know
            self.pruner.load_state_dict(state["emp"])


def sharded_fabric():
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(model, mesh):
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh["data_parallel"])
        return model

    return ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)


def loop_of(kind, settings):
    return FabricLoop(kind, settings) if kind.startswith("fabric") else AccelerateLoop(kind, settings)


def plugin(kind):
    if kind == "fsdp2":
        policy = "NO_WRAP"
        return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy)}
    if kind.startswith("zero"):
        deepspeed = accelerate.DeepSpeedPlugin(
            zero_stage=int(kind[-1]), gradient_accumulation_steps=2, gradient_clipping=0.1
        )
        deepspeed.deepspeed_config["zero_allow_untested_optimizer"] = True
        return {"deepspeed_plugin": deepspeed}
    return {}


def told(pruner):
    return [[row.step, row.group, row.keep, round(row.n_eff, 6)] for row in pruner.trajectory]


def ranks(rank, world_size, folder, kind, settings):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29556", DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU=str(kind == "ddp"),
    )  # fmt: skip
    if kind.startswith(("zero", "fsdp")):
        take_cpus_for_gpus()
    with process_group(rank, world_size, folder):
        whole = loop_of(kind, settings)
        whole.run(0, MIDDLE, rank, world_size)
        whole.save(f"{folder}/saved")
        whole.run(MIDDLE, STEPS, rank, world_size)
        assert whole.pruner.audit().clean, whole.pruner.audit()
        assert whole.pruner.sharded == (kind not in ("ddp", "fabric"))
        masks = whole.pruner.masks
        again = loop_of(kind, settings)
        again.load(f"{folder}/saved")
        again.run(MIDDLE, STEPS, rank, world_size)
        assert told(again.pruner) == told(whole.pruner)
        assert all(torch.equal(again.pruner.masks[name], mask) for name, mask in masks.items())
        for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(local(ours), local(theirs))
        if whole.pruner.sharded:  # a state of another rank is no state of this one
            with pytest.raises(ValueError, match="that of rank"):
                again.pruner.load_state_dict(again.pruner.state_dict() | {"part": [1 - rank, world_size]})
        if rank == 0:
            with open(f"{folder}/told.json", "w") as file:
                json.dump(told(whole.pruner), file)


EVIDENCE = {"criterion": "taylor", "evidence_steps": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ddp", {"mode": "freeze", **EVIDENCE}),
        ("zero2", {"mode": "project", **EVIDENCE}),
        ("zero3", {"mode": "feedback"}),
        ("fsdp2", {"mode": "feedback", **EVIDENCE}),
        ("fabric", {"mode": "project", **EVIDENCE}),
        ("fabric fsdp2", {"mode": "freeze", **EVIDENCE}),
    ],
)
def test_ranks_prune_as_one_process_and_resume_exactly(kind, settings, tmp_path):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if kind == "fsdp2" and "fsdp_version" not in inspect.signature(FullyShardedDataParallelPlugin).parameters:
        pytest.skip("this Accelerate knows no FSDP2")
    spawn(ranks, 2, tmp_path, kind, settings)
    alone = loop_of("fabric" if kind.startswith("fabric") else "alone", settings)
    alone.run(0, STEPS, 0, 1)
    found = json.loads((tmp_path / "told.json").read_text())
    assert len(found) == 3
    if kind.startswith("zero") or "fsdp2" in kind:  # in fp32; other sums
        assert [row[:3] for row in found] == [row[:3] for row in told(alone.pruner)]
    else:
        assert found == told(alone.pruner)
