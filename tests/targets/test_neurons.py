import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import timm
import torch
import transformers
from timm.layers import BatchNormAct2d, GluMlp, Mlp, SwiGLU
from torch import nn

from emp_callbacks.targets.neurons import left_out_neurons, neurons
from tests.targets.masked_units import prune


def names(model: nn.Module, **patterns) -> list[str]:
    return [target.name for target in neurons(model, **patterns)]


def lively(model: nn.Module) -> nn.Module:
    """Give weights and statistics of a size that matters, so that a unit that is not removed shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def shrink(module: nn.Module, kept: torch.Tensor, side: str) -> None:
    """Delete rows (side "out") or columns (side "in") of a layer, or the channels of a norm."""
    is_conv1d = type(module).__name__ == "Conv1D"
    if side == "in":
        module.weight = nn.Parameter(module.weight.index_select(0 if is_conv1d else 1, kept))
        return
    module.weight = nn.Parameter(module.weight.index_select(1 if is_conv1d else 0, kept))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[kept])
    if is_conv1d:
        module.nf = len(kept)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.running_mean, module.running_var = module.running_mean[kept], module.running_var[kept]


def logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(batch)
    out = getattr(out, "logits", out)
    return getattr(out, "last_hidden_state", out)


def assert_pruned_is_deleted(model, batch, target_name, pruned, writers, readers, **patterns) -> None:
    """Masking the units must give what the model gives whose rows and columns are deleted."""
    lively(model)
    (target,) = (target for target in neurons(model, **patterns) if target.name == target_name)
    small = copy.deepcopy(model)
    for writer, copies in writers:
        kept = torch.tensor([i for i in range(target.units * copies) if i % target.units not in pruned])
        shrink(small.get_submodule(writer), kept, "out")
    kept = torch.tensor([i for i in range(target.units) if i not in pruned])
    for reader in readers:
        shrink(small.get_submodule(reader), kept, "in")
    expected = logits(small, batch)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-3), "the units matter"
    prune(target, pruned)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)


def vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(bias: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=bias,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config)


class Perceptron(nn.Module):
    """Layers as attributes, activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 7)
        self.fc3 = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Plain(nn.Module):
    """Convolutions before all norms, as many write them."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn1 = norm(6)
        self.bn2 = norm(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


class WithNormAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = BatchNormAct2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.conv(x)))


def dense(*sizes: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3))


def block(mlp: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(mlp=mlp, head=nn.Linear(6, 3)))


VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(2))
SEQUENCES = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("model", "batch", "name", "writers", "readers"),
    [
        (vit(), IMAGES, "blocks.1.mlp.fc1", ["blocks.1.mlp.fc1"], ["blocks.1.mlp.fc2"]),
        (gpt2(), TOKENS, "transformer.h.0.mlp.c_fc", ["transformer.h.0.mlp.c_fc"], ["transformer.h.0.mlp.c_proj"]),
        (
            bert(),
            TOKENS,
            "bert.encoder.layer.1.intermediate.dense",
            ["bert.encoder.layer.1.intermediate.dense"],
            ["bert.encoder.layer.1.output.dense"],
        ),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2),
            SEQUENCES,
            "layers.0.linear1",
            ["layers.0.linear1"],
            ["layers.0.linear2"],
        ),
        (dense(6, 8, 5), VECTORS, "2", ["2"], ["4"]),
        (dense(6, 8, 5, norm=True), VECTORS, "0", ["0", "1"], ["3"]),
        (Perceptron(), VECTORS, "fc2", ["fc2"], ["fc3"]),
        (Plain(), IMAGES, "conv1", ["conv1", "bn1"], ["conv2"]),
        (Plain(), IMAGES, "conv2", ["conv2", "bn2"], ["fc"]),
        (WithNormAct(), IMAGES, "conv", ["conv", "bn"], ["head"]),
        (
            timm.create_model("resnet18", num_classes=5),
            IMAGES,
            "layer4.1.conv1",
            ["layer4.1.conv1", "layer4.1.bn1"],
            ["layer4.1.conv2"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_pruned_units_are_as_good_as_deleted(model, batch, name, writers, readers):
    pruned = range(0, 512, 2)
    assert_pruned_is_deleted(model, batch, name, pruned, [(writer, 1) for writer in writers], readers)


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_value_are_pruned_together(bias):
    mlp = "model.layers.1.mlp"
    writers = [(f"{mlp}.gate_proj", 1), (f"{mlp}.up_proj", 1)]
    assert_pruned_is_deleted(llama(bias), TOKENS, mlp, {0, 3, 39}, writers, [f"{mlp}.down_proj"])
    target = neurons(llama(bias))[0]
    assert [m.weight.name.removeprefix("model.layers.0.mlp.") for m in target.members if m.scored] == [
        "gate_proj.weight",
        "up_proj.weight",
    ]
    assert len(target.members) == (4 if bias else 2)


@pytest.mark.parametrize("gate_last", [True, False])
def test_both_halves_of_a_gated_layer_are_pruned_together(gate_last):
    model = block(GluMlp(6, 10, act_layer=nn.SiLU, gate_last=gate_last))
    assert_pruned_is_deleted(model, VECTORS, "mlp.fc1", {0, 3}, [("mlp.fc1", 2)], ["mlp.fc2"])
    (target,) = neurons(model)
    assert target.units == 5
    assert target.observed == (model.mlp.fc2, "input")
    assert target.members[0].unit_of.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_swiglu_of_timm():
    model = block(SwiGLU(6, 8))
    assert_pruned_is_deleted(model, VECTORS, "mlp", {0, 3}, [("mlp.fc1_g", 1), ("mlp.fc1_x", 1)], ["mlp.fc2"])
    assert neurons(model)[0].observed == (model.mlp.fc2, "input")


def test_a_named_pair_is_chosen_by_either_of_its_weights():
    assert names(llama(), include=["*.0.mlp.up_proj.weight"]) == ["model.layers.0.mlp"]
    assert names(llama(), include=["model.layers.1.mlp"]) == ["model.layers.1.mlp"]


@pytest.mark.compiler
def test_compiled_models_keep_their_names_and_lose_their_units():
    model = lively(dense(6, 8, 5))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    compiled(VECTORS)
    assert names(compiled) == names(plain) == ["0", "2"]
    for one in (compiled, plain):
        prune(neurons(one)[0], {1, 6})
    assert torch.equal(compiled(VECTORS), plain(VECTORS))
    assert not plain[0](VECTORS)[:, [1, 6]].any()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (vit(), ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        (gpt2(), ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]),
        (llama(), ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (
            bert(),
            [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)] + ["bert.pooler.dense"],
        ),
        (nn.TransformerDecoderLayer(12, 3, 20), ["linear1"]),
        (Perceptron(), ["fc1", "fc2"]),
        (dense(6, 8, 5), ["0", "2"]),
        (nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 2)), ["0.0"]),
        (nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 5), nn.ReLU()), "head": nn.Linear(5, 2)}), ["body.0"]),
        (nn.ModuleList([Mlp(6, 8), Mlp(6, 8)]), ["0.fc1", "1.fc1"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_hidden_layers_by_default(model, expected):
    assert names(model) == expected


def test_two_heads_are_no_hidden_layers():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    assert names(timm.create_model("deit_tiny_distilled_patch16_224", **sizes)) == ["blocks.0.mlp.fc1"]


def test_channels_of_resnet18():
    targets = neurons(timm.create_model("resnet18"))
    assert [target.units for target in targets] == (
        [64] * 5 + [128, 128, 128, 128, 128] + [256, 256, 256, 256, 256] + [512, 512, 512, 512, 512]
    )
    roles = ["weight", "scale", "shift"]
    assert all([member.role for member in target.members] == roles for target in targets)
    assert all(isinstance(target.observed[0], nn.BatchNorm2d) for target in targets)
    assert targets[7].name == "layer2.0.downsample.0"


def test_members():
    model = Plain()
    target = neurons(model)[0]
    assert [(m.weight.name, *m.dims, m.role, m.masked, m.scored) for m in target.members] == [
        ("conv1.weight", 0, "weight", True, True),
        ("conv1.bias", 0, "bias", True, False),
        ("bn1.weight", 0, "scale", True, False),
        ("bn1.bias", 0, "shift", True, False),
    ]
    assert target.observed == (model.bn1, "output")
    assert all(member.unit_of.tolist() == [0, 1, 2, 3, 4, 5] for member in target.members)
    conv1d = neurons(gpt2())[0]
    assert (conv1d.members[0].dims[0], conv1d.members[0].weight.output_dim) == (1, 1)
    assert conv1d.observed[1] == "output"


class Stem(nn.Module):
    """Convolutions in a Sequential, whose batch norm is an attribute of the model."""

    def __init__(self, *between: nn.Module, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.between = nn.ModuleList(between) if between else None
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(6, 5, 3)


def members_of(model: nn.Module, name: str) -> list[str]:
    (target,) = (target for target in neurons(model, include=["*conv*"]) if target.name == name)
    return [member.weight.name for member in target.members]


def test_the_norm_behind_a_sequential_belongs_to_its_last_layer():
    own = ["conv1.3.weight", "conv1.3.bias"]
    assert members_of(Stem(), "conv1.3") == [*own, "bn1.weight", "bn1.bias"]
    assert members_of(Stem(), "conv1.0")[2:] == ["conv1.1.weight", "conv1.1.bias"]
    assert members_of(Stem(nn.Dropout()), "conv1.3") == own  # another module lies between
    assert members_of(Stem(channels=5), "conv1.3") == own  # the norm of something else
    model = timm.create_model("resnet10t")
    (stem,) = (target for target in neurons(model) if target.name == "conv1.6")
    assert [member.weight.name for member in stem.members] == ["conv1.6.weight", "bn1.weight", "bn1.bias"]
    assert stem.observed == (model.bn1, "output")


def test_depthwise_and_excitation_and_last_convolutions_are_left_out():
    chosen = names(timm.create_model("efficientnet_b0"))
    assert "blocks.1.0.conv_pw" in chosen
    assert not any("conv_dw" in name or ".se." in name for name in chosen)
    assert names(timm.create_model("efficientnet_b0"), include=["blocks.1.0.conv_dw"]) == ["blocks.1.0.conv_dw"]
    assert names(WithNormAct()) == ["conv"]


@pytest.mark.parametrize(
    "norm",
    [
        lambda channels: nn.BatchNorm2d(channels, affine=False),
        lambda channels: timm.layers.FrozenBatchNormAct2d(channels),
    ],
    ids=["no affine", "frozen"],
)
def test_what_a_norm_wakes_again_is_left_out_and_refused_when_named(norm):
    model = Plain(norm)
    model.conv3 = nn.Conv2d(6, 6, 1)
    model.head = nn.Linear(6, 2)
    assert names(model) == ["conv3"]
    with pytest.raises(ValueError, match="'conv1' is followed by a norm without trainable scale"):
        neurons(model, include=["conv1"])


def assert_silent(model: nn.Module, batch: torch.Tensor, **patterns) -> None:
    """Every other unit is pruned; what its own modules make of it must be exactly zero."""
    lively(model)
    targets, seen = neurons(model, **patterns), {}
    for target in targets:
        prune(target, range(0, target.units, 2))
        for member in target.members:
            module = model.get_submodule(member.weight.name.rpartition(".")[0])
            seen.setdefault(module, (target.name, member.unit_of, []))
    for module, (_, _, outputs) in seen.items():
        module.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
    logits(model, batch)
    for module, (name, unit_of, outputs) in seen.items():
        for output in outputs:
            dim = -1 if isinstance(module, nn.Linear) or output.dim() == 3 else 1
            assert not output.movedim(dim, 0)[unit_of % 2 == 0].any(), name


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 6),
        nn.GroupNorm(6, 6),
        nn.GroupNorm(1, 6),
        nn.InstanceNorm2d(6, affine=True),
        nn.InstanceNorm2d(6),
        timm.layers.LayerNorm2d(6),
        timm.layers.GroupNorm1(6),
        nn.LayerNorm([6, 32, 32]),
    ],
    ids=repr,
)
def test_channels_are_silent_behind_any_norm_of_their_own(norm):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.SiLU(), nn.Conv2d(6, 2, 1))
    assert names(model) == ["0"], "logits of pixels are no channels"
    assert_silent(model, IMAGES)
    after = model[2](model[1](model[0](IMAGES)))
    assert not after[:, ::2].any()
    assert neurons(model)[0].observed == (model[0], "output")


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 6, affine=False), nn.InstanceNorm2d(6, track_running_stats=True), nn.LayerNorm(30)],
    ids=repr,
)
def test_a_norm_of_other_things_leaves_its_channels_out(norm):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert names(model) == ["3"]
    assert "without trainable scale" in left_out_neurons(model)["0.weight"]
    with pytest.raises(ValueError, match="'0' is followed by a norm without trainable scale and shift of its own"):
        neurons(model, include=["0"])


class Shared(nn.Module):
    """Two convolutions before one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.norm(self.near(x)), self.norm(self.far(x))], 1))


