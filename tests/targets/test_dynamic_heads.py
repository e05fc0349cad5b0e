"""Heads that each token or sample chooses for itself, by the norm of what each adds to the residual stream."""

import copy
import importlib.util
import io
import pickle

import peft
import pytest
import timm
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from emp_callbacks import EMPPruner
from emp_callbacks.core.selection import emp_mask
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.targets import attention_heads
from emp_callbacks.targets.dynamic_heads import DynamicHeadSite
from emp_callbacks.targets.head_norms import added_norms
from emp_callbacks.targets.head_outputs import HeadOutputs
from emp_callbacks.targets.unit_search import units_dim

RULE = KeepRule(beta=1.0, tolerance=0.01).counts
HEADS = {"target": "heads", "dynamic": True}


def vit(**sizes):
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, **sizes}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **sizes)


def gpt2():
    settings = {"vocab_size": 17, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **settings)).eval()


def llama():
    settings = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 17}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **settings)).eval()


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class ByHand(nn.Module):
    """Multihead, or any output projection, computed head by head."""

    def __init__(self, projection, unit_of, units, beta):
        super().__init__()
        self.projection, self.unit_of, self.units, self.beta = projection, unit_of, units, beta

    def forward(self, x):
        weight = self.projection.weight if units_dim(self.projection) else self.projection.weight.T
        added = [(x * (self.unit_of == h)) @ weight for h in range(self.units)]
        scores = torch.stack([one.norm(dim=-1) for one in added], -1)
        kept = torch.stack([emp_mask(row, self.beta) for row in scores.reshape(-1, self.units)]).view(scores.shape)
        return sum(one * kept[..., h, None] for h, one in enumerate(added)) + (
            0 if self.projection.bias is None else self.projection.bias
        )


