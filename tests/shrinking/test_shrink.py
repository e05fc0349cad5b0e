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
from emp_callbacks.shrinking import Cut, load_shrunk, pruned_units, shrink
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
    assert report.layers == (("0", 6, 6, 5, None),)


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
    assert report.layers == (("a", 3, 2, 0, None),)
    zero(model.b.weight, 0, 1)
    zero(model.b.bias, 0, 1)
    assert shrink(model, {"a": kept(3, 0, 1), "b": kept(3, 1)}, POINTS).layers == (
        ("a", 3, 2, 1, None),
        ("b", 3, 1, 1, None),
    )


def test_zeros_that_an_activation_changes_stay():
    report = shrink(mlp(nn.Sigmoid), MLP_MASKS, POINTS)
    assert removed(report) == {"0": 0, "2": 0}


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


@pytest.mark.parametrize("between", [nn.PReLU(6), nn.RMSNorm(6)], ids=["PReLU", "RMSNorm"])
def test_what_a_layer_of_an_unknown_kind_reads_stays(between):
    model = mlp()
    model[1] = between  # maps zeros to zeros, has a parameter per unit and cannot be cut
    report = shrink(model, MLP_MASKS, POINTS)
    assert report.layers == (("0", 6, 2, 0, None), ("2", 5, 1, 1, None))
    assert model[0].out_features == 6


def test_units_that_are_not_masked_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert removed(shrink(model, {"0": kept(6, 0)}, POINTS)) == {"0": 0}


def test_heads_that_are_not_masked_are_an_error_and_the_model_is_as_before():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError, match="apply the masks first"):
        shrink(model, {"blocks.0.attn": kept(4, 0)}, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.blocks[0].attn.num_heads == 4
    assert outputs(model, IMAGES).shape == (2, 5)


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


def test_without_torch_pruning_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"emp-callbacks\[shrink\]"):
        shrink(mlp(), MLP_MASKS, POINTS)
    masks = {name: mask for name, mask in VIT_MASKS.items() if "attn" in name}
    assert shrink(masked_vit(), masks, IMAGES).layers  # heads need no graph


# ---- files ---------------------------------------------------------------------------------------------------------


def write(model, masks, args, file):
    report = shrink(model, masks, args)
    save_file(model.state_dict(), file, report.metadata())
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


def test_loading_needs_no_torch_pruning(tmp_path, monkeypatch):
    file = write(mlp(), MLP_MASKS, POINTS, tmp_path / "small.safetensors")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
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


def test_files_that_are_not_shrunk_models_are_errors(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="is not a shrunk model"):
        load_shrunk(mlp(), tmp_path / "dense.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_shrunk(mlp(), tmp_path / "none.safetensors")
