import pytest
import torch
from safetensors.torch import save_file

from emp_callbacks import EMPPruner, load_shrunk, pruned_units, shrink
from emp_callbacks.shrinking.experts import past_removed_experts
from tests.targets.mixtures import CONFIGS, ids, language_model, needs_stacked_experts
from tests.targets.test_experts import Listed

pytestmark = needs_stacked_experts


def masked(family, density=0.5, **settings):
    """Return a model whose experts were pruned once by REAP, and the masks."""
    model = language_model(family, **settings).eval()
    pruner = EMPPruner(model, target="experts", mode="project", density=density)
    with torch.no_grad():
        model(input_ids=ids())
    pruner.refresh()
    pruner.finalize()
    return model, pruner.masks


def shrunk(model, masks, **settings):
    return shrink(model, masks, (), {"input_ids": ids(), "use_cache": False}, **settings)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_a_shrunk_mixture_is_the_masked_one_that_never_chooses_pruned_experts(family, tmp_path):
    model, masks = masked(family)
    assert pruned_units(model).keys() == masks.keys()
    before = logits(model)
    report = shrunk(model, masks)
    assert [(layer.removed, layer.reason) for layer in report.layers] == [(len(m) // 2, None) for m in masks.values()]
    dense, _ = masked(family)
    with past_removed_experts(dense, report.surgery):
        expected = logits(dense)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    changed = float((before - expected).abs().max() / before.abs().max())
    assert report.rerouted == pytest.approx(changed, rel=1e-3)
    assert changed > 0.01, "tokens were sent to pruned experts"
    torch.testing.assert_close(logits(dense), before, rtol=0, atol=0)  # routers choose as before
    save_file(model.state_dict(), tmp_path / "small.safetensors", report.metadata())
    again = load_shrunk(language_model(family).eval(), tmp_path / "small.safetensors")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_other_numbers_of_experts_by_layer_unless_uniform():
    for uniform in (False, True):
        model, masks = masked("Mixtral", density=1.0)
        first, second = masks
        kept = {first: torch.tensor([True, False, True, False]), second: torch.tensor([True, True, True, False])}
        with torch.no_grad():
            for name, mask in kept.items():
                for parameter in model.get_submodule(name).parameters():
                    parameter[~mask] = 0
        report = shrunk(model, kept, uniform=uniform)
        left = [model.get_submodule(name).num_experts for name in masks]
        assert left == ([3, 3] if uniform else [2, 3])
        assert [layer.removed for layer in report.layers] == ([1, 1] if uniform else [2, 1])
        assert report.brought_back == int(uniform)


def test_experts_that_have_to_stay_are_named():
    model, masks = masked("DeepseekV3", n_group=2, topk_group=1)
    (layer,) = shrunk(model, masks).layers
    assert (layer.removed, layer.reason) == (
        0,
        "'model.layers.1.mlp.gate' chooses among 2 groups of neighbouring experts, which would become others",
    )
    model, masks = masked("Mixtral")
    for name in masks:
        masks[name][:] = False
        for parameter in model.get_submodule(name).parameters():
            parameter.data.zero_()
    layers = shrunk(model, masks).layers
    assert {layer.reason for layer in layers} == {"a token is sent to 2 experts, and 0 would be left"}


def test_experts_that_are_modules():
    model, x = Listed().eval(), torch.randn(5, 8)
    for parameter in model.experts[1].parameters():
        parameter.data.zero_()
    report = shrink(model, {"experts": torch.tensor([True, False, True])}, (x,))
    assert (len(model.experts), model.gate.out_features, report.layers[0].removed) == (2, 2, 1)
    assert model(x).shape == (5, 8)


def test_hidden_neurons_of_experts_stay_as_zeros():
    model = language_model("Mixtral").eval()
    pruner = EMPPruner(model, target="neurons", mode="project", density=0.5)
    pruner.refresh()
    pruner.finalize()
    assert pruned_units(model).keys() == pruner.masks.keys()
    assert {(layer.pruned, layer.removed) for layer in shrunk(model, pruner.masks).layers} == {(96, 0)}
    assert "not cut" in shrunk(model, pruner.masks).layers[0].reason
