"""Learned gates in the life of a pruner: they begin, learn, are resumed, and end as an ordinary mask."""

import io

import peft
import pytest
import timm
import torch
from torch import nn

from emp_callbacks import EMPConfig, EMPPruner, shrink
from emp_callbacks.trajectory import Trajectory

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "in_chans": 1, "num_classes": 5}
SETTINGS = {"target": "heads", "criterion": "taylor", "evidence_steps": 2, "mode": "freeze"}
GATES = {"gates": "hard_concrete", "gate_warmup": 3}


def make_net():
    return timm.create_model("vit_tiny_patch16_224", **SIZES)


class Run:
    def __init__(self, path=None, seed=0, optimizer=torch.optim.AdamW, **settings):
        torch.manual_seed(seed)
        self.net = make_net()
        self.optimizer = optimizer(self.net.parameters(), lr=0.01)
        self.pruner = EMPPruner(self.net, self.optimizer, trajectory_path=path, **{**SETTINGS, **GATES, **settings})

    def train(self, first, last, scale=1.0):
        for step in range(first, last):
            x, y = batch(step)
            self.optimizer.zero_grad()
            (scale * nn.functional.cross_entropy(self.net(x), y)).backward()
            self.optimizer.step()
            self.pruner.step()
        return self

    def logits(self):
        with torch.no_grad():
            found = self.net.eval()(batch(99)[0])
        self.net.train()
        return found


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)


KINDS = ("hard_concrete", "top_k")


@pytest.mark.parametrize("kind", KINDS)
def test_gates_begin_learn_and_end_as_the_mask_that_evaluation_saw(kind):
    run = Run(gates=kind, every_n_steps=3, beta=0.8)
    assert run.pruner.gates is None
    run.train(0, 3)
    first = run.pruner.trajectory[0]
    assert (first.step, first.criterion) == (3, "taylor")
    expected = 0.8 * first.n_eff if kind == "hard_concrete" else first.keep
    assert first.gates.expected == pytest.approx(expected, abs=1e-3), "as many as EMP says, before any step of theirs"
    assert first.keep == int(0.8 * first.n_eff + 0.01)
    before = {name: value.clone() for name, value in run.net.named_parameters()}
    start = run.pruner.gates.log_alpha.detach().clone()
    run.train(3, 10)
    assert not torch.equal(run.pruner.gates.log_alpha, start), "they learn"
    assert all(not torch.equal(value, before[name]) for name, value in run.net.named_parameters() if "proj.w" in name)
    assert all(bool(mask.all()) for mask in run.pruner.masks.values()), "and there is no mask yet"
    kept, shown = run.pruner.gates.hardened, run.logits()
    run.pruner.finalize()
    assert torch.equal(run.logits(), shown), "what evaluation saw is what stays"
    assert {name: mask.tolist() for name, mask in run.pruner.masks.items()} == {n: m.tolist() for n, m in kept.items()}
    last = run.pruner.last_events[0]
    assert last.keep == first.keep == sum(int(mask.sum()) for mask in run.pruner.masks.values())
    assert last.criterion == kind
    assert "hardened" in last.note
    assert run.pruner.audit().clean
    assert [event.step for event in run.pruner.trajectory] == [3, 6, 9, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hardened_model_equals_the_shrunk_one(kind):
    run = Run(gates=kind, every_n_steps=3, density=0.5).train(0, 8)
    run.pruner.finalize()
    before, parameters = run.logits(), sum(p.numel() for p in run.net.parameters())
    shrink(run.net, run.pruner.masks, (batch(0)[0],))
    torch.testing.assert_close(run.logits(), before, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in run.net.parameters()) < parameters
    assert sum(block.attn.num_heads for block in run.net.blocks) == 4


def test_they_harden_at_stop_and_the_heads_that_stay_train_on():
    run = Run(every_n_steps=3, stop=6, density=0.5).train(0, 6)
    masks = run.pruner.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == 4
    assert run.pruner.density == 0.5
    learned = run.pruner.gates.log_alpha.detach().clone()
    run.train(6, 9)
    assert torch.equal(run.pruner.gates.log_alpha, learned)
    assert {name: mask.tolist() for name, mask in run.pruner.masks.items()} == {n: m.tolist() for n, m in masks.items()}
    assert run.pruner.audit().clean
    run.pruner.finalize()
    assert len(run.pruner.trajectory) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [2, 5, 10])
