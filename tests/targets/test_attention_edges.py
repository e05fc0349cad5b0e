import copy
import math

import pytest
import timm
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from emp_callbacks import EMPPruner
from emp_callbacks.core.effective_number import effective_number
from emp_callbacks.core.selection import emp_mask
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.targets.attention_edges import EdgeSite, edge_sites

RULE = KeepRule(beta=1.0).counts
ALL = KeepRule(beta=1e9).counts
each_score = pytest.mark.parametrize("score", ["weight", "logit"])


class Bare(nn.Module):
    """Attention and nothing else."""

    def forward(self, query, key, value, **options):
        return F.scaled_dot_product_attention(query, key, value, **options)


def bare(score: str = "weight", rule=RULE, active: bool = True) -> tuple[nn.Module, EdgeSite]:
    model = nn.ModuleDict({"attention": Bare()})
    (site,) = edge_sites(model, ["attention"], None, score, rule)
    site.attach()
    site.active, site.observing = active, True
    return model["attention"], site


def edges_on(model: nn.Module, score: str = "weight", rule=RULE, active: bool = True) -> list[EdgeSite]:
    sites = edge_sites(model, None, None, score, rule)
    for site in sites:
        site.attach()
        site.active, site.observing = active, True
    return sites


def row_by_hand(logits: torch.Tensor, allowed: list[int], score: str, beta: float = 1.0):
    """Keys that one query keeps, the scores of its allowed keys, and its softmax weights over them."""
    chosen = logits.detach()[allowed]
    weights = torch.softmax(chosen, 0)
    scores = weights if score == "weight" else chosen - chosen.min()
    return [allowed[i] for i in emp_mask(scores, beta).nonzero().flatten().tolist()], scores, weights


