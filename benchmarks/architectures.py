"""Small models of the families of timm and transformers, each with its example batch, for `sweep_architectures.py`.

A family is one line: the name of a model and the sizes that make it tiny. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family"]

BATCH, TOKENS, VOCABULARY, CLASSES = 4, 8, 64, 5

Sizes = dict[str, Any]
Batch = dict[str, Tensor]


class Family(NamedTuple):
    """One architecture.

    Attributes:
        build: Makes the model, with random weights of torch's default generator.
        batch: Makes a batch, with values of torch's default generator: keyword arguments of the model, the first of
            which timm's models take by position.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]


# ---- timm -----------------------------------------------------------------------------------------------------------

_VIT_BODY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
_VIT = {**_VIT_BODY, "num_heads": 4}
_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
_DIMS, _ONCE = (16, 32, 32, 64), (1, 1, 1, 1)
_TWINS = {"img_size": 64, "depths": _ONCE, "embed_dims": _DIMS, "num_heads": (2, 2, 4, 4)}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}

# Family -> name of the model, or "module.Class" where the names fix the sizes; pixels per side; its sizes.
_TIMM: dict[str, tuple[str, int, Sizes]] = {
    # convolutions
    "resnet": ("test_resnet", 32, {}),
    "resnext": ("resnext50_32x4d", 64, {"layers": _ONCE}),
    "resnetv2": ("resnetv2_18", 64, {"layers": _ONCE, "channels": (16, 32, 48, 64)}),
    "res2net": ("res2net50_14w_8s", 64, {"layers": _ONCE}),
    "resnest": ("resnest14d", 64, {"stem_width": 8}),
    "sknet": ("skresnet18", 64, {"layers": _ONCE}),
    "senet": ("legacy_seresnet18", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "regnety": ("regnety_002", 64, {}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "mixnet": ("mixnet_s", 32, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "mobilenetv4": ("mobilenetv4_conv_small_035", 32, {}),
    "mobilenetv4_hybrid": ("mobilenetv4_hybrid_medium", 64, {}),
    "convnext": ("test_convnext", 32, {}),
    "convnextv2": ("test_convnext2", 32, {}),
    "densenet": ("densenet121", 64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "repvgg": ("test_byobnet", 64, {}),
    "mobileone": ("mobileone_s0", 32, {"width_factor": 0.5}),
    "nfnet": ("test_nfnet", 32, {}),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "vgg": ("vgg.VGG", 64, {"cfg": (16, "M", 32, "M", 32, "M"), "mlp_ratio": 0.01, "norm_layer": nn.BatchNorm2d}),
    "inception_v3": ("inception_v3", 75, {}),
    "inception_next": ("inception_next_atto", 64, {"depths": _ONCE}),
    "xception": ("legacy_xception", 64, {}),
    "dpn": ("dpn48b", 64, {"k_sec": _ONCE}),
    "dla": ("dla46_c", 64, {}),
    "cspnet": ("cspresnet50", 64, {}),
    "darknet": ("darknet17", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "vovnet": ("ese_vovnet19b_slim", 64, {}),
    "rexnet": ("rexnet_100", 32, {"width_mult": 0.5}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "repghost": ("repghostnet_050", 32, {}),
    "starnet": ("starnet_s050", 64, {}),
    "rdnet": ("rdnet_tiny", 64, {"growth_rates": (16, 16, 16, 24, 24, 24, 32), "num_blocks_list": (1,) * 7}),
    "convmixer": ("convmixer.ConvMixer", 32, {"dim": 32, "depth": 2}),
    "fasternet": ("fasternet_t0", 64, {"depths": _ONCE, "embed_dim": 16}),
    "mambaout": ("test_mambaout", 64, {}),
    "tresnet": ("tresnet.TResNet", 64, {"layers": _ONCE, "width_factor": 0.25}),
    "lambda_resnet": ("lambda_resnet26t", 64, {"width_factor": 0.25}),
    # attention
    "vit": ("vit_tiny_patch16_224", 32, _VIT),
    "vit_dinov2": ("vit_small_patch14_dinov2", 32, _VIT),
    "vit_siglip": ("vit_base_patch16_siglip_224", 32, _VIT),
    "vit_relpos": ("test_vit_relpos", 32, _VIT),
    "vit_sam": ("samvit_base_patch16_224", 32, _VIT),
    "vit_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, _VIT),
    "cait": ("cait_xxs24_224", 32, _VIT),
    "beit": ("beit_base_patch16_224", 32, _VIT),
    "eva": ("eva_giant_patch14_224", 32, _VIT),
    "eva02": ("eva02_tiny_patch14_224", 32, _VIT),
    "naflexvit": ("naflexvit_base_patch16_gap", 32, {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}),
    "swin": ("swin_tiny_patch4_window7_224", 32, _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", 32, _SWIN),
    "swinv2_cr": ("swinv2_cr_tiny_224", 32, _SWIN),
    "pvt_v2": ("pvt_v2_b0", 64, {"depths": _ONCE, "embed_dims": _DIMS, "num_heads": (1, 2, 2, 4)}),
    "twins_svt": ("twins_svt_small", 64, _TWINS),
    "twins_pcpvt": ("twins_pcpvt_small", 64, _TWINS),
    "xcit": ("xcit_nano_12_p8_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 32}),
    "crossvit": (
        *("crossvit.CrossVit", 48),
        {"img_size": 48, "img_scale": (1.0, 1.0), "embed_dim": (32, 48), "depth": ((1, 2, 0),), "num_heads": (4, 4)},
    ),
    "convit": (
        "convit_tiny",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 3, "local_up_to_layer": 2},
    ),
    "levit": (
        *("levit_128s", 64),
        {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 8},
    ),
    "tiny_vit": (
        *("tiny_vit_5m_224", 64),
        {"embed_dims": _DIMS, "depths": _ONCE, "num_heads": (2, 2, 4, 4), "window_sizes": (2, 2, 2, 2)},
    ),
    "edgenext": ("edgenext_xx_small", 64, {"dims": (16, 24, 32, 48), "depths": (2, 2, 2, 2)}),
    "efficientformer": ("efficientformer_l1", 224, {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 1, 2)}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "maxvit": ("test_maxvit", 64, {"img_size": 64}),
    "coatnet": ("test_coatnet", 64, {"img_size": 64}),
    "coat": ("coat_lite_tiny", 32, {"img_size": 32, "embed_dims": (32, 32, 32, 64), "serial_depths": _ONCE}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16, "stages": _ONCE}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "nest": (
        *("nest.Nest", 32),
        {"img_size": 32, "embed_dims": (16, 32, 64), "num_heads": (2, 2, 4), "depths": (1, 1, 2)},
    ),
    "gcvit": (
        *("gcvit.GlobalContextVit", 64),
        {"img_size": 64, "embed_dim": 16, "depths": (1, 2, 1, 1), "window_size": (4, 4, 4, 2), "num_heads": (2,) * 4},
    ),
    "focalnet": ("focalnet.FocalNet", 64, {"embed_dim": 16, "depths": _ONCE}),
    "davit": ("davit_tiny", 64, {"embed_dims": _DIMS, "num_heads": (2, 2, 4, 4), "depths": _ONCE}),
    "botnet": ("botnet26t_256", 64, {"img_size": 64, "width_factor": 0.25}),
    "halonet": (
        *("halonet26t", 64),
        {"width_factor": 0.25, "self_attn_kwargs": {"block_size": 2, "halo_size": 1}},
    ),
    "poolformer": ("metaformer.MetaFormer", 64, {"depths": _ONCE, "dims": _DIMS}),
    "caformer": ("caformer_s18", 64, {}),
    "mlp_mixer": ("mlp_mixer.MlpMixer", 32, _MIXER),
    "gmlp": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "embed_dim": 32, "depth": (1, 2, 1), "num_heads": 2}),
    "tnt": (
        *("tnt_s_patch16_224", 32),
        {**_VIT_BODY, "inner_dim": 8, "num_heads_inner": 2, "num_heads_outer": 4},
    ),
    "volo": (
        *("volo.VOLO", 64),
        {"img_size": 64, "layers": _ONCE, "embed_dims": (32,) * 4, "num_heads": (2, 4, 4, 4)},
    ),
    "sequencer": (
        *("sequencer2d_s", 56),
        {"img_size": 56, "layers": _ONCE, "embed_dims": (16, 32, 32, 32), "hidden_sizes": (4, 8, 8, 8)},
    ),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "shvit": ("shvit_s1", 128, {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "partial_dim": (16, 16, 16)}),
    "fastvit": ("fastvit_sa12", 64, {"layers": _ONCE, "embed_dims": (32, 32, 32, 32)}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    "nextvit": ("nextvit_small", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 4)}),
    "repvit": ("repvit_m0_9", 64, {"embed_dim": (16, 24, 32, 48), "depth": _ONCE}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
}


def _timm_model(name: str, sizes: Sizes) -> nn.Module:
    module, _, kind = name.rpartition(".")
    if module:
        return getattr(importlib.import_module(f"timm.models.{module}"), kind)(num_classes=CLASSES, **sizes)
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **sizes)


def _image(key: str, pixels: int) -> Batch:
    return {key: torch.randn(BATCH, 3, pixels, pixels)}


# ---- transformers ---------------------------------------------------------------------------------------------------

# Put into every configuration that has such a size.
_TINY: Sizes = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8, "num_labels": CLASSES, "use_cache": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_FOUR = {"hidden_sizes": (16, 32, 32, 64), "depths": _ONCE}
_T5 = {"d_ff": 48, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
_TWO_TOWERS = {
    "text_config": {**{key: _TINY[key] for key in list(_TINY)[:5]}, "max_position_embeddings": 32},
    "vision_config": {**{key: _TINY[key] for key in list(_TINY)[1:5]}, "image_size": 32, "patch_size": 8},
}

_CAUSAL, _MASKED, _SEQ2SEQ, _IMAGES = "CausalLM", "MaskedLM", "Seq2SeqLM", "ImageClassification"

# Family -> model type, what it is for (AutoModelFor...; "" for AutoModel), own sizes.
_TRANSFORMERS: dict[str, tuple[str, str, Sizes]] = {
    "gpt2": ("gpt2", _CAUSAL, {}),
    "gpt_neo": ("gpt_neo", _CAUSAL, {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gptj": ("gptj", _CAUSAL, {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _CAUSAL, {}),
    "gpt_bigcode": ("gpt_bigcode", _CAUSAL, {}),
    "codegen": ("codegen", _CAUSAL, {"rotary_dim": 4}),
    "opt": ("opt", _CAUSAL, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", _CAUSAL, {}),
    "falcon": ("falcon", _CAUSAL, {"new_decoder_architecture": False}),
    "falcon_new": ("falcon", _CAUSAL, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", _CAUSAL, {"n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
    "llama": ("llama", _CAUSAL, {}),
    "mistral": ("mistral", _CAUSAL, {}),
    "qwen2": ("qwen2", _CAUSAL, {}),
    "qwen3": ("qwen3", _CAUSAL, {}),
    "olmo2": ("olmo2", _CAUSAL, {}),
    "phi": ("phi", _CAUSAL, {}),
    "phi3": ("phi3", _CAUSAL, {}),
    "gemma": ("gemma", _CAUSAL, {}),
    "gemma2": ("gemma2", _CAUSAL, {}),
    "gemma3": ("gemma3_text", _CAUSAL, {}),
    "cohere": ("cohere", _CAUSAL, {}),
    "starcoder2": ("starcoder2", _CAUSAL, {}),
    "stablelm": ("stablelm", _CAUSAL, {}),
    "granite": ("granite", _CAUSAL, {}),
    "mixtral": ("mixtral", _CAUSAL, {}),
    "qwen2_moe": ("qwen2_moe", _CAUSAL, {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", _CAUSAL, {}),
    "olmoe": ("olmoe", _CAUSAL, {}),
    "gpt_oss": ("gpt_oss", _CAUSAL, {}),
    "deepseek_v3": (
        *("deepseek_v3", _CAUSAL),
        {
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
            **{"num_key_value_heads": 4},
        },
    ),
    "phimoe": ("phimoe", _CAUSAL, {}),
    "granitemoe": ("granitemoe", _CAUSAL, {}),
    "jamba": (
        *("jamba", _CAUSAL),
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    ),
    "mamba": ("mamba", _CAUSAL, {"state_size": 4}),
    "recurrent_gemma": ("recurrent_gemma", _CAUSAL, {"num_hidden_layers": 3, "lru_width": 32}),
    "rwkv": ("rwkv", _CAUSAL, {"attention_hidden_size": 32}),
    "bert": ("bert", _MASKED, {}),
    "roberta": ("roberta", _MASKED, {}),
    "xlm_roberta": ("xlm-roberta", _MASKED, {}),
    "albert": ("albert", _MASKED, {"embedding_size": 16}),
    "distilbert": ("distilbert", _MASKED, {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "electra": ("electra", _MASKED, {"embedding_size": 16}),
    "deberta_v2": (
        *("deberta-v2", _MASKED),
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    ),
    "modernbert": ("modernbert", _MASKED, {}),
    "bart": ("bart", _SEQ2SEQ, {}),
    "pegasus": ("pegasus", _SEQ2SEQ, {}),
    "t5": ("t5", _SEQ2SEQ, _T5),
    "mt5": ("mt5", _SEQ2SEQ, _T5),
    "switch_transformers": (
        *("switch_transformers", _SEQ2SEQ),
        {
            **_T5,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "vit": ("vit", _IMAGES, {}),
    "deit": ("deit", _IMAGES, {"architectures": ["DeiTForImageClassification"]}),
    "beit": ("beit", _IMAGES, {}),
    "dinov2": ("dinov2", _IMAGES, {}),
    "swin": (
        "swin",
        _IMAGES,
        {"patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "convnext": ("convnext", _IMAGES, {**_FOUR, "num_stages": 4, "patch_size": 4}),
    "resnet": ("resnet", _IMAGES, {**_FOUR, "embedding_size": 16}),
    "segformer": ("segformer", _IMAGES, {**_FOUR, "num_attention_heads": (1, 2, 2, 4), "decoder_hidden_size": 32}),
    "clip": ("clip", "", {**_TWO_TOWERS, "projection_dim": 16}),
    "siglip": ("siglip", "", _TWO_TOWERS),
    "wav2vec2": (
        *("wav2vec2", "CTC"),
        {
            **{"conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 8)},
            **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
        },
    ),
    "whisper": ("whisper", "SpeechSeq2Seq", {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}),
}


def _transformers_model(kind: str, purpose: str, sizes: Sizes) -> nn.Module:
    import transformers

    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    transformers.logging.set_verbosity_error()  # tiny vocabularies lack the special tokens of the defaults
    plain = config_class()
    other_names = config_class.attribute_map
    fitting = {
        key: value
        for key, value in _TINY.items()
        if hasattr(plain, key)
        and getattr(getattr(config_class, key, None), "fset", True)  # a property may be read-only
        and other_names.get(key, key) not in sizes
    }
    config = config_class(**{**fitting, **sizes})
    auto = getattr(transformers, f"AutoModelFor{purpose}" if purpose else "AutoModel")
    return auto.from_config(config)


def _transformers_batch(kind: str, purpose: str) -> Batch:
    if purpose == _IMAGES:
        return _image("pixel_values", 32)
    if purpose == "CTC":
        return {"input_values": torch.randn(BATCH, 256)}
    if purpose == "SpeechSeq2Seq":
        return {"input_features": torch.randn(BATCH, 8, 16), "decoder_input_ids": _tokens()}
    ids = {"input_ids": _tokens()}
    if purpose == _SEQ2SEQ:
        return {**ids, "decoder_input_ids": _tokens()}
    return {**ids, **_image("pixel_values", 32)} if kind in ("clip", "siglip") else ids


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


FAMILIES: dict[str, Family] = {
    **{
        f"timm/{family}": Family(partial(_timm_model, name, sizes), partial(_image, "x", pixels))
        for family, (name, pixels, sizes) in _TIMM.items()
    },
    **{
        f"transformers/{family}": Family(
            partial(_transformers_model, kind, purpose, sizes), partial(_transformers_batch, kind, purpose)
        )
        for family, (kind, purpose, sizes) in _TRANSFORMERS.items()
    },
}
"""Family, as "timm/resnet" or "transformers/gpt2" -> how to build it."""