class MultiheadByHand(nn.Module):
    def __init__(self, attention, projection):
        super().__init__()
        self.attention, self.projection = attention, projection

    def forward(self, x):
        rows = functional.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in rows.chunk(3, -1))
        return self.projection(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


MODELS = {
    "timm": (vit, lambda: torch.randn(2, 1, 8, 8)),
    "GPT-2": (gpt2, lambda: torch.randint(17, (2, 6))),
    "grouped queries": (llama, lambda: torch.randint(17, (2, 6))),
    "nn.MultiheadAttention": (Multihead, lambda: torch.randn(2, 5, 16)),
}


def output_of(model, batch):
    found = model(batch)
    return getattr(found, "logits", found)


def projected(projection, unit_of, module=None, called=True):
    units = int(unit_of.max()) + 1
    return HeadOutputs("a", module or projection, projection, unit_of, units, called)


# ---- norms --------------------------------------------------------------------------------------------------------

PERMUTED = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 1, 2])
PROJECTIONS = {
    "Linear": lambda: nn.Linear(12, 7),
    "Conv1D": lambda: gpt2().transformer.h[0].attn.c_proj,
    "convolution": lambda: nn.Conv2d(12, 5, 1),
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_norms_are_those_of_what_each_head_alone_adds(kind):
    torch.manual_seed(0)
    projection = PROJECTIONS[kind]().double()
    inputs = 16 if kind == "Conv1D" else 12
    for unit_of in (torch.arange(inputs) // 4, torch.cat([PERMUTED, torch.tensor([2, 0, 1, 2])])[:inputs]):
        if len(unit_of.bincount().unique()) > 1:
            continue
        outputs = projected(projection, unit_of)
        values = torch.randn(2, inputs, 4, 3) if kind == "convolution" else torch.randn(2, 5, inputs)
        values = values.double()
        dim = 1 if kind == "convolution" else -1
        mine = unit_of.view(-1, 1, 1) if kind == "convolution" else unit_of
        nothing = projection(values * 0)  # the bias
        naive = [(projection(values * (mine == h)) - nothing).norm(dim=dim) for h in range(outputs.units)]
        torch.testing.assert_close(added_norms(outputs, values), torch.stack(naive, -1), rtol=1e-9, atol=1e-12)


def test_norms_are_wide_whatever_the_model_and_autocast_compute_in():
    torch.manual_seed(0)
    projection, values = nn.Linear(12, 7), torch.randn(5, 12).bfloat16()
    outputs = projected(projection, torch.arange(12) // 4)
    plain = added_norms(outputs, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(added_norms(outputs, values), plain)
    assert plain.dtype == torch.float32
    exact = added_norms(projected(copy.deepcopy(projection).double(), outputs.unit_of), values)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-5, atol=0)


# ---- choices ------------------------------------------------------------------------------------------------------


def three_heads():
    """Return a projection of three heads whose columns have the norms 5, 1 and 2."""
    projection = nn.Linear(3, 2, bias=False)
    projection.weight.data = torch.tensor([[3.0, 0.0, 2.0], [4.0, 1.0, 0.0]])
    return projection


def site_at(projection, per="token", unit_of=None):
    site = DynamicHeadSite(projected(projection, torch.arange(3) if unit_of is None else unit_of), per, RULE)
    site.attach()
    site.observing = site.active = True
    return site


# Scores (5, 1, 2): N_eff = 64 / 30 = 2.1. Scores (1, 1, 1): 3. Scores (0, 1, 0): 1.
TOKENS = torch.tensor([[[1.0, 1.0, 1.0], [0.2, -1.0, 0.5]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])


def test_each_token_keeps_its_own_heads_and_the_statistics_are_sums_over_tokens():
    projection = three_heads()
    site = site_at(projection)
    found = projection(TOKENS)
    expected = torch.tensor([[[5.0, 4.0], [0.6 + 1.0, 0.8 - 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    torch.testing.assert_close(found, expected)
    sums = {key: float(value) for key, value in site.statistics().items()}
    assert sums == pytest.approx(
        {"samples": 4, "n_eff": 64 / 30 + 3 + 1 + 1, "keep": 7, "mass": 7 / 8 + 3, "not_finite": 0}
    )


def test_a_sample_keeps_the_heads_of_its_mean_norms_at_every_position():
    projection = three_heads()
    site = site_at(projection, per="sample")
    # Means (3, 1, 1.5), N_eff = 30.25 / 12.25 = 2.5: heads 0 and 2. (0, 1, 0): 1. (2.5, 3, 0), N_eff = 1.98: head 1.
    samples = torch.cat([TOKENS, torch.tensor([[[1.0, 3.0, 0.0], [0.0, -3.0, 0.0]]])])
    expected = [[[5.0, 4.0], [1.6, 0.8]], [[0.0, 1.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, -3.0]]]
    torch.testing.assert_close(projection(samples), torch.tensor(expected))
    assert {key: float(site.statistics()[key]) for key in ("samples", "keep")} == {"samples": 3, "keep": 4}
    with pytest.raises(ValueError, match=r"'a' hands on \(4, 3\), in which samples are not apart: use per='token'"):
        projection(TOKENS.flatten(0, 1))


def test_of_a_convolution_each_pixel_chooses():
    projection, conv = three_heads(), nn.Conv2d(3, 2, 1, bias=False)
    conv.weight.data = projection.weight.data.view(2, 3, 1, 1)
    site_at(projection)
    site_at(conv)
    images = TOKENS.movedim(-1, 1).unsqueeze(-1).contiguous()
    torch.testing.assert_close(conv(images).squeeze(-1).movedim(1, -1), projection(TOKENS))


def test_padding_is_not_counted():
    projection = three_heads()
    site = site_at(projection)
    site.positions = torch.tensor([[True, False], [True, True]])
    projection(TOKENS)
    assert {key: float(site.statistics()[key]) for key in ("samples", "keep")} == {"samples": 3, "keep": 4}


def test_gradients_flow_through_kept_heads_and_not_through_the_choice():
    projection = three_heads()
    site_at(projection)
    x = TOKENS[0].clone().requires_grad_()
    out = projection(x)
    out.sum().backward()
    weight = projection.weight.detach()
    kept = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(x.grad, kept * weight.sum(0))
    torch.testing.assert_close(projection.weight.grad, (kept * TOKENS[0]).sum(0).expand(2, 3))


def test_a_token_with_nan_is_kept_whole_and_not_counted():
    projection = three_heads()
    site = site_at(projection)
    x = TOKENS[0].clone()
    x[0, 1] = torch.nan
    assert projection(x)[0].isnan().any()
    torch.testing.assert_close(projection(x)[1], torch.tensor([1.6, -0.2]))
    assert {key: float(site.statistics()[key]) for key in ("samples", "not_finite")} == {"samples": 2, "not_finite": 2}


# ---- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_pruned_model_is_that_whose_heads_are_added_up_one_by_one(kind):
    torch.manual_seed(0)
    model, batch = MODELS[kind][0](), MODELS[kind][1]()
    by_hand = copy.deepcopy(model)
    for target in attention_heads(by_hand):
        heads = target.heads
        naive = ByHand(heads.projection, heads.unit_of, heads.units, 0.7)
        if heads.is_called:
            name = next(name for name, part in heads.module.named_children() if part is heads.projection)
            setattr(heads.module, name, naive)
        else:
            by_hand = MultiheadByHand(heads.module, naive)
    with torch.no_grad():
        dense = output_of(model, batch)
    pruner = EMPPruner(model, beta=0.7, tolerance=0.0, **HEADS)
    assert torch.equal(output_of(model, batch), dense), "before the first refresh nothing is dropped"
    (event,) = pruner.refresh()
    found = output_of(model, batch)
    torch.testing.assert_close(found, output_of(by_hand, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-4)
    assert event.scope == "sample"
    assert pruner.density == event.density < 1.0
    assert {layer.name: layer.n for layer in event.layers} == {
        target.name: target.units for target in attention_heads(model)
    }


@pytest.mark.parametrize("make", [gpt2, llama])
def test_only_a_choice_per_token_is_blind_to_later_tokens(make):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # as they begin, its attention hardly tells tokens apart
        parameter.data.mul_(10.0 if parameter.dim() > 1 else 1.0)
    one = torch.randint(0, 17, (16, 8))
    other = one.clone()
    other[:, 5:] = torch.randint(0, 17, (16, 3))
    pruner = EMPPruner(model, beta=0.7, **HEADS)
    model(one)
    pruner.refresh()
    moved = {}
    for per in ("token", "sample"):
        for site in pruner._refresher.dynamic:
            site.per = per  # which no setting can do
        with torch.no_grad():
            moved[per] = float((model(one).logits - model(other).logits)[:, :5].abs().max())
    assert moved["token"] < 1e-6
    assert moved["sample"] > 1e-4


def test_where_a_choice_by_sample_would_be_wrong_it_is_refused_before_anything_changes():
    cross = GPT2Config(vocab_size=17, n_layer=1, n_head=2, n_embd=8, n_positions=8, add_cross_attention=True)
    decoder = GPT2LMHeadModel(cross)
    for model, include, message in (
        (gpt2(), None, r"'transformer.h.0.attn' \(GPT2Attention\) is causal, .*: use per='token'"),
        (llama(), None, r"'model.layers.0.self_attn' \(LlamaAttention\) is causal, .*: use per='token'"),
        (decoder, ["*crossattention"], r"h.0.crossattention' \(GPT2Attention\) is causal, or beside one that is"),
        (Multihead(), None, r"'attention' \(MultiheadAttention\) .* finds no samples: use per='token'"),
    ):
        with pytest.raises(ValueError, match=message):
            EMPPruner(model, per="sample", include=include, **HEADS)
        assert not any(part._forward_pre_hooks for part in model.modules())
    EMPPruner(vit(), per="sample", **HEADS)


def test_adapters_of_the_output_projection_are_refused_by_name():
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"'transformer.h.0.attn' has adapters of PEFT, .*merge them"):
        EMPPruner(model, **HEADS)


def test_a_projection_that_holds_a_part_of_its_weight_is_refused():
    projection = three_heads()
    site_at(projection)
    projection.weight.data = torch.empty(0)  # ZeRO-3 outside of the module's own forward
    with pytest.raises(RuntimeError, match=r"output projection of 'a' holds a part of its weight .*exclude=\['a'\]"):
        projection._forward_pre_hooks[next(iter(projection._forward_pre_hooks))](projection, (TOKENS,))


def test_nan_in_a_weight_ends_in_one_line_and_no_mask():
    torch.manual_seed(0)
    model = vit()
    pruner = EMPPruner(model, **HEADS)
    model.blocks[1].attn.proj.weight.data[0, 5] = torch.nan
    model(torch.randn(2, 1, 8, 8))
    with pytest.raises(FloatingPointError, match=r"everything that passed 'blocks.1.attn' since the last refresh"):
        pruner.refresh()
    assert not any(site.active for site in pruner._refresher.dynamic)


def test_observing_only_changes_nothing():
    torch.manual_seed(0)
    model, images = vit(), torch.randn(2, 1, 8, 8)
    dense = model(images)
    pruner = EMPPruner(model, observe_only=True, **HEADS)
    model(images)
    (event,) = pruner.refresh()
    assert event.keep < event.n
    assert torch.equal(model(images), dense)


# ---- gated attention ----------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Attention with a sigmoid gate for each head, made of the hidden state (Qiu et al. 2025)."""

    num_heads = 3

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(12, 12))
        self.gate_proj = nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (3, 4)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj))
        self.ungated = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        self.gate = self.gate_proj(x).sigmoid()
        return self.o_proj((self.ungated * self.gate[..., None]).flatten(-2))


def test_of_gated_attention_the_score_is_gate_times_norm():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Gated()}).double()
    (target,) = attention_heads(model)
    seen = []
    target.heads.register(lambda values: seen.append(added_norms(target.heads, values)))
    gated = model["a"]
    with torch.no_grad():
        gated(torch.randn(2, 5, 12).double())
    added = torch.einsum("bthd,ehd->bthe", gated.ungated, gated.o_proj.weight.view(12, 3, 4))
    torch.testing.assert_close(seen[0], gated.gate * added.norm(dim=-1), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.qwen3_next") is None, reason="transformers has no Qwen3-Next yet"
)
def test_of_qwen3_next_a_closed_gate_drops_the_head():
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": [0], "num_experts": 0}
    tokens = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = Qwen3NextForCausalLM(Qwen3NextConfig(head_dim=8, attention_bias=True, **sizes, **layers, **tokens)).eval()
    (target,) = attention_heads(model)
    attention, kept = target.heads.module, []
    with torch.no_grad():  # queries and gates of a head lie together
        attention.q_proj.bias.view(4, 2, 8)[1, 1] = -30.0
    pruner = EMPPruner(model, **HEADS)
    model(torch.randint(1, 17, (2, 5)))
    pruner.refresh()
    attention.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0].view(2, 5, 4, 8).any(-1)))
    model(torch.randint(1, 17, (2, 5)))
    assert not kept[0][..., 1].any()
    assert kept[0].any(-1).all()