def attention_by_hand(query, key, value, allow, bias=None, score="weight", scale=None):
    """Loops over samples, heads and queries. `allow[b][h][i]` lists the allowed keys."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=value.dtype)
    names = ("rows", "n_eff", "allowed", "keep", "mass", "not_finite", "first_token", "first_token_rows")
    sums = dict.fromkeys(names, 0.0)
    rows = []
    for b, h, i in [
        (b, h, i) for b in range(query.shape[0]) for h in range(query.shape[1]) for i in range(query.shape[2])
    ]:
        allowed = allow[b][h][i]
        if not allowed:
            rows.append(torch.zeros_like(value[b, h, 0]))
            continue
        logits = key[b, h] @ query[b, h, i] * scale + (0 if bias is None else bias[b, h, i])
        kept, scores, weights = row_by_hand(logits, allowed, score)
        rows.append(torch.softmax(logits[kept], 0) @ value[b, h, kept])
        sums["rows"] += 1
        sums["n_eff"] += effective_number(scores)
        sums["allowed"] += len(allowed)
        sums["keep"] += len(kept)
        sums["mass"] += float(scores[[allowed.index(j) for j in kept]].sum() / scores.sum()) if scores.sum() else 1.0
        if len(allowed) > 1:
            sums["first_token"] += float(weights[0]) if allowed[0] == 0 else 0.0
            sums["first_token_rows"] += 1
    output = torch.stack(rows).view(output.shape)
    return output, sums


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [(2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def everything(b: int, h: int, queries: int, keys: int) -> list:
    return [[[list(range(keys)) for _ in range(queries)] for _ in range(h)] for _ in range(b)]


def causal(b: int, h: int, queries: int) -> list:
    return [[[list(range(i + 1)) for i in range(queries)] for _ in range(h)] for _ in range(b)]


def masks(kind: str) -> tuple[dict, list, torch.Tensor | None]:
    """Arguments for torch, keys that they allow, and what they add to the logits; 2 samples, 3 heads, 4 x 5."""
    torch.manual_seed(5)
    drawn = torch.rand(2, 1, 4, 5) > 0.4
    drawn[0, 0, 1] = False  # a row without any key
    drawn[1, 0, 2] = torch.tensor([False, False, True, False, False])
    allow = [[[drawn[b, 0, i].nonzero().flatten().tolist() for i in range(4)] for _ in range(3)] for b in range(2)]
    bias = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    return {
        "none": ({}, everything(2, 3, 4, 5), None),
        "scale": ({"scale": 1.7}, everything(2, 3, 4, 5), None),
        "causal": ({"is_causal": True}, causal(2, 3, 4), None),
        "bool": ({"attn_mask": drawn}, allow, None),
        "bias": ({"attn_mask": bias}, everything(2, 3, 4, 5), bias),
        "inf": ({"attn_mask": bias.masked_fill(~drawn, -torch.inf)}, allow, bias),
    }[kind]


@each_score
@pytest.mark.parametrize("kind", ["none", "scale", "causal", "bool", "bias", "inf"])
def test_masked_attention_its_gradients_and_statistics_are_those_of_loops_over_rows(kind, score):
    options, allow, bias = masks(kind)
    attention, site = bare(score)
    mine, twin = leaves((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2)), leaves((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2))
    output = attention(*mine, **options)
    by_hand, sums = attention_by_hand(*twin, allow, bias, score, options.get("scale"))
    torch.testing.assert_close(output, by_hand, rtol=1e-10, atol=1e-12)
    assert {key: value.item() for key, value in site.statistics().items()} == pytest.approx(sums, rel=1e-9)
    assert sums["keep"] < sums["allowed"]

    output.sin().sum().backward()
    by_hand.sin().sum().backward()
    for a, b in zip(mine, twin, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "inf"])
def test_watched_only_the_output_is_torchs_own_and_the_statistics_are_the_same(kind):
    options, _, _ = masks(kind)
    inputs = [t.detach() for t in leaves((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2))]
    active, active_site = bare()
    active(*inputs, **options)
    attention, site = bare(active=False)
    assert torch.equal(attention(*inputs, **options), F.scaled_dot_product_attention(*inputs, **options))
    torch.testing.assert_close(site.statistics(), active_site.statistics())


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "inf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_everything_kept_the_output_is_torchs(kind, dtype):
    options, _, _ = masks(kind)
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    inputs = [t.detach().to(dtype) for t in leaves((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 2))]
    attention, _ = bare(rule=ALL)
    output = attention(*inputs, **options)
    assert output.dtype == dtype
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*inputs, **options))


def test_the_lowest_number_of_a_dtype_means_not_allowed():
    query, key, value = (t.detach().float() for t in leaves((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)))
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 2] = torch.finfo(torch.float32).min
    mask[..., 1, :] = torch.finfo(torch.float32).min
    attention, site = bare(rule=ALL)
    output = attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, mask))
    assert site.statistics()["rows"] == 2
    assert site.statistics()["allowed"] == 4


def test_grouped_queries_are_those_of_repeated_keys_and_values():
    query, key, value = (t.detach() for t in leaves((2, 4, 3, 6), (2, 2, 3, 6), (2, 2, 3, 6)))
    attention, _ = bare()
    grouped = attention(query, key, value, enable_gqa=True)
    repeated = attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(grouped, repeated)


def test_dropout_acts_on_the_weights_of_kept_edges():
    torch.manual_seed(0)
    value = torch.eye(6).expand(64, 1, 6, 6)
    attention, _ = bare()
    zeros = torch.zeros(64, 1, 6, 4)
    weights = attention(zeros, zeros, value, dropout_p=0.25)
    assert sorted(weights.unique().tolist()) == pytest.approx([0.0, 1 / 6 / 0.75])
    assert (weights == 0).double().mean() == pytest.approx(0.25, abs=0.03)


def test_equal_weights_all_stay():
    attention, site = bare()
    zeros = torch.zeros(1, 1, 49, 4)
    attention(zeros, zeros, zeros, is_causal=True)
    assert site.statistics()["keep"] == 49 * 50 / 2


def test_a_row_with_nan_is_kept_whole_and_counted_apart():
    query, key, value = (t.detach() for t in leaves((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    query[0, 0, 1, 0] = torch.nan
    attention, site = bare()
    output = attention(query, key, value)
    assert output[0, 0].isnan().any(1).tolist() == [False, True, False]
    found = site.statistics()
    assert (found["rows"], found["not_finite"]) == (2, 1)
    assert all(torch.isfinite(sum_) for sum_ in found.values())


# ---- whole models


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=24, num_classes=3).double()


def sharpen(model: nn.Module, factor: float = 10.0) -> nn.Module:
    """Make attention uneven, so that something is pruned."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in ("qkv.weight", "c_attn.weight", "q_proj", "query.weight", "in_proj_weight")
            ):
                parameter.mul_(factor)
    return model


