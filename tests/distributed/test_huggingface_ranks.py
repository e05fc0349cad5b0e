"""EMPTrainerCallback under a Trainer's DDP, FSDP2 and DeepSpeed on gloo ranks: masks of one process, exact resume."""

import inspect
import json
import os
import shutil

import pytest
import torch

from tests.distributed.accelerated import local, take_cpus_for_gpus
from tests.distributed.ranks import process_group, spawn

pytest.importorskip("accelerate", reason="accelerate comes with emp-callbacks[hf]")
pytest.importorskip("transformers", "5.0", reason="before 5.0 a Trainer cannot resume on ranks of a CPU")
from accelerate import FullyShardedDataParallelPlugin
from transformers import GPT2LMHeadModel

from tests.integrations.hf_trainer import attach, gpt2, trainer


def arguments_of(kind, world_size):
    """Return a Trainer's arguments for one kind of parallelism; the global batch is the same for all."""
    plain = {"per_device_train_batch_size": 6 // world_size, "max_grad_norm": 0.2, "gradient_accumulation_steps": 2}
    if kind == "alone":
        return plain
    plain |= {"ddp_backend": "gloo", "use_cpu": kind == "ddp"}
    if kind == "fsdp2":
        config = {"version": 2, "fsdp_version": 2, "reshard_after_forward": True}
        config |= {"state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        plain |= {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if kind.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True},
        }  # fmt: skip
        plain |= {"deepspeed": config}
    return plain


def train(folder, kind, world_size, settings, resume=None):
    torch.use_deterministic_algorithms(True)
    more = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}
    one = trainer(folder, model=gpt2(0.0), **more, **arguments_of(kind, world_size))
    emp = attach(one, **settings)
    one.train(resume_from_checkpoint=resume)
    return one, emp


def told(one, emp):
    rows = [(row.step, row.group, row.keep) for row in emp.trajectory]
    logged = [entry["step"] for entry in one.state.log_history if "emp/density" in entry]
    return {"rows": rows, "logged": logged, "density": round(emp.pruner.density, 6)}


def ranks(rank, world_size, folder, kind, settings):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    if kind != "ddp":
        take_cpus_for_gpus()
    with process_group(rank, world_size, folder):
        one, emp = train(f"{folder}/whole", kind, world_size, settings)
        assert emp.pruner.audit().clean, emp.pruner.audit()
        assert emp.pruner.sharded == (kind != "ddp")
        whole = told(one, emp)
        masks = emp.masks
        one.save_model(f"{folder}/final")
        if rank == 0:
            shutil.copytree(f"{folder}/whole/checkpoint-4", f"{folder}/part/checkpoint-4")
        torch.distributed.barrier()
        again, resumed = train(f"{folder}/part", kind, world_size, settings, f"{folder}/part/checkpoint-4")
        assert told(again, resumed)["rows"] == whole["rows"]
        assert all(torch.equal(resumed.masks[name], mask) for name, mask in masks.items())
        for (name, ours), theirs in zip(one.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(local(ours), local(theirs)), name
        if rank == 0:
            with open(f"{folder}/told.json", "w") as file:
                json.dump(whole, file)


@pytest.mark.parametrize(
    ("kind", "world_size", "settings"),
    [
        ("ddp", 3, {"mode": "freeze", "every_n_epochs": 1, "every_n_steps": None}),
        ("zero2", 2, {"mode": "feedback", "every_n_steps": 2}),
        ("zero3", 2, {"mode": "freeze", "every_n_steps": 2, "criterion": "taylor", "evidence_steps": 1}),
        ("fsdp2", 2, {"mode": "project", "every_n_steps": 2}),
    ],
)
def test_ranks_prune_as_one_process_and_resume_exactly(kind, world_size, settings, tmp_path):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if kind == "fsdp2" and "fsdp_version" not in inspect.signature(FullyShardedDataParallelPlugin).parameters:
        pytest.skip("this Accelerate knows no FSDP2")
    one, emp = train(tmp_path / "alone", "alone", 1, settings)
    spawn(ranks, world_size, tmp_path, kind, settings)
    expected, found = told(one, emp), json.loads((tmp_path / "told.json").read_text())
    assert len(expected["rows"]) >= 2
    assert found == json.loads(json.dumps(expected))
    if kind == "ddp":  # one process goes on where three stopped
        _, fewer = train(tmp_path / "fewer", "alone", 1, settings, tmp_path / "whole/checkpoint-4")
        assert told(one, fewer)["rows"] == expected["rows"]
    if kind != "fsdp2":  # whose files are of shards
        saved = GPT2LMHeadModel.from_pretrained(tmp_path / "final")
        kept = sum(int(p.count_nonzero()) for name, p in saved.named_parameters() if name in emp.masks)
        assert kept == expected["rows"][-1][2]