def test_a_norm_behind_two_layers_is_neither_layers():
    assert names(Shared()) == ["head.0"]


class Detector(nn.Module):
    """Transposed, grouped and depthwise convolutions, and two heads that are called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.depthwise = nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.ConvTranspose2d(16, 6, 1)
        self.split = nn.ConvTranspose2d(6, 6, 1, groups=2)
        self.heads = nn.ModuleDict({"boxes": nn.Conv2d(6, 4, 1), "classes": nn.Conv2d(6, 2, 1)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.depthwise(self.grouped(self.up(x)).relu())
        x = self.split(self.down(x).relu())
        return {name: head(x) for name, head in self.heads.items()}


def test_transposed_grouped_and_depthwise_convolutions():
    model = Detector()
    assert names(model) == ["up.0", "grouped", "down"]
    up, grouped, _ = neurons(model)
    assert (up.members[0].dims[0], up.members[0].weight.output_dim, up.units) == (1, 1, 6)
    assert [(m.weight.name, m.role) for m in grouped.members] == [
        ("grouped.weight", "weight"),
        ("grouped.bias", "bias"),
        ("depthwise.0.bias", "shift"),
        ("depthwise.1.weight", "behind"),
        ("depthwise.1.bias", "behind"),
    ]
    assert_silent(model, IMAGES)
    assert {name: why[:9] for name, why in left_out_neurons(model).items() if name.endswith("weight")} == {
        "depthwise.0.weight": "depthwise",
        "split.weight": "a transpo",
        "heads.boxes.weight": "an output",
        "heads.classes.weight": "an output",
    }


@pytest.mark.parametrize("kind", ["mobilenetv3_small_050", "regnety_002", "nf_resnet26", "pvt_v2_b0", "starnet_s050"])
def test_channels_of_real_networks_are_silent(kind):
    torch.manual_seed(0)
    assert_silent(timm.create_model(kind), torch.randn(1, 3, 64, 64))


class Gated(nn.Module):
    """An MLP whose hidden neurons are products, with names that say nothing."""

    def __init__(self, multiply) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 16), nn.Identity())
        self.b = nn.Linear(6, 16)
        self.c, self.head = nn.Linear(8 if multiply is not two else 16, 6), nn.Linear(6, 3)
        self.multiply = multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.c(self.multiply(self, x)))


def two(mlp, x):
    return mlp.a(x).sigmoid() * mlp.b(x)


def chunks(mlp, x):
    gate, value = mlp.b(x).chunk(2, dim=-1)
    return value * nn.functional.gelu(gate)


def slices(mlp, x):
    both = mlp.a(x)
    return both[..., 8:].sigmoid() * both[..., :8]


def gated_linear_unit(mlp, x):
    return nn.functional.glu(mlp.a(x))


@pytest.mark.parametrize(
    ("multiply", "owner", "units"), [(two, "", 16), (chunks, "b", 8), (slices, "a.0", 8), (gated_linear_unit, "a.0", 8)]
)
def test_what_is_multiplied_is_a_gated_mlp_whatever_it_is_called(multiply, owner, units):
    model = lively(Gated(multiply))
    target = next(target for target in neurons(model) if target.name == owner)
    assert target.units == units
    assert target.observed == (model.c, "input")
    before = multiply(model, VECTORS)
    prune(target, {0, 3})
    after = multiply(model, VECTORS)
    assert not after[:, [0, 3]].any()
    left = [unit for unit in range(units) if unit not in (0, 3)]
    assert torch.equal(after[:, left], before[:, left])


def test_a_gate_of_something_else_is_left_out():
    def gate(mlp, x):
        return mlp.b(x).sigmoid()[..., :8] * x.mean(-1, keepdim=True)

    reasons = left_out_neurons(Gated(gate))
    assert reasons["b.weight"] == "multiplies something else than a layer like it"


class ActorCritic(nn.Module):
    """Two outputs, one of them behind an activation and as wide as what is read before; one for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.policy, self.value, self.aux = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.body(x)
        outputs = self.policy(x).tanh(), self.value(x)
        return (*outputs, self.aux(x)) if self.training else outputs


