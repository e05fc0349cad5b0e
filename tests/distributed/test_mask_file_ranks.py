"""Masks travel between strategies and numbers of ranks on real gloo processes; a dead rank costs nothing saved."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner
from emp_callbacks.checkpoint import mask_part
from tests.distributed.ranks import process_group, spawn, start

# One process reads every link's folder too.
NUMBERS_OF_RANKS = [("one", 1), ("ddp", 3), ("ddp", 2)]
STRATEGIES = [("one", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 3), ("zero1", 2), ("one", 1)]
MODES = ["feedback", "freeze"]
STEPS = 4
BATCH = 12  # every number of ranks divides it: the mean over ranks is the mean over the batch


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5))


def make_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, eps=1e-3)


def engine_of(net, ranks, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=net, optimizer=make_optimizer(net.parameters()), config=config)[0]


class Link:
    """A model under one strategy: `model`, what to prune, and how to step it and to read its full weights."""

    def __init__(self, strategy, ranks, weights):
        net = make_net()
        net.load_state_dict(weights)
        self.net, self.engine, self.optimizer = net, None, None
        if strategy.startswith("zero"):
            self.engine = self.model = engine_of(net, ranks, int(strategy[-1]))
            return
        if strategy == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (ranks,))
            for layer in (net[0], net[2], net):
                fully_shard(layer, mesh=mesh)
        self.model = DistributedDataParallel(net) if strategy == "ddp" else net
        self.optimizer = make_optimizer(net.parameters())

    def step(self, x):
        loss = self.model(x).square().mean()
        if self.engine:
            self.engine.backward(loss)
            self.engine.step()
        else:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def full_weights(self):
        if self.engine and self.engine.zero_optimization_stage() == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.net.parameters())):
                return {name: p.detach().clone() for name, p in self.net.named_parameters()}
        tensors = {name: p.detach() for name, p in self.net.named_parameters()}
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in tensors.items()}


def train_link(rank, ranks, strategy, number, mode, folder):
    """Continue from link `number - 1`, write again what was loaded, train, save."""
    weights = torch.load(f"{folder}/weights{number - 1}.pt", weights_only=True) if number else make_net().state_dict()
    link = Link(strategy, ranks, weights)
    pruner = EMPPruner(link.model, link.optimizer, mode=mode, every_n_steps=3)
    if number:
        pruner.load(f"{folder}/masks{number - 1}")
        pruner.save(f"{folder}/loaded{number}")
    for step in range(number * STEPS, (number + 1) * STEPS):
        x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
        link.step(x[rank::ranks])
        pruner.step()
    full = link.full_weights()
    if rank == 0:
        torch.save(full, f"{folder}/weights{number}.pt")
    pruner.save(f"{folder}/masks{number}")


def link_rank(rank, ranks, folder, strategy, number):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    with process_group(rank, ranks, f"{folder}/{number}"):
        for mode in MODES:
            train_link(rank, ranks, strategy, number, mode, f"{folder}/{mode}")


def read(folder, mode):
    """Return masks, values behind them, steps and rows of a folder, as one process reads them."""
    pruner = EMPPruner(make_net(), mode=mode)
    pruner.load(folder)
    rows = [(e.step, e.keep, e.churn, e.regrown) for e in pruner.trajectory]
    return pruner.masks, {w.name: w.stash for w in pruner._weights}, (pruner.steps, rows)


def run_chain(chain, folder):
    for mode in MODES:
        (folder / mode).mkdir(parents=True)
    for number, (strategy, ranks) in enumerate(chain):
        if strategy == "one":
            for mode in MODES:
                train_link(0, 1, strategy, number, mode, folder / mode)
        else:
            (folder / str(number)).mkdir()
            spawn(link_rank, ranks, folder, strategy, number)


def assert_same(ours, theirs, exact):
    for name, mask in theirs[0].items():
        assert torch.equal(ours[0][name], mask)
        if theirs[1][name] is not None:
            tolerance = 0 if exact else 1e-5
            torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=0, atol=tolerance)
    assert ours[2] == theirs[2]


def test_a_chain_of_numbers_of_ranks_continues_with_identical_masks(tmp_path):
    compare_with_one_process(NUMBERS_OF_RANKS, tmp_path)


def test_a_chain_of_strategies_continues_with_identical_masks(shm_comm, tmp_path):
    compare_with_one_process(STRATEGIES, tmp_path)


def compare_with_one_process(chain, tmp_path):
    run_chain(chain, tmp_path / "chain")
    run_chain([("one", 1)] * len(chain), tmp_path / "alone")
    for mode in MODES:
        ours, alone = tmp_path / "chain" / mode, tmp_path / "alone" / mode
        for number in range(len(chain)):
            saved = read(ours / f"masks{number}", mode)
            kept = torch.cat([mask.flatten() for mask in saved[0].values()])
            assert 0.1 < kept.float().mean() < 0.9
            assert_same(saved, read(alone / f"masks{number}", mode), exact=False)
            if number:
                assert_same(read(ours / f"loaded{number}", mode), read(ours / f"masks{number - 1}", mode), exact=True)
        assert [row[0] for row in saved[2][1]] == list(range(3, len(chain) * STEPS + 1, 3))


def killed_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
    )
    torch.manual_seed(0)
    net = nn.Linear(33, 9)
    pruner = EMPPruner(net)
    pruner.refresh()
    pruner.save(f"{folder}/masks")
    with torch.no_grad():
        net.weight.copy_(net.weight.flip(0))
    pruner.clock.steps = 7
    pruner.refresh()
    if rank == 1:

        def half(tensors, path):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        mask_part.write_tensors = half
    try:
        pruner.save(f"{folder}/masks")
    except Exception:
        os._exit(3)  # the other rank is gone: nothing to tidy
    os._exit(0)


def test_a_rank_killed_while_it_saves_leaves_the_old_checkpoint(tmp_path):
    context = start(killed_rank, 2, tmp_path)
    for process in context.processes:
        process.join(timeout=60)
    codes = [process.exitcode for process in context.processes]
    assert codes == [3, -signal.SIGKILL]
    assert len(list((tmp_path / "masks").glob("*.safetensors"))) > 2, "the new save had begun"
    torch.manual_seed(0)
    net = nn.Linear(33, 9)
    alone = EMPPruner(net)
    alone.refresh()
    resumed = EMPPruner(nn.Linear(33, 9))
    resumed.load(tmp_path / "masks")
    assert resumed.steps == 0
    assert torch.equal(resumed.masks["weight"], alone.masks["weight"])
    resumed.save(tmp_path / "masks")
    assert len(list((tmp_path / "masks").iterdir())) == 2


def damaged_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        torch.manual_seed(0)
        pruner = EMPPruner(DistributedDataParallel(nn.Linear(33, 9)))
        pruner.refresh()
        pruner.save(f"{folder}/masks")
        if rank == 0:
            [name] = Path(folder, "masks").glob("*-00001-of-00002.safetensors")
            name.write_bytes(name.read_bytes()[:-1] + b"?")
        dist.barrier()
        net = nn.Linear(33, 9)
        pruner = EMPPruner(DistributedDataParallel(net))
        before = net.weight.detach().clone()
        try:
            pruner.load(f"{folder}/masks")
        except ValueError as error:
            torch.save(str(error), f"{folder}/message{rank}.pt")
        assert torch.equal(net.weight, before)
        assert bool(pruner.masks["weight"].all())


def test_damage_found_by_one_rank_is_raised_by_both(tmp_path):
    spawn(damaged_rank, 2, tmp_path)
    messages = [torch.load(tmp_path / f"message{rank}.pt", weights_only=True) for rank in range(2)]
    assert all("-00001-of-00002.safetensors is damaged" in message for message in messages)
    assert [message.startswith("rank 1: ") for message in messages] == [True, False]
