"""PEFT: adapters are not pruned by default, the base is found behind them, and masked units are off through both."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emp_callbacks import EMPPruner, shrink
from emp_callbacks.targets import left_out, prunable_weights
from emp_callbacks.targets.heads import attention_heads
from emp_callbacks.targets.neurons import neurons
from emp_callbacks.targets.weights import ADAPTER
from tests.targets import adapters
from tests.targets.adapters import adapted_model, optimizer_of, train

MODELS = [adapters.gpt2, adapters.llama, adapters.qwen2, adapters.bert, adapters.vit, adapters.timm_vit]
FIRST_LAYERS = ("*.c_fc", "*.intermediate.dense", "*.fc1")
OUTPUTS = ("c_proj", "o_proj", "output.dense", "proj")
PREFIX = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True)


# ---- which weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_adapters_are_never_pruned_unasked(kind):
    model, _ = adapted_model(adapters.llama, kind)
    with pytest.raises(ValueError, match=r"trains adapters of PEFT, which are not pruned.*Name what to prune"):
        prunable_weights(model)
    for parameter in model.get_base_model().parameters():
        parameter.requires_grad_(True)
    trained = [target.name for target in prunable_weights(model)]
    plain = [target.name for target in prunable_weights(adapters.llama()[0])]
    assert trained == plain
    added = {p for p in model.parameters() if p.requires_grad} - set(model.get_base_model().parameters())
    told = [one for one in left_out(model) if one.reason == ADAPTER]
    assert sum(one.size for one in told) >= sum(p.numel() for p in added)


def test_prefixes_are_left_out_by_what_peft_says_of_them():
    model, _ = adapted_model(adapters.llama, lambda _: PREFIX)
    with pytest.raises(ValueError, match=r"trains adapters of PEFT, which are not pruned.*use include with patterns"):
        prunable_weights(model)
    told = {one.name for one in left_out(model) if one.reason == ADAPTER}
    assert told == {name for name, _ in model.named_parameters() if name.startswith("prompt_encoder")}


def test_a_head_that_is_trained_beside_adapters_is_pruned():
    config = peft.LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    model, _ = adapted_model(adapters.vit, lambda _: config)
    assert [target.name for target in prunable_weights(model)] == ["classifier.modules_to_save.default.weight"]


@pytest.mark.parametrize(
    "pattern", ["*q_proj.base_layer.weight", "*.q_proj.weight", "model.layers.0.self_attn.q_proj.weight", "*q_proj*"]
)
def test_patterns_match_with_and_without_what_peft_put_into_names(pattern):
    model, _ = adapted_model(adapters.llama, "lora")
    assert [target.name for target in prunable_weights(model, [pattern])] == ["model.layers.0.self_attn.q_proj.weight"]


def test_adapters_are_pruned_where_a_pattern_means_nothing_else():
    model, _ = adapted_model(adapters.llama, "lora")
    assert {target.name.split(".")[-3] for target in prunable_weights(model, ["*lora_A*"])} == {"lora_A"}


def test_names_that_are_the_same_without_peft_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

    with pytest.raises(ValueError, match="two parameters are called 'weight'"):
        prunable_weights(Two())


def test_quantized_bases_are_refused():
    model, _ = adapted_model(adapters.llama, "lora")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            codes = module.base_layer.weight.data.to(torch.uint8)
            module.base_layer.weight = nn.Parameter(codes.flatten()[:, None], requires_grad=False)
    with pytest.raises(TypeError, match=r"torch.uint8 \(quantized\?\).*without quantization"):
        prunable_weights(model, ["*q_proj*"])
    with pytest.raises(ValueError, match="no attention with heads was found"):
        attention_heads(model)


# ---- heads and neurons --------------------------------------------------------------------------------------------


def kept_columns(mask, width):
    return mask.repeat_interleave(width // len(mask))


def is_off(model, pruner, target):
    """Return whether what is pruned is off for any input, and what is kept is not."""
    modules = {name.replace("base_model.model.", ""): module for name, module in model.named_modules()}
    for name, mask in pruner.masks_of_units.items():
        paths = OUTPUTS if target == "heads" else ("gate_proj", "up_proj", "")
        for module in [modules[p] for end in paths if (p := f"{name}.{end}".rstrip(".")) in modules]:
            layer = getattr(module, "base_layer", module)
            if not hasattr(layer, "weight"):
                continue
            width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
            inputs, others = torch.randn(2, 4, width)
            if target == "heads":
                kept = kept_columns(mask, width)
                same = torch.allclose(module(inputs), module(torch.where(kept, inputs, others)), atol=1e-6)
                assert not torch.allclose(module(inputs), module(others), atol=1e-6)
            else:
                same = not module(inputs)[:, ~mask].any()
                assert module(inputs)[:, mask].any()
            if not same:
                return False
    return True


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("target", ["heads", "neurons"])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "loha", "ia3"])
def test_pruned_units_are_off_through_base_and_adapter(make, target, kind):
    if (kind == "loha" and make is adapters.gpt2) or (kind == "dora" and target == "neurons"):
        pytest.skip("PEFT has none, or it is refused")
    model, batch = adapted_model(make, kind)
    names = [name.removesuffix(".base_layer") for name, _ in model.named_modules()]
    layers = [pattern for pattern in FIRST_LAYERS if any(name.endswith(pattern[1:]) for name in names)]
    include = ["*"] if target == "heads" else layers or ["*.mlp"]
    optimizer = optimizer_of(model)
    pruner = EMPPruner(model, optimizer, target=target, density=0.5, include=include, every_n_steps=2, mode="freeze")
    train(model, batch, optimizer, pruner, 3)
    pruner.masks_of_units = {layer.name: layer.mask for layer in pruner._refresher.layers}
    assert not any("lora" in name for name in pruner.masks_of_units)
    model.eval()
    assert is_off(model, pruner, target)
    assert pruner.audit().clean
    merged = copy.deepcopy(model).merge_and_unload()
    pruner.mask(merged)
    assert is_off(merged, pruner, target)


@pytest.mark.parametrize(("kind", "find"), [("lokr", attention_heads), ("vera", attention_heads), ("dora", neurons)])
def test_adapters_that_would_bring_pruned_units_back_are_refused(kind, find):
    model, _ = adapted_model(adapters.llama, kind)
    with pytest.raises(ValueError, match=r"the adapter of .*brings back.*merge_and_unload\(\).*target_modules"):
        find(model, include=["*"])


def test_an_adapter_that_comes_later_is_followed():
    model, batch = adapted_model(adapters.llama, "lora")
    optimizer = optimizer_of(model)
    pruner = EMPPruner(model, optimizer, target="heads", density=0.5, include=["*"], every_n_steps=2)
    train(model, batch, optimizer, pruner, 3)
    model.add_adapter("other", adapters.KINDS["lora"](["o_proj"]))
    model.set_adapter("other")
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".other." in name]})
    with pytest.warns(UserWarning, match="replaced, so that its mask begins anew: model.layers.0.self_attn"):
        train(model, batch, optimizer, pruner, 1)
    assert [weight.name.rpartition("o_proj.")[2] for weight in pruner._weights] == [
        "weight",
        "lora_A.default.weight",
        "lora_A.other.weight",
    ]
    assert pruner.audit().clean


def test_adapters_are_no_neurons():
    model, _ = adapted_model(adapters.llama, "lora")
    with pytest.raises(ValueError, match=r"no hidden neurons were found.*frozen layers too"):
        neurons(model)


def test_shrinking_asks_for_a_merged_model():
    model, batch = adapted_model(adapters.llama, "lora")
    with pytest.raises(NotImplementedError, match=r"merge_and_unload\(\).*pruner.mask"):
        shrink(model, {}, (batch,))


@pytest.mark.parametrize("settings", [{"criterion": "taylor"}, {"mode": "rewire", "density": 0.5}])
def test_what_is_frozen_cannot_be_scored_by_gradients(settings):
    model, _ = adapted_model(adapters.llama, "lora")
    with pytest.raises(ValueError, match=r"is frozen \(model.layers.0.*has no gradients.*'magnitude'"):
        EMPPruner(model, optimizer_of(model), include=["*base_layer.weight"], **settings)


# ---- through training and merging ---------------------------------------------------------------------------------


def under_masks(pruner):
    return sum(int((weight.weight[~weight.mask] != 0).sum()) for weight in pruner._weights)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "vera"])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_a_frozen_base_stays_pruned_and_the_merged_model_is_masked_again(kind, mode):
    model, batch = adapted_model(adapters.llama, kind)
    optimizer = optimizer_of(model)
    pruner = EMPPruner(model, optimizer, include=["*base_layer.weight"], mode=mode, every_n_steps=2)
    train(model, batch, optimizer, pruner, 3)
    assert pruner.audit().clean
    assert 0 < pruner.density < 1
    dense = [weight.stash for weight in pruner._weights] if mode == "feedback" else []
    adapted = loss_of_evaluated(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
        assert under_masks(pruner)
        pruner.state_dict()
        with pytest.raises(RuntimeError, match=r"merged into the weights.*unmerge_adapter\(\) first"):
            pruner.refresh()
        assert under_masks(pruner), "merged weights are PEFT's"
        model.unmerge_adapter()
        pruner.state_dict()
    if mode != "project":
        assert pruner.audit().clean
    for weight, before in zip(pruner._weights, dense, strict=bool(dense)):
        assert torch.equal(weight.stash, before)
    assert loss_of_evaluated(model, batch) == pytest.approx(adapted, rel=1e-4)
    train(model, batch, optimizer, pruner, 2)
    merged = model.merge_and_unload()
    pruner.finalize()
    pruner.mask(merged)
    parameters = dict(merged.named_parameters())
    assert not any(parameters[name][~mask].any() for name, mask in pruner.masks.items())


def loss_of_evaluated(model, batch):
    model.eval()
    with torch.no_grad():
        found = float(adapters.loss_of(model, batch))
    model.train()
    return found


@pytest.mark.parametrize("settings", [{}, {"mode": "freeze", "density": "found"}, {"target": "heads", "density": 0.5}])
@pytest.mark.filterwarnings("error:.*of the weights to prune are 0 already")  # these are frozen
def test_a_run_resumes_bit_for_bit(settings, tmp_path):
    runs = []
    for resumed in (False, True):
        model, batch = adapted_model(adapters.llama, "lora")
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if not p.requires_grad):
                parameter.mul_(torch.rand_like(parameter) < 0.5)
        include = ["*"] if "target" in settings else ["*base_layer.weight"]
        optimizer = optimizer_of(model)
        pruner = EMPPruner(model, optimizer, include=include, every_n_steps=2, **settings)
        if resumed:
            state = torch.load(tmp_path / "state", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            pruner.load_state_dict(state["emp"])
        else:
            train(model, batch, optimizer, pruner, 3)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "emp": pruner.state_dict()}
            torch.save(state, tmp_path / "state")
        train(model, batch, optimizer, pruner, 3)
        runs.append((dict(model.named_parameters()), pruner.masks, pruner.trajectory.records()))
    (weights, masks, rows), (weights_again, masks_again, rows_again) = runs
    assert all(torch.equal(weights[name], found) for name, found in weights_again.items())
    assert all(torch.equal(masks[name], found) for name, found in masks_again.items())
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in rows_again]


def test_saved_adapters_meet_the_pruned_base_again(tmp_path):
    model, batch = adapted_model(adapters.llama, "lora")
    optimizer = optimizer_of(model)
    pruner = EMPPruner(model, optimizer, include=["*base_layer.weight"], every_n_steps=1)
    train(model, batch, optimizer, pruner, 2)
    pruner.finalize()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(adapters.llama()[0], tmp_path)
    pruner.mask(again)
    model.eval()
    again.eval()
    assert torch.equal(again(batch)[0], model(batch)[0])
