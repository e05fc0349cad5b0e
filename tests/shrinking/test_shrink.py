import copy
import subprocess
import sys
from contextlib import suppress

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import emp_callbacks
from emp_callbacks.shrinking import Cut, load_shrunk, pruned_units, save_shrunk, shrink
from emp_callbacks.shrinking.surgery import perform
from emp_callbacks.targets import attention_heads, neurons

TOKENS = {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}
IMAGES = (torch.linspace(-2, 2, 128).view(2, 1, 8, 8).sin(),)
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "in_chans": 1, "num_classes": 5}


def kept(units, *pruned):
    return torch.tensor([unit not in pruned for unit in range(units)])


def randomized(model):
    """Give every bias, norm and running statistic a value that is not the one of a fresh model."""
    torch.manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 1.2)
    return model.eval()


def vit(**settings):
    torch.manual_seed(0)
    return randomized(timm.create_model("vit_tiny_patch16_224", **{**VIT, **settings}))


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 8}
    return randomized(GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes)))


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return randomized(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)))


@torch.no_grad()
def zero(tensor, dim, *indices):
    tensor.index_fill_(dim, torch.tensor(indices), 0)


def outputs(model, args=(), kwargs=None):
    with torch.no_grad():
        given = model(*args, **(kwargs or {}))
    return given if isinstance(given, torch.Tensor) else given[0]


def check(model, masks, args=(), kwargs=None):
    """Shrink the model, compare it with the masked one at 1e-5 and check that FLOPs and parameters went down."""
    expected = outputs(model, args, kwargs)
    assert float(expected.std()) > 1e-3
    report = shrink(model, masks, args, kwargs)
    torch.testing.assert_close(outputs(model, args, kwargs), expected, rtol=1e-5, atol=1e-5)
    assert report.difference < 1e-5
    assert report.flops[1] < report.flops[0]
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
    return report


def removed(report):
    return {layer.name: layer.removed for layer in report.layers}


def counts(report):
    return [layer[:4] for layer in report.layers]


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers}


def mlp(activation=nn.ReLU):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 2))
    for layer, pruned in ((model[0], (1, 4)), (model[2], (0,))):
        zero(layer.weight, 0, *pruned)
        zero(layer.bias, 0, *pruned)
    return model


MLP_MASKS = {"0": kept(6, 1, 4), "2": kept(5, 0)}
POINTS = (torch.linspace(-1, 1, 12).view(3, 4),)


def test_mlp_by_hand():
    model = mlp()
    report = check(model, MLP_MASKS, POINTS)
    assert report.parameters == (30 + 35 + 12, 20 + 20 + 10)
    assert report.flops == (2 * 3 * (24 + 30 + 10), 2 * 3 * (16 + 16 + 8))
    assert report.layers == (("0", 6, 2, 2, None), ("2", 5, 1, 1, None))
    assert report.surgery["2"] == {"inputs": Cut(6, [0, 2, 3, 5]), "outputs": Cut(5, [1, 2, 3, 4])}
    assert (model[2].in_features, model[2].out_features, model[4].in_features) == (4, 4, 4)


def test_the_package_gives_the_functions():
    assert (emp_callbacks.shrink, emp_callbacks.pruned_units, emp_callbacks.load_shrunk) == (
        shrink,
        pruned_units,
        load_shrunk,
    )


def test_units_that_are_zero_are_found():
    found = pruned_units(mlp())
    assert found.keys() == MLP_MASKS.keys()
    assert all(torch.equal(found[name], MLP_MASKS[name]) for name in found)


def test_nothing_pruned_changes_nothing():
    model = mlp()
    report = shrink(model, {"0": torch.ones(6, dtype=torch.bool)}, POINTS)
    assert (report.layers, report.surgery, report.parameters) == ((), {}, (77, 77))


def test_a_layer_keeps_one_unit():
    model = mlp()
    zero(model[0].weight, 0, *range(6))
    zero(model[0].bias, 0, *range(6))
    report = check(model, {"0": kept(6, *range(6))}, POINTS)
    assert model[0].out_features == 1
    assert report.layers == (("0", 6, 6, 5, "a layer keeps one unit"),)


