"""Every target with every criterion, in a training loop, against scores computed from what the loop itself saw."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPPruner
from emp_callbacks.criteria import DEFAULT_CRITERIA, fitting_criteria
from emp_callbacks.study.recipe.networks import KANLinear

STEPS, WINDOW = 3, 2  # the refresh is at step 3 and evidence is of the steps 2 and 3
GLOBAL = {"scope": "global", "every_n_steps": STEPS, "evidence_steps": WINDOW}


class Net(nn.Module):
    """A convolution with a batch norm, one without, and two Linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, groups=2)
        self.fc1, self.act, self.fc2 = nn.Linear(16, 7), nn.GELU(), nn.Linear(7, 5)

    def forward(self, images):
        hidden = functional.silu(self.bn1(self.conv1(images)))
        hidden = functional.silu(self.conv2(hidden))
        return self.fc2(self.act(self.fc1(functional.adaptive_avg_pool2d(hidden, 2).flatten(1))))


def make_vit():
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **sizes)


def make_kan():
    return nn.Sequential(nn.Flatten(), KANLinear(64, 6, 3, 3), KANLinear(6, 4, 3, 3), KANLinear(4, 5, 3, 3))


class Seen:
    """What a training loop saw: per step the weights before it, their gradients, inputs and outputs of modules."""

    def __init__(self, model, prune):
        self.model, self.steps, self.now = model, [], None
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, out, name=name: self.look(name, args, out))
        self.pruner = prune()

    def look(self, name, args, output):
        self.now["inputs"][name] = args[0].detach().clone() if isinstance(args[0], torch.Tensor) else None
        self.now["outputs"][name] = output
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.retain_grad()

    def train(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        optimizer.register_step_pre_hook(lambda *_: None)
        self.pruner = self.pruner(optimizer)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            self.now = {"inputs": {}, "outputs": {}}
            images = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, 5, (6,), generator=generator)
            functional.cross_entropy(self.model(images), labels).backward()
            self.now["weights"] = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            self.now["gradients"] = {n: p.grad.clone() for n, p in self.model.named_parameters()}
            self.steps.append(self.now)
            optimizer.step()
            self.now = {n: p.detach().clone() for n, p in self.model.named_parameters()}  # what the refresh scores
            self.events = self.pruner.step()
            optimizer.zero_grad()
        self.final = self.now
        return self

    @property
    def window(self):
        return self.steps[-WINDOW:]


def trained(make, **settings):
    torch.manual_seed(0)
    model = make().double()
    seen = Seen(model, lambda: lambda opt: EMPPruner(model, opt, **GLOBAL, **settings))
    return seen.train()


def check(seen, expected, tolerance=0.0):
    """Compare N_eff and masks with what the definition gives for the expected scores, all layers competing."""
    flat = np.concatenate([np.abs(np.asarray(scores, dtype=np.float64)).ravel() for scores in expected.values()])
    n_eff = flat.sum() ** 2 / (flat**2).sum()
    (event,) = seen.events
    assert event.n == flat.size
    assert event.n_eff == pytest.approx(n_eff, rel=1e-9)
    assert event.keep == int(np.floor(n_eff + tolerance))
    assert 1 < event.keep < flat.size, "a mask that keeps all or one compares nothing"
    order = np.lexsort((np.arange(flat.size), -flat))
    kept = np.zeros(flat.size, dtype=bool)
    kept[order[: event.keep]] = True
    assert list(seen.pruner.masks) == list(expected)
    assert np.array_equal(np.concatenate([m.numpy().ravel() for m in seen.pruner.masks.values()]), kept)


def mean(values):
    return sum(values) / len(values)


# ---- weights ------------------------------------------------------------------------------------------------------

WEIGHTS = ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "saliency"])
def test_weights_by_what_weights_and_gradients_say(criterion):
    seen = trained(Net, criterion=criterion)
    score = {
        "magnitude": lambda name: seen.final[name],
        "taylor": lambda name: mean([(s["weights"][name] * s["gradients"][name]).abs() for s in seen.window]),
        "saliency": lambda name: mean([s["gradients"][name].abs() for s in seen.window]),
    }[criterion]
    check(seen, {name: score(name) for name in WEIGHTS})


def test_weights_by_wanda():
    seen = trained(Net, criterion="wanda")
    norm = {}
    for name in ("conv1", "conv2", "fc1", "fc2"):
        inputs = torch.cat([s["inputs"][name] for s in seen.window]).numpy()
        channels = np.moveaxis(inputs, 1, 0).reshape(inputs.shape[1], -1)
        norm[name] = [float(np.sqrt(sum(x.astype(np.float32).astype(np.float64) ** 2))) for x in channels]
    scores = {name: seen.final[name].abs().numpy().copy() for name in WEIGHTS}
    for name, values in scores.items():
        for out in range(values.shape[0]):
            for column in range(values.shape[1]):
                # the second half of conv2's kernels reads channels 3 to 5
                channel = column + (3 if name == "conv2.weight" and out >= 2 else 0)
                values[out, column] *= norm[name.split(".")[0]][channel]
    check_close(seen, scores)


