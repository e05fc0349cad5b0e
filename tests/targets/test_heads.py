import warnings
from functools import partial

import pytest
import timm
import torch
import transformers
from timm.layers import attention2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models import (
    byobnet,
    cait,
    efficientformer_v2,
    gcvit,
    levit,
    maxxvit,
    nest,
    shvit,
    swin_transformer_v2,
    tiny_vit,
    vision_transformer,
    volo,
    xcit,
)
from torch import nn

from emp_callbacks.targets import AttentionLayout, attention_heads, check_attention, register_attention
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


SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "moe_intermediate_size", "ffn_dim"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"), 2),
    **{"num_key_value_heads": 2, "vocab_size": 30, "pad_token_id": 0, "type_vocab_size": 2, "embedding_size": 8},
    **{"q_lora_rank": 8, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_group": 1, "topk_group": 1},
    **{"max_position_embeddings": 16, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 2},
}


def hf(kind: str, **changes) -> nn.Module:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    default = transformers.AutoConfig.for_model(kind)
    own = {name: value for name, value in SIZES.items() if name in vars(default) and name not in default.attribute_map}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **{**own, **changes}))


OLD, NEW = ({"new_decoder_architecture": new, "alibi": False} for new in (False, True))
TRANSFORMERS = {  # how the model is made, and how many heads each of its attentions has
    "phi": (lambda: hf("phi"), {2}),
    "gpt_neox": (lambda: hf("gpt_neox"), {4}),
    "falcon, one key": (lambda: hf("falcon", multi_query=True, **OLD), {4}),
    "falcon, grouped": (lambda: hf("falcon", num_kv_heads=2, **NEW), {2}),
    "falcon, triples": (lambda: hf("falcon", multi_query=False, **OLD), {4}),
    "gpt_bigcode, one key": (lambda: hf("gpt_bigcode", multi_query=True), {4}),
    "gpt_bigcode, triples": (lambda: hf("gpt_bigcode", multi_query=False), {4}),
    "bloom": (lambda: hf("bloom"), {4}),
    "mpt": (lambda: hf("mpt"), {4}),
    "persimmon": (lambda: hf("persimmon"), {4}),
    "albert": (lambda: hf("albert"), {4}),
    "deberta": (lambda: hf("deberta"), {4}),
    "deberta-v2": (lambda: hf("deberta-v2"), {4}),
    "modernbert": (lambda: hf("modernbert"), {4}),
    "deepseek_v2": (lambda: hf("deepseek_v2", num_key_value_heads=4, head_dim=2), {4}),
    "deepseek_v3": (lambda: hf("deepseek_v3", num_key_value_heads=4, head_dim=2), {4}),
    "gpt_oss": (lambda: hf("gpt_oss"), {2}),
    "qwen3": (lambda: hf("qwen3"), {2}),
    "phi3": (lambda: hf("phi3"), {2}),
    "opt": (lambda: hf("opt", word_embed_proj_dim=16), {4}),
    "distilbert": (lambda: hf("distilbert"), {4}),
}
ROWS, GRID = torch.randn(2, 4, 16), torch.randn(2, 16, 4, 4)


def in_bottleneck(attention, **settings):
    layers = byobnet.LayerFn(self_attn=partial(attention, num_heads=2, **settings))
    return byobnet.SelfAttnBlock(16, 16, layers=layers, bottle_ratio=1.0, feat_size=(4, 4))


