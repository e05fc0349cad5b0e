"""What the heads hand to the output projection can be seen and changed, in every attention."""

import pytest
import timm
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from emp_callbacks.targets import attention_heads


def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, num_classes=3)


def llama():
    settings = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 17}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **settings))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Weighing(nn.Module):
    """An attention that is asked for its weights, which takes another path through torch."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=True)[0]


MODELS = {
    "timm": (vit, lambda: torch.randn(2, 3, 32, 32)),
    "grouped queries": (llama, lambda: torch.randint(17, (2, 5))),
    "nn.MultiheadAttention": (encoder, lambda: torch.randn(2, 5, 16)),
    "nn.MultiheadAttention with weights": (
        Weighing,
        lambda: torch.randn(2, 5, 16),
    ),
}


def output_of(model, batch):
    found = model(batch)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_a_head_that_hands_on_nothing_equals_one_whose_columns_are_zero(kind, training):
    torch.manual_seed(0)
    make, batch = MODELS[kind][0](), MODELS[kind][1]()
    model = make.train(training)
    target = attention_heads(model)[0]
    outputs, kept = target.heads, torch.ones(target.units)
    kept[1] = 0.0
    plain = output_of(model, batch)
    handles = outputs.register(lambda values: values * outputs.spread(kept, values))
    with torch.no_grad():
        gated = output_of(model, batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(output_of(model, batch), plain), "the hooks are gone"
    weight = outputs.projection.weight
    with torch.no_grad():
        weight[:, outputs.unit_of == 1] = 0.0
        masked = output_of(model, batch)
    assert not torch.allclose(plain, masked, atol=1e-4), "the head mattered"
    torch.testing.assert_close(gated, masked, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_samples_that_torch_makes_of_padded_ones_are_reached():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model, batch = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    outputs, kept = [target.heads for target in attention_heads(model)], torch.tensor([1.0, 0.0, 1.0, 1.0])
    with torch.no_grad():
        plain = model(batch, src_key_padding_mask=padding)
        handles = [h for one in outputs for h in one.register(lambda v, one=one: v * one.spread(kept, v))]
        gated = model(batch, src_key_padding_mask=padding)
        for handle in handles:
            handle.remove()
        for one in outputs:
            one.projection.weight[:, one.unit_of == 1] = 0.0
        masked = model(batch, src_key_padding_mask=padding)
    assert not torch.allclose(plain[1, :3], masked[1, :3], atol=1e-4)
    torch.testing.assert_close(gated[0], masked[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gated[1, :3], masked[1, :3], rtol=1e-5, atol=1e-6)


def test_transposed_and_convolved_projections_are_reached():
    attention = GPT2Attention(GPT2Config(n_embd=16, n_head=4), layer_idx=0)
    (target,) = attention_heads(nn.ModuleDict({"a": attention}))
    seen = []
    handles = target.heads.register(lambda values: seen.append(values.shape))
    attention(torch.randn(2, 3, 16))
    assert seen == [(2, 3, 16)]
    assert target.heads.spread(torch.arange(4.0), torch.zeros(2, 3, 16)).tolist() == [i // 4 for i in range(16)]
    assert len(handles) == 1
