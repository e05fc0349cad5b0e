"""Two and three real gloo processes under DeepSpeed ZeRO 0 to 3 give exactly the masks of one plain process."""

import contextlib
import importlib.util
import logging
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from emp_callbacks import EMPPruner
from tests.core.reference import reference_mask
from tests.distributed.ranks import process_group, spawn

deepspeed_installed = importlib.util.find_spec("deepspeed") is not None
pytestmark = pytest.mark.skipif(not deepspeed_installed, reason="DeepSpeed is not installed")

STEPS, EVERY, ROWS = 20, 5, 12


class Net(nn.Module):
    """Sizes that no number of ranks divides; `gain` is one weight, so that most ranks hold nothing of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(9, 13)
        self.conv = nn.Conv1d(1, 3, 4)
        self.last = nn.Linear(30, 5)
        self.gain = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.gain.weight)

    def forward(self, x):
        hidden = self.conv(torch.tanh(self.first(x))[:, None]).flatten(1)
        return self.gain(self.last(torch.tanh(hidden))[..., None])[..., 0]


def batch(step, micro):
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(ROWS, 9, generator=generator), torch.randn(ROWS, 5, generator=generator)


# name -> (ZeRO stage, dtype, settings of EMP, micro-batches per step, further DeepSpeed configuration)
MODES = {
    "feedback": ({"mode": "feedback"}, 1),
    "project": ({"mode": "project", "scope": "tensor"}, 2),
    "freeze": ({"mode": "freeze"}, 2),
}
CASES = {
    f"{stage}-{dtype}-{mode}": (stage, dtype, settings, micro, {})
    for stage in range(4)
    for dtype in ("fp32", "bf16")
    for mode, (settings, micro) in MODES.items()
}
FREEZE, FEEDBACK = {"mode": "freeze"}, {"mode": "feedback"}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
PIECES = {"zero_optimization": {"sub_group_size": 40, "stage3_param_persistence_threshold": 0}}
CASES |= {
    "1-fp32-rows": (1, "fp32", {"mode": "feedback", "scope": "row"}, 1, {}),
    "3-fp32-rows": (3, "fp32", {"mode": "freeze", "scope": "row"}, 1, {}),
    "2-fp32-round-robin": (2, "fp32", FREEZE, 2, ROUND_ROBIN),
    "2-bf16-round-robin": (2, "bf16", FEEDBACK, 1, ROUND_ROBIN),
    "3-fp32-pieces": (3, "fp32", FREEZE, 2, PIECES),
    "3-bf16-pieces": (3, "bf16", FEEDBACK, 2, PIECES),
    "1-fp32-offload": (1, "fp32", FREEZE, 2, OFFLOAD),
    "2-fp32-offload": (2, "fp32", FREEZE, 2, OFFLOAD),
    "3-fp32-offload": (3, "fp32", FREEZE, 2, OFFLOAD),
    "3-bf16-offload": (3, "bf16", FEEDBACK, 1, OFFLOAD),
    "1-bf16-grad32": (1, "bf16", FEEDBACK, 2, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "1-bf16-grad32-freeze": (1, "bf16", FREEZE, 2, {"data_types": {"grad_accum_dtype": "fp32"}}),
}
FP32 = [name for name, (_, dtype, *_) in CASES.items() if dtype == "fp32"]


# ---- one plain process ------------------------------------------------------------------------------------------


def train_alone(settings, micro):
    net = Net()
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=0.02)
    pruner = EMPPruner(net, optimizer, every_n_steps=EVERY, **settings)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in range(micro):
            x, y = batch(step, part)
            loss = nn.functional.mse_loss(net(x), y) / micro
            loss.backward()
            total += loss.item()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
        optimizer.step()
        pruner.step()
        losses.append(total)
    with pruner.dense_weights():
        weights = {name: p.detach().flatten().clone() for name, p in net.named_parameters()}
    return {
        "masks": {name: mask.flatten() for name, mask in pruner.masks.items()},
        "rows": rows_of(pruner),
        "n_eff": [e.n_eff for e in pruner.trajectory],
        "losses": losses,
        "norms": norms,
        "weights": weights,
    }


def parameter_groups(net):
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in net.named_parameters() if not name.endswith("bias")]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def rows_of(pruner):
    return [(e.step, e.group, e.n, e.keep, e.density) for e in pruner.trajectory]


# ---- ranks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deepspeed_ranks(rank, world_size, folder):
    keys = {"DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    keys |= {"LOCAL_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in keys.items()})
    with process_group(rank, world_size, folder):
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling for nothing
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        yield deepspeed


def make_engine(deepspeed, stage, dtype, micro, extra):
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 0.1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **{key: value for key, value in extra.items() if key != "zero_optimization"},
        "zero_optimization": {"stage": stage, **extra.get("zero_optimization", {})},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True} | ({"initial_scale_power": 8} if dtype == "fp16" else {})
    net = Net()
    groups = parameter_groups(net)
    if "optimizer" in config:  # one of DeepSpeed's own
        return deepspeed.initialize(model=net, model_parameters=groups, config=config)[0]
    return deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=0.02), config=config)[0]


def gather(hook, values_of):
    """Return name -> flat values of the full parameter, on every rank, from each rank's counted part."""
    full = {}
    for weight in hook.pruner._weights:
        segment = weight.segment
        values = values_of(weight).reshape(-1)[segment.counted]
        tensor = torch.zeros(segment.size, dtype=torch.float64)
        start = segment.positions_of(segment.counted)
        tensor[start : start + values.numel()] += values.double()
        dist.all_reduce(tensor)
        full[segment.name] = tensor
    return full


