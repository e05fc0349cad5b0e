"""Small mixtures of experts: of transformers by their configurations, and a classifier made of two of their layers."""

from importlib.metadata import version

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

HAS_STACKED_EXPERTS = Version(version("transformers")) >= Version("5")
needs_stacked_experts = pytest.mark.skipif(not HAS_STACKED_EXPERTS, reason="transformers stacks experts from 5 on")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**FOUR, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**FOUR, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": FOUR,
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "DeepseekV3": {
        **{"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, **LATENT},
    },
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def language_model(family, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **CONFIGS[family], **settings})
    config._experts_implementation = "eager"
    return getattr(transformers, f"{family}ForCausalLM")(config)


def ids(rows=4):
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(1))


class Classifier(nn.Module):
    """Images of 8 x 8 as four tokens through two layers of experts, by class of 5."""

    def __init__(self):
        super().__init__()
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=16, intermediate_size=6, num_local_experts=5, num_experts_per_tok=2)
        config._experts_implementation = "eager"
        self.embed = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(MixtralSparseMoeBlock(config) for _ in range(2))
        self.head = nn.Linear(16, 5)
        for parameter in self.blocks.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        tokens = self.embed(x.unflatten(2, (4, 2)).flatten(1).unflatten(1, (4, 16)))
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens.mean(1))