def tiny_gpt2(**options) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=12, n_head=3, vocab_size=11, n_positions=9, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config._attn_implementation = options.pop("attention", "sdpa")
    return GPT2LMHeadModel(config).double()


def test_n_eff_is_no_larger_than_the_keys_that_a_row_may_read_on_average():
    gpt2 = tiny_gpt2()
    pruner = EMPPruner(gpt2, target="attention_edges")
    gpt2(torch.randint(0, 11, (2, 4)))  # rows of 1 to 4 keys: 2.5, which rounds to 2
    (event,) = pruner.refresh()
    assert event.n == 4
    assert 0.9 < event.n_eff_fraction <= 1


def test_timm_vit_against_attention_by_hand():
    vit = sharpen(tiny_vit())
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    sites = edges_on(vit)
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.1.attn"]
    output = vit(images)

    x = vit.pos_drop(vit._pos_embed(vit.patch_embed(images)))
    for block, site in zip(vit.blocks, sites, strict=True):
        query, key, value = block.attn.qkv(block.norm1(x)).reshape(2, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
        attended, sums = attention_by_hand(query, key, value, everything(2, 3, 10, 10))
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(2, 10, 24))
        x = x + block.mlp(block.norm2(x))
        assert {key: value.item() for key, value in site.statistics().items()} == pytest.approx(sums, rel=1e-9)
        assert sums["keep"] < 0.8 * sums["allowed"]
    torch.testing.assert_close(output, vit.forward_head(vit.norm(x)))


@each_score
def test_gpt2_against_attention_by_hand(score):
    gpt2 = sharpen(tiny_gpt2(), 20.0)
    tokens = torch.randint(0, 11, (2, 7))
    sites = edges_on(gpt2, score)
    assert [site.name for site in sites] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    output = gpt2(tokens).logits

    x = gpt2.transformer.wte(tokens) + gpt2.transformer.wpe(torch.arange(7))
    for block, site in zip(gpt2.transformer.h, sites, strict=True):
        parts = block.attn.c_attn(block.ln_1(x)).split(12, -1)
        query, key, value = (part.view(2, 7, 3, 4).transpose(1, 2) for part in parts)
        attended, sums = attention_by_hand(query, key, value, causal(2, 3, 7), score=score)
        x = x + block.attn.c_proj(attended.transpose(1, 2).reshape(2, 7, 12))
        x = x + block.mlp(block.ln_2(x))
        assert {key: value.item() for key, value in site.statistics().items()} == pytest.approx(sums, rel=1e-8)
        assert sums["first_token_rows"] == 2 * 3 * 6
    torch.testing.assert_close(output, gpt2.lm_head(gpt2.transformer.ln_f(x)))


def encoder_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True).double()


