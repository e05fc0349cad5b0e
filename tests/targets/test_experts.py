import pytest
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPPruner
from emp_callbacks.targets import prunable_weights
from emp_callbacks.targets.expert_units import expert_neurons, experts
from emp_callbacks.targets.experts import stacked_experts
from emp_callbacks.targets.shapes import own_shape
from emp_callbacks.targets.unit_search import UnitSearch
from tests.targets.mixtures import CONFIGS, Classifier, ids, language_model, needs_stacked_experts

TURNED = {"GptOss"}  # (experts, input, output)

pytestmark = needs_stacked_experts


def watched(model, **settings):
    """Return a pruner that watched one forward pass over `ids()`, and what each experts module was called with."""
    calls = {}
    pruner = EMPPruner(model, observe_only=True, **settings)
    modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: calls.update({n: args})) for n, m in modules.items()]
    model(input_ids=ids())
    for hook in hooks:
        hook.remove()
    return pruner, {name: (modules[name], args) for name, args in calls.items()}


def each_expert(module, args):
    """Yield of each expert: its tokens, what they are multiplied by, its hidden neurons and its outputs."""
    tokens, chosen, weights = args
    for e in range(module.num_experts):
        at, place = (chosen == e).nonzero(as_tuple=True)
        x = tokens[at]
        if module.is_transposed:
            h = module._apply_gate(x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e])
            yield x, weights[at, place], h, h @ module.down_proj[e] + module.down_proj_bias[e]
        else:
            gate, up = functional.linear(x, module.gate_up_proj[e]).chunk(2, dim=-1)
            h = module.act_fn(gate) * up
            yield x, weights[at, place], h, functional.linear(h, module.down_proj[e])


