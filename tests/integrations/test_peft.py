"""Adapters: not pruned themselves; their frozen base can be, and stays pruned through training and merging."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft comes with emp-callbacks[test]")
import transformers  # noqa: E402

from emp_callbacks import EMPPruner  # noqa: E402

TOKENS = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS = {
    "gpt2": ("GPT2", {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "bert": ("Bert", {**SMALL, "num_attention_heads": 4, "max_position_embeddings": 16, "is_decoder": True}),
}
PARTS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "value", "dense"],
}
HEADS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertLMHeadModel"}
BASE = {"include": ["*base_layer.weight"]}


def adapted(name, config=None):
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    model = getattr(transformers, HEADS[name])(getattr(transformers, f"{kind}Config")(**sizes))
    config = config or peft.LoraConfig(
        target_modules=PARTS[name], r=2, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    return peft.get_peft_model(model, config)


def train(model, steps=4, **settings):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pruner = EMPPruner(model, optimizer, every_n_steps=2, **settings)
    for number in range(steps):
        step(number, model, optimizer, pruner)
    return pruner, optimizer


def step(number, model, optimizer, pruner):
    torch.manual_seed(number)  # of dropout
    optimizer.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    pruner.step()


def wrong(model, pruner):
    named = dict(model.named_parameters())
    return sum(int((named[name][~mask] != 0).sum()) for name, mask in pruner.weight_masks.items())


def test_adapters_are_not_pruned_by_default_and_it_is_said_what_can_be():
    with pytest.raises(ValueError, match=r"trains adapters, which are not pruned.*include=\['\*base_layer.weight'\]"):
        train(adapted("gpt2"))
    whole = adapted("gpt2")
    for name, parameter in whole.named_parameters():
        parameter.requires_grad = "lora" in name or "c_attn" in name
    with pytest.warns(UserWarning, match="left out of pruning"):  # the rest of the base, which is frozen
        pruner, _ = train(whole)
    assert {name.rpartition("c_attn.")[2] for name in pruner.masks} == {"base_layer.weight"}
    assert any(one.reason == "part of an adapter" for one in pruner.left_out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "project"}, {"mode": "freeze", "criterion": "wanda", "scope": "row"}, {"pattern": "2:4"}],
    ids=str,
)
def test_a_frozen_base_stays_pruned_through_training_and_merging(settings, name):
    model = adapted(name)
    before = {key: p.clone() for key, p in model.named_parameters() if "lora" in key}
    pruner, _ = train(model, **BASE, **settings)
    assert len(pruner.masks) >= 6
    assert wrong(model, pruner) == 0
    assert pruner.audit().clean
    assert not any(torch.equal(p, before[key]) for key, p in model.named_parameters() if "lora" in key)
    pruner.finalize()
    merged = copy.deepcopy(model).merge_and_unload()
    named = {
        f"base_model.model.{key}".replace(".weight", ".base_layer.weight"): p for key, p in merged.named_parameters()
    }
    assert any((named[key][~mask] != 0).any() for key, mask in pruner.masks.items())  # a merge fills the zeros
    pruner.mask(merged)
    assert not any((named[key][~mask] != 0).any() for key, mask in pruner.masks.items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["heads", "neurons"])
def test_units_behind_adapters_are_off_with_what_the_adapters_add(target, name):
    model = adapted(name)
    pruner, _ = train(model, target=target, density=0.5, criterion="taylor", evidence_steps=1)
    assert not any("lora" in layer for layer in pruner.masks)
    assert any("lora" in weight for weight in pruner.weight_masks)
    assert wrong(model, pruner) == 0
    pruner.finalize()
    merged = copy.deepcopy(model).merge_and_unload()
    pruner.mask(merged)
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=TOKENS).logits for one in (merged, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_adapters_that_add_in_other_ways_are_refused_for_units_and_fine_for_weights():
    dora = peft.LoraConfig(target_modules=["c_fc"], r=2, use_dora=True, fan_in_fan_out=True)
    loha = peft.LoHaConfig(target_modules=["gate_proj", "up_proj"], r=2)
    with pytest.raises(NotImplementedError, match=r"DoRA divides by the norm.*merge_and_unload"):
        train(adapted("gpt2", dora), target="neurons")
    with pytest.raises(NotImplementedError, match=r"loha adds to them is not masked.*merge_and_unload"):
        train(adapted("llama", loha), target="neurons")
    for model in (adapted("gpt2", dora), adapted("llama", loha)):
        pruner, _ = train(model, **BASE)
        assert wrong(model, pruner) == 0
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True)
    with pytest.raises(ValueError, match="trains adapters, which are not pruned"):
        train(adapted("gpt2", prefix))


def test_a_resumed_run_equals_the_one_that_never_stopped(tmp_path):
    whole = adapted("gpt2")
    train(whole, **BASE, mode="freeze")
    part = adapted("gpt2")
    pruner, optimizer = train(part, 3, **BASE, mode="freeze")
    torch.save([part.state_dict(), optimizer.state_dict(), pruner.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    again = adapted("gpt2")
    again.load_state_dict(states[0])
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.01)
    optimizer.load_state_dict(states[1])
    pruner = EMPPruner(again, optimizer, every_n_steps=2, **BASE, mode="freeze")
    pruner.load_state_dict(states[2])
    step(3, again, optimizer, pruner)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    again.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(again.unload(), tmp_path / "adapter")
    assert wrong(fresh, pruner) == 0


def test_a_sparse_base_keeps_its_zeros_under_adapters_and_without():
    base = adapted("gpt2").merge_and_unload().requires_grad_(True)
    first = EMPPruner(base, density=0.3)
    first.refresh()
    first.finalize()
    zeros = {name: p == 0 for name, p in base.named_parameters() if name in first.masks}
    tuned = copy.deepcopy(base)
    pruner, _ = train(tuned, density="found", mode="freeze")
    assert all(torch.equal(dict(tuned.named_parameters())[name] == 0, zero) for name, zero in zeros.items())
    config = peft.LoraConfig(target_modules=PARTS["gpt2"], r=2, init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    pruner, _ = train(model, density="found", mode="freeze", **BASE)
    merged = model.merge_and_unload()
    pruner.mask(merged)
    assert all(torch.equal(dict(merged.named_parameters())[name] == 0, zero) for name, zero in zeros.items())