def check_close(seen, expected):
    """Where float32 sums stand behind the scores: N_eff to 1e-6, masks equal but for none."""
    (event,) = seen.events
    flat = np.concatenate([np.abs(values).ravel() for values in expected.values()])
    assert event.n_eff == pytest.approx(flat.sum() ** 2 / (flat**2).sum(), rel=1e-6)
    kept = np.concatenate([m.numpy().ravel() for m in seen.pruner.masks.values()])
    assert 1 < event.keep < flat.size
    assert flat[kept].min() >= flat[~kept].max() * (1 - 1e-6)


# ---- heads --------------------------------------------------------------------------------------------------------


def head_of(seen, criterion):
    """Return the scores of each block's three heads of four channels."""

    def columns(values, head):
        return values[:, 4 * head : 4 * head + 4]

    def rows(values, head):
        return torch.cat([values[12 * part + 4 * head : 12 * part + 4 * head + 4] for part in range(3)])

    def score(block, head):
        qkv, proj = f"blocks.{block}.attn.qkv.weight", f"blocks.{block}.attn.proj.weight"
        if criterion == "weight_norm":
            return (rows(seen.final[qkv], head).square().sum() + columns(seen.final[proj], head).square().sum()).sqrt()
        if criterion == "taylor":  # h * dL/dh of the head's own output, summed over the batch
            found = []
            for step in seen.window:
                h = step["inputs"][f"blocks.{block}.attn.proj"][..., 4 * head : 4 * head + 4]
                dy = step["outputs"][f"blocks.{block}.attn.proj"].grad
                dh = dy @ columns(step["weights"][proj], head)
                found.append((h * dh).sum().abs())
            return mean(found)
        if criterion == "saliency":
            return mean([columns(step["gradients"][proj], head).abs().mean() for step in seen.window])
        return (
            torch.cat([s["inputs"][f"blocks.{block}.attn.proj"] for s in seen.window])[..., 4 * head : 4 * head + 4]
            .abs()
            .mean()
        )

    return {f"blocks.{b}.attn": torch.stack([score(b, h) for h in range(3)]).numpy() for b in range(2)}


def added_by_head(seen):
    """Return the mean norm of what each head adds, computed from a projection without the others' columns."""

    def norm(name, head):
        mine = torch.arange(12) // 4 == head
        added = [s["inputs"][name] @ (s["weights"][f"{name}.weight"] * mine).T for s in seen.window]
        return torch.cat(added).norm(dim=-1).mean()

    names = [f"blocks.{block}.attn" for block in range(2)]
    return {name: torch.stack([norm(f"{name}.proj", head) for head in range(3)]).numpy() for name in names}


@pytest.mark.parametrize("criterion", ["weight_norm", "taylor", "saliency", "activation", "output_norm"])
def test_heads(criterion):
    by_output = criterion == "output_norm"
    mode = "freeze" if by_output else "feedback"
    seen = trained(make_vit, target="heads", criterion=criterion, beta=0.7, tolerance=0.0, min_units=0, mode=mode)
    expected = added_by_head(seen) if by_output else head_of(seen, criterion)
    (event,) = seen.events
    flat = np.concatenate(list(expected.values()))
    n_eff = flat.sum() ** 2 / (flat**2).sum()
    assert event.n_eff == pytest.approx(n_eff, rel=1e-6)
    assert event.keep == int(0.7 * n_eff)
    kept = np.concatenate([m.numpy() for m in seen.pruner.masks.values()])
    assert flat[kept].min() > flat[~kept].max()


# ---- neurons and channels -----------------------------------------------------------------------------------------

LAYERS = {"conv1": "bn1", "conv2": None, "fc1": None}


def neuron_scores(seen, criterion, layer, bn):
    masked = [f"{layer}.weight", f"{layer}.bias", *([f"{bn}.weight", f"{bn}.bias"] if bn else [])]

    def per_unit(values):
        return values.flatten(1).sum(1) if values.dim() > 1 else values

    def gradients(read):
        return [sum(per_unit(read(s["weights"][n], s["gradients"][n])) for n in masked) for s in seen.window]

    if criterion == "weight_norm":
        return seen.final[f"{layer}.weight"].flatten(1).norm(dim=1)
    if criterion == "taylor":
        return mean([total.abs() for total in gradients(lambda w, g: w * g)])
    if criterion == "saliency":
        sizes = sum(per_unit(torch.ones_like(seen.final[n])) for n in masked)
        return mean(gradients(lambda w, g: g.abs())) / sizes
    outputs = torch.cat([s["outputs"][bn or layer].detach() for s in seen.window])
    return outputs.movedim(1, 0).flatten(1).abs().mean(1)


