"""Heads, neurons, features and criteria that gather evidence: ranks of every strategy give the masks of one process."""

import functools
import importlib.util

import peft
import pytest
import timm
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner
from tests.distributed.ranks import process_group, spawn
from tests.distributed.sharded_net import full_masks
from tests.distributed.zero_ranks import deepspeed_ranks
from tests.targets.mixtures import HAS_STACKED_EXPERTS, Classifier

STEPS, EVERY, ROWS = 7, 3, 12
SETTINGS = {
    "weights-taylor": {"criterion": "taylor", "certify": True},
    "weights-saliency-freeze": {"criterion": "saliency", "mode": "freeze"},
    "weights-rewire": {"mode": "rewire", "density": 0.3, "scope": "tensor", "shares": "erk"},
    "weights-rewire-random": {"mode": "rewire", "density": 0.3, "grow": "random"},
    "weights-wanda-row": {"criterion": "wanda", "scope": "row", "certify": True},
    "weights-wanda-pattern": {"criterion": "wanda", "pattern": "2:4", "certify": True},
    "weights-rewire-pattern": {"mode": "rewire", "pattern": "2:4"},
    "weights-found": {"mode": "freeze", "density": "found"},
    "heads": {"target": "heads", "beta": 0.7, "mode": "project"},
    "heads-taylor": {"target": "heads", "criterion": "taylor", "beta": 0.9, "certify": True},
    "heads-activation": {"target": "heads", "criterion": "activation", "beta": 0.7, "scope": "tensor"},
    "heads-dynamic": {"target": "heads", "dynamic": True, "beta": 0.8},
    "neurons": {"target": "neurons", "beta": 0.8, "mode": "freeze"},
    "neurons-taylor": {"target": "neurons", "criterion": "taylor"},
    "neurons-saliency": {"target": "neurons", "criterion": "saliency", "mode": "project"},
    "neurons-activation": {"target": "neurons", "criterion": "activation", "beta": 0.8},
    "features": {"target": "features", "beta": 0.8},
    "features-mean": {"target": "features", "beta": 0.8, "center": "mean", "mode": "freeze"},
    "features-taylor": {"target": "features", "criterion": "taylor"},
    "features-dynamic": {"target": "features", "dynamic": True, "beta": 0.8},
    "experts": {"target": "experts", "density": 0.6, "mode": "freeze"},
    "experts-global": {"target": "experts", "criterion": "taylor", "scope": "global", "beta": 0.8},
    "experts-neurons": {"target": "neurons", "include": ["*experts"], "beta": 0.8},
    "experts-wanda-row": {"criterion": "wanda", "scope": "row", "include": ["*experts*"]},
    "experts-pattern": {"pattern": "1:2", "include": ["*experts*"]},
    "edges": {"target": "attention_edges", "criterion": "attention_logit"},
}
if not HAS_STACKED_EXPERTS:
    SETTINGS = {name: settings for name, settings in SETTINGS.items() if not name.startswith("experts")}
# Of a base that no optimizer updates DeepSpeed holds no part.
ADAPTERS = {
    "adapters-found": {"include": ["*qkv.base_layer.weight"], "mode": "freeze", "density": "found"},
    "adapters-heads": {"target": "heads", "beta": 0.8, "include": ["*attn"]},
}
# DeepSpeed's engine scales the loss by itself.
GATES = {
    "heads-gates": {"target": "heads", "criterion": "taylor", "gates": "hard_concrete", "gate_warmup": 2, "beta": 0.8},
    "heads-gates-top_k": {"target": "heads", "gates": "top_k", "init": "open", "gate_warmup": 2, "density": 0.6},
}
TORCH_SETTINGS = SETTINGS | ADAPTERS | GATES
# Every setting runs on two ranks or on three; every target, mode and kind of evidence meets both.
ON_BOTH = {"edges", "features-dynamic"}
ON_THREE = ON_BOTH | {
    "weights-taylor", "weights-rewire-random", "weights-wanda-pattern", "heads-activation", "neurons-taylor",
    "neurons-saliency", "features-mean", "heads-gates-top_k", "experts-global", "experts-wanda-row", "adapters-heads",
}  # fmt: skip
TORCH_WAYS = ("ddp", "fsdp2", "fsdp1")
# Stages 1 and 2 hold weights alike: each has every second setting.
ZERO_CASES = [(stage, name) for i, name in enumerate(SETTINGS) for stage in (1 + i % 2, 3)]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def make_model(dtype, name):
    torch.manual_seed(0)
    if name.startswith("experts"):
        return Classifier().to(dtype)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **sizes).to(dtype)
    for parameter in model.parameters() if "found" in name else ():
        parameter.data.mul_(torch.rand_like(parameter, dtype=torch.float32) < 0.6)
    model.head.weight.data.mul_(name != "weights-found")  # a layer of zeros alone
    if name in ADAPTERS:
        lora = peft.LoraConfig(r=3, target_modules=["qkv", "proj"], init_lora_weights=False)
        return peft.get_peft_model(model, lora).to(dtype)
    return model