class Watch:
    """Records the scores of every refresh, and what forward really multiplies with."""

    def __init__(self, hook, engine):
        self.hook, self.selections, self.seen, self.forwards = hook, 0, 0, 0
        self.masks = None
        score = hook.pruner._criterion.score
        self.scores = {}

        def recorded(segment):
            self.scores[segment.name] = score(segment).clone()
            return self.scores[segment.name]

        hook.pruner._criterion.score = recorded
        self.names = {id(m): f"{n}.weight" for n, m in engine.module.named_modules() if hasattr(m, "weight")}
        for module in engine.module.modules():
            if id(module) in self.names:
                module.register_forward_pre_hook(self.forward)

    def forward(self, module, inputs):
        if self.masks is not None:
            self.forwards += 1
            pruned = self.masks[self.names[id(module)]] == 0
            self.seen += int((module.weight.detach().flatten()[pruned] != 0).sum())

    def after_step(self):
        if len(self.hook.trajectory) == self.selections:
            return
        self.selections = len(self.hook.trajectory)
        self.masks = gather(self.hook, lambda w: w.mask)
        scores = gather(self.hook, lambda w: self.scores[w.name])
        for name, mask in sort_reference(scores, self.hook.pruner.config.scope).items():
            assert torch.equal(self.masks[name].bool(), mask), name


def sort_reference(scores, scope):
    if scope == "tensor":
        return {name: reference_mask(values) for name, values in scores.items()}
    if scope == "row":
        shapes = {name: p.shape for name, p in Net().named_parameters()}
        return {
            name: torch.cat([reference_mask(row) for row in values.view(shapes[name][0], -1)])
            for name, values in scores.items()
        }
    flat = reference_mask(torch.cat(list(scores.values())))
    return dict(zip(scores, flat.split([v.numel() for v in scores.values()]), strict=True))


def train_rank(deepspeed, rank, world_size, case):
    from emp_callbacks.integrations.deepspeed import EMPHook

    stage, dtype, settings, micro, extra = case
    engine = make_engine(deepspeed, stage, dtype, micro, extra)
    hook = EMPHook(engine, every_n_steps=EVERY, **settings)
    watch = Watch(hook, engine)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(1, dtype=torch.float64)
        for part in range(micro):
            x, y = batch(step, part)
            x, y = x[rank::world_size].to(next(engine.module.parameters()).dtype), y[rank::world_size]
            loss = nn.functional.mse_loss(engine(x).float(), y)
            engine.backward(loss)
            engine.step()
            total += loss.item() / micro / world_size
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(float(engine.get_global_grad_norm() or 0))
        watch.after_step()
        if settings["mode"] == "project":  # may grow back from the next update on
            watch.masks = watch.masks if hook.pruner.steps % EVERY == 0 else None
    empty = [w.name for w in hook.pruner._weights if w.weight.numel() == 0]
    result = {"losses": losses, "norms": norms, "empty": empty, "steps": hook.pruner.steps} | closing(hook)
    # After a forward without gradient, ZeRO-3 still has gathered weights: a refresh must reach those as well.
    with torch.no_grad():
        engine(x)
    hook.pruner.refresh()
    watch.masks = gather(hook, lambda w: w.mask)
    engine(x)
    audit = hook.pruner.audit()
    assert audit.clean, audit
    return result | {"seen": watch.seen, "forwards": watch.forwards, "selections": watch.selections}


