"""A net, data, a plain loop and DeepSpeed engines on CPU ranks, for tests that compare them."""

import contextlib
import logging
import os
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from emp_callbacks import EMPPruner
from tests.core.reference import reference_mask
from tests.distributed.ranks import process_group

STEPS, EVERY, ROWS = 10, 3, 12


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
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    # Its wrapper keeps flat masters for its own FusedAdam, which takes minutes to compile: call this one that.
    fused = torch.optim.AdamW if config.pop("flat_masters", False) else deepspeed.runtime.engine.FusedAdam
    with mock.patch.object(deepspeed.runtime.engine, "FusedAdam", fused):
        return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


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
        score = hook.pruner._refresher.criterion.score
        self.scores = {}

        def recorded(segment):
            self.scores[segment.name] = score(segment).clone()
            return self.scores[segment.name]

        hook.pruner._refresher.criterion.score = recorded
        self.names = {id(m): f"{n}.weight" for n, m in engine.module.named_modules() if hasattr(m, "weight")}
        for module in engine.module.modules():
            if id(module) in self.names:
                module.register_forward_pre_hook(self.forward)

    def forward(self, module, inputs):
        if self.masks is not None and self.names[id(module)] in self.masks:
            self.forwards += 1
            pruned = self.masks[self.names[id(module)]] == 0
            self.seen += int((module.weight.detach().flatten()[pruned] != 0).sum())

    def after_step(self):
        if len(self.hook.trajectory) == self.selections:
            return
        self.selections = len(self.hook.trajectory)
        self.masks = gather(self.hook, lambda w: w.mask)
        scores = gather(self.hook, lambda w: self.scores[w.name])
        for name, mask in sort_reference(scores, self.hook.pruner.config).items():
            assert torch.equal(self.masks[name].bool(), mask), name


def sort_reference(scores, config):
    scope = config.scope
    if config.pattern is not None:  # of Linear layers, whose groups lie one after another
        kept, of = map(int, config.pattern.split(":"))
        groups = {name: values.abs().view(-1, of) for name, values in scores.items()}
        orders = {name: group.argsort(dim=1, descending=True, stable=True) for name, group in groups.items()}
        return {name: (order.argsort(1) < kept).flatten() for name, order in orders.items()}
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
