import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.backends import detect_backend
from emp_callbacks.config import EMPConfig
from emp_callbacks.core.effective_number import effective_number
from emp_callbacks.layer.mask_mode import Observe
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.pruning.refresher import Refresher
from emp_callbacks.pruning.streamed_refresh import StreamedLayer, observe_streamed


class Remade:
    """Makes a layer's scores anew at each call, and fails where any that it or another one made is still held."""

    held = staticmethod(lambda: None)

    def __init__(self, layer, criterion):
        self.layer, self.criterion = layer, criterion

    def __call__(self):
        assert Remade.held() is None, "the scores of a layer were held while the next ones were made"
        scores = self.criterion.score(self.layer).clone()
        Remade.held = weakref.ref(scores)
        return scores


@pytest.fixture(autouse=True)
def nothing_is_held_yet(monkeypatch):
    monkeypatch.setattr(Remade, "held", staticmethod(lambda: None))


def observed(model, scope, beta=1.0, make=Remade):
    config = EMPConfig(observe_only=True, beta=beta, scope=scope)
    backend = detect_backend(model, None)
    refresher = Refresher(config, Observe(), backend)
    layers = [
        StreamedLayer(layer.span, layer.weight.dtype, make(layer, refresher.criterion)) for layer in refresher.layers
    ]
    common = {"step": 0, "epoch": 0, "mode": "observe", "criterion": "magnitude", "scope": scope, "beta": beta}
    return observe_streamed(layers, KeepRule(beta=beta), backend, common)


def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv1d(8, 4, 3, groups=2).half(),
        nn.Linear(300, 7).bfloat16(),
        nn.Linear(1, 1),
        nn.ConvTranspose2d(4, 6, 2).to(torch.bfloat16),
    )
    with torch.no_grad():
        model[0].weight[:3] = 0.0
        model[2].weight.mul_(4).round_().div_(4)  # ties
    return model


def wide():
    return nn.Sequential(mixed(), nn.Linear(4, 4).double())


def zeros():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def alike():
    """Weights all of one size: which of them stay is a matter of their places alone."""
    model = nn.Sequential(*(nn.Linear(3, 4) for _ in range(3)))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize("make", [mixed, wide, zeros, alike])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
def test_rows_are_those_of_a_refresh(make, scope, beta):
    model = make()
    found = observed(model, scope, beta)
    expected = EMPPruner(model, observe_only=True, scope=scope, beta=beta).refresh()
    assert [replace(group.event, seconds=0.0) for group in found] == [replace(event, seconds=0.0) for event in expected]
    weights = [module.weight for module in model.modules() if hasattr(module, "weight")]
    assert [n for group in found for n in group.nonzero] == [int(weight.count_nonzero()) for weight in weights]
    sums = [one for group in found for one in group.sums]
    assert [one.mass for one in sums] == pytest.approx([float(w.double().abs().sum()) for w in weights])
    assert [one.n_eff for one in sums] == pytest.approx([effective_number(w.detach().double()) for w in weights])


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_weight_norm_that_would_lose_a_slice_is_guarded(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].parametrizations.weight.original0[0] = 1e-6
    (event, *others) = [group.event for group in observed(model, scope, make=lambda *a: lambda: a[1].score(a[0]))]
    pruner = EMPPruner(model, observe_only=True, scope=scope)
    assert [replace(one, seconds=0.0) for one in pruner.refresh()] == [event, *others]
    assert "no slice of a norm is empty" in event.note


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_not_a_number_names_the_layer(scope):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in the scores of '1\.weight'"):
        observed(model, scope)