def test_modes_and_frozen_parameters_stay_as_they_were():
    model = mlp().train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    shrink(model, MLP_MASKS, POINTS)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]


# A head: 3 * 4 rows of qkv with their biases, 4 columns of proj. A neuron: a row with its bias, and a column.
HEAD, NEURON = 3 * 4 * (16 + 1) + 4 * 16, 16 + 1 + 16


def masked_vit(**settings):
    model = vit(**settings)
    zero(model.blocks[0].attn.proj.weight, 1, *range(4, 8), *range(12, 16))
    zero(model.blocks[1].attn.proj.weight, 1, *range(16))
    for parameter in model.blocks[0].mlp.fc1.parameters():
        zero(parameter, 0, *range(10, 20))
    return model


VIT_MASKS = {
    "blocks.0.attn": kept(4, 1, 3),
    "blocks.1.attn": kept(4, *range(4)),
    "blocks.0.mlp.fc1": kept(64, *range(10, 20)),
}


def test_vit_heads_and_neurons_by_hand():
    model = masked_vit()
    assert {n: m.tolist() for n, m in pruned_units(model).items()} == {n: m.tolist() for n, m in VIT_MASKS.items()}
    report = check(model, VIT_MASKS, IMAGES)
    assert report.parameters[0] - report.parameters[1] == 5 * HEAD + 10 * NEURON
    assert removed(report) == {"blocks.0.attn": 2, "blocks.1.attn": 3, "blocks.0.mlp.fc1": 10}
    assert [(block.attn.num_heads, block.attn.attn_dim) for block in model.blocks] == [(2, 8), (1, 4)]


