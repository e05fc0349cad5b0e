import pytest
import torch
from torch import nn

from emp_callbacks.study.flops import layer_flops, masked_flops


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


# 10 x 10 pixels give 5 x 5, then 3 x 3; a multiply-add is 2.
BY_HAND = {"conv": 2 * 25 * 8 * 3 * 9, "norm": 0, "depthwise": 2 * 9 * 8 * 9, "head": 2 * 8 * 5}


@pytest.mark.parametrize("examples", [1, 4])
def test_convolutions_and_linear_layers_by_hand(examples):
    net = ConvNet()
    assert layer_flops(net, lambda: net(torch.zeros(examples, 3, 10, 10)), examples) == BY_HAND


def test_counting_leaves_the_model_as_it_was():
    net = ConvNet()
    layer_flops(net, lambda: net(torch.ones(2, 3, 10, 10)), 2)
    assert net.training
    assert net.norm.num_batches_tracked == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def gpt2_block():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def test_a_gpt2_block_by_hand():
    model, tokens, width = gpt2_block(), 10, 8
    found = layer_flops(model, lambda: model(torch.zeros(3, tokens, dtype=torch.long)), 3)
    square = 2 * tokens * width * width
    assert {name: flops for name, flops in found.items() if flops} == {
        "transformer.h.0.attn": 2 * 2 * tokens * tokens * width,  # scores, then values; all heads together
        "transformer.h.0.attn.c_attn": 3 * square,
        "transformer.h.0.attn.c_proj": square,
        "transformer.h.0.mlp.c_fc": 4 * square,
        "transformer.h.0.mlp.c_proj": 4 * square,
        "lm_head": 2 * tokens * width * 16,
    }
    assert found["transformer.wte"] == found["transformer.h.0.ln_1"] == 0
    # the products of attention stay, however few weights do
    none = dict.fromkeys((f"{name}.weight" for name in found if not name.endswith(".attn")), 0.0)
    assert masked_flops(found, none) == 4 * tokens * tokens * width


def test_a_module_that_two_others_call_counts_both_calls_once():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(self.shared(x))

    shared = nn.Linear(4, 4, bias=False)
    net = nn.Sequential(shared, Twice(shared))
    assert layer_flops(net, lambda: net(torch.zeros(1, 4))) == {"0": 3 * 32}


def test_attention_inside_one_module_and_its_hidden_projection():
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.zeros(1, 5, 4)
    with pytest.warns(UserWarning, match="no FLOPs were counted for out_proj"):
        found = layer_flops(net, lambda: net(x, x, x, need_weights=False))
    assert found == {"": 4 * 2 * 5 * 16, "products": 2 * 2 * 25 * 4, "out_proj": 0}


def test_an_operation_without_a_formula_is_said():
    net = nn.LSTM(4, 6)
    with pytest.warns(UserWarning, match="does not know the operation"):
        layer_flops(net, lambda: net(torch.zeros(5, 1, 4)))


def test_masked_flops_by_hand():
    densities = {"conv.weight": 0.5, "head.weight": 0.25}
    expected = BY_HAND["conv"] / 2 + BY_HAND["depthwise"] + BY_HAND["head"] / 4
    assert masked_flops(BY_HAND, densities) == expected
    assert masked_flops(BY_HAND, {}) == sum(BY_HAND.values())


@pytest.mark.parametrize(
    ("densities", "words"),
    [
        ({"other.weight": 0.5}, "no layer 'other'"),
        ({"conv.weight": 0.5, "conv.bias": 0.5}, "two densities"),
        ({"conv.weight": 1.5}, r"must lie in \[0, 1\], got 1.5"),
        ({"conv.weight": float("nan")}, "got nan"),
    ],
)
def test_masked_flops_refuses(densities, words):
    with pytest.raises(ValueError, match=words):
        masked_flops(BY_HAND, densities)


def test_layer_flops_refuses():
    net, other = nn.Linear(2, 3), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="did not run the Linear"):
        layer_flops(net, lambda: other(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="no multiple of 5 examples"):
        layer_flops(net, lambda: net(torch.zeros(3, 2)), 5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layer_flops(net, lambda: net(torch.zeros(3, 2)), 0)
