import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from emp_callbacks.targets.heads import attention_heads
from tests.targets.masked_units import prune


def vit(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **changes})


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=5,
    )


def gpt2(attention: str = "sdpa") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=4,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(key_value_heads: int = 2, attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=key_value_heads,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(2))
MODELS = {
    "vit": (vit, IMAGES),
    "deit": (lambda: vit("deit_tiny_distilled_patch16_224"), IMAGES),
    "beit": (lambda: vit("beit_base_patch16_224"), IMAGES),
    "eva, q, k, v apart": (lambda: vit("eva02_small_patch14_224", qkv_fused=False), IMAGES),
    "swin": (swin, IMAGES),
    "gpt2": (gpt2, TOKENS),
    "gpt2 eager": (lambda: gpt2("eager"), TOKENS),
    "llama": (llama, TOKENS),
    "llama eager": (lambda: llama(attention="eager"), TOKENS),
    "llama, as many keys as queries": (lambda: llama(6), TOKENS),
    "llama, one key": (lambda: llama(1), TOKENS),
    "bert": (bert, TOKENS),
}


def logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(batch)
    return getattr(out, "logits", out)


def lively(model: nn.Module) -> nn.Module:
    """Give weights of a size that matters, so that a head that is not removed shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def without_heads(model: nn.Module, batch: torch.Tensor, pruned: dict[str, set[int]], units: dict[str, int]):
    """Run the model with the heads' blocks of the output projection's input set to zero by hooks."""
    handles = []
    for name, heads in pruned.items():
        attention = model.get_submodule(name)
        ends = ("proj", "c_proj", "o_proj", "output.dense")
        found = [dict(attention.named_modules())[end] for end in ends if end in dict(attention.named_modules())]
        (projection,) = found

        def silence(_, inputs, heads=heads, count=units[name]):
            context = inputs[0].unflatten(-1, (count, -1)).clone()
            context[..., sorted(heads), :] = 0.0
            return (context.flatten(-2),)

        handles.append(projection.register_forward_pre_hook(silence))
    result = logits(model, batch)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_pruned_heads_add_nothing(kind):
    build, batch = MODELS[kind]
    model = lively(build())
    targets = attention_heads(model)
    units = {target.name: target.units for target in targets}
    pruned = {name: {0, count - 1} - ({0} if count == 2 else set()) for name, count in units.items()}
    expected = without_heads(model, batch, pruned, units)
    assert not torch.allclose(expected, logits(model, batch), atol=1e-2), "the heads matter"
    for target in targets:
        prune(target, pruned[target.name])
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_reads_its_own_queries_keys_and_values_only(kind):
    """Whatever stands in its input rows, only its own columns of the output projection see it."""
    build, batch = MODELS[kind]
    model = lively(build())
    for target in attention_heads(model):
        projection, side = target.observed
        assert side == "input"
        seen = []
        handle = projection.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        logits(model, batch)
        output, *inputs = target.members
        unit = target.units - 1
        dense = copy.deepcopy([member.weight.parameter.data for member in inputs])
        for member in inputs:
            rows = member.weight.parameter.data.transpose(0, member.dim)
            rows[member.unit_of == unit] = torch.randn_like(rows[member.unit_of == unit])
        logits(model, batch)
        for member, before in zip(inputs, dense, strict=True):
            member.weight.parameter.data.copy_(before)
        handle.remove()
        changed = (seen[0] != seen[1]).flatten(0, -2).any(0)
        assert torch.equal(changed, output.unit_of == unit)


@pytest.mark.parametrize(
    ("build", "names", "heads"),
    [
        (vit, ["blocks.0.attn", "blocks.1.attn"], 3),
        (gpt2, ["transformer.h.0.attn", "transformer.h.1.attn"], 4),
        (llama, ["model.layers.0.self_attn", "model.layers.1.self_attn"], 2),
        (bert, ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention"], 4),
    ],
)
def test_names_counts_and_members(build, names, heads):
    targets = attention_heads(build())
    assert [target.name for target in targets] == names
    for target in targets:
        assert target.units == heads
        output, *inputs = target.members
        assert (output.role, output.masked, output.scored) == ("output", True, True)
        assert {(member.role, member.masked, member.scored) for member in inputs} == {("input", False, True)}
        assert all(member.weight.name.startswith(target.name) for member in target.members)


def test_grouped_queries_are_pruned_with_their_keys():
    attention, _ = attention_heads(llama())
    output, query, key, value = attention.members
    # Two key/value heads, three query heads each, of four features each.
    by_hand = [group for group in range(2) for _ in range(3) for _ in range(4)]
    assert output.unit_of.tolist() == query.unit_of.tolist() == by_hand
    assert key.unit_of.tolist() == value.unit_of.tolist() == [group for group in range(2) for _ in range(4)]


def test_units_of_a_fused_projection_by_hand():
    attention, _ = attention_heads(gpt2())
    output, fused = attention.members
    by_hand = [head for _ in "qkv" for head in range(4) for _ in range(6)]
    assert (fused.weight.name, fused.dim, fused.weight.output_dim) == ("transformer.h.0.attn.c_attn.weight", 1, 1)
    assert fused.unit_of.tolist() == by_hand
    assert (output.weight.name, output.dim) == ("transformer.h.0.attn.c_proj.weight", 0)
    assert output.unit_of.tolist() == by_hand[:24]


def test_gpt2_of_124_million_weights_has_144_heads():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    targets = attention_heads(model)
    assert sum(target.units for target in targets) == 144
    assert all(member.unit_of.device.type == "cpu" for target in targets for member in target.members)


def multihead_by_hand(attention: nn.MultiheadAttention, query, key, value, kept: list[bool]) -> torch.Tensor:
    """Attention of batch-first tensors, head after head; the heads that are not kept add nothing."""
    weights = attention.in_proj_weight
    parts = weights.chunk(3) if weights is not None else [getattr(attention, f"{p}_proj_weight") for p in "qkv"]
    biases = attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), parts, biases, strict=True))
    width = q.shape[-1] // attention.num_heads
    total = attention.out_proj.bias.expand(*q.shape).clone()
    for head in range(attention.num_heads):
        block = slice(head * width, (head + 1) * width)
        scores = q[..., block] @ k[..., block].transpose(1, 2) / width**0.5
        if kept[head]:
            total += scores.softmax(-1) @ v[..., block] @ attention.out_proj.weight[:, block].T
    return total


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("key_width", [12, 8], ids=["fused", "apart"])
@pytest.mark.parametrize("weights", [True, False], ids=["eager", "sdpa"])
def test_multihead_attention(batch_first, key_width, weights):
    model = nn.Module()
    model.attend = lively(nn.MultiheadAttention(12, 3, batch_first=batch_first, kdim=key_width, vdim=key_width))
    query, key = torch.randn(2, 5, 12), torch.randn(2, 4, key_width)
    expected = multihead_by_hand(model.attend, query, key, key, [True, False, True])
    (target,) = attention_heads(model)
    assert (target.name, target.units, target.observed) == ("attend", 3, None)
    prune(target, {1})
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, key)]
    result = model.attend(*inputs, need_weights=weights)[0]
    torch.testing.assert_close(result if batch_first else result.transpose(0, 1), expected)
    by_hand = [head for head in range(3) for _ in range(4)]
    assert [member.unit_of.tolist() for member in target.members[1:]] == (
        [by_hand * 3] if key_width == 12 else [by_hand] * 3
    )


@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(training):
    layer = lively(nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)).train(training)
    x = torch.randn(2, 5, 12)
    attended = multihead_by_hand(layer.self_attn, x, x, x, [False, True, False])
    hidden = layer.norm1(x + attended)
    expected = layer.norm2(hidden + layer.linear2(layer.linear1(hidden).relu()))
    (target,) = attention_heads(layer)
    assert target.name == "self_attn"
    prune(target, {0, 2})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.compiler
def test_compiled_models_keep_their_names_and_lose_their_heads():
    model = lively(gpt2())
    for block in model.transformer.h:
        block.attn = torch.compile(block.attn, backend="eager")
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled, TOKENS)
    plain = lively(gpt2())
    torch.testing.assert_close(before, logits(plain, TOKENS))
    targets = attention_heads(compiled)
    assert [t.name for t in targets] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert [m.weight.name for t in targets for m in t.members] == [
        m.weight.name for t in attention_heads(plain) for m in t.members
    ]
    expected = without_heads(plain, TOKENS, {t.name: {0, 2} for t in targets}, {t.name: t.units for t in targets})
    for target in targets:
        prune(target, {0, 2})
    torch.testing.assert_close(logits(compiled, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_unsharded_model():
    model = vit()
    full = {parameter: parameter.shape for parameter in model.parameters()}
    expected = [[m.unit_of.tolist() for m in t.members] for t in attention_heads(model)]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    sharded = attention_heads(model, full_shape=full.__getitem__)
    assert [[m.unit_of.tolist() for m in t.members] for t in sharded] == expected


def test_nest_lays_its_heads_feature_by_feature():
    with torch.device("meta"):
        targets = attention_heads(timm.create_model("nest_tiny"))
    output = targets[0].members[0]
    assert targets[0].observed is None, "its heads are no blocks of neighbours"
    assert output.unit_of[:7].tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("name", "index", "by_hand"),
    [
        # head after head: query and key of 16 features, value of 16 or 32
        ("tiny_vit_5m_224", 0, [head for head in range(4) for _ in range(3 * 32)]),
        ("maxvit_tiny_rw_224", 0, [head for head in range(2) for _ in range(3 * 32)]),
        # keys and values only
        ("gcvit_xxtiny", 1, [head for _ in "kv" for head in range(2) for _ in range(32)]),
    ],
)
def test_fused_projections_of_other_orders(name, index, by_hand):
    with torch.device("meta"):
        targets = attention_heads(timm.create_model(name))
    assert targets[index].members[1].unit_of.tolist() == by_hand


def test_a_shared_attention_counts_once_and_answers_to_both_names():
    model = nn.ModuleDict({"first": nn.MultiheadAttention(8, 2)})
    model["second"] = model["first"]
    assert [t.name for t in attention_heads(model)] == ["first"]
    assert [t.name for t in attention_heads(model, include=["second"])] == ["first"]


def test_a_tied_projection_is_masked_once():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    model[1].out_proj.weight = model[0].out_proj.weight
    assert [t.name for t in attention_heads(model)] == ["0"]


def test_include_and_exclude():
    model = vit()
    assert [t.name for t in attention_heads(model, include=["blocks.1.*"])] == ["blocks.1.attn"]
    assert [t.name for t in attention_heads(model, include=["*.0.attn.proj.weight"])] == ["blocks.0.attn"]
    assert [t.name for t in attention_heads(model, exclude=["blocks.0.attn"])] == ["blocks.1.attn"]


@pytest.mark.parametrize("pattern", ["block.0.attn", "blocks.0.attn.qkv.weight"])
@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern, side):
    with pytest.raises(ValueError, match=rf"'{pattern}' matches no attention.*near names: .*blocks\.0\.attn"):
        attention_heads(vit(), **{side: [pattern]})


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"exclude=\['\*'\] leaves no attention of blocks.0.attn"):
        attention_heads(vit(), exclude=["*"])


def test_no_attention_is_an_error_that_says_what_is_there():
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))})
    with pytest.raises(ValueError, match=r"looked for nn.MultiheadAttention.*qkv and proj.*mlp \(0, 2\)"):
        attention_heads(model)
    with pytest.raises(ValueError, match="holds no Linear"):
        attention_heads(nn.ReLU())


def test_heads_that_do_not_divide_are_an_error():
    model = vit()
    model.blocks[1].attn.num_heads = 5
    with pytest.raises(ValueError, match=r"'blocks.1.attn' has 5 heads.*48"):
        attention_heads(model)
