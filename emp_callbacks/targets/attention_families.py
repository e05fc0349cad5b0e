"""Attentions that are known: by what they hold, and by class where that does not show how their heads lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from emp_callbacks.targets.attention_layout import AttentionLayout
from emp_callbacks.targets.unit_search import child

# What belongs to single heads where an attention holds it, and along which dimension: tables, biases, scales, gates.
_PER_HEAD = {
    **dict.fromkeys(("relative_position_bias_table", "rel_pos.relative_position_bias_table"), 1),
    **dict.fromkeys(("self.relative_position_bias_table", "relative_attention_bias", "rel_attn_embed"), 1),
    "relative_position_bias.relative_position_bias_table": 1,
    **dict.fromkeys(("rel_pos.mlp.fc2", "meta_mlp.fc2", "cpb_mlp.2", "self.continuous_position_bias_mlp.2"), 0),
    **dict.fromkeys(("attention_biases", "q_bias", "k_bias", "v_bias", "logit_scale", "self.logit_scale"), 0),
    **dict.fromkeys(("temperature", "sinks", "gating_param", "pos_proj", "g_proj", "gate_proj"), 0),
    **dict.fromkeys(("self.query_global", "self.key_global", "self.value_global"), 0),
    **dict.fromkeys(("r_w_bias", "r_r_bias", "r_s_bias", "pos_bias_u", "pos_bias_v", "bias_u", "bias_v"), 0),
    **dict.fromkeys(("r_kernel", "seg_embed", "gru_rel_pos_const"), 1),
}
_TALKING = "its heads mix what they attend to (talking heads), so that the others read a pruned head"
_SINGLE = "it has a single head"
_SHARED_TABLE = "the first layer makes the position bias for the heads of all layers"


def _apart(names: str, *outputs: str, parts: str = "q k v") -> Iterator[AttentionLayout]:
    inputs = dict(zip(names.split(), parts.split(), strict=True))
    yield from (AttentionLayout(inputs=inputs, output=output, per_head=_PER_HEAD) for output in outputs)


BY_STRUCTURE: tuple[AttentionLayout, ...] = (
    *_apart("qkv", "proj", "projection", parts="qkv"),  # timm: ViT, DeiT, Swin, BEiT, EVA, ...; BLIP
    *_apart("q_proj k_proj v_proj", "o_proj", "out_proj", "proj", "dense", "Wo", "projection_layer"),  # Llama, OPT, ...
    *_apart("q k v", "proj", "o", "proj_out"),  # timm CaiT, T5
    *_apart("q kv", "proj", parts="q kv"),  # timm PVT, Twins
    *_apart("qk v", "proj", parts="qk v"),  # timm ConViT
    *_apart("attn v", "proj", parts="q v"),  # timm VOLO, which makes the weights of its neighbours of one projection
    *_apart("wq wk wv", "proj", "wo"),  # timm CrossViT
    *_apart("q_attn c_attn", "c_proj", parts="q kv"),  # GPT-2's cross attention
    *_apart("c_attn", "c_proj", parts="qkv"),  # GPT-2
    *_apart("qkv_proj", "o_proj", parts="qkv"),  # Phi-3
    *_apart("Wqkv", "Wo", "out_proj", parts="qkv"),  # ModernBERT, MPT
    *_apart("self.query self.key self.value", "output.dense", "output"),  # BERT; BigBird-Pegasus
    *_apart("attention.query attention.key attention.value", "output.dense"),
    *_apart("att.query att.key att.value", "output.dense"),  # LXMERT's cross attention
    *_apart("attention.qkv", "output.dense", parts="qkv"),  # TimeSformer
    *_apart(" ".join(f"attention.projection_{part}" for part in ("query", "key", "value")), "output.dense"),  # CvT
    *_apart(" ".join(f"longformer_self_attn.{part}" for part in ("query", "key", "value")), "output"),  # LED
    *_apart("self.query_proj self.key_proj self.value_proj", "output.dense"),  # DeBERTa-v2
    *_apart("query key value", "dense", "proj", "out_proj", "output"),  # ALBERT
    *_apart("query_proj key_proj value_proj", "out_proj"),  # ProphetNet
    *_apart("q_lin k_lin v_lin", "out_lin"),  # DistilBERT
    *_apart("q_head k_head v_head", "post_proj"),  # Funnel
    *_apart("linear_q linear_k linear_v", "linear_out"),  # Conformers
    *_apart("Wq Wk Wv", "dense"),  # CTRL
    *_apart("project_q project_k project_v", "attention_out"),  # CPM-Ant
    *_apart("att_proj", "out_proj", parts="qkv"),  # Bark
    *_apart("attention_weights sampling_offsets value_proj", "output_proj", parts="q q v"),  # Deformable DETR
    *_apart("to_qkv", "to_out", "proj", parts="qkv"),  # diffusion models, vit-pytorch
    *_apart("to_q to_k to_v", "to_out", "proj"),
    *_apart("to_q to_kv", "to_out", parts="q kv"),
    *_apart("in_proj", "attn_out_proj", parts="-qkv"),  # timm ViTs with the MLP beside the attention
    *_apart("q_content_proj q_pos_proj k_content_proj k_pos_proj v_proj", "o_proj", parts="q q k k v"),  # DETRs
    *_apart("q_content_proj q_pos_sine_proj k_content_proj k_pos_proj v_proj", "o_proj", parts="q q k k v"),
    # DeepSeek's latent attention widens keys and values out of what all heads share: that belongs to none.
    *(
        replace(layout, order="heads")
        for query in ("q_b_proj", "q_proj")
        for layout in _apart(f"{query} kv_b_proj", "o_proj", parts="q kv")
    ),
)

_FUSED = next(_apart("qkv", "proj", parts="qkv"))
_KEYED = replace(_FUSED, order="heads", sizes=("out_dim", "val_attn_dim", "key_attn_dim"))
_PER_HEAD_TRIPLES = replace(next(_apart("query_key_value", "dense", parts="qkv")), order="heads")
_SEPARATE = next(_apart("q k v", "proj"))
_T5 = replace(next(_apart("q k v", "o")), fixed=_SHARED_TABLE)

Known = AttentionLayout | Callable[[nn.Module], "AttentionLayout | str"] | str


def _falcon(module: nn.Module) -> AttentionLayout:
    layout = replace(_PER_HEAD_TRIPLES, kv_heads="num_kv_heads")
    if getattr(module, "num_kv_heads", 0) == 1:
        layout = replace(layout, order="parts")
    return _with_alibi(layout) if getattr(getattr(module, "config", None), "alibi", False) else layout


def _with_alibi(layout: AttentionLayout) -> AttentionLayout:
    return replace(layout, fixed="the model makes its position bias (ALiBi) for all heads")


def _big_code(module: nn.Module) -> AttentionLayout:
    layout = replace(next(_apart("c_attn", "c_proj", parts="qkv")), sizes=("embed_dim",))
    return layout if getattr(module, "multi_query", False) else replace(layout, order="heads")


def _levit(module: nn.Module) -> AttentionLayout:
    fused = child(module, "queries_keys_values") is not None
    return replace(
        _KEYED,
        inputs={"queries_keys_values": "qkv"} if fused else {"queries": "q", "keys_values": "kv"},
        output="projection",
        sizes=("out_dim_projection", "out_dim_keys_values"),
    )


def _deberta(module: nn.Module) -> AttentionLayout:
    mixes = getattr(child(module, "self"), "talking_head", False)
    places = ("self.q_bias", "self.v_bias", "self.pos_proj", "self.pos_q_proj")
    return AttentionLayout(
        inputs={"self.in_proj": "qkv"},
        output="output.dense",
        order="heads",
        per_head=dict.fromkeys(places, 0),
        fixed=_TALKING if mixes else "",
    )


def _head_first(module: nn.Module) -> AttentionLayout:
    layout = replace(_FUSED, order="heads") if getattr(module, "head_first", False) else _FUSED
    if hasattr(child(module, "rel_pos"), "height_lookup"):  # MaxViT's of TensorFlow has its heads first
        layout = replace(layout, per_head={"rel_pos.relative_position_bias_table": 0})
    return layout


def _asked_from_outside(module: nn.Module) -> AttentionLayout:
    """Return the layout of timm's GCViT, whose global queries are the whole image's: `qkv` holds keys and values."""
    return replace(_FUSED, inputs={"qkv": "kv"}) if getattr(module, "use_global", False) else _FUSED


def _bottleneck(module: nn.Module) -> AttentionLayout | str:
    """Return the layout of timm's blocks whose attention has no output projection: the next convolution is one."""
    attention, between = child(module, "self_attn"), {"post_attn": 0, **_PER_HEAD}
    if child(module, "self_attn.kv") is not None:
        inputs = {"self_attn.q": "q", "self_attn.kv": "kv"}
        return AttentionLayout(
            inputs=inputs, output="conv3_1x1", order="heads", per_head=between, sizes=("dim_out_qk", "dim_out_v")
        )
    if hasattr(attention, "dim_out_v"):
        inputs = {"self_attn.qkv": "qkv"}
        sizes = ("dim_out_qk", "dim_out_v")
        return AttentionLayout(inputs=inputs, output="conv3_1x1", per_head=between, sizes=sizes)
    return f"{type(attention).__name__} gives all heads the same keys and values through a convolution"


