"""A forward pass a block at a time is the model's own, with one block's weights in memory."""

import pytest
import torch

pytest.importorskip("transformers")

from emp_callbacks.folders.skeleton import Skeleton
from emp_callbacks.folders.units import find_units
from emp_callbacks.folders.walk import BlockWalk
from tests.folders.kinds import KINDS, called, made, samples


def walked(folder, inputs, *, twice=False, together=lambda _: False):
    skeleton, outputs, loaded = Skeleton(folder), [None] * len(inputs), []
    # Whisper's encoder of transformers 4 reads its positions without a call.
    parameters = ((name, p) for name, p in skeleton.model.named_parameters() if "encoder.embed_positions" not in name)
    units = find_units(skeleton.model, {p for _, p in parameters if p.dim() > 1 and p.numel() > 64})
    walk = BlockWalk(skeleton, units, inputs[0], together=together)
    take = outputs.__setitem__
    for visit in walk.visits(inputs, on_output=take):
        loaded.append({name.rpartition(".")[0] for name, p in skeleton.model.named_parameters() if not p.is_meta})
        if twice:
            visit.run(keep=False)
        visit.run(keep=True)
    return skeleton, walk, [output.logits for output in outputs], loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_are_those_of_the_whole_model(kind, tmp_path):
    model, inputs = made(kind, tmp_path), samples(kind)
    for twice in (False, True):
        for one, logits in zip(inputs, walked(tmp_path, inputs, twice=twice)[2], strict=True):
            assert torch.equal(called(model, one), logits)


@pytest.mark.parametrize("kind", ["llama", "whisper", "mixtral"])
def test_the_weights_of_one_unit_are_in_memory(kind, tmp_path):
    made(kind, tmp_path)
    skeleton, walk, _, loaded = walked(tmp_path, samples(kind))
    blocks = {unit.name for unit in walk.units}
    for unit, owners in zip(walk.order, loaded, strict=True):
        assert {name for name in blocks if any(f"{owner}.".startswith(f"{name}.") for owner in owners)} == {unit.name}
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_decoders_are_given_what_the_encoder_returned_last(tmp_path):
    made("bart", tmp_path)
    _, walk, _, _ = walked(tmp_path, samples("bart"))
    names = [unit.name for unit in walk.order]
    last_encoder = max(i for i, name in enumerate(names) if "encoder.layers" in name)
    last_decoder = max(i for i, name in enumerate(names) if "decoder.layers" in name)
    assert walk.last_readers[last_encoder] == last_decoder


def test_what_no_later_block_reads_takes_no_memory(tmp_path):
    made("llama", tmp_path)
    skeleton, inputs = Skeleton(tmp_path), samples("llama")
    walk = BlockWalk(skeleton, find_units(skeleton.model), inputs[0])
    for number, visit in enumerate(walk.visits(inputs)):
        visit.run(keep=True)
        held = [walk.bytes_held(at) for at in range(number + 1)]
        # Of an output without memory one number is there, that all of it shows.
        assert all(size <= 4 * len(inputs) for size in held[:-1])
        assert number == len(walk.order) - 1 or held[-1] == len(inputs) * 12 * 32 * 4


def test_a_shared_layer_is_one_unit_where_it_must_be(tmp_path):
    made("albert", tmp_path)
    apart = walked(tmp_path, samples("albert"))[1]
    assert [unit.name for unit in apart.order].count("albert.encoder.albert_layer_groups.0") == 3
    together = walked(tmp_path, samples("albert"), together=lambda _: True)[1]
    names = [unit.name for unit in together.order]
    assert names.count("albert.encoder") == 1
    assert not any(name.startswith("albert.encoder.") for name in names)


def test_a_block_that_reads_the_inside_of_another_is_refused(tmp_path, monkeypatch):
    made("llama", tmp_path)
    from transformers.models.llama import modeling_llama

    forward, seen = modeling_llama.LlamaMLP.forward, []

    def reads_the_last_one(self, x):
        seen.append(x)
        return forward(self, x) + 0 * seen[max(0, len(seen) - 2)]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", reads_the_last_one)
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1 reads what model\.layers\.0 computed inside"):
        walked(tmp_path, samples("llama"))


def test_what_is_in_a_list_and_is_not_called_itself_is_taken_apart(tmp_path, monkeypatch):
    in_memory = made("llama", tmp_path)
    from transformers.models.llama import modeling_llama

    returned = []
    in_memory.model.layers[0].register_forward_hook(lambda _, __, made: returned.append(made))
    called(in_memory, samples("llama")[0])

    def by_its_parts(self, hidden_states, **settings):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **settings)[0]
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states,) if isinstance(returned[0], tuple) else hidden_states  # a tuple in transformers 4

    skeleton, inputs = Skeleton(tmp_path), samples("llama")
    # The model calls the layer's function and not the layer: hooks on it, and its own forward, are passed by.
    kind = type(skeleton.model.model.layers[0])
    monkeypatch.setattr(kind, "__call__", by_its_parts)
    walk = BlockWalk(skeleton, find_units(skeleton.model), inputs[0])
    assert "model.layers.0.mlp" in [unit.name for unit in walk.order]
    outputs = {}
    for visit in walk.visits(inputs, on_output=outputs.__setitem__):
        visit.run(keep=True)
    monkeypatch.undo()
    model = modeling_llama.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(called(model, one), outputs[i].logits) for i, one in enumerate(inputs))