def test_a_resumed_run_equals_one_that_never_stopped(kind, at, tmp_path):
    settings = {"gates": kind, "every_n_steps": 3, "stop": 9, "beta": 0.8}
    whole = Run(**settings).train(0, 12)
    stopped, file = Run(**settings).train(0, at), io.BytesIO()
    torch.save({k: getattr(stopped, k).state_dict() for k in ("net", "optimizer", "pruner")}, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = Run(seed=1, **settings)
    for part in ("net", "optimizer", "pruner"):
        getattr(resumed, part).load_state_dict(states[part])
    resumed.train(at, 12)
    assert torch.equal(resumed.pruner.gates.log_alpha, whole.pruner.gates.log_alpha)
    assert torch.equal(resumed.logits(), whole.logits())
    rows = [[(e.step, e.keep, e.n_eff, e.gates) for e in run.pruner.trajectory] for run in (resumed, whole)]
    assert rows[0] == rows[1]


def test_a_folder_brings_the_gates_back_and_files_keep_what_rows_say_of_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    run = Run(path, every_n_steps=3).train(0, 5)
    run.pruner.save(tmp_path / "folder")
    other = Run(seed=1, every_n_steps=3)
    other.pruner.load(tmp_path / "folder")
    assert torch.equal(other.pruner.gates.log_alpha, run.pruner.gates.log_alpha)
    other.net.load_state_dict(run.net.state_dict())
    assert torch.equal(other.logits(), run.logits()), "the gates are in the forward pass again"
    run.pruner.finalize()
    assert [e.gates for e in Trajectory.read(path)] == [e.gates for e in run.pruner.trajectory]


def test_a_state_of_other_gates_is_refused_and_changes_nothing():
    held = Run(gates="top_k", every_n_steps=3).train(0, 5).pruner.state_dict()
    other = Run(every_n_steps=3).train(0, 4)
    learned = other.pruner.gates.log_alpha.detach().clone()
    with pytest.raises(ValueError, match="still learn"):
        other.pruner.mask(make_net())
    with pytest.raises(ValueError, match="gates='top_k', this run has gates='hard_concrete'"):
        other.pruner.load_state_dict(held)
    damaged = Run(every_n_steps=3).train(0, 5).pruner.state_dict()
    damaged["gates"]["log_alpha"].popitem()
    with pytest.raises(ValueError, match="other attentions"):
        other.pruner.load_state_dict(damaged)
    with pytest.raises(ValueError, match="gates=None"):
        EMPPruner(other.net, other.optimizer, every_n_steps=3, **SETTINGS).load_state_dict(held)
    assert torch.equal(other.pruner.gates.log_alpha, learned)
    assert other.pruner.steps == 4


def test_the_unit_of_the_loss_decides_nothing():
    """Neither a sum in place of a mean, nor a gradient scaler's factor, weighs the loss against the constraint."""
    gates = [
        Run(every_n_steps=3, init="open", density=0.5).train(0, 12, scale=scale).pruner.gates for scale in (1.0, 1024.0)
    ]
    torch.testing.assert_close(gates[0].log_alpha, gates[1].log_alpha, rtol=0, atol=2e-3)


def test_the_expected_number_comes_to_the_target():
    run = Run(every_n_steps=3, init="open", density=0.5, gate_warmup=20).train(0, 3)
    assert run.pruner.gates.expected == pytest.approx(0.952 * 8, abs=0.01)
    run.train(3, 90)
    assert run.pruner.gates.expected == pytest.approx(4.0, abs=0.6)


def test_a_user_says_how_gates_begin():
    names = [name for name, _ in Run().net.named_modules() if name.endswith("attn")]
    first = {names[0]: [0.9, 0.2, 0.5, 0.6], names[1]: [0.3, 0.4, 0.7, 0.8]}
    run = Run(init=first, density=0.5)
    rows = run.pruner.refresh()  # nothing had to be gathered
    assert rows[0].criterion == "hard_concrete"
    assert {n: p.tolist() for n, p in run.pruner.gates.probabilities.items()} == {
        name: pytest.approx(values) for name, values in first.items()
    }
    with pytest.raises(ValueError, match=r"blocks.1.attn: given \[0\], there are \[4\]"):
        Run(init={names[0]: [0.5] * 4}, density=0.5)


def test_each_layer_by_itself_has_its_own_count():
    run = Run(scope="tensor", every_n_steps=3, density=0.5).train(0, 6)
    run.pruner.finalize()
    assert [int(mask.sum()) for mask in run.pruner.masks.values()] == [2, 2]
    assert [e.group for e in run.pruner.last_events] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(e.gates.target == 2 for e in run.pruner.last_events)


def test_a_step_with_nan_moves_no_gate_and_the_next_one_does():
    run = Run(every_n_steps=3, optimizer=torch.optim.SGD).train(0, 4)
    learned = run.pruner.gates.log_alpha.detach().clone()
    run.pruner.gates.log_alpha.grad = torch.full_like(learned, torch.nan)  # of a step that a scaler skipped
    run.train(4, 5)
    assert torch.equal(run.pruner.gates.log_alpha, learned)
    run.train(5, 6)
    assert not torch.equal(run.pruner.gates.log_alpha, learned)


def test_gates_without_an_optimizer_are_refused():
    with pytest.raises(ValueError, match="no optimizer is known"):
        EMPPruner(make_net(), target="heads", gates="top_k", init="open", density=0.5).refresh()


def test_adapters_beside_the_output_projection_are_refused():
    lora = peft.LoraConfig(r=2, target_modules=["proj"])
    net = peft.get_peft_model(make_net(), lora)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="adapters of PEFT, which read the heads beside it"):
        EMPPruner(net, optimizer, target="heads", gates="top_k", init="open", density=0.5)


