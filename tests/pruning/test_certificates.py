"""Certificates against what the layers' outputs and the loss really do, computed from the inputs that hooks see."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from emp_callbacks import EMPConfig, EMPPruner, Trajectory
from emp_callbacks.trajectory import PruneEvent, layer_table


class Net(nn.Module):
    """A layer of every kind that Wanda scores."""

    def __init__(self, padding_mode="zeros"):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode=padding_mode)
        self.conv2 = nn.Conv2d(6, 4, (3, 2), groups=2, padding="same", dilation=(1, 3))
        self.conv3 = nn.Conv1d(4, 5, 3, padding=2, stride=2)
        self.fc1, self.fc2 = Conv1D(7, 45), nn.Linear(7, 3)

    def forward(self, images):
        hidden = functional.silu(self.conv2(functional.silu(self.conv1(images))))
        hidden = functional.silu(self.conv3(hidden.flatten(2)))
        return self.fc2(functional.silu(self.fc1(hidden.flatten(1))))


LAYERS = ("conv1", "conv2", "conv3", "fc1", "fc2")


def observed(net, batches=3, **settings):
    """Show batches to a pruner of a finished model; return it, the refresh's rows and what every layer read."""
    inputs = {name: [] for name in LAYERS}
    for name in LAYERS:
        net.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0]))
    pruner = EMPPruner(net, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(batches):
            net(torch.randn(4, 2, 8, 8) ** 3)
    seen = {name: torch.cat(values) for name, values in inputs.items()}
    dense = {name: net.get_submodule(name).weight.detach().clone() for name in LAYERS}
    events = pruner.refresh()
    pruner.finalize()
    return dense, seen, events


def outputs(net, name, weight, values):
    layer = net.get_submodule(name)
    bias = layer.bias.data.clone()
    layer.bias.data.zero_()
    kept, layer.weight.data = layer.weight.data, weight
    result = layer(values).detach()
    layer.weight.data = kept
    layer.bias.data = bias
    return (result.movedim(1, -1) if name.startswith("conv") else result).reshape(
        -1, result.shape[1 if name.startswith("conv") else -1]
    )


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_wanda_measures_the_error_of_every_output_and_bounds_it(scope, beta):
    torch.manual_seed(0)
    net = Net()
    dense, seen, events = observed(net, criterion="wanda", scope=scope, beta=beta, mode="project", certify=True)
    layers = {layer.name: layer for event in events for layer in event.layers}
    assert list(layers) == [f"{name}.weight" for name in LAYERS]
    for name in LAYERS:
        certificate = layers[f"{name}.weight"].certificate
        assert certificate.kind == "output_error"
        before = outputs(net, name, dense[name], seen[name])
        errors = (before - outputs(net, name, net.get_submodule(name).weight.data, seen[name])).double()
        assert certificate.measured == pytest.approx(float(errors.norm()), rel=1e-4, abs=1e-5)
        assert certificate.scale == pytest.approx(float(before.double().norm()), rel=1e-4)
        assert certificate.measured <= certificate.bound
        assert 0 <= certificate.tightness <= 1 + 1e-6
        if layers[f"{name}.weight"].density < 1:
            assert certificate.measured > 0
        if name == "fc2":  # what the bound says of each output, computed anew
            removed = (dense[name] - net.fc2.weight.data).double().abs()
            bounds = removed @ seen[name].double().norm(dim=0)
            assert certificate.bound == pytest.approx(float(bounds.norm()), rel=1e-5)
            some = bounds > 0
            worst = float((errors.norm(dim=0)[some] / bounds[some]).max())
            assert certificate.tightness == pytest.approx(worst, rel=1e-4)


def test_measured_under_autocast_as_without():
    def measured(autocast):
        torch.manual_seed(0)
        layer = nn.Linear(64, 8)
        pruner = EMPPruner(layer, criterion="wanda", certify=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(torch.randn(100, 64))
        return pruner.refresh()[0].layers[0].certificate

    assert measured(True).measured == pytest.approx(measured(False).measured, rel=1e-6)


def test_reflected_edges_read_a_pixel_twice_and_are_not_certified():
    torch.manual_seed(0)
    *_, events = observed(Net(padding_mode="reflect"), criterion="wanda", certify=True)
    certificates = {layer.name: layer.certificate for layer in events[0].layers}
    assert certificates["conv1.weight"] is None
    assert certificates["conv2.weight"] is not None


def test_one_pruned_weight_reaches_the_bound():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, 1.0, 0.1]])
    pruner = EMPPruner(layer, criterion="wanda", density=0.67, certify=True)
    layer(torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]]))
    (event,) = pruner.refresh()
    assert event.keep == 2
    certificate = event.layers[0].certificate
    assert certificate.bound == pytest.approx(0.1 * 5.0)  # ||x_3|| = 5
    assert certificate.measured == pytest.approx(certificate.bound)
    assert certificate.tightness == pytest.approx(1.0)
    assert certificate.relative == pytest.approx((certificate.bound / certificate.scale,) * 2)