TIMM = {  # what it reads, and what belongs to its heads besides projections
    "levit": (lambda: levit.Attention(16, 4, 2, resolution=2), ROWS, ["qkv.bn", "attention_biases"]),
    "levit, smaller": (
        lambda: levit.AttentionDownsample(16, 16, 4, num_heads=2, resolution=(2, 2)),
        ROWS,
        ["q.ln.bn", "kv.bn", "attention_biases"],
    ),
    "tiny_vit": (lambda: tiny_vit.Attention(16, 4, 2, attn_ratio=2, resolution=(2, 2)), ROWS, ["attention_biases"]),
    "efficientformer_v2": (
        lambda: efficientformer_v2.Attention2dDownsample(16, 4, 2, 2.0, resolution=4, out_dim=16),
        GRID,
        ["q.proj.bn", "k.bn", "v.bn", "attention_biases", "v_local.conv", "v_local.bn"],
    ),
    "nest": (lambda: nest.Attention(16, 2), ROWS[:, None], []),
    "gcvit": (lambda: gcvit.WindowAttentionGlobal(16, 2, (2, 2), use_global=False), ROWS, ["rel_pos"]),
    "maxvit": (lambda: maxxvit.AttentionCl(16, dim_head=8), GRID.movedim(1, -1), []),
    "coatnet": (lambda: maxxvit.AttentionCl(16, dim_head=8, head_first=False), GRID.movedim(1, -1), []),
    "mobilenetv4": (lambda: attention2d.MultiQueryAttention2d(16, num_heads=2, kv_stride=2), GRID, []),
    "botnet": (lambda: in_bottleneck(BottleneckAttn), GRID, ["post_attn"]),
    "halonet": (lambda: in_bottleneck(HaloAttn, block_size=2, halo_size=1), GRID, ["post_attn"]),
    "vit, MLP beside": (lambda: vision_transformer.ParallelScalingBlock(16, 2), ROWS, []),
    "volo": (lambda: volo.OutlookAttention(16, 2), GRID.movedim(1, -1), []),
    "swin 2": (
        lambda: swin_transformer_v2.WindowAttention(16, (2, 2), 2),
        ROWS,
        ["cpb_mlp.2", "q_bias", "v_bias", "logit_scale"],
    ),
    "xcit": (lambda: xcit.XCA(16, 2), ROWS, ["temperature"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_reads_its_own_queries_keys_and_values_only(kind):
    """Whatever stands in its input rows, only its own columns of the output projection see it."""
    build, batch = MODELS[kind]
    seen = check_attention(lively(build()), batch)
    assert seen
    assert all(check.ran and not check.wrong and not check.mixed for check in seen)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_attentions_of_transformers(kind):
    build, heads = TRANSFORMERS[kind]
    seen = check_attention(lively(build()), TOKENS)
    assert {check.heads for check in seen} == heads
    assert all(check.ran and not check.wrong and not check.mixed for check in seen)


@pytest.mark.parametrize("kind", TIMM)
def test_attentions_of_timm(kind):
    build, x, besides = TIMM[kind]
    model = lively(nn.Sequential(build()))
    assert check_attention(model, x) == [("0", 2, (), (), True)]
    (target,) = attention_heads(model)
    names = [member.weight.name.removeprefix("0.") for member in target.members if member.role == "per_head"]
    assert list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names)) == [
        f"{name}.relative_position_bias_table" if name == "rel_pos" else name for name in besides
    ]
    assert (target.observed is None) == (kind == "nest"), "its heads are no blocks of neighbours"


@pytest.mark.parametrize(
    ("build", "name", "dim"),
    [
        (swin, "layers.0.blocks.0.attn.relative_position_bias_table", 1),
        (lambda: vit("beit_base_patch16_224"), "blocks.0.attn.v_bias", 0),
        (lambda: hf("gpt_oss"), "layers.0.self_attn.sinks", 0),
        (lambda: hf("t5"), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
        (lambda: hf("umt5"), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    ],
)
def test_what_an_attention_holds_per_head_belongs_to_its_heads(build, name, dim):
    target = attention_heads(build())[0]
    (member,) = (member for member in target.members if member.weight.name == name)
    assert (member.role, member.dims[0], member.masked, member.scored) == ("per_head", dim, False, False)
    each = member.weight.parameter.shape[dim] // target.units
    assert member.unit_of.tolist() == [head for head in range(target.units) for _ in range(each)]


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
    assert (fused.weight.name, fused.dims[0], fused.weight.output_dim) == ("transformer.h.0.attn.c_attn.weight", 1, 1)
    assert fused.unit_of.tolist() == by_hand
    assert (output.weight.name, output.dims[0]) == ("transformer.h.0.attn.c_proj.weight", 0)
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


@pytest.mark.parametrize("build", [vit, swin, lambda: nn.Sequential(TIMM["levit"][0]())], ids=["vit", "swin", "levit"])
def test_sizes_are_those_of_the_unsharded_model(build):
    model = build()
    full = {parameter: parameter.shape for parameter in model.parameters()}
    expected = [[m.unit_of.tolist() for m in t.members] for t in attention_heads(model)]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    sharded = attention_heads(model, full_shape=full.__getitem__)
    assert [[m.unit_of.tolist() for m in t.members] for t in sharded] == expected


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


class Own(nn.Module):
    """An attention whose fused projection holds query, key and value of one head after the other's."""

    def __init__(self, order="heads"):
        super().__init__()
        self.order, self.how_many = order, 2
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        sizes, order = ((2, 3, 4), (3, 0, 2, 1, 4)) if self.order == "heads" else ((3, 2, 4), (2, 0, 3, 1, 4))
        q, k, v = self.into(x).unflatten(-1, sizes).permute(*order)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def own(**settings):
    """Return a model of a class of its own, so that tests do not meet each other's layouts."""
    return nn.Sequential(type("Mine", (Own,), {})(**settings))


DESCRIBED = {"inputs": {"into": "qkv"}, "output": "out", "heads": "how_many"}
X = torch.randn(2, 3, 8)


def test_ones_own_attention_is_described_by_its_class():
    model = own()
    with pytest.raises(
        ValueError, match=r"left out of the heads: 0 \(Attention of into, out\): how its heads lie is not"
    ):
        attention_heads(nn.Sequential(type("Attention", (Own,), {})(), nn.ReLU()))
    register_attention(type(model[0]), lambda module: AttentionLayout(**DESCRIBED, order=module.order))
    (target,) = attention_heads(model)
    assert [member.unit_of.tolist() for member in target.members] == [[0] * 4 + [1] * 4, [0] * 12 + [1] * 12]
    assert check_attention(model, X) == [("0", 2, (), (), True)]
    register_attention(type(model[0]), AttentionLayout(**DESCRIBED, order="parts"))  # goes before the last
    assert check_attention(model, X)[0].wrong, "the heads are not there"
    assert all(p.grad_fn is None and p.requires_grad for p in model.parameters())


def test_a_layout_of_a_parent_class_holds_and_one_that_does_not_fit_is_an_error():
    model = own(order="parts")
    register_attention(type(model[0]), AttentionLayout(**DESCRIBED))
    assert check_attention(nn.Sequential(type("Child", (type(model[0]),), {})(order="parts")), X)[0].wrong == ()
    register_attention(type(model[0]), AttentionLayout(**{**DESCRIBED, "heads": lambda _: 3}))
    with pytest.raises(ValueError, match=r"registered for Mine does not fit '0': its 3 heads do not divide"):
        attention_heads(model)
    register_attention(type(model[0]), AttentionLayout(**{**DESCRIBED, "output": "outer"}))
    with pytest.raises(ValueError, match=r"does not fit '0': 'outer' is no dense layer"):
        attention_heads(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {}}, "inputs={} must give"),
        ({"inputs": {"into": "vqk"}}, "one of q, k, v, qk"),
        ({"order": "rows"}, "order='rows' is unknown; choose one of parts, heads"),
        ({"columns": "parts"}, "columns='parts' is unknown"),
    ],
)
def test_layouts_that_say_nothing_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionLayout(**{**DESCRIBED, **changes})
    with pytest.raises(TypeError, match="no class of torch"):
        register_attention(own()[0], AttentionLayout(**DESCRIBED))
    with pytest.raises(TypeError, match="neither an AttentionLayout"):
        register_attention(Own, DESCRIBED)


def test_a_norm_over_all_heads_and_talking_heads_are_seen():
    talking = lively(nn.Sequential(cait.TalkingHeadAttn(16, 2)))
    assert check_attention(talking, ROWS) == [("0", 2, (), (0, 1), True)]
    normed = lively(nn.Sequential(vision_transformer.Attention(16, 2, scale_norm=True, norm_layer=nn.LayerNorm)))
    assert check_attention(normed, ROWS) == [("0", 2, (), (0, 1), True)]


def test_what_is_not_understood_is_left_out_by_name():
    model = vit()
    model.blocks[1].attn.num_heads = 5
    told = r"left out of the heads: blocks.1.attn \(Attention of qkv, proj\): its 5 heads do not divide.*\[144\].*48"
    with pytest.warns(UserWarning, match=told):
        assert [target.name for target in attention_heads(model)] == ["blocks.0.attn"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_heads(model, include=["blocks.0.attn"])
    single = nn.ModuleDict({"one": shvit.SHSA(16, 4, 8), "two": nn.MultiheadAttention(8, 2)})
    with pytest.warns(UserWarning, match=r"one \(SHSA of qkv.c, proj.1.c\): it has a single head"):
        assert [target.name for target in attention_heads(single)] == ["two"]
