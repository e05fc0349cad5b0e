import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

from emp_callbacks.targets import left_out, prunable_weights
from emp_callbacks.targets.weights import A_FUNCTION, PARAMETRISED


def names(model: nn.Module, **patterns) -> list[str]:
    return [target.name for target in prunable_weights(model, **patterns)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.shared_body = self.body
        self.norm = nn.LayerNorm((3, 4))
        self.scale_table = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_norms_biases_embeddings_and_tied_heads_are_left_alone():
    assert names(Tied()) == ["body.weight"]


def test_naming_overrides_the_default_rule():
    assert names(Tied(), include=["*bias", "embed*", "scale_table"]) == [
        "scale_table",
        "embed.weight",
        "body.bias",
        "norm.bias",
    ]
    assert names(Tied(), include=["head.weight"]) == ["embed.weight"], "a tied parameter counts once"
    assert names(Tied(), include=["shared_body.weight"]) == ["body.weight"], "a shared module counts once"


def test_exclude():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert names(model, exclude=["0.*"]) == ["1.weight"]


def test_frozen_parameters_only_if_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(model) == ["1.weight"]
    assert names(model, include=["*.weight"]) == ["0.weight", "1.weight"]


def test_a_pattern_that_matches_nothing_lists_near_names():
    with pytest.raises(ValueError, match=r"pattern 'bodi.weight' matches no parameter; near names: body.weight"):
        names(Tied(), include=["bodi.weight"])
    with pytest.raises(ValueError, match=r"pattern 'hed\*' matches no parameter; near names: "):
        names(Tied(), exclude=["hed*"])


@pytest.mark.parametrize("model", [nn.Module(), nn.Sequential(), nn.LayerNorm(4), nn.Embedding(3, 2)])
def test_nothing_to_prune_is_refused(model):
    with pytest.raises(ValueError, match="has no weights to prune"):
        names(model)


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match=r"no weights to prune.*weight \(2, 2\)"):
        names(nn.Linear(2, 2), exclude=["*"])


def test_only_floating_point_parameters():
    model = nn.Linear(2, 2)
    model.register_parameter("codes", nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False))
    assert names(model) == ["weight"]
    with pytest.raises(TypeError, match=r"parameter 'codes' is torch.int8"):
        names(model, include=["*"])


class Own(nn.Module):
    """Multiplies, convolves, adds and scales with parameters of its own, whatever they are called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3, 2))
        self.second = nn.Parameter(torch.ones(2, 3))
        self.stack = nn.Parameter(torch.ones(4, 2, 3))
        self.kernel = nn.Parameter(torch.ones(3, 2, 5))
        self.table_of_weights = nn.Parameter(torch.ones(2, 2))
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.spline = nn.Parameter(torch.ones(3, 2, 1))
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.cache = 0, {}

    def forward(self, x):
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(())
        self.count.add_(1)
        self.cache["last"] = x
        self.last = x = (x + self.table_of_weights) * self.weight
        y = nn.functional.linear(x, self.first) + x @ self.second + nn.functional.linear(x, self.spline.view(3, -1))
        return y, torch.bmm(x, self.stack.to(x.dtype)), nn.functional.conv1d(x, self.kernel)


def test_output_dimension_of_each_layer_kind():
    from transformers.pytorch_utils import Conv1D

    kinds = [nn.Linear(2, 3), nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(2, 3, 1), Conv1D(3, 2), Own()]
    found = prunable_weights(nn.ModuleList(kinds))
    assert [target.parameter.shape[target.output_dim] for target in found] == [3] * len(found)
    assert [target.name for target in found if target.stacked] == ["4.stack"]


def test_what_a_module_multiplies_with_is_a_weight_whatever_it_is_called():
    model = Own()
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert names(model) == ["first", "second", "stack", "kernel", "spline"]
    assert (model.calls, model.cache, float(model.count)) == (0, {}, 0.0), "the forward pass is read, not run"
    assert not hasattr(model, "last")
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class NormedLinear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x):
        return self.norm(super().forward(x))


class Conv1D(nn.Conv1d):
    pass


class Embedding(nn.Conv2d):
    pass


class Quiet(nn.Linear):
    """A layer whose pass cannot be followed."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_class_names_say_nothing():
    model = nn.ModuleList([NormedLinear(2, 3), Conv1D(2, 3, 1), Embedding(2, 3, 1), Quiet(2, 3)])
    assert [(t.name, t.output_dim) for t in prunable_weights(model)] == [(f"{i}.weight", 0) for i in range(4)]


def test_weights_that_a_layer_computes_are_left_out_and_told():
    from timm.layers import ScaledStdConv2d

    parametrizations = nn.utils.parametrizations
    model = nn.ModuleList(
        [
            nn.Linear(2, 2),
            parametrizations.spectral_norm(nn.Linear(2, 2)),
            nn.utils.spectral_norm(nn.Linear(2, 2)),
            parametrizations.orthogonal(nn.Linear(2, 2)),
            ScaledStdConv2d(2, 2, 1),
        ]
    )
    assert names(model) == ["0.weight"]
    reasons = {one.name: one.reason for one in left_out(model) if "vector" not in one.reason}
    assert reasons == {
        "1.parametrizations.weight.original": PARAMETRISED,
        "2.weight_orig": PARAMETRISED,
        "3.parametrizations.weight.original": PARAMETRISED,
        "4.weight": A_FUNCTION,
    }
    assert names(model, include=["1.*original", "4.weight"]) == ["1.parametrizations.weight.original", "4.weight"]


@pytest.mark.compiler
def test_compiled_model_has_the_same_names():
    model = nn.Sequential(nn.Linear(2, 2))
    assert names(torch.compile(model)) == names(model)
    model[0].compile()
    assert names(model) == ["0.weight"]


def test_timm_vision_transformer():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    chosen = names(model)
    assert chosen == [
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    ]


def test_gpt2_head_tied_to_the_embedding_is_left_alone():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    chosen = names(model)
    assert chosen == [
        f"transformer.h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_names_that_fabric_adds_do_not_show():
    from lightning_fabric import Fabric
    from pytorch_lightning import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    fabric = Fabric(accelerator="cpu", devices=1)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for module, names in ((plain, ["0.weight", "1.weight"]), (Module(), ["net.0.weight", "net.1.weight"])):
        wrapped, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        assert [target.name for target in prunable_weights(wrapped)] == names
        assert [target.name for target in prunable_weights(wrapped, include=[names[0]])] == names[:1]