@pytest.mark.parametrize("target", ["weights", "neurons"])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_taylor_bounds_the_first_order_change_of_the_loss(target, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    pruner = EMPPruner(net, target=target, criterion="taylor", mode=mode, certify=True, scope="global", beta=0.8)
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(4)]
    dense = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = {name: [] for name in dense}
    for images, labels in batches:
        functional.cross_entropy(net(images), labels).backward()
        pruner.collect()
        for name, p in net.named_parameters():
            gradients[name].append(p.grad.clone())
        net.zero_grad()
    (event,) = pruner.refresh()
    change = 0.0
    for name, mask in pruner.weight_masks.items():
        gradient = torch.stack(gradients[name]).double().mean(0)
        change -= float((dense[name].double() * gradient)[~mask].sum())
    assert event.certificate.kind == "loss_change"
    assert 0 < abs(change) <= event.certificate.bound
    assert event.certificate.bound == pytest.approx(sum(layer.certificate.bound for layer in event.layers))
    if target == "neurons":
        assert event.certificate.measured == pytest.approx(change, rel=1e-4)
    else:
        assert event.certificate.measured is None  # signs of single weights are not kept
    pruned = (1 - event.preserved_mass) * sum(score_mass(event, dense, gradients, pruner))
    assert event.certificate.bound == pytest.approx(pruned, rel=1e-3)


def score_mass(event, dense, gradients, pruner):
    """Sum of all scores, which the preserved mass is a share of."""
    for layer in event.layers:
        if layer.name in dense:
            yield float(torch.stack([(dense[layer.name] * g).abs() for g in gradients[layer.name]]).mean(0).sum())
        else:
            per_batch = []
            for weight, bias in zip(gradients[f"{layer.name}.weight"], gradients[f"{layer.name}.bias"], strict=True):
                rows = (dense[f"{layer.name}.weight"] * weight).sum(1) + dense[f"{layer.name}.bias"] * bias
                per_batch.append(rows.abs())
            yield float(torch.stack(per_batch).mean(0).sum())


@pytest.mark.parametrize(
    "settings",
    [{}, {"criterion": "saliency"}, {"target": "features", "criterion": "taylor"}, {"target": "attention_edges"}],
)
def test_refused_where_no_certificate_is_known(settings):
    with pytest.raises(ValueError, match="no certificate is known"):
        EMPConfig(certify=True, **settings)


def test_rows_survive_a_checkpoint_a_file_and_the_resume_in_the_window(tmp_path):
    def make(path=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        pruner = EMPPruner(
            net, optimizer, criterion="wanda", certify=True, every_n_steps=4, evidence_steps=3, trajectory_path=path
        )
        return net, optimizer, pruner

    def run(net, optimizer, pruner, steps):
        for step in steps:
            optimizer.zero_grad()
            net(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            pruner.step()

    straight = make(tmp_path / "rows.jsonl")
    run(*straight, range(8))
    first, second = make(), make()
    run(*first, range(7))  # two steps into the second window
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    run(*second, range(7, 8))
    rows = [(event.layers, event.tight_mass_bound) for event in straight[2].trajectory]
    assert rows == [(event.layers, event.tight_mass_bound) for event in second[2].trajectory]
    assert all(layer.certificate.measured > 0 for layers, _ in rows for layer in layers)
    assert [(e.layers, e.certificate) for e in Trajectory.read(tmp_path / "rows.jsonl")] == [
        (e.layers, e.certificate) for e in straight[2].trajectory
    ]
    table = layer_table(straight[2].last_events)
    assert table.headings[-2:] == ["output error <=", "measured"]


def test_rows_of_older_files_are_read():
    torch.manual_seed(0)
    (event,) = EMPPruner(nn.Linear(4, 3)).refresh()
    record = event.record()
    del record["tight_mass_bound"], record["certificate"], record["layers"][0]["certificate"]
    read = PruneEvent.from_record(record)
    assert read.tight_mass_bound is None
    assert read.layers == event.layers


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize(("setting", "value"), [("beta", 0.5), ("beta", 1.0), ("beta", 1.4), ("density", 0.3)])
def test_every_row_bounds_its_preserved_mass(scope, setting, value):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 9))
    for parameter in net.parameters():
        parameter.data.pow_(3)
    for event in EMPPruner(net, scope=scope, **{setting: value}).refresh():
        assert 0 < event.tight_mass_bound <= event.preserved_mass
        if event.mass_bound is not None:
            assert event.mass_bound <= event.tight_mass_bound
        expected = setting == "beta" and value == 1.0 and scope != "row"
        assert (event.mass_bound is not None) == expected


def test_guards_that_keep_other_units_than_the_highest_have_no_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight.data.mul_(1e-3)
    (event,) = EMPPruner(net, target="neurons", scope="global", beta=0.3).refresh()
    assert "min_units" in event.note
    assert event.tight_mass_bound is None


def test_the_bound_of_rows_is_their_mean_by_mass():
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0], [40.0, 0.5, 0.5, 0.5]])
    (event,) = EMPPruner(net, scope="row").refresh()
    n_eff = [100 / 30, 41.5**2 / (1600 + 0.75)]
    each = [
        3 / 4 + 1 / 4 * math.sqrt((4 - n_eff[0]) / (n_eff[0] * 3)),
        0.25 + 0.75 * math.sqrt((4 - n_eff[1]) / (n_eff[1] * 3)),
    ]
    each[1] = min(each[1], 1 / 2 + 1 / 2 * math.sqrt(max(0.0, (1 / n_eff[1] - 1 / 2) / (1 - 1 / 2))))
    assert event.tight_mass_bound == pytest.approx((each[0] * 10 + each[1] * 41.5) / 51.5, abs=1e-6)
