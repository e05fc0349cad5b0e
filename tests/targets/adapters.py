"""Tiny models with adapters of PEFT whose weights are no zeros, so that they do something."""

import warnings

import peft
import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, ViTConfig

KINDS = {
    "lora": lambda layers: peft.LoraConfig(r=4, target_modules=layers),
    "dora": lambda layers: peft.LoraConfig(r=4, target_modules=layers, use_dora=True),
    "adalora": lambda layers: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=layers),
    "loha": lambda layers: peft.LoHaConfig(r=4, target_modules=layers),
    "lokr": lambda layers: peft.LoKrConfig(r=4, target_modules=layers),
    "ia3": lambda layers: peft.IA3Config(target_modules=layers, feedforward_modules=[]),
    "vera": lambda layers: peft.VeraConfig(r=4, target_modules=layers),
}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
VIT = {**BERT, "image_size": 8, "patch_size": 4, "num_labels": 2}
LLAMA = {**BERT, "num_key_value_heads": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}


def gpt2():
    config = GPT2Config(n_layer=1, n_head=4, n_embd=16, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"], torch.randint(20, (2, 8))


def llama():
    layers = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return transformers.LlamaForCausalLM(LlamaConfig(**LLAMA)), layers, torch.randint(20, (2, 8))


def qwen2():
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA))
    return model, ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], torch.randint(20, (2, 8))


def bert():
    return transformers.BertModel(BertConfig(**BERT, vocab_size=20)), ["query", "dense"], torch.randint(20, (2, 8))


def vit():
    model = transformers.ViTForImageClassification(ViTConfig(**VIT))
    return model, "all-linear", torch.randn(2, 3, 8, 8)


def timm_vit():
    import timm

    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 2}
    return timm.models.VisionTransformer(**kwargs), ["qkv", "attn.proj", "fc1", "fc2"], torch.randn(2, 3, 8, 8)


def adapted_model(make, kind):
    """Return a model with adapters, and a batch for it."""
    torch.manual_seed(0)
    model, layers, batch = make()
    config = KINDS[kind](layers) if isinstance(kind, str) else kind(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out itself
        adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted, batch


def loss_of(model, batch):
    out = model(batch)
    return (out if isinstance(out, torch.Tensor) else out[0]).square().mean()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model, batch, optimizer, pruner, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        pruner.step()
