"""Targets that work in the forward pass, and criteria that gather evidence, inside a Trainer."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from emp_callbacks import EMPCallback, EMPPruner
from emp_callbacks.integrations.lightning import log_values
from tests.integrations.test_lightning import data, make_module, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
]


def hooks_of(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def watched(module):
    """Record what the second Linear reads: the features after their mask."""
    seen = []
    module.net[2].register_forward_pre_hook(lambda _, args: seen.append((module.training, args[0].detach().clone())))
    return seen


def test_features_are_masked_in_training_validation_and_test_and_hooks_leave(tmp_path):
    module = make_module(pl)
    seen = watched(module)
    callback = EMPCallback(target="features", every_n_epochs=1, beta=0.7, summary=False)
    trainer = make_trainer(pl, tmp_path, [callback])
    trainer.fit(module, data(), data(2))
    pruned = ~callback.masks["net.1"]
    assert 0 < int(pruned.sum()) < 9
    assert hooks_of(module) == 1, "only the hook of this test is left"
    last_validation = [values for training, values in seen if not training][-1]
    assert bool((last_validation[:, pruned] == 0).all())
    assert bool((last_validation[:, ~pruned] != 0).all())
    module.test_step = module.validation_step
    seen.clear()
    trainer.test(module, data(1), verbose=False)
    assert bool((seen[0][1][:, pruned] == 0).all()), "masked in test, too"
    assert hooks_of(module) == 1
    seen.clear()
    module.net(torch.randn(1, 6))
    assert bool((seen[0][1] != 0).all()), "the model is the user's own again"
    with callback.pruner.masked_forward():
        module.net(torch.randn(1, 6))
    assert bool((seen[1][1][:, pruned] == 0).all())


def test_an_epoch_window_looks_at_the_last_steps_of_the_first_epoch_already(tmp_path):
    seen = []

    def record(module, args):
        if module.training:
            seen.append(args[0].detach().clone())

    module = make_module(pl)
    module.net[0].register_forward_pre_hook(record)
    callback = EMPCallback(
        criterion="wanda", include=["net.0.weight"], every_n_epochs=1, evidence_steps=2, summary=False
    )
    make_trainer(pl, tmp_path, [callback], max_epochs=1).fit(module, data(5))
    assert len(seen) == 5
    with callback.pruner.dense_weights():
        dense = module.net[0].weight.detach().double().abs()
    scores = dense * torch.cat(seen[-2:]).double().square().sum(0).sqrt()
    (event,) = callback.trajectory
    assert event.n_eff == pytest.approx(float(scores.sum() ** 2 / scores.square().sum()), rel=1e-6)


def test_project_with_evidence_closes_with_the_last_mask(tmp_path):
    module = make_module(pl)
    callback = EMPCallback(criterion="taylor", mode="project", every_n_steps=4, evidence_steps=1, summary=False)
    make_trainer(pl, tmp_path, [callback], max_epochs=-1, max_steps=7).fit(module, data())
    assert [event.step for event in callback.trajectory] == [4], "no evidence was gathered for another refresh"
    for name, mask in callback.masks.items():
        assert bool((module.get_parameter(name)[~mask] == 0).all())


def test_attention_of_the_first_token_is_logged():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    pruner = EMPPruner(model, target="attention_edges")
    x = torch.randn(3, 5, 8)
    model(x)
    values = log_values(pruner.refresh())
    pruner.finalize()
    with torch.no_grad():
        _, weights = model.self_attn(x, x, x, average_attn_weights=False)
    assert values["emp/first_token/self_attn"] == pytest.approx(float(weights[..., 0].mean()), rel=1e-5)


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_certificates_go_to_the_loggers(criterion):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    pruner = EMPPruner(net, criterion=criterion, certify=True, beta=0.7)
    net(torch.randn(9, 6)).square().mean().backward()
    if criterion == "taylor":
        pruner.collect()
    values = log_values(pruner.refresh())
    assert 0 < values["emp/tight_mass_bound"] <= values["emp/preserved_mass"]
    if criterion == "taylor":
        assert values["emp/certified_loss_change"] == pruner.trajectory[-1].certificate.bound
    else:
        assert 0 < values["emp/measured_error/0.weight"] <= values["emp/certified_error/0.weight"]