def wrap(way, model):
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    if way == "fsdp1":
        settings = {"use_orig_params": True, "device_id": torch.device("cpu")}
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FullyShardedDataParallel(block, **settings)
        return FullyShardedDataParallel(model, **settings)
    return model


def batch(step, dtype):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 1, 8, 8, generator=generator).to(dtype), torch.randint(0, 5, (ROWS,), generator=generator)


def closing(pruner, losses):
    masks = pruner.masks if pruner.config.target != "weights" else {}
    if pruner.config.pattern is not None:  # how many it keeps says nothing
        masks = full_masks(pruner)
    return {
        "rows": [(e.step, e.n, e.keep, e.density, e.churn, e.note) for e in pruner.trajectory],
        "n_eff": [value for e in pruner.trajectory for value in (e.n_eff, *(layer.n_eff for layer in e.layers))],
        "masks": masks,
        "mass_bounds": [e.tight_mass_bound for e in pruner.trajectory],
        "certificates": [layer.certificate for e in pruner.trajectory for layer in e.layers if layer.certificate],
        "losses": torch.stack(losses),
        "clean": pruner.audit().clean or pruner.config.mode == "project",  # which lets pruned weights grow
    }


def train(rank, world_size, way, name, folder=None):
    """Train with torch's own strategies, in double precision: far from any tie."""
    model = wrap(way, make_model(torch.float64, name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if name in GATES:
        torch.manual_seed(rank)  # each rank draws other numbers, of dropout for one: gates do not
    pruner = EMPPruner(model, optimizer, every_n_steps=EVERY, evidence_steps=2, **TORCH_SETTINGS[name])
    losses = []
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        loss = nn.functional.cross_entropy(model(x[rank::world_size]), y[rank::world_size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(pruner._backend.all_sum(loss.detach()) / world_size)
        with torch.no_grad():  # neither validation nor gathered copies disturb what is gathered
            model.eval()(x)
            model.train()
        pruner.step()
        if step == 4 and folder:  # in the middle of a window: what was gathered comes back, wherever it lies
            pruner.save(f"{folder}/{way}-{name}")
            pruner.load(f"{folder}/{way}-{name}")
    if pruner.needs_closing_refresh and name in GATES:
        pruner.close()
    return closing(pruner, losses)


def train_zero(deepspeed, rank, world_size, stage, name):
    from emp_callbacks.integrations.deepspeed import EMPHook

    model = make_model(torch.float32, name)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": ROWS // world_size,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # its default is 1
            "zero_optimization": {"stage": stage},
        },
    )
    hook = EMPHook(engine, every_n_steps=EVERY, evidence_steps=2, **SETTINGS[name])
    losses = []
    for step in range(STEPS):
        x, y = batch(step, torch.float32)
        loss = nn.functional.cross_entropy(engine(x[rank::world_size]), y[rank::world_size])
        engine.backward(loss)
        engine.step()
        losses.append(hook.pruner._backend.all_sum(loss.detach()) / world_size)
    return closing(hook.pruner, losses)


def torch_settings(world_size):
    return [name for name in TORCH_SETTINGS if name in ON_BOTH or (name in ON_THREE) == (world_size == 3)]


def on_torch(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        found = {
            (way, name): train(rank, world_size, way, name, folder)
            for way in TORCH_WAYS
            for name in torch_settings(world_size)
        }
    torch.save(found, f"{folder}/rank{rank}.pt")


def on_zero(rank, world_size, folder):
    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        found = {
            (f"zero{stage}", name): train_zero(deepspeed, rank, world_size, stage, name) for stage, name in ZERO_CASES
        }
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank saw; each number of ranks is spawned once for all tests."""
    seen = {}

    def results(work, world_size):
        if (work, world_size) not in seen:
            seen[work, world_size] = []  # a rank that fails once is not started for every test again
            folder = tmp_path_factory.mktemp(f"{work.__name__}{world_size}")
            spawn(work, world_size, folder)
            files = [folder / f"rank{rank}.pt" for rank in range(world_size)]
            seen[work, world_size] = [torch.load(file, weights_only=False) for file in files]
        assert seen[work, world_size], "the ranks failed: see the first failure"
        return seen[work, world_size]

    return results


@functools.cache
def alone(name):
    return train(0, 1, "alone", name)


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size in (2, 3) for name in torch_settings(size)])
@pytest.mark.parametrize("way", TORCH_WAYS)
def test_torch_strategies_give_the_masks_of_one_process(world_size, way, name, ranks):
    expected = alone(name)
    assert any(keep < n for _, n, keep, *_ in expected["rows"]), "a mask that keeps all compares nothing"
    # a router's softmax, too
    in_single_precision = any(word in name for word in ("activation", "wanda", "experts", "gates"))
    for result in ranks(on_torch, world_size):
        compare(result[way, name], expected, 1e-5 if in_single_precision else 1e-9)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(("stage", "name"), ZERO_CASES)
def test_zero_gives_the_masks_of_one_process(stage, name, ranks):
    for result in ranks(on_zero, 2):
        compare(
            result[f"zero{stage}", name], alone(name), 1e-3, exact=SETTINGS[name].get("target", "weights") != "weights"
        )


def compare(ours, expected, tolerance, exact=True):
    if exact:
        assert [row[:3] for row in ours["rows"]] == [row[:3] for row in expected["rows"]]
        assert ours["masks"].keys() == expected["masks"].keys()
        for layer, mask in expected["masks"].items():
            assert torch.equal(ours["masks"][layer], mask), layer
    assert ours["n_eff"] == pytest.approx(expected["n_eff"], rel=tolerance)
    torch.testing.assert_close(ours["losses"].double(), expected["losses"], rtol=0, atol=max(tolerance, 1e-8))
    assert ours["clean"]
    told = [(a, b) for a, b in zip(ours["mass_bounds"], expected["mass_bounds"], strict=True) if (a, b) != (None, None)]
    assert [a for a, _ in told] == pytest.approx([b for _, b in told], rel=tolerance)
    compare_certificates(ours["certificates"], expected["certificates"], max(tolerance, 1e-6))


def compare_certificates(ours, expected, tolerance):
    """Bounds are those of one process; measured is what a rank can: shards know no whole rows."""
    assert [c.bound for c in ours] == pytest.approx([c.bound for c in expected], rel=tolerance)
    for own, alone_found in zip(ours, expected, strict=True):
        if own.measured is not None:
            assert own.measured == pytest.approx(alone_found.measured, rel=max(tolerance, 1e-4), abs=1e-7)
            assert (own.scale or 0.0) == pytest.approx(alone_found.scale or 0.0, rel=max(tolerance, 1e-4))


def test_certificates_are_asked_for_and_measured_where_weights_are_whole(ranks):
    for name in ("weights-wanda-row", "heads-taylor"):
        (result, _) = ranks(on_torch, 2)
        assert all(c.measured is not None for c in result["ddp", name]["certificates"])
        assert any(c.bound > 0 for c in result["ddp", name]["certificates"])
        assert len(result["ddp", name]["certificates"]) == len(alone(name)["certificates"]) > 0
    assert all(c.measured is None for c in result["fsdp2", "weights-wanda-row"]["certificates"])
