"""A sparse model that is trained further keeps its zeros from the first step on: density="found"."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPCallback, EMPConfig, EMPPruner, effective_number


def sparse_net(layers=((9, 14), (14, 5)), left=0.3):
    """A net whose weights are pruned by magnitude, and one layer of which is pruned altogether."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*sizes) for sizes in layers))
    for layer in net:
        with torch.no_grad():
            cut = layer.weight.abs().flatten().quantile(1 - left)
            layer.weight.mul_(layer.weight.abs() > cut)
    return net


def zeros(net):
    return {name: p == 0 for name, p in net.named_parameters() if p.dim() > 1}


def steps(net, optimizer, pruner, number=4):
    for step in range(number):
        optimizer.zero_grad()
        net(torch.randn(8, 9, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        pruner.step()
        yield


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", [{}, {"every_n_steps": 2}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_from_the_first_step_on(schedule, kind):
    net = sparse_net()
    before = zeros(net)
    optimizer = kind(net.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    pruner = EMPPruner(net, optimizer, density="found", mode="freeze", **schedule)
    weights = [p.clone() for p in net.parameters()]
    assert pruner.density == pytest.approx(0.3, abs=0.02)
    for _ in steps(net, optimizer, pruner):
        assert all(torch.equal(now, before[name]) for name, now in zeros(net).items())
    assert all(torch.equal(~mask, before[name]) for name, mask in pruner.masks.items())
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), weights, strict=True))
    state = optimizer.state[net[0].weight]
    for value in state.values():
        assert value.dim() == 0 or int(value[before["0.weight"]].count_nonzero()) == 0
    assert pruner.trajectory[0].step == 0
    assert pruner.trajectory[0].n_eff == pytest.approx(
        effective_number(torch.cat([w.flatten() for w in weights if w.dim() > 1]))
    )


def test_a_layer_that_is_all_zero_stays_so():
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    nn.init.zeros_(net[1].weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="nothing is kept of 1.weight"):
        pruner = EMPPruner(net, optimizer, density="found", mode="freeze")
    for _ in steps(net, optimizer, pruner):
        assert int(net[1].weight.count_nonzero()) == 0


def test_a_dense_model_is_said():
    net = nn.Linear(9, 9)
    with pytest.warns(UserWarning, match="no weight to prune is 0"):
        EMPPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), density="found", mode="freeze")


def test_a_state_that_is_loaded_takes_the_place_of_what_was_found():
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, density="found", mode="freeze")
    list(steps(net, optimizer, pruner, 2))
    state, masks = pruner.state_dict(), pruner.masks
    pruner.detach()
    again = sparse_net(left=0.6)
    resumed = EMPPruner(again, torch.optim.SGD(again.parameters(), lr=0.1), density="found", mode="freeze")
    resumed.load_state_dict(state)
    assert all(torch.equal(mask, masks[name]) for name, mask in resumed.masks.items())
    assert len(resumed.trajectory) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "feedback"}, "mode='freeze', got 'feedback'"),
        ({"mode": "freeze", "scope": "row"}, "scope='global', got 'row'"),
        ({"mode": "freeze", "criterion": "wanda"}, "criterion='magnitude', got 'wanda'"),
        ({"mode": "freeze", "beta": 2.0}, r"beta=1.0, got 2.0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        EMPConfig(density="found", **settings)
    with pytest.raises(ValueError, match="'found'"):
        EMPConfig(density="lost", mode="freeze")


def test_lightning_fine_tunes_behind_the_zeros(tmp_path):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = sparse_net()

        def training_step(self, batch, batch_idx):
            assert all(torch.equal(now, before[name]) for name, now in zeros(self.net).items())
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    module = Module()
    before = zeros(module.net)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    emp = EMPCallback(density="found", mode="freeze", summary=False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[emp], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 9)), batch_size=4))
    assert all(torch.equal(now, before[name]) for name, now in zeros(module.net).items())
    assert [row.step for row in emp.trajectory] == [0, 2, 4]