def models() -> dict:
    tokens, mask = torch.arange(14).view(2, 7) % 11, torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    x = torch.linspace(-1, 1, 168, dtype=torch.float64).view(2, 7, 12)
    size = {"hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 11}
    bert = BertConfig(num_attention_heads=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **size)
    llama = LlamaConfig(num_attention_heads=6, num_key_value_heads=3, head_dim=4, **size)
    bert._attn_implementation = llama._attn_implementation = "sdpa"
    torch.manual_seed(0)
    # gpt2-padded in float32: transformers 4.48 itself fails to pad in float64
    return {
        "vit": (tiny_vit(), lambda m: m(torch.ones(2, 3, 48, 48, dtype=torch.float64).cumsum(-1) / 48)),
        "gpt2": (tiny_gpt2(), lambda m: m(tokens).logits),
        "gpt2-padded": (tiny_gpt2().float(), lambda m: m(tokens, attention_mask=mask).logits),
        "bert-padded": (BertModel(bert).double(), lambda m: m(tokens, attention_mask=mask).last_hidden_state),
        "llama": (LlamaForCausalLM(llama).double(), lambda m: m(tokens).logits),
        "encoder": (encoder_layer(), lambda m: m(x, src_key_padding_mask=~mask.bool())),
    }


@pytest.mark.parametrize("name", ["vit", "gpt2", "gpt2-padded", "bert-padded", "llama", "encoder"])
def test_every_family_is_reached_in_training_and_in_eval(name):
    model, run = models()[name]
    sharpen(model, 8.0)
    for mode in (True, False):
        model.train(mode)
        before = run(model)
        sites = edges_on(model, rule=ALL)
        torch.testing.assert_close(run(model), before)
        for site in sites:
            site._rule = RULE
            site.in_eval = True
            site.reset()
        with torch.no_grad():  # torch's encoder layer would take its fast path past the attention module
            pruned = run(model)
        assert not torch.allclose(pruned, before)
        for site in sites:
            assert 0 < site.statistics()["keep"] < site.statistics()["allowed"]
            site.detach()
        torch.testing.assert_close(run(model), before)


def test_padded_keys_are_never_counted():
    model, run = models()["bert-padded"]
    site = edges_on(model)[0]
    run(model)
    assert site.statistics()["allowed"] == 3 * (7 * 7 + 7 * 4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_attention_counts_once_and_is_pruned_alike(reentrant):
    found = {}
    for checkpointed in (False, True):
        layer = sharpen(encoder_layer(), 5.0)
        model = nn.ModuleDict({"layer": layer})
        (site,) = edges_on(model)
        x = torch.linspace(-1, 1, 168, dtype=torch.float64).view(2, 7, 12).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().mean().backward()
        found[checkpointed] = (site.statistics(), layer.self_attn.in_proj_weight.grad)
    assert found[False][0]["rows"] == 2 * 3 * 7
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.compiler
@pytest.mark.slow
def test_compiled_models_are_whole_and_do_not_grow():
    torch._dynamo.reset()
    vit, twin = sharpen(tiny_vit()), sharpen(tiny_vit())
    sites, twins = edges_on(vit), edges_on(twin)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vit, backend=counter, fullgraph=True)
    images = torch.linspace(-2, 2, 2 * 3 * 48 * 48, dtype=torch.float64).view(2, 3, 48, 48).sin()
    graphs = []
    for _ in range(3):
        for active, observing in [(True, True), (True, False), (False, True), (False, False)]:
            for site in [*sites, *twins]:
                site.active, site.observing = active, observing
            out = [model(images) for model in (compiled, twin)]
            torch.testing.assert_close(*out)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] <= 4
    for site, other in zip(sites, twins, strict=True):
        torch.testing.assert_close(site.statistics(), other.statistics())
        assert site.statistics()["rows"] == 3 * 2 * 2 * 3 * 10
        site.active, site.observing = True, True
        site.detach()
    torch.testing.assert_close(compiled(images), out[1])


# ---- life


def modes() -> int:
    return len(torch.overrides._get_current_function_mode_stack())


def test_idle_sites_intercept_nothing():
    attention, site = bare(active=False)
    site.observing = False
    query = torch.randn(1, 1, 3, 4)
    entered = []
    attention.forward = lambda *args: entered.append(modes())
    attention(query, query, query)
    assert entered == [0]
    site.observing = True
    attention.eval()(query, query, query)
    assert entered == [0, 0], "observing, but in eval"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_forward_leaves_no_mode_behind(error):
    attention, site = bare()

    def fail(*args):
        raise error

    attention.forward = fail
    with pytest.raises(error):
        attention(torch.randn(1, 1, 3, 4))
    assert modes() == (error is KeyboardInterrupt)
    del attention.forward
    query = torch.randn(1, 1, 3, 4)
    attention(query, query, query)
    assert modes() == 0, "what an interrupt leaves, since it runs no hooks, goes with the next forward"
    attention.forward = fail
    with pytest.raises(error):
        attention(query, query, query)
    site.detach()
    assert modes() == 0, "and with detach"