class Named(nn.Linear):
    """Hands its input on by name, where no hook before a forward sees it."""

    def __call__(self, x):
        return super().__call__(input=x)


def test_an_attention_whose_heads_pass_no_gate_is_named():
    run = Run(every_n_steps=3)
    run.net.blocks[1].attn.proj.__class__ = Named
    with pytest.warns(UserWarning, match="nothing has passed the gates of blocks.1.attn"):
        run.train(0, 7)


def test_nan_in_a_weight_begins_no_gates():
    run = Run(criterion="weight_norm", every_n_steps=3).train(0, 2)
    with torch.no_grad():
        run.net.blocks[0].attn.proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"blocks.0.attn"):
        run.pruner.refresh()
    assert run.pruner.gates is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates": "sigmoid"}, "gates must be one of 'hard_concrete', 'top_k'; got 'sigmoid'"),
        ({"gates": "top_k", "target": "neurons", "criterion": None}, "target='neurons' must be 'heads'"),
        ({"gates": "top_k", "observe_only": True}, "observe_only=True means nothing beside gates"),
        ({"gates": "top_k", "certify": True}, "certify=True means nothing beside gates"),
        ({"gates": "top_k", "init": "closed"}, "init must be one of 'emp', 'open'; got 'closed'"),
        ({"gates": "top_k", "init": {"a": [0.5, 1.0]}}, r"init\['a'\] must be P\(open\)"),
        ({"gates": "top_k", "gate_lr": 0}, "gate_lr must be a number > 0"),
        ({"gates": "top_k", "gate_warmup": -1}, "gate_warmup must be an integer >= 0"),
        ({"gates": "top_k", "every_n_steps": 5, "stop": 9}, "is one alone: raise stop"),
        ({"init": "open"}, "init='open': of learned gates"),
        ({"gate_lr": 0.5, "gate_warmup": 5}, "gate_lr=0.5, gate_warmup=5: of learned gates"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EMPConfig(**{"target": "heads", "criterion": "taylor", **settings})


def test_what_prunes_a_finished_model_has_no_gates():
    config = EMPConfig(target="heads", gates="top_k", init="open", gate_lr=0.5, every_n_steps=3)
    assert config.once().gates is None
    assert config.once(target="weights").target == "weights"
