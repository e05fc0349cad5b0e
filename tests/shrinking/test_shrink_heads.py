import copy
import re

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import cait, levit, tiny_vit
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from emp_callbacks.shrinking import load_shrunk, pruned_units, shrink
from emp_callbacks.targets import AttentionLayout, attention_heads, register_attention

IMAGES = torch.linspace(-2, 2, 3 * 32 * 32).sin().view(1, 3, 32, 32)
TOKENS = torch.arange(3, 10).view(1, 7)
ROWS = torch.linspace(-2, 2, 64).sin().view(1, 4, 16)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 30}


def hf(kind, **settings):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    return AutoModel.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))


def swin():
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=5, **sizes)


class Own(nn.Module):
    """An attention with a gate per head, and a width in an attribute."""

    def __init__(self):
        super().__init__()
        self.many, self.wide = 4, 16
        self.into, self.gate, self.out = nn.Linear(16, 48), nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, self.many, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v) * self.gate
        return self.out(heads.transpose(1, 2).reshape(*x.shape[:2], self.wide))


register_attention(
    Own,
    AttentionLayout(inputs={"into": "qkv"}, output="out", heads="many", per_head={"gate": 1}, sizes=("many", "wide")),
)

CUT = {  # a model, an example, and one of its tensors with the dimension that gets shorter besides the projections'
    "swin": (swin, IMAGES, ("layers.0.blocks.1.attn.relative_position_bias_table", 1)),
    "levit": (lambda: nn.Sequential(levit.Attention(16, 4, 4, resolution=2)), ROWS, ("0.qkv.bn.running_var", 0)),
    "tiny_vit": (
        lambda: nn.Sequential(tiny_vit.Attention(16, 4, 4, 2, resolution=(2, 2))),
        ROWS,
        ("0.attention_biases", 0),
    ),
    "own": (lambda: nn.Sequential(Own()), ROWS, ("0.gate", 1)),
    "llama, one key": (lambda: hf("llama", num_key_value_heads=1), TOKENS, ("layers.1.self_attn.q_proj.weight", 0)),
    "gpt_oss": (
        lambda: hf("gpt_oss", num_key_value_heads=4, head_dim=4, **MIXTURE),
        TOKENS,
        ("layers.0.self_attn.sinks", 0),
    ),
    "gpt_neox": (lambda: hf("gpt_neox"), TOKENS, ("layers.0.attention.query_key_value.bias", 0)),
    "umt5": (
        lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
        TOKENS,
        ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    ),
}


def lively(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def masked(model, head=1):
    """Prune one head of every attention; return the masks."""
    masks = {}
    for target in attention_heads(model):
        masks[target.name] = torch.arange(target.units) != head
        for member in target.members:
            if member.masked:
                member.weight.parameter.movedim(member.dims[0], 0)[member.unit_of == head] = 0
    return masks


@torch.no_grad()
def outputs(model, x):
    given = model(x)
    return given if isinstance(given, torch.Tensor) else given[0]


@pytest.mark.parametrize("kind", CUT)
def test_heads_are_cut_with_all_that_belongs_to_them(kind, tmp_path):
    build, x, (name, dim) = CUT[kind]
    model = lively(build())
    dense, size = copy.deepcopy(model), model.state_dict()[name].shape[dim]
    masks = masked(model)
    expected = outputs(model, x)
    assert (expected - outputs(dense, x)).abs().max() > 1e-3, "the heads matter"
    report = shrink(model, masks, (x,))
    assert [(layer.removed, layer.reason) for layer in report.layers] == [(1, None)] * len(masks)
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-5)
    units = next(target.units for target in attention_heads(dense) if name.startswith(target.name))
    assert model.state_dict()[name].shape[dim] == size - size // units
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "small.safetensors", report.metadata())
    outputs(dense, x)  # what it remembers of its tables is of all heads
    loaded = load_shrunk(dense, tmp_path / "small.safetensors")
    torch.testing.assert_close(outputs(loaded, x), expected, rtol=1e-4, atol=1e-5)


def vit(kind, **settings):
    return timm.create_model(kind, **{**TINY, **settings})


STAY = {
    "beit": (lambda: vit("beit_base_patch16_224"), IMAGES, "the forward pass needs them"),
    "eva02": (lambda: vit("eva02_tiny_patch14_224", embed_dim=32), IMAGES, "the forward pass needs them"),
    "talking heads": (lambda: nn.Sequential(cait.TalkingHeadAttn(16, 4)), ROWS, "its heads mix what they attend to"),
    "t5": (
        lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        TOKENS,
        "the first layer makes the position bias for the heads of all layers",
    ),
    "bloom": (lambda: hf("bloom", n_head=4), TOKENS, r"the model makes its position bias \(ALiBi\)"),
    "olmo2": (lambda: hf("olmo2", num_key_value_heads=4), TOKENS, "the forward pass needs them|without its zeros"),
}


@pytest.mark.parametrize("kind", STAY)
def test_heads_stay_for_a_reason_that_is_told(kind):
    build, x, reason = STAY[kind]
    model = lively(build())
    masks = masked(model)
    before = copy.deepcopy(model)
    report = shrink(model, masks, (x,))
    assert len(report.layers) == len(masks)
    assert report.surgery == {}
    for layer in report.layers:
        assert layer.removed == 0
        assert re.search(reason, layer.reason)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.state_dict().items())
    torch.testing.assert_close(outputs(model, x), outputs(before, x))


def test_what_cannot_be_cut_stays_and_the_rest_is_cut():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.torchs, self.own = nn.MultiheadAttention(16, 4, batch_first=True), Own()

        def forward(self, x):
            return self.own(self.torchs(x, x, x)[0])

    model = lively(Both())
    masks = masked(model)
    expected = outputs(model, ROWS)
    report = shrink(model, masks, (ROWS,))
    assert [layer[:4] for layer in report.layers] == [("torchs", 4, 1, 0), ("own", 4, 1, 1)]
    assert "torch.nn.MultiheadAttention" in report.layers[0].reason
    torch.testing.assert_close(outputs(model, ROWS), expected, rtol=1e-4, atol=1e-5)
    assert pruned_units(model).keys() == {"torchs"}


def test_a_parameter_given_to_a_module_does_not_stop_the_count_of_operations():
    """torch's counter fails on a module whose input asks for a gradient, as CaiT's class token does."""
    model = lively(timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=4))
    asked = [parameter.requires_grad for parameter in model.parameters()]
    report = shrink(model, masked(model), (IMAGES,))
    assert report.flops[0] > 0
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