def test_gpt2_heads_and_neurons_by_hand():
    model = gpt2()
    blocks = model.transformer.h
    zero(blocks[0].attn.c_proj.weight, 0, *range(8, 12))
    zero(blocks[1].attn.c_proj.weight, 0, *range(12))
    for parameter in blocks[1].mlp.c_fc.parameters():
        zero(parameter, parameter.dim() - 1, 3, 60)
    masks = {"transformer.h.0.attn": kept(4, 2), "transformer.h.1.attn": kept(4, 0, 1, 2)}
    masks["transformer.h.1.mlp.c_fc"] = kept(64, 3, 60)
    report = check(model, masks, kwargs=TOKENS)
    assert report.parameters[0] - report.parameters[1] == 4 * HEAD + 2 * NEURON
    assert [block.attn.split_size for block in blocks] == [12, 4]
    assert model.lm_head.weight is model.transformer.wte.weight
    model.generate(TOKENS["input_ids"][:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_llama_groups_and_gated_neurons_by_hand():
    model = llama()
    layers = model.model.layers
    zero(layers[0].self_attn.o_proj.weight, 1, *range(8, 16))
    for projection in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
        zero(projection.weight, 0, 0, 5, 23)
    masks = {"model.layers.0.self_attn": kept(2, 1), "model.layers.1.mlp": kept(24, 0, 5, 23)}
    report = check(model, masks, kwargs=TOKENS)
    group = (8 + 4 + 4 + 8) * 16  # rows of q, k and v, columns of o
    assert report.parameters[0] - report.parameters[1] == group + 3 * 3 * 16
    assert layers[0].self_attn.k_proj.out_features == 4


def test_bert_heads():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    model = randomized(BertModel(BertConfig(num_attention_heads=4, **sizes)))
    zero(model.encoder.layer[0].attention.output.dense.weight, 1, *range(8))
    tokens = {"input_ids": TOKENS["input_ids"]}
    report = check(model, {"encoder.layer.0.attention": kept(4, 0, 1)}, kwargs=tokens)
    assert report.parameters[0] - report.parameters[1] == 2 * HEAD


def mask_at_random(model, targets):
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for target in targets:
        masks[target.name] = torch.rand(target.units, generator=generator) < 0.6
        pruned = (~masks[target.name]).nonzero().flatten()
        for member in target.members:
            if member.masked:
                zero(
                    member.weight.parameter,
                    member.dims[0],
                    *torch.isin(member.unit_of, pruned).nonzero().flatten().tolist(),
                )
    return masks


def test_gated_neurons_in_one_layer_behind_position_embeddings():
    model = vit(mlp_layer=timm.layers.SwiGLUPacked)
    report = check(model, mask_at_random(model, [*attention_heads(model), *neurons(model)]), IMAGES)
    assert len(report.layers) == 4
    assert all(layer.removed == layer.pruned > 0 for layer in report.layers)


def test_resnet_channels():
    torch.manual_seed(0)
    model = randomized(timm.create_model("resnet10t", num_classes=3, in_chans=1))
    masks = mask_at_random(model, neurons(model))
    report = check(model, masks, (torch.randn(2, 1, 32, 32),))
    layers = {layer.name: layer for layer in report.layers}
    assert layers["layer1.0.conv1"].removed == layers["layer1.0.conv1"].pruned > 0
    both = ~masks["layer2.0.conv2"] & ~masks["layer2.0.downsample.1"]
    stem = ~masks["conv1.6"] & ~masks["layer1.0.conv2"]  # its norm is outside the stem, and the block is added to it
    assert removed(report)["conv1.6"] == removed(report)["layer1.0.conv2"] == int(stem.sum()) > 0
    assert removed(report)["layer2.0.conv2"] == removed(report)["layer2.0.downsample.1"] == int(both.sum()) > 0


class Residual(nn.Module):
    """A stem and a block that adds to it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 2)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_coupled_channels_by_hand():
    torch.manual_seed(0)
    model = randomized(Residual())
    pruned = {"stem": (1, 2, 3), "conv1": (0, 5), "conv2": (2, 3, 4)}
    for layer, norm in (("stem", "bn"), ("conv1", "bn1"), ("conv2", "bn2")):
        for parameter in (*getattr(model, layer).parameters(), *getattr(model, norm).parameters()):
            zero(parameter, 0, *pruned[layer])
    masks = {name: kept(8 if name == "conv1" else 6, *gone) for name, gone in pruned.items()}
    report = check(model, masks, (torch.randn(2, 3, 8, 8),))
    assert removed(report) == {"stem": 2, "conv1": 2, "conv2": 2}  # 2 and 3 are pruned on both sides of the addition
    before = (6 * 27 + 12) + (8 * 54 + 16) + (6 * 72 + 12) + (24 * 2 + 2)
    assert report.parameters == (before, (4 * 27 + 8) + (6 * 36 + 12) + (4 * 54 + 8) + (16 * 2 + 2))
    assert report.surgery["head"]["inputs"].kept == [*range(8), *range(16, 24)]
    assert model.bn1.running_var.shape == (6,)


def test_what_is_zero_only_on_the_example_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.a(x).relu() + self.b(x).relu())

    torch.manual_seed(0)
    model = Sum()
    for parameter in model.a.parameters():
        zero(parameter, 0, 0, 1)
    with torch.no_grad():
        model.b.bias[:2] = torch.tensor([-100.0, -100.0])  # silent here, for other inputs it is not
    report = shrink(model, {"a": kept(3, 0, 1)}, POINTS)
    assert counts(report) == [("a", 3, 2, 0)]
    assert "other values where 'out' (Linear) reads them, joined with 'b' (Linear)" in report.layers[0].reason
    zero(model.b.weight, 0, 1)
    zero(model.b.bias, 0, 1)
    report = shrink(model, {"a": kept(3, 0, 1), "b": kept(3, 1)}, POINTS)
    assert counts(report) == [("a", 3, 2, 1), ("b", 3, 1, 1)]
    assert report.layers[0].reason == "joined with 'b' (Linear), which keeps these channels"


def test_zeros_that_an_activation_changes_stay():
    report = shrink(mlp(nn.Sigmoid), MLP_MASKS, POINTS)
    assert removed(report) == {"0": 0, "2": 0}
    assert reasons(report)["0"] == "its zeros are other values where '2' (Linear) reads them"


def test_what_the_model_gives_out_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.hidden(x).relu()
            return x, self.out(x)

    model = Both()
    for layer in (model.hidden, model.out):
        for parameter in layer.parameters():
            zero(parameter, 0, 1)
    report = shrink(model, {"hidden": kept(6, 1), "out": kept(3, 1)}, POINTS)
    assert removed(report) == {"hidden": 0, "out": 0}
    assert set(reasons(report).values()) == {"the model gives its output out"}


def test_channels_stay_in_front_of_a_norm_and_pass_a_prelu():
    model = mlp()
    model[1] = nn.RMSNorm(6)  # maps zeros to zeros
    zero(model[1].weight, 0, *(~MLP_MASKS["0"]).nonzero().flatten().tolist())
    report = shrink(model, MLP_MASKS, POINTS)
    assert counts(report) == [("0", 6, 2, 0), ("2", 5, 1, 1)]
    assert report.layers[0].reason == "its output passes '1' (RMSNorm), which needs all of its channels"
    assert model[0].out_features == 6
    model = mlp()
    model[1] = nn.PReLU(6)
    nn.init.uniform_(model[1].weight)
    check(model, MLP_MASKS, POINTS)
    assert model[1].num_parameters == 4


def test_units_that_are_not_masked_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    report = shrink(model, {"0": kept(6, 0)}, POINTS)
    assert removed(report) == {"0": 0}
    assert "1 of its units are not zero in this model (apply the masks first)" in report.layers[0].reason


def test_heads_that_are_not_masked_are_an_error_and_the_model_is_as_before():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="apply the masks first"):
        shrink(model, {"blocks.0.attn": kept(4, 0)}, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.blocks[0].attn.num_heads == 4
    assert outputs(model, IMAGES).shape == (2, 5)


def test_attentions_that_cannot_shrink_are_left_out_and_the_rest_is_cut():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    zero(model.self_attn.out_proj.weight, 1, *range(4, 8))
    for parameter in model.linear1.parameters():
        zero(parameter, 0, 3, 4)
    masks = {"self_attn": kept(4, 1), "linear1": kept(32, 3, 4)}
    report = shrink(model, masks, (torch.randn(1, 3, 16),))
    assert removed(report) == {"self_attn": 0, "linear1": 2}
    assert "MultiheadAttention" in report.layers[0].reason


class Stubborn(nn.Module):
    """Blocks of two layers; the code of some counts on their number of channels."""

    def __init__(self, *stubborn):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(4, 6) for _ in range(5))
        self.second = nn.ModuleList(nn.Linear(6, 4) for _ in range(5))
        self.stubborn = stubborn

    def forward(self, x):
        for index, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            hidden = first(x).relu()
            if index in self.stubborn:
                hidden = hidden.view(len(x), 6)
            x = x + second(hidden) * hidden.shape[-1] ** (0.5 if index == 4 else 0)
        return x


def test_what_the_model_does_not_run_without_is_found_and_left_out():
    torch.manual_seed(0)
    model = Stubborn(1, 3)
    masks = {f"first.{index}": kept(6, index, 5) for index in range(5)}
    for name, mask in masks.items():
        for parameter in model.get_submodule(name).parameters():
            zero(parameter, 0, *(~mask).nonzero().flatten().tolist())
    report = check(model, masks, POINTS)
    assert removed(report) == {"first.0": 2, "first.1": 0, "first.2": 2, "first.3": 0, "first.4": 0}
    assert reasons(report)["first.0"] is None
    assert reasons(report)["first.1"].startswith("the forward pass needs them (RuntimeError: shape '[3, 6]'")
    assert reasons(report)["first.4"].startswith("without its zeros the shrunk model's outputs differ by")


def test_a_model_that_runs_with_its_own_weights_only_keeps_its_channels():
    class Guarded(nn.Sequential):
        def forward(self, x):
            if self[4].weight.sum() != 0:
                raise RuntimeError("other weights")
            return super().forward(x)

    model = Guarded(*mlp())
    with torch.no_grad():
        model[4].weight[:] = torch.tensor([[1.0], [-1.0]])
    report = shrink(model, MLP_MASKS, POINTS)
    assert removed(report) == {"0": 0, "2": 0}
    assert reasons(report)["0"] == "the model cannot be followed with other weights (RuntimeError: other weights)"


def test_a_model_that_is_not_repeatable_is_an_error():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    with pytest.raises(ArithmeticError, match="gives other outputs each time"):
        shrink(Noisy(*mlp()), MLP_MASKS, POINTS)


class Bottleneck(nn.Module):
    """A grouped convolution between two pointwise ones, with an excitation."""

    def __init__(self, groups):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.expand = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.conv3 = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.conv3(x * self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


IMAGE = (torch.linspace(-2, 2, 2 * 3 * 36).view(2, 3, 6, 6).sin(),)


@pytest.mark.parametrize(
    ("first", "second", "gone", "sizes"),
    [
        ((0, 3, 6, 9), (), (4, 0), (4, 8, 12)),  # one of each group
        ((0, 1, 2, 3), (), (0, 0), (4, 12, 12)),  # all of one group, whose outputs stay
        ((), (0, 3, 6, 9, 10), (0, 4), (4, 12, 8)),
        ((0, 1, 2), (0, 1, 2), (3, 3), (3, 9, 9)),  # a group as a whole
        ((0, 1, 6, 7), (0, 1, 6, 7), (4, 4), (2, 8, 8)),  # a sparse group joins a lively one
        (range(12), range(12), (11, 11), (1, 1, 1)),
    ],
)
def test_groups_of_a_convolution_by_hand(first, second, gone, sizes):
    torch.manual_seed(0)
    model = randomized(Bottleneck(4))
    zero_layers(model, (("conv1", "bn1"), first), (("conv2", "bn2"), second))
    masks = {name: kept(12, *pruned) for name, pruned in (("conv1", first), ("conv2", second)) if len(pruned)}
    before = copy.deepcopy(model)
    expected = outputs(model, IMAGE)
    report = shrink(model, masks, IMAGE)
    torch.testing.assert_close(outputs(model, IMAGE), expected, rtol=1e-5, atol=1e-5)
    assert (removed(report).get("conv1", 0), removed(report).get("conv2", 0)) == gone
    assert (model.conv2.groups, model.conv2.in_channels, model.conv2.out_channels) == sizes
    assert model.conv2.weight.shape == (sizes[2], sizes[1] // sizes[0], 3, 3)
    assert all(
        "groups of 'conv2' (Conv2d) need equal" in why or "keeps one" in why for why in reasons(report).values() if why
    )
    perform(before, report.surgery)  # as `load_shrunk` does
    torch.testing.assert_close(outputs(before, IMAGE), expected, rtol=1e-5, atol=1e-5)


def zero_layers(model, *layers):
    for names, pruned in layers:
        for name in names if len(pruned) else ():
            for parameter in model.get_submodule(name).parameters():
                zero(parameter, 0, *pruned)


class Mobile(nn.Module):
    """Shuffled halves, a depthwise convolution, a concatenation with itself and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.split, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.project = nn.Conv2d(8, 4, 1)
        self.ghost, self.bn2 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.cheap = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        left, right = self.norm(self.split(x)).relu().chunk(2, 1)
        right = self.project(self.deep(nn.functional.relu6(self.bn1(self.expand(right)))))
        x = torch.cat([left, right], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = self.bn2(self.ghost(x)).relu()
        return self.head(self.up(torch.cat([x, self.cheap(x)], 1)).relu())


def test_channels_are_followed_through_what_a_model_does_between_layers():
    torch.manual_seed(0)
    model = randomized(Mobile())
    pruned = {("split", "norm"): (1, 6), ("expand", "bn1"): (0, 5, 7), ("ghost", "bn2"): (2, 3)}
    zero_layers(model, *pruned.items())
    zero(model.up.weight, 1, 4)
    zero(model.up.bias, 0, 4)
    masks = {names[0]: kept(model.get_submodule(names[0]).out_channels, *gone) for names, gone in pruned.items()}
    report = check(model, masks, IMAGE)
    assert removed(report) == {"split": 0, "expand": 3, "ghost": 2}
    assert "needs them" in reasons(report)["split"] or "differ" in reasons(report)["split"]
    assert (model.deep.groups, model.cheap.groups, model.up.in_channels) == (5, 4, 8)


def test_weight_standardised_convolutions_keep_their_inputs():
    torch.manual_seed(0)
    convolutions = [timm.layers.ScaledStdConv2d(3, 8, 3, padding=1), timm.layers.ScaledStdConv2d(8, 6, 3, padding=1)]
    model = nn.Sequential(convolutions[0], nn.SiLU(), convolutions[1], nn.SiLU(), nn.Conv2d(6, 2, 1))
    zero_layers(model, (("0",), (1, 2)), (("2",), (0, 5)))
    report = check(model, {"0": kept(8, 1, 2), "2": kept(6, 0, 5)}, IMAGE)
    assert removed(report) == {"0": 0, "2": 2}
    assert reasons(report)["0"].endswith("reads it: its weights are standardised over all of its inputs")
    assert convolutions[1].gain.shape == (4, 1, 1, 1)


def test_norms_behind_a_depthwise_convolution_are_cut_with_it():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8, bias=False)]
    model = randomized(nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)))
    zero_layers(model, (("0", "1"), (1, 2)))
    report = shrink(model, {"0": kept(8, 1, 2)}, IMAGE)
    assert removed(report) == {"0": 0}
    assert reasons(report)["0"].startswith("2 of its units are not zero"), "the last norm wakes them"
    zero_layers(model, (("3",), (1, 2)))
    assert removed(check(model, {"0": kept(8, 1, 2)}, IMAGE)) == {"0": 2}
    assert model[3].num_features == 6


