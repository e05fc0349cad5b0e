"""Tiny models of several kinds in folders, and what they are called with."""

import inspect

import torch
import transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LLAMA = {**SIZES, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
MOE = {"num_experts_per_tok": 2}
IMAGES = {"image_size": 32, "patch_size": 8}
# Name -> its class, its configuration's class, the configuration, and what it reads.
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "text"),
    "tied_llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "word_embed_proj_dim": 16,
        },
        "text",
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 4}, "text"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, **MOE, "num_local_experts": 4}, "text"),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64},
        "text",
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES, "text"),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 16}, "text"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        "both",
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, "both"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**ENCODER_DECODER, "max_source_positions": 20, "num_mel_bins": 8},
        "sound",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **IMAGES}, "image"),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        "image",
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        "image",
    ),
}


def made(kind, folder, dtype=torch.float32, **changes):
    """Return a model of a kind, in evaluation mode, after it was saved into a folder."""
    name, config_name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**settings, **changes})
    model = getattr(transformers, name)(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as drawn, blocks add next to nothing to what passes them
            parameter.data *= 4
    for buffer_name, buffer in model.named_buffers():  # of batch norms, so that they are seen to be read
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
    model.save_pretrained(folder)
    return model


def samples(kind, count=3):
    """Return keyword arguments for a few calls, each a batch of one."""
    draws = torch.Generator().manual_seed(1)

    def ids():
        return torch.randint(3, 60, (1, 12), generator=draws)

    def one():
        reads = KINDS[kind][3]
        if reads == "text":
            return {"input_ids": ids()}
        if reads == "both":
            return {"input_ids": ids(), "decoder_input_ids": ids()}
        if reads == "sound":
            return {"input_features": torch.randn(1, 8, 40, generator=draws), "decoder_input_ids": ids()}
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=draws)}

    return [one() for _ in range(count)]


def called(model, inputs):
    """Return the logits of a model in memory, as a folder's model is called."""
    takes = inspect.signature(model.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in takes else {}
    dtype = next(model.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        return model(**given, **without_cache).logits