# By the path of their class: what they hold does not show how their heads lie, or would show it wrongly. A string says
# why an attention has no heads that could be pruned by themselves.
BY_CLASS: dict[str, Known] = {
    **{
        f"transformers.models.{path}Attention": _PER_HEAD_TRIPLES
        for path in (
            "gpt_neox.modeling_gpt_neox.GPTNeoX",
            "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapanese",
            "persimmon.modeling_persimmon.Persimmon",
        )
    },
    "transformers.models.bloom.modeling_bloom.BloomAttention": _with_alibi(_PER_HEAD_TRIPLES),
    "transformers.models.mpt.modeling_mpt.MptAttention": _with_alibi(next(_apart("Wqkv", "out_proj", parts="qkv"))),
    "transformers.models.falcon.modeling_falcon.FalconAttention": _falcon,
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention": _big_code,
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": (
        "its fused projection holds the heads in four blocks of query, value and key"
    ),
    **{
        f"transformers.models.{path}Attention": _T5
        for path in (
            "t5.modeling_t5.T5",
            "mt5.modeling_mt5.MT5",
            "udop.modeling_udop.Udop",
            "pop2piano.modeling_pop2piano.Pop2Piano",
            "switch_transformers.modeling_switch_transformers.SwitchTransformers",
            "longt5.modeling_longt5.LongT5",
            "longt5.modeling_longt5.LongT5Local",
            "longt5.modeling_longt5.LongT5TransientGlobal",
        )
    },
    **dict.fromkeys(
        (
            "transformers.models.levit.modeling_levit.LevitAttention",
            "transformers.models.levit.modeling_levit.LevitAttentionSubsample",
        ),
        _levit,
    ),
    "transformers.models.deberta.modeling_deberta.DebertaAttention": _deberta,
    "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention": (
        "a norm over all heads and a gate come before its output projection"
    ),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": replace(
        next(_apart("q_proj k_proj v_proj", "out_proj")),
        calls_output=False,
        fixed="it calls torch's multi-head attention, whose heads are as wide together as its input",
    ),
    "transformers.models.diffllama.modeling_diffllama.DiffLlamaAttention": (
        "its heads attend in pairs, one of each half"
    ),
    "transformers.models.doge.modeling_doge.DogeAttention": "the values of all heads say where each attends",
    "transformers.models.convbert.modeling_convbert.ConvBertAttention": (
        "half of what its output projection reads comes from a convolution"
    ),
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention": _SINGLE,
    "transformers.models.swiftformer.modeling_swiftformer.SwiftFormerEfficientAdditiveAttention": (
        "a projection mixes its heads before the output"
    ),
    "timm.models.tiny_vit.Attention": _KEYED,
    "timm.models.efficientformer.Attention": _KEYED,
    "timm.models.levit.Attention": _KEYED,
    "timm.models.levit.AttentionDownsample": replace(_KEYED, inputs={"q.ln": "q", "kv": "kv"}),
    "timm.models.efficientformer_v2.Attention2d": replace(
        _SEPARATE, per_head={**_PER_HEAD, "v_local": 0, "talking_head1": 0, "talking_head2": 0}, fixed=_TALKING
    ),
    "timm.models.efficientformer_v2.Attention2dDownsample": replace(
        _SEPARATE, inputs={"q.proj": "q", "k": "k", "v": "v"}, per_head={**_PER_HEAD, "v_local": 0}, sizes=("dh",)
    ),
    "timm.models.cait.TalkingHeadAttn": replace(_FUSED, fixed=_TALKING),
    "timm.models.nest.Attention": replace(_FUSED, columns="features"),
    "timm.models.gcvit.WindowAttentionGlobal": _asked_from_outside,
    "timm.models.maxxvit.Attention2d": _head_first,
    "timm.models.maxxvit.AttentionCl": _head_first,
    "timm.layers.attention2d.Attention2d": _head_first,
    "timm.layers.attention2d.MultiQueryAttention2d": AttentionLayout(
        inputs={"query.proj": "q", "key.proj": "k", "value.proj": "v"}, output="output.proj"
    ),
    "timm.models.hiera.MaskUnitAttention": replace(_FUSED, sizes=("dim_out",)),
    "timm.models.hieradet_sam2.MultiScaleAttention": _FUSED,
    "timm.models.mvitv2.MultiScaleAttention": replace(_FUSED, sizes=("dim_out",)),
    "timm.models.byobnet.SelfAttnBlock": _bottleneck,
    **{
        f"timm.models.{family}.ConvAttention": AttentionLayout(
            inputs={"pwise": "qkv"}, output="o_proj", order="heads", sizes=("o_proj_inpdim",)
        )
        for family in ("lowformer", "cpubone")
    },
    "timm.models.shvit.SHSA": _SINGLE,
    "timm.models.swiftformer.EfficientAdditiveAttention": "a projection mixes its heads before the output",
    "timm.models.efficientvit_msra.CascadedGroupAttention": "each head reads the one before it",
    "timm.models.efficientvit_mit.LiteMLA": "convolutions mix its heads before they attend",
    "timm.models.mobilevit.LinearSelfAttention": _SINGLE,
    "timm.models.csatv2.SpatialAttention": _SINGLE,
    "timm.models.nextvit.ConvAttention": "its heads are the groups of a convolution",
}


def known_by_class(module: nn.Module) -> AttentionLayout | str | None:
    """Return the layout of an attention of a known class, or why its heads are left out; None for other classes."""
    for cls in type(module).__mro__:
        known = BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
        if known is not None:
            return known(module) if callable(known) else known
    return None