def pretraining() -> nn.Module:
    return transformers.BertForPreTraining(bert().config)


@pytest.mark.parametrize(
    ("model", "expected", "heads"),
    [
        (ActorCritic(), ["body.0"], ["policy", "value", "aux"]),
        (
            pretraining(),
            [
                *[f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)],
                "bert.pooler.dense",
                "cls.predictions.transform.dense",
            ],
            ["cls.seq_relationship"],
        ),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()), ["0"], ["2"]),
    ],
    ids=["actor-critic", "masked words and next sentence", "features"],
)
def test_an_output_is_no_hidden_layer(model, expected, heads):
    assert names(model) == expected
    assert {f"{head}.weight" for head in heads} <= left_out_neurons(model).keys()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_of_recurrent_layers(kind):
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(12, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    model = lively(Tagger())
    layers = ["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]
    assert names(model) == layers
    assert names(model, include=["rnn.weight_hh_l1"]) == ["rnn.l1"]
    assert names(model, exclude=["rnn.l1*"]) == ["rnn.l0", "rnn.l0_reverse"]
    before = model.rnn(SEQUENCES)[0]
    for target in neurons(model, include=["rnn.l1*"]):
        prune(target, {1, 3})
    after, states = model.rnn(SEQUENCES)
    assert not after[..., [1, 3, 6, 8]].any()
    assert (after != before)[..., [0, 2, 4, 5, 7, 9]].any()
    states = states[0] if isinstance(states, tuple) else states
    assert not states[2:, :, [1, 3]].any()
    assert states[:2].all()


def test_recurrent_layers_that_are_no_units():
    class Reader(nn.Module):
        def __init__(self, **settings) -> None:
            super().__init__()
            self.rnn = nn.LSTM(12, 5, **settings)
            self.mlp = dense(6, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.rnn(x)[0], self.mlp(x[..., :6])

    assert names(Reader()) == ["mlp.0"], "its states are outputs"
    assert names(Reader(num_layers=2)) == ["rnn.l0", "mlp.0"]
    assert names(Reader(proj_size=2)) == ["mlp.0"]
    assert "proj_size" in left_out_neurons(Reader(proj_size=2))["rnn.weight_hr_l0"]


class NormedLinear(nn.Linear):
    """A dense layer with a norm of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.ln, self.act = nn.LayerNorm(outputs), nn.Mish()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.ln(super().forward(x)))


def test_class_names_say_nothing():
    model = nn.Sequential(NormedLinear(6, 8), NormedLinear(8, 5), nn.Linear(5, 3))
    assert_silent(model, VECTORS)
    assert names(model) == ["0", "1"]
    after = model[0](VECTORS)
    assert not after[:, ::2].any()
    assert after[:, 1::2].all()


def test_layers_with_computed_weights_are_left_out():
    model = dense(6, 8, 7, 5)
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[2])
    assert names(model) == ["4"]
    reasons = left_out_neurons(model)
    assert {name for name, why in reasons.items() if "computed from other parameters" in why} == {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "2.bias",
        "2.parametrizations.weight.original",
    }


class Careless(nn.Module):
    """Leaves something behind in every forward, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("steps", torch.zeros(()))
        self.mlp = dense(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.mlp(x) + torch.rand(1)
        return self.last


def test_looking_leaves_no_trace():
    model = Careless().train()
    random = torch.get_rng_state()
    assert names(model) == ["mlp.0"]
    assert (model.calls, model.last, model.training) == (0, None, True)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("model", "pattern", "units"),
    [
        (vit(), "blocks.0.attn.qkv", 144),
        (vit(), "blocks.0.mlp.fc2.weight", 48),
        (vit(), "patch_embed.proj", 48),
        (vit(), "head", 5),
        (gpt2(), "transformer.h.0.attn.c_proj", 24),
    ],
    ids=lambda value: "" if isinstance(value, nn.Module) else None,
)
def test_naming_overrides_the_default_rule(model, pattern, units):
    (target,) = neurons(model, include=[pattern])
    assert target.units == units
    assert target.name == pattern.removesuffix(".weight")


def test_exclude():
    assert names(Perceptron(), exclude=["fc1"]) == ["fc2"]
    with pytest.raises(ValueError, match="no hidden neurons were found"):
        neurons(Perceptron(), exclude=["*"])


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(side):
    with pytest.raises(ValueError, match=r"'fc4' matches no dense layer or convolution.*near names: .*fc1"):
        neurons(Perceptron(), **{side: ["fc4"]})


def test_nothing_hidden_is_an_error():
    with pytest.raises(ValueError, match=r"no hidden neurons.*the model itself \(0\).*include="):
        neurons(nn.Sequential(nn.Linear(2, 2)))


def test_shared_tied_and_frozen_layers():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(6, 5), shared, nn.ReLU(), shared, nn.Linear(5, 2))
    assert names(model) == ["0", "1"]
    assert names(model, include=["3"]) == ["1"], "it answers to both names"
    tied = dense(5, 5, 5)
    tied[2].weight = tied[0].weight
    assert names(tied) == ["0"]
    frozen = dense(6, 8, 5)
    frozen[0].requires_grad_(False)
    assert names(frozen) == ["2"]
    embedded = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    embedded[1].weight = embedded[0].weight
    with pytest.raises(ValueError, match="no hidden neurons"):
        neurons(embedded)


def test_sizes_are_those_of_the_unsharded_model():
    for model in (Plain(), llama(), gpt2()):
        expected = [(t.name, t.units, [m.unit_of.tolist() for m in t.members]) for t in neurons(model)]
        full = {parameter: parameter.shape for parameter in model.parameters()}
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
        sharded = neurons(model, full_shape=full.__getitem__)
        assert [(t.name, t.units, [m.unit_of.tolist() for m in t.members]) for t in sharded] == expected