@pytest.mark.parametrize("criterion", ["weight_norm", "taylor", "saliency", "activation"])
def test_neurons_and_channels(criterion):
    seen = trained(Net, target="neurons", criterion=criterion, tolerance=0.0, min_units=0)
    expected = {layer: neuron_scores(seen, criterion, layer, bn).numpy() for layer, bn in LAYERS.items()}
    if criterion == "activation":  # gathered in float32
        check_close(seen, expected)
    else:
        check(seen, expected)


def test_channels_by_batch_norm_scale():
    torch.manual_seed(3)
    model = Net().double()
    model.bn1.weight.data.copy_(torch.tensor([0.1, -3.0, 0.2, 2.0, -0.05, 1.0]))
    pruner = EMPPruner(model, target="neurons", criterion="bn_scale", include=["conv1"], mode="project")
    (event,) = pruner.refresh()
    assert event.n_eff == pytest.approx(6.35**2 / (0.01 + 9 + 0.04 + 4 + 0.0025 + 1))
    assert pruner.masks["conv1"].tolist() == [False, True, False, True, False, False]
    for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"):
        zeroed = model.get_parameter(name).flatten(1).abs().sum(1) == 0 if "conv1.w" in name else None
        zeroed = model.get_parameter(name) == 0 if zeroed is None else zeroed
        assert zeroed.tolist() == [True, False, True, False, True, True] or name == "bn1.bias"
    with pytest.raises(ValueError, match="'bn_scale' needs a batch norm after every layer, and 'conv2' has none"):
        EMPPruner(Net(), target="neurons", criterion="bn_scale")


# ---- KAN nodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["spline", "weight_norm", "taylor", "saliency"])
def test_kan_nodes(criterion):
    seen = trained(make_kan, target="kan_nodes", criterion=criterion, beta=0.8, tolerance=0.0, min_units=0)

    def score(layer, node):
        into, out = f"{layer}.spline_weight", f"{layer + 1}.spline_weight"
        base = f"{layer + 1}.base_weight"
        if criterion == "spline":
            return max(seen.final[into][node].abs().mean(), seen.final[out][:, node].abs().mean())
        if criterion == "weight_norm":
            return (seen.final[into][node].square().sum() + seen.final[out][:, node].square().sum()).sqrt()
        taylor, size = [], seen.final[out][:, node].numel() + seen.final[base][:, node].numel()
        for step in seen.window:
            w, g = step["weights"], step["gradients"]
            if criterion == "taylor":
                taylor.append(sum((w[n][:, node] * g[n][:, node]).sum() for n in (out, base)).abs())
            else:
                taylor.append(sum(g[n][:, node].abs().sum() for n in (out, base)) / size)
        return mean(taylor)

    units = {1: 6, 2: 4}
    flat = np.array([float(score(layer, node)) for layer, n in units.items() for node in range(n)])
    n_eff = flat.sum() ** 2 / (flat**2).sum()
    (event,) = seen.events
    assert event.n_eff == pytest.approx(n_eff, rel=1e-9)
    assert event.keep == int(0.8 * n_eff)
    kept = np.concatenate([m.numpy() for m in seen.pruner.masks.values()])
    assert flat[kept].min() > flat[~kept].max()


# ---- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["activation", "taylor", "saliency"])
def test_features(criterion):
    seen = trained(Net, target="features", criterion=criterion, include=["bn1", "act"], tolerance=0.0, min_units=0)

    def score(name):
        per_sample = []
        for step in seen.window:
            a, g = step["outputs"][name].detach(), step["outputs"][name].grad
            a, g = (a.flatten(2), g.flatten(2)) if a.dim() > 2 else (a[..., None], g[..., None])
            per_sample += {
                "activation": a.abs().mean(2),
                "taylor": (a * g).sum(2).abs(),
                "saliency": g.abs().mean(2),
            }[criterion]
        return mean(per_sample).numpy()

    check(seen, {name: score(name) for name in ("bn1", "act")})


def test_random_scores_on_every_static_target():
    for target, make in {"heads": make_vit, "neurons": Net, "features": Net, "kan_nodes": make_kan}.items():
        one, other = (trained(make, target=target, criterion="random", beta=0.7).pruner.masks for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert not all(mask.all() for mask in one.values())


def test_all_pairs_are_tested_here():
    pairs = {(target, name) for target in DEFAULT_CRITERIA for name in fitting_criteria(target)}
    here = {("weights", c) for c in ("magnitude", "taylor", "saliency", "wanda", "random")}
    here |= {("heads", c) for c in ("weight_norm", "taylor", "saliency", "activation", "output_norm", "random")}
    here |= {("neurons", c) for c in ("weight_norm", "taylor", "saliency", "activation", "bn_scale", "random")}
    here |= {("experts", c) for c in ("reap", "weight_norm", "taylor", "saliency", "random")}  # targets/test_experts
    here |= {("kan_nodes", c) for c in ("spline", "weight_norm", "taylor", "saliency", "random")}
    here |= {("features", c) for c in ("activation", "taylor", "saliency", "random")}
    here |= {("attention_edges", c) for c in ("attention_weight", "attention_logit")}  # targets/test_attention_edges
    assert pairs == here
