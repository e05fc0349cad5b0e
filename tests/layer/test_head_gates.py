"""Gates on what heads hand on: exact where open, exact gradients, alike in every pass of a step."""

import copy
import pickle

import pytest
import torch
from torch import nn

from emp_callbacks.layer.head_gates import HeadGates, first_probabilities
from emp_callbacks.targets import attention_heads
from tests.targets.test_head_outputs import MODELS, output_of


class Attention(nn.Module):
    """One layer of three heads."""

    def __init__(self, width=6, heads=3):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gates_of(model, kind="hard_concrete", keep=2, probabilities=None, **settings):
    attentions = [target.heads for target in attention_heads(model)]
    gates = HeadGates(attentions, kind, **{"least": 1, "warmup": 0, "seed": 5, **settings})
    gates.begin({"global": keep}, probabilities)
    gates.attach()
    return gates


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_gates_that_are_fully_open_give_the_outputs_of_the_model_without_gates(kind, training):
    torch.manual_seed(0)
    model, batch = MODELS[kind][0]().train(training), MODELS[kind][1]()
    plain = output_of(model, batch)
    gates = gates_of(model, keep=10**6)
    with torch.no_grad():
        gates.log_alpha.fill_(10.0)
    assert torch.equal(output_of(model, batch), plain)
    with torch.no_grad():
        gates.log_alpha.fill_(-10.0)
    assert torch.equal(output_of(model, batch), plain) != training, "closed gates matter, hardened ones are still open"
    gates.detach()
    assert torch.equal(output_of(model, batch), plain)


def handed_on_by(model, x, *, before_gates):
    """Run the model backwards from the sum of its outputs and return what its heads hand on, shape (B, T, C)."""
    seen = []
    handle = model.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()), prepend=before_gates)
    model(x).sum().backward()
    handle.remove()
    return seen[0]


def added_by(model, handed_on):
    """Return the sum over all outputs of what each of three heads of two channels adds, shape (3,)."""
    per_head = handed_on.unflatten(-1, (3, 2)).unbind(-2)
    weight = model.proj.weight.detach().unflatten(1, (3, 2)).unbind(1)
    return torch.stack([(values @ columns.T).sum() for values, columns in zip(per_head, weight, strict=True)])


def test_gradients_of_three_heads_are_those_computed_by_hand():
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    gates = gates_of(model)
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(5))
    logit = torch.tensor([0.1, -0.2, 0.3])  # of the concrete value, times the temperature: each gate is between 0 and 1
    with torch.no_grad():
        gates.log_alpha.copy_(logit - torch.logit(uniform))
    handed_on = handed_on_by(model, x, before_gates=True)
    s = torch.sigmoid(logit.double() / 0.33)
    torch.testing.assert_close(gates.gate(slice(0, 3), True).double(), 1.2 * s - 0.1, rtol=1e-5, atol=1e-6)
    by_hand = added_by(model, handed_on) * 1.2 * s * (1 - s) / 0.33
    torch.testing.assert_close(gates.log_alpha.grad.double(), by_hand, rtol=1e-4, atol=1e-6)


def test_the_highest_are_open_and_the_gradient_passes_straight_through():
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    (name,) = [target.name for target in attention_heads(model)]
    gates = gates_of(model, "top_k", keep=2, probabilities={name: torch.tensor([0.5, 0.1, 0.9])})
    handed_on = handed_on_by(model, x, before_gates=True)
    assert gates.hardened[name].tolist() == [True, False, True]
    torch.testing.assert_close(gates.log_alpha.grad.double(), added_by(model, handed_on), rtol=1e-5, atol=1e-6)


def test_one_draw_serves_all_passes_of_a_step_and_the_next_step_has_another():
    model, x = Attention(), torch.randn(2, 4, 6)
    gates = gates_of(model, probabilities={attention_heads(model)[0].name: torch.full((3,), 0.5)})
    state = torch.get_rng_state()
    first, again = model(x), model(x)
    assert torch.equal(first, again)
    gates.steps += 1
    gates.renew()
    assert not torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers are left alone"


def test_a_scaled_gradient_in_half_precision_does_not_overflow():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(64, 40, 6)
    gates = gates_of(model, "top_k")
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gates.log_alpha.grad = None
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        (output.float().sum() * 4096).backward()
        found[dtype] = gates.log_alpha.grad
    assert float(found[torch.float32].abs().max()) > torch.finfo(torch.float16).max, "or the test says nothing"
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(found[dtype], found[torch.float32], rtol=0.05, atol=2000.0)


def test_checkpointed_activations_have_the_same_gradients():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 4, 6, requires_grad=True)
    gates = gates_of(model, probabilities={attention_heads(model)[0].name: torch.full((3,), 0.5)})
    model(x).sum().backward()
    plain, gates.log_alpha.grad = gates.log_alpha.grad, None
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(gates.log_alpha.grad, plain)


@pytest.mark.compiler
def test_compiled_code_stays_whole_and_follows_the_draws():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 4, 6)
    gates = gates_of(model, probabilities={attention_heads(model)[0].name: torch.full((3,), 0.5)})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
        gates.steps += 1
        gates.renew()
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


def test_a_model_with_gates_can_be_copied_and_pickled():
    model, x = Attention().eval(), torch.randn(2, 4, 6)
    gates_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))


def test_each_attention_keeps_its_least_and_ties_go_to_the_first():
    model = nn.ModuleList([Attention(), Attention()])
    names = [target.name for target in attention_heads(model)]
    first = {names[0]: torch.tensor([0.9, 0.8, 0.7]), names[1]: torch.tensor([0.2, 0.2, 0.1])}
    assert {n: m.tolist() for n, m in gates_of(model, keep=3, probabilities=first).hardened.items()} == {
        names[0]: [True, True, False],
        names[1]: [True, False, False],
    }


def test_the_number_that_is_open_moves_in_the_warm_up():
    model = nn.ModuleList([Attention(), Attention()])
    gates = gates_of(model, "top_k", keep=2, warmup=4)
    open_ = []
    for _ in range(6):
        open_.append(sum(int(mask.sum()) for mask in gates.hardened.values()))
        gates.steps += 1
        gates.renew()
    assert open_ == [6, 5, 4, 3, 2, 2]


def test_n_eff_gates_are_expected_to_be_open():
    scores = {"a": torch.tensor([1.0, 0.5, 0.1]), "b": torch.tensor([0.7, 0.2, 0.3])}
    flat = torch.cat([*scores.values()])
    n_eff = float(flat.sum() ** 2 / flat.square().sum())
    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    gates = gates_of(model, probabilities=first_probabilities(scores, n_eff))
    assert gates.expected == pytest.approx(n_eff, abs=1e-3)
    assert gates.open == sum(int((p > 0.5).sum()) for p in gates.probabilities.values())
    assert 0 < gates.entropy < 1