# ---- the life of a run --------------------------------------------------------------------------------------------


def trained(steps=range(4), model=None, state=None, path=None):
    torch.manual_seed(0)
    model = vit() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = EMPPruner(model, optimizer, every_n_steps=3, beta=0.8, trajectory_path=path, **HEADS)
    if state is not None:
        for part, saved in zip((model, optimizer, pruner), state, strict=True):
            part.load_state_dict(saved)
    for step in steps:
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        pruner.step()
    return model, optimizer, pruner


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, _, pruner = trained(range(8))
    half = trained(range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    resumed, _, again = trained(range(5, 8), state=torch.load(file, weights_only=True))
    assert [event.record() | {"seconds": 0} for event in again.trajectory] == [
        event.record() | {"seconds": 0} for event in pruner.trajectory
    ]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), resumed.parameters(), strict=True))
    half[2].save(tmp_path)
    other = EMPPruner(vit(), every_n_steps=3, beta=0.8, **HEADS)
    other.load(tmp_path)
    assert all(site.active for site in other._refresher.dynamic)
    static = EMPPruner(vit(), every_n_steps=3, beta=0.8, target="heads", criterion="output_norm", mode="project")
    with pytest.raises(ValueError, match="trained with mode='feedback', this run has mode='project'"):
        static.load(tmp_path)