def test_uniform_keeps_what_the_neediest_layer_needs():
    model = llama()
    layers = model.model.layers
    for index, gone in ((0, range(8, 24)), (1, range(4))):
        zero_layers(layers[index].mlp, (("gate_proj", "up_proj"), gone))
    zero(layers[0].self_attn.o_proj.weight, 1, *range(8, 16))
    masks = {"model.layers.0.mlp": kept(24, *range(8, 24)), "model.layers.1.mlp": kept(24, *range(4))}
    masks["model.layers.0.self_attn"] = kept(2, 1)
    expected = outputs(model, kwargs=TOKENS)
    report = shrink(model, masks, kwargs=TOKENS, uniform=True)
    torch.testing.assert_close(outputs(model, kwargs=TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert [layer.mlp.gate_proj.out_features for layer in layers] == [20, 20]
    assert removed(report) == {"model.layers.0.mlp": 4, "model.layers.1.mlp": 4, "model.layers.0.self_attn": 0}
    assert report.brought_back == 12 + 1  # the other attention needs both of its groups
    assert reasons(report)["model.layers.0.mlp"] == "kept as zeros, for equal sizes"


def test_tied_layers_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    zero(model[0].weight, 0, 1)
    zero(model[0].bias, 0, 1)
    assert removed(shrink(model, {"0": kept(4, 1)}, POINTS)) == {"0": 0}


@pytest.mark.parametrize(
    ("masks", "message"),
    [({"9": kept(6, 0)}, "no layer '9'"), ({"0": kept(5, 0)}, "for 5 units, the layer has 6")],
)
def test_masks_of_another_model_are_errors(masks, message):
    with pytest.raises(ValueError, match=message):
        shrink(mlp(), masks, POINTS)


# ---- files ---------------------------------------------------------------------------------------------------------


def write(model, masks, args, file):
    report = shrink(model, masks, args)
    save_shrunk(model, report, file)
    return file


@pytest.mark.processes
def test_a_new_process_loads_the_shrunk_model(tmp_path):
    model = masked_vit()
    expected = outputs(model, IMAGES)
    file = write(model, VIT_MASKS, IMAGES, tmp_path / "small.safetensors")
    code = f"""
import timm, torch
from emp_callbacks.shrinking import load_shrunk
model = load_shrunk(timm.create_model("vit_tiny_patch16_224", **{VIT!r}), {str(file)!r}).eval()
images = torch.linspace(-2, 2, 128).view(2, 1, 8, 8).sin()
torch.save(model(images).detach(), {str(tmp_path / "outputs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_file_loads_into_the_dense_architecture(tmp_path):
    file = write(mlp(), MLP_MASKS, POINTS, tmp_path / "small.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    loaded = load_shrunk(fresh, file)
    assert loaded is fresh
    torch.testing.assert_close(outputs(fresh, POINTS), outputs(mlp(), POINTS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Linear(4, 6),
    ],
    ids=["widths", "head", "names"],
)
def test_another_architecture_is_an_error(other, tmp_path):
    file = write(mlp(), MLP_MASKS, POINTS, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="does not fit this"):
        load_shrunk(other, file)


def test_a_damaged_file_is_refused_before_the_model_is_cut(tmp_path):
    file = write(mlp(), MLP_MASKS, POINTS, tmp_path / "small.safetensors")
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for damaged in (content[:-3], content[: header // 2], b""):
        file.write_bytes(damaged)
        dense = mlp()
        with pytest.raises(ValueError, match=r"small.safetensors is damaged \(.+\); copy or export it again"):
            load_shrunk(dense, file)
        assert [module.weight.shape for module in dense[::2]] == [module.weight.shape for module in mlp()[::2]]
    for damaged in flips(content, 8 + header):  # in the numbers of a cut there are flips that nothing can tell
        file.write_bytes(damaged)
        with suppress(ValueError):
            load_shrunk(mlp(), file)


def flips(content, upto):
    """Yield the file with one bit of its header flipped, every ninth of them."""
    for position in range(0, 8 * upto, 9):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)


@pytest.mark.parametrize("cut", ["3", "{}", '{"modules": 3}', '{"modules": {"0": {"outputs": {"of": 6}}}}', "[" * 9999])
def test_metadata_that_say_no_cut_are_refused(cut, tmp_path):
    save_file(mlp().state_dict(), tmp_path / "odd.safetensors", {"emp_shrunk": cut})
    with pytest.raises(ValueError, match=r"odd.safetensors does not fit this Sequential: .+"):
        load_shrunk(mlp(), tmp_path / "odd.safetensors")


def test_a_model_that_was_shrunk_twice_is_not_saved_with_half_of_its_cuts(tmp_path):
    model = mlp()
    shrink(model, MLP_MASKS, POINTS)
    again = shrink(model, {}, POINTS)
    with pytest.raises(ValueError, match=r"shrunk more than once.*one call, shrink\(model, \{\*\*masks"):
        save_shrunk(model, again, tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()
    loaded = load_shrunk(mlp(), write(mlp(), MLP_MASKS, POINTS, tmp_path / "small.safetensors"))
    with pytest.raises(ValueError, match="shrunk more than once"):
        save_shrunk(loaded, shrink(loaded, {}, POINTS), tmp_path / "again.safetensors")


def test_a_shrink_that_took_nothing_out_is_no_cut(tmp_path):
    model = mlp()
    assert not shrink(model, {}, POINTS).surgery
    report = shrink(model, MLP_MASKS, POINTS)
    save_shrunk(model, report, tmp_path / "small.safetensors")
    torch.testing.assert_close(
        outputs(load_shrunk(mlp(), tmp_path / "small.safetensors"), POINTS), outputs(model, POINTS)
    )


def test_files_that_are_not_shrunk_models_are_errors(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=r"does not say what was cut .*: write a shrunk model by save_shrunk"):
        load_shrunk(mlp(), tmp_path / "dense.safetensors")
    torch.save(mlp().state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"small.pt is torch.save's, .*: write the shrunk model by save_shrunk"):
        load_shrunk(mlp(), tmp_path / "small.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_shrunk(mlp(), tmp_path / "none.safetensors")


def test_a_module_under_two_names_is_as_it_was():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), shared, nn.ReLU(), shared)
    zero_layers(model, (("0",), (1, 2)))
    held = dict(model.named_parameters(remove_duplicate=False))
    report = check(model, {"0": kept(6, 1, 2)}, POINTS)
    assert removed(report) == {"0": 2}
    assert shared.weight is held["3.weight"]