def test_detach_leaves_nothing_behind_and_attach_works_after_hooks_were_cleared():
    attention, site = bare()
    site.attach()
    assert (len(attention._forward_hooks), len(attention._forward_pre_hooks)) == (1, 1)
    attention._forward_hooks.clear()
    attention._forward_pre_hooks.clear()
    site.attach()
    query = 3 * torch.randn(1, 1, 9, 4)
    masked = attention(query, query, query)
    site.detach()
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not attention._forward_hooks_always_called
    assert not torch.allclose(attention(query, query, query), masked)


def test_reset_forgets():
    attention, site = bare()
    query = torch.randn(1, 1, 9, 4)
    attention(query, query, query)
    assert site.statistics()["rows"] == 9
    site.reset()
    assert all(value == 0 and value.dtype == torch.float64 for value in site.statistics().values())


def test_a_copy_of_the_model_has_its_own_site():
    vit = sharpen(tiny_vit())
    sites = edges_on(vit)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    twin = copy.deepcopy(vit)
    masked = twin(images)
    assert sites[0].statistics()["rows"] == 0
    torch.testing.assert_close(vit(images), masked)


@pytest.mark.parametrize("family", ["gpt2", "timm", "multihead"])
def test_attention_that_torch_does_not_compute_says_what_to_do(family):
    if family == "gpt2":
        model, inputs = tiny_gpt2(attention="eager"), (torch.zeros(1, 3, dtype=torch.long),)
    elif family == "timm":
        model, inputs = tiny_vit(), (torch.zeros(1, 3, 48, 48, dtype=torch.float64),)
        model.blocks[0].attn.fused_attn = False
    else:
        model, inputs = nn.Sequential(nn.MultiheadAttention(4, 2)), None
    edges_on(model)
    with pytest.raises(RuntimeError, match=r"fused_attn = True; .*attn_implementation=\"sdpa\".*need_weights=False"):
        model(*inputs) if inputs else model[0](*[torch.randn(3, 1, 4)] * 3)
    assert modes() == 0


def test_choices_are_checked():
    vit = tiny_vit()
    with pytest.raises(ValueError, match="score='entropy' is unknown; choose one of weight, logit"):
        edge_sites(vit, None, None, "entropy", RULE)
    with pytest.raises(ValueError, match="no attention modules found in Sequential"):
        edge_sites(nn.Sequential(nn.Linear(2, 2)), None, None, "weight", RULE)
    with pytest.raises(ValueError, match=r"near names: .*blocks.1.attn"):
        edge_sites(vit, ["blocks.1.atn"], None, "weight", RULE)
    assert [site.name for site in edge_sites(vit, None, ["*.0.*"], "weight", RULE)] == ["blocks.1.attn"]


def test_nested_tensors_of_an_evaluated_encoder_are_masked_as_padded_ones():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[6], [3], [5]])
    sites = edge_sites(net, None, None, "weight", RULE)
    dense = net(x, src_key_padding_mask=padding)
    for site in sites:
        site.attach()
        site.active = site.observing = site.in_eval = True
    padded = net(x, src_key_padding_mask=padding)
    assert not torch.allclose(padded[~padding], dense[~padding])
    rows = [int(site.statistics()["rows"]) for site in sites]
    net.eval()
    with torch.no_grad():  # now the encoder makes a nested tensor of the batch
        nested = net(x, src_key_padding_mask=padding)
    torch.testing.assert_close(nested[~padding], padded[~padding])
    assert [int(site.statistics()["rows"]) for site in sites] == [2 * count for count in rows]