def test_after_the_end_heads_are_dropped_inside_masked_forward_and_in_copies_by_their_own_weights():
    model, _, pruner = trained()
    images = torch.randn(2, 1, 8, 8)
    masked = model(images)
    pruner.finalize()
    assert pruner.masks == {}
    assert not torch.equal(model(images), masked)
    with pruner.masked_forward():
        assert torch.equal(model(images), masked)
    torch.manual_seed(5)
    other = vit()
    dense = other(images)
    own = EMPPruner(copy.deepcopy(other), beta=0.8, **HEADS)
    (twin,) = [own._backend.module]
    twin(images)
    own.refresh()
    with pruner.mask(other):
        found = other(images)
    torch.testing.assert_close(found, twin(images))
    assert not torch.allclose(found, dense, atol=1e-4)
    assert torch.equal(other(images), dense), "the hooks are gone"
    with pytest.raises(ValueError, match=r"'blocks.0.attn' has 4 heads in the other model \(Attention\), and 3 in"):
        pruner.mask(vit(num_heads=4))


def test_a_copy_of_an_attention_chooses_by_its_own_weights():
    projection = three_heads()
    site = site_at(projection)
    for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        (hook,) = twin._forward_pre_hooks.values()
        assert hook.__self__._change.__self__ is not site
        twin.weight.data[:, 2] *= 10.0  # the norms are 5, 1 and 20: N_eff = 1.6
        torch.testing.assert_close(twin(TOKENS[0, 0]), torch.tensor([20.0, 0.0]))
    torch.testing.assert_close(projection(TOKENS[0, 0]), torch.tensor([5.0, 4.0]))


@pytest.mark.compiler
@pytest.mark.parametrize("per", ["token", "sample"])
def test_compiled_code_is_whole_and_gives_the_same(per):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = vit(depth=1)
    model = copy.deepcopy(plain)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, images = torch.compile(model, backend=counter, fullgraph=True), torch.randn(2, 1, 8, 8)
    pruners = [EMPPruner(one, beta=0.8, per=per, **HEADS) for one in (model, plain)]
    graphs = []
    for _ in range(3):
        outputs = [one(images) for one in (compiled, plain)]
        torch.testing.assert_close(*outputs)
        for one, output in zip((model, plain), outputs, strict=True):
            one.zero_grad()
            output.square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        events = [pruner.refresh()[0] for pruner in pruners]
        assert events[0].n_eff == pytest.approx(events[1].n_eff, rel=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[2] == 2, f"one while it watches, one while it chooses: {graphs}"
