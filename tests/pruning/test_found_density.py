"""density="found": a sparse model trains on and keeps its zeros from the first step on."""

import warnings

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn

from emp_callbacks import EMPCallback, EMPConfig, EMPPruner

FOUND = {"density": "found", "mode": "freeze"}


def sparse_net(zeros=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        for layer in net[::2] if zeros else ():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.4)
        net[2].weight[3] = 0.0  # a whole row
    return net


def zeros_of(net):
    return {name: p == 0 for name, p in net.named_parameters() if p.dim() > 1}


def train(net, optimizer, pruner, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        pruner.step()


def same(net, zeros):
    return all(torch.equal(now, zeros[name]) for name, now in zeros_of(net).items())


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_zeros_are_kept_from_the_first_step_on(scope):
    net = sparse_net()
    zeros = zeros_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = EMPPruner(net, optimizer, scope=scope, every_n_steps=4, **FOUND)
        assert all(torch.equal(mask, ~zeros[name]) for name, mask in pruner.masks.items())
        for _ in range(6):
            train(net, optimizer, pruner, 1)
            assert same(net, zeros)
    for name, parameter in net.named_parameters():
        if name in zeros:
            assert not optimizer.state[parameter]["exp_avg"][zeros[name]].any()
    first = [event for event in pruner.trajectory if event.step == 0]
    layers = {layer.name: layer for event in first for layer in event.layers}
    assert {name: layer.keep for name, layer in layers.items()} == {
        name: int((~pruned).sum()) for name, pruned in zeros.items()
    }
    assert {event.step for event in pruner.trajectory} == {0, 4}
    assert all(event.density == again.density for event, again in zip(first, pruner.last_events, strict=True))


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_a_layer_of_zeros_stays_zero_and_is_said(scope):
    net = sparse_net()
    nn.init.zeros_(net[4].weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match=r"all weights are 0 in 4.weight and stay so.*exclude"):
        pruner = EMPPruner(net, optimizer, scope=scope, **FOUND)
    train(net, optimizer, pruner, 3)
    assert not net[4].weight.any()


def test_a_model_without_zeros_is_said():
    net = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="none of the weights to prune is 0"):
        EMPPruner(net, torch.optim.SGD(net.parameters()), **FOUND)


def test_sparse_weights_that_come_after_the_pruner_are_said():
    net = sparse_net(zeros=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, **FOUND)
    net.load_state_dict(sparse_net().state_dict())
    with pytest.warns(UserWarning, match=r"came after the pruner was made: call pruner.refresh\(\)"):
        train(net, optimizer, pruner, 1)


def test_a_state_that_is_loaded_takes_their_place():
    net = sparse_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, **FOUND)
    train(net, optimizer, pruner, 3)
    state, masks, rows = pruner.state_dict(), pruner.masks, pruner.trajectory.records()
    other = sparse_net()
    with torch.no_grad():
        other[0].weight[0] = 0  # more zeros than the state knows
    again = EMPPruner(other, torch.optim.AdamW(other.parameters()), every_n_steps=2, **FOUND)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(state)
    assert all(torch.equal(mask, masks[name]) for name, mask in again.masks.items())
    assert again.trajectory.records() == rows


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = sparse_net()
        self.zeros = zeros_of(self.net)
        self.steps = 0

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    def on_train_batch_end(self, *_):
        self.steps += same(self.net, self.zeros)


def fit(folder, epochs, checkpoint=None):
    module, emp = Module(), EMPCallback(**FOUND, summary=False)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[emp], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=0.1, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 6), batch_size=8), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, emp.pruner


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_callback_keeps_them_too_and_resumes(tmp_path):
    module, pruner = fit(tmp_path / "whole", 3)
    assert module.steps == 12
    assert [event.step for event in pruner.trajectory] == [0, 4, 8, 12]
    fit(tmp_path / "parts", 1)
    again, resumed = fit(tmp_path / "parts", 3, tmp_path / "parts" / "last.ckpt")
    assert again.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert [event.step for event in resumed.trajectory] == [0, 4, 8, 12]
    assert [file.name for file in (tmp_path / "parts").glob("*.jsonl*")] == ["emp_trajectory.jsonl"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"density": "found"}, "mode='freeze', got 'feedback'"),
        ({**FOUND, "criterion": "taylor"}, "criterion='magnitude', got 'taylor'"),
        ({**FOUND, "target": "neurons"}, "target='weights', got 'neurons'"),
        ({**FOUND, "beta": 0.5}, "beta=1.0, got 0.5"),
        ({**FOUND, "min_density": 0.1}, "min_density=0.0, got 0.1"),
        ({**FOUND, "shares": "erk", "scope": "tensor"}, "shares='uniform', got 'erk'"),
        ({"density": "lost", "mode": "freeze"}, "or 'found', got 'lost'"),
    ],
)
def test_what_it_does_not_go_with(settings, told):
    with pytest.raises(ValueError, match=told):
        EMPConfig(**settings)


def test_of_the_finished_model_n_eff_decides():
    assert EMPConfig(**FOUND, every_n_steps=1).once().density is None