def closing(hook):
    rows = rows_of(hook.pruner)
    with hook.pruner.dense_weights():
        weights = gather(hook, lambda w: w.weight)
    return {
        "rows": rows,
        "n_eff": [e.n_eff for e in hook.trajectory],
        "masks": {name: mask.bool() for name, mask in gather(hook, lambda w: w.mask).items()},
        "weights": weights,
    }


def all_cases_rank(rank, world_size, folder, names):
    results = {}
    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        for name in names:
            try:
                results[name] = train_rank(deepspeed, rank, world_size, CASES[name])
            except Exception as error:
                raise RuntimeError(f"case {name}") from error
    torch.save(results, f"{folder}/rank{rank}.pt")


# On three ranks: every stage, and what cuts parameters in its own way.
FEWER = [
    name
    for name in CASES
    if not name.startswith("0-bf16") and not name.endswith(("bf16-project", "bf16-freeze", "2-fp32-feedback"))
]


@pytest.fixture(scope="module", params=[2, 3])
def runs(request, tmp_path_factory):
    """Return case -> one result per rank: all cases in one process group, so that DeepSpeed is imported once."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    names = list(CASES) if request.param == 2 else FEWER
    spawn(all_cases_rank, request.param, folder, names, seconds=200)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]
    return {name: [rank[name] for rank in ranks] for name in names}


@pytest.fixture(scope="module")
def alone():
    """Return the result of one plain process for the settings of a case."""
    done = {}

    def result(case):
        _, _, settings, micro, _ = case
        key = (str(settings), micro)
        done[key] = done.get(key) or train_alone(settings, micro)
        return done[key]

    return result


def test_every_case_refreshed_and_forward_read_masked_weights(runs):
    for name, ranks in runs.items():
        groups = 4 if CASES[name][2].get("scope", "global") != "global" else 1
        for result in ranks:
            # That each selection equals a sort of the gathered scores is asserted on the ranks, at every refresh.
            assert result["selections"] == STEPS // EVERY * groups, name
            assert result["forwards"] >= 32, name
            assert result["seen"] == 0, name
            assert result["steps"] == STEPS, name


def test_fp32_gives_the_masks_of_one_process(runs, alone):
    for name in filter(FP32.__contains__, runs):
        expected = alone(CASES[name])
        for result in runs[name]:
            assert result["rows"] == expected["rows"], name
            assert result["n_eff"] == pytest.approx(expected["n_eff"], rel=1e-5), name
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            for weight, mask in expected["masks"].items():
                assert torch.equal(result["masks"][weight], mask), (name, weight)
                close = torch.isclose(result["weights"][weight].float(), expected["weights"][weight], rtol=0, atol=2e-5)
                assert bool(close.all()), (name, weight)


def test_clipping_reads_the_masked_gradient(runs, alone):
    for name in filter(FP32.__contains__, runs):
        if name.startswith("0"):
            continue  # the engine reports no norm
        for result in runs[name]:
            assert result["norms"] == pytest.approx(alone(CASES[name])["norms"], rel=1e-4), name


def test_half_precision_stays_near_one_process(runs, alone):
    for name, ranks in runs.items():
        if name not in FP32 and not name.startswith("0"):  # stage 0 in bf16 takes a step of its own at the start
            for result in ranks:
                assert result["losses"] == pytest.approx(alone(CASES[name])["losses"], rel=1e-2), name


def test_some_rank_holds_nothing_of_a_parameter(runs):
    assert any(result["empty"] for result in runs["1-fp32-freeze"])
    assert any(result["empty"] for result in runs["3-fp32-freeze"])


# ---- steps that are skipped -------------------------------------------------------------------------------------


def overflow_rank(rank, world_size, folder):
    found = {}
    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        from deepspeed.accelerator import get_accelerator

        from emp_callbacks.integrations.deepspeed import EMPHook

        get_accelerator().is_fp16_supported = lambda: True
        for stage in range(4):
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
                after = closing(hook)["weights"]
                assert (step == 2) == all(torch.equal(after[name], before[name]) for name in before)
                assert hook.pruner.audit().clean
            found[stage] = ([event.step for event in hook.trajectory], hook.pruner.steps, engine.global_steps)
            hook.finalize()
    torch.save(found, f"{folder}/rank{rank}.pt")


def test_a_refresh_due_on_an_overflowed_step_is_late_not_lost(tmp_path):
    spawn(overflow_rank, 2, tmp_path)
    for rank in range(2):
        for stage, found in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True).items():
            assert found == ([0, 3, 6], 7, 8), stage


# ---- checkpoints ------------------------------------------------------------------------------------------------

SAVED = [(0, "bf16", "feedback"), (1, "bf16", "feedback"), (2, "fp32", "freeze"), (3, "fp32", "feedback")]


def run_steps(engine, rank, world_size, first, last):
    for step in range(first, last):
        x, y = batch(step, 0)
        x = x[rank::world_size].to(next(engine.module.parameters()).dtype)
        engine.backward(nn.functional.mse_loss(engine(x).float(), y[rank::world_size]))
        engine.step()


def resume_rank(rank, world_size, folder):
    from emp_callbacks.integrations.deepspeed import EMPHook

    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        for stage, dtype, mode in SAVED:
            settings = {"every_n_steps": 3, "mode": mode}
            whole = make_engine(deepspeed, stage, dtype, 1, {})
            hook = EMPHook(whole, **settings)
            run_steps(whole, rank, world_size, 0, 7)
            whole.save_checkpoint(f"{folder}/{stage}")
            run_steps(whole, rank, world_size, 7, 12)
            resumed = make_engine(deepspeed, stage, dtype, 1, {})
            other = EMPHook(resumed, **settings)
            owners = [w.segment.owner for w in other.pruner._weights]
            run_steps(resumed, rank, world_size, 20, 24)  # another run's masks, to be forgotten
            resumed.load_checkpoint(f"{folder}/{stage}")
            updated = [id(t) for t in other.pruner._backend._layout.owners()]
            assert all(id(owner) in updated for owner in owners), "loading keeps the owners"
            assert other.pruner.audit().clean
            run_steps(resumed, rank, world_size, 7, 12)
            one, two = closing(hook), closing(other)
            assert one["rows"] == two["rows"]
            assert [row[0] for row in one["rows"]] == [3, 6, 9, 12]
            for name in one["masks"]:
                assert torch.equal(one["masks"][name], two["masks"][name]), (stage, name)
                assert torch.equal(one["weights"][name], two["weights"][name]), (stage, name)
            hook.finalize()
            assert "step" not in vars(whole)
            assert "load_checkpoint" not in vars(whole)


def test_an_engine_checkpoint_resumes_bit_for_bit(tmp_path):
    spawn(resume_rank, 2, tmp_path)


# ---- what is refused, epochs, the engine given back -------------------------------------------------------------


def manners_rank(rank, world_size, folder):
    from emp_callbacks.integrations.deepspeed import EMPHook

    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        engine = make_engine(deepspeed, 2, "fp32", 1, {})
        engine.save_checkpoint(f"{folder}/dense")
        hook = EMPHook(engine, every_n_epochs=1)
        inner = engine.optimizer.step
        run_steps(engine, rank, world_size, 0, 2)
        assert not hook.trajectory
        assert len(hook.end_epoch()) == 1
        assert hook.density < 1
        with pytest.raises(FileNotFoundError, match="saved without EMP"):
            engine.load_checkpoint(f"{folder}/dense")
        state = hook.state_dict()
        run_steps(engine, rank, world_size, 2, 4)
        hook.end_epoch()
        hook.load_state_dict(state)
        assert hook.pruner.epochs == 1
        assert inner is engine.optimizer.step
        hook.finalize()
        assert not {"step", "save_checkpoint", "load_checkpoint"} & set(vars(engine))
        assert "step" not in vars(engine.optimizer)
        run_steps(engine, rank, world_size, 4, 5)
        assert hook.pruner.steps == 2

        frozen = make_engine(deepspeed, 2, "fp32", 1, {})
        frozen.module.extra = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r"does not update 'extra.weight'.*exclude it"):
            EMPHook(frozen)
        EMPHook(frozen, exclude=["extra.*"]).finalize()

        def refused(message, **changes):
            other = make_engine(deepspeed, 3, "fp32", 1, {})
            for place, value in changes.items():
                target = other.optimizer if place in vars(other.optimizer) else other
                setattr(target, place, value)
            with pytest.raises(NotImplementedError, match=message):
                EMPHook(other)

        refused("NVMe; offload to the CPU", swap_optimizer=True)
        refused("remove zenflow", zenflow=True)
        refused("ratio: 1", partial_offload=0.5)
        refused("MoE", has_moe_layers=True)
        refused("pipeline", pipeline_parallelism=True)
        refused("not a torch.optim.Optimizer", basic_optimizer=object())


def test_manners(tmp_path):
    spawn(manners_rank, 2, tmp_path)
