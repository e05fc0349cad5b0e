"""What cannot be scored or watched is said, all at once, when the pruner is made."""

import re

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.pruning.assembly import patterns_for


def make_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 16, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 4))


def test_all_layers_without_inputs_are_named_with_the_patterns_that_leave_them_out():
    with pytest.raises(ValueError, match="criterion 'wanda' needs the inputs") as raised:
        EMPPruner(make_encoder(), criterion="wanda")
    text = str(raised.value)
    for layer in range(2):
        for weight in ("in_proj_weight", "out_proj.weight"):
            assert f"'1.layers.{layer}.self_attn.{weight}'" in text
    patterns = re.search(r"exclude=\[(.*?)\]", text)[1].replace("'", "").split(", ")
    assert patterns == ["*.in_proj_weight", "*.out_proj.weight"]
    with pytest.raises(ValueError, match=r"out_proj.weight' belongs to none.*exclude=\['\*.out_proj.weight'\]"):
        EMPPruner(make_encoder(), criterion="wanda", exclude=patterns[:1])
    net = make_encoder()
    pruner = EMPPruner(net, criterion="wanda", exclude=patterns)
    net(torch.randn(2, 3, 6))
    (event,) = pruner.refresh()
    assert not event.note
    assert len(event.layers) == 6


def test_the_other_criteria_name_all_of_theirs():
    with pytest.raises(ValueError, match=r"no module shows .*'1.layers.0.self_attn'.*'1.layers.1.self_attn'"):
        EMPPruner(make_encoder(), target="heads", criterion="activation")
    convolutions = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(3)], nn.BatchNorm2d(2), nn.Flatten())
    with pytest.raises(ValueError, match=r"'0' has none; .* the same holds of '1' \(.*exclude=\['0', '1'\]"):
        EMPPruner(convolutions, target="neurons", criterion="bn_scale", include=["0", "1", "2"])


def test_features_of_a_module_that_is_never_called_are_refused():
    with pytest.raises(ValueError, match=r"'1.layers.0.self_attn.out_proj', .* cannot be watched.*exclude it"):
        EMPPruner(make_encoder(), target="features", include=["*.out_proj"])


@pytest.mark.parametrize("target", ["weights", "heads", "neurons", "features", "attention_edges"])
def test_a_lazy_module_is_named_with_what_to_do(target):
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LazyLinear(6), nn.ReLU()), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"'1.0' \(LazyLinear\) has no shape yet: run one batch through the model"):
        EMPPruner(net, target=target)


@pytest.mark.parametrize("target", ["weights", "neurons", "features"])
def test_a_lazy_module_that_was_called_is_as_any_other(target):
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2))
    net(torch.ones(1, 4))
    assert EMPPruner(net, target=target)._layers


def test_patterns_match_what_they_should_and_nothing_else():
    assert patterns_for(["a.x.w", "b.x.w", "c.y.w"], ["d.w"]) == ["*.x.w", "*.y.w"]
    assert patterns_for(["a.w"], ["b.a.w", "c.w"]) == ["a.w"]
    assert patterns_for(["w"], ["a.w"]) == ["w"]