@pytest.mark.parametrize("family", CONFIGS)
def test_experts_are_pruned_by_default_and_routers_are_not(family):
    model = language_model(family)
    pruner = EMPPruner(model)
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "bias" not in n}
    left = {name for name in matrices if name.endswith(("gate.weight", "router.weight"))}
    assert left
    assert pruner.masks.keys() == matrices - left
    stacks = [target for target in prunable_weights(model) if target.stacked]
    assert {target.output_dim for target in stacks} == {2 if family in TURNED else 1}


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_row_is_one_output_of_one_expert(family):
    model = language_model(family)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stack = model.get_parameter(name).detach().clone()
    pruner = EMPPruner(model, scope="row", include=[name])
    pruner.refresh()
    rows, kept = (
        (of.mT if family in TURNED else of).flatten(0, 1) for of in (stack.double().abs(), pruner.masks[name])
    )
    assert torch.equal(kept.sum(1), (rows.sum(1).square() / rows.square().sum(1)).long())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_wanda_reads_the_inputs_of_each_expert(family):
    model = language_model(family)
    with torch.no_grad():
        pruner, calls = watched(model, criterion="wanda", include=["*layers.0*up_proj", "*layers.0*down_proj"])
        pruner.refresh()
        (module, args) = calls["model.layers.0.mlp.experts"]
        found = [*each_expert(module, args)]
        inputs_of = [f[0] for f in found], [f[2] for f in found]
        for layer, inputs in zip(pruner.trajectory[-1].layers, inputs_of, strict=True):
            norms = torch.stack([x.norm(dim=0) for x in inputs])
            stack = model.get_parameter(layer.name)
            scores = (stack * (norms[:, :, None] if family in TURNED else norms[:, None])).abs().double()
            assert layer.n_eff == pytest.approx(float(scores.sum().square() / scores.square().sum()), rel=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_reap_is_the_mean_of_router_weight_times_output_norm_over_an_experts_tokens(family):
    model = language_model(family)
    with torch.no_grad():
        pruner, calls = watched(model, target="experts")
        events = {event.layers[0].name: event for event in pruner.refresh()}
        assert events.keys() == calls.keys()
        for name, (module, args) in calls.items():
            means = [
                (g * f.norm(dim=1)).mean() if len(f) else torch.zeros(()) for _, g, _, f in each_expert(module, args)
            ]
            scores = torch.stack(means).double()
            assert events[name].n_eff == pytest.approx(float(scores.sum().square() / scores.square().sum()), rel=1e-5)


def test_what_padding_adds_is_no_evidence():
    model, mask = language_model("Mixtral"), torch.ones(4, 16)
    mask[:, 12:] = 0
    pruner = EMPPruner(model, target="experts", observe_only=True)
    with torch.no_grad():
        pruner.count_positions(mask)
        model(input_ids=ids(), attention_mask=mask)
        padded = pruner.refresh()
        pruner.count_positions(None)
        model(input_ids=ids()[:, :12])
        short = pruner.refresh()
    assert [event.n_eff for event in padded] == pytest.approx([event.n_eff for event in short], rel=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_pruned_experts_add_nothing_and_stay_zero_in_training(family):
    model = language_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = EMPPruner(model, optimizer, target="experts", density=0.5, mode="freeze", every_n_steps=2)
    for _ in range(4):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.audit().clean
    for name, mask in pruner.masks.items():
        assert mask.sum() == len(mask) // 2
        module = model.get_submodule(name)
        for parameter in module.parameters():
            assert not parameter[~mask].any()
            assert parameter[mask].any()
        stacked = stacked_experts(module, own_shape)
        tokens = torch.randn(3, stacked.width)
        out = module(tokens, (~mask).nonzero()[:1].expand(3, 1), torch.ones(3, 1))
        assert not out.any()


def test_as_many_experts_stay_as_a_token_is_sent_to():
    model = language_model("Mixtral")
    for scope in ("tensor", "global"):
        pruner = EMPPruner(model, target="experts", criterion="weight_norm", beta=0.01, scope=scope, observe_only=True)
        assert {layer.keep for event in pruner.refresh() for layer in event.layers} == {2}


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_hidden_neurons_of_experts(family):
    model = language_model(family)
    search = UnitSearch(model, own_shape)
    (module, target), *_ = expert_neurons(search)
    assert target.units == 4 * 48
    with torch.no_grad():
        for member in target.members:  # of expert 1 the neuron 5
            parameter = member.weight.parameter
            sizes = [size if dim in member.dims else 1 for dim, size in enumerate(parameter.shape)]
            parameter.masked_fill_((member.unit_of == 48 + 5).view(sizes), 0)
    args = torch.randn(3, 32), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)
    (_, _, hidden, _) = [*each_expert(module, args)][1]
    assert (hidden == 0).all(0).nonzero().flatten().tolist() == [5]


class Listed(nn.Module):
    """Experts as modules, as transformers 4 has them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_experts_that_are_modules():
    torch.manual_seed(0)
    model = Listed()
    assert "gate.weight" not in EMPPruner(model).masks
    (target,) = experts(model)
    assert (target.name, target.units, len(target.members)) == ("experts", 3, 13)
    with pytest.raises(ValueError, match=r"'reap' reads what the experts of 'experts' are called with"):
        EMPPruner(model, target="experts")
    model = Listed()
    with torch.no_grad():
        model.experts[1][0].weight *= 0.01
        model.experts[1][2].weight *= 0.01
    pruner = EMPPruner(model, target="experts", criterion="weight_norm", mode="project")
    pruner.refresh()
    assert pruner.masks["experts"].tolist() == [True, False, True]
    assert not any(parameter.any() for parameter in model.experts[1].parameters())


class Layers(nn.Module):
    """As many layers as classes: no experts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)


def test_layers_one_after_another_are_no_experts():
    assert "head.weight" in EMPPruner(Layers()).masks
    with pytest.raises(ValueError, match="no mixture of experts was found"):
        experts(Layers())


def test_a_classifier_of_images_with_experts():
    model = Classifier()
    assert [target.name for target in experts(model)] == ["blocks.0.experts", "blocks.1.experts"]
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 5)
