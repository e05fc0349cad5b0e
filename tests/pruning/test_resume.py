"""A run that is stopped and resumed equals the run that was not, bit for bit."""

import dataclasses
import io

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner

STEPS = 8
SETTINGS = {
    "feedback": {"mode": "feedback", "every_n_steps": 3},
    "feedback-tensor": {"mode": "feedback", "every_n_steps": 2, "scope": "tensor"},
    "project": {"mode": "project", "every_n_steps": 3},
    "freeze": {"mode": "freeze", "every_n_steps": 3},
    "epochs": {"mode": "feedback", "every_n_epochs": 2},
    "observe": {"observe_only": True, "every_n_steps": 3},
    "random": {"criterion": "random", "every_n_steps": 2, "density": 0.5},
    "taylor": {"criterion": "taylor", "every_n_steps": 3, "evidence_steps": 2},
    "wanda": {"criterion": "wanda", "every_n_steps": 3, "scope": "row"},
    "epoch window": {"criterion": "saliency", "every_n_epochs": 2, "evidence_steps": 1, "mode": "freeze"},
    "neurons": {"target": "neurons", "every_n_steps": 2, "beta": 0.8},
    "neurons taylor": {"target": "neurons", "criterion": "taylor", "every_n_steps": 3, "mode": "project", "beta": 0.8},
    "neurons activation": {"target": "neurons", "criterion": "activation", "every_n_steps": 3, "mode": "freeze"},
    "features": {"target": "features", "every_n_steps": 3, "evidence_steps": 2, "beta": 0.8},
    "features mean": {"target": "features", "every_n_steps": 2, "center": "mean", "mode": "freeze"},
    "features taylor": {"target": "features", "criterion": "taylor", "every_n_steps": 3, "beta": 0.8},
    "features dynamic": {"target": "features", "dynamic": True, "every_n_steps": 3, "beta": 0.8},
}


class Run:
    def __init__(self, settings, path=None):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02, weight_decay=0.1)
        self.pruner = EMPPruner(self.net, self.optimizer, trajectory_path=path, **settings)

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(5, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
            self.pruner.step(end_of_epoch=step % 2 == 1)
        return self

    def save(self):
        parts = {"net": self.net, "optimizer": self.optimizer, "pruner": self.pruner}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return file

    def load(self, file, order=("net", "optimizer", "pruner")):
        states = torch.load(file, weights_only=True)
        for name in order:
            getattr(self, name).load_state_dict(states[name])
        return self


def assert_equal(one: Run, two: Run):
    for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in one.optimizer.state[a].items():
            assert torch.equal(value, two.optimizer.state[b][key])
    for name, mask in one.pruner.masks.items():
        assert torch.equal(mask, two.pruner.masks[name])
    strip = [[dataclasses.replace(e, seconds=0.0) for e in run.pruner.trajectory] for run in (one, two)]
    assert strip[0] == strip[1]
    with one.pruner.dense_weights(), two.pruner.dense_weights():
        for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("stop", range(STEPS))
@pytest.mark.parametrize(
    "order", [("net", "optimizer", "pruner"), ("pruner", "net", "optimizer")], ids=["last", "first"]
)
def test_stopped_after_any_step(kind, stop, order):
    whole = Run(SETTINGS[kind]).train(0, STEPS)
    file = Run(SETTINGS[kind]).train(0, stop).save()
    resumed = Run(SETTINGS[kind]).load(file, order).train(stop, STEPS)
    assert len(whole.pruner.trajectory) >= 2
    assert_equal(whole, resumed)


def test_the_model_state_holds_masked_weights_and_the_pruner_the_dense_ones():
    run = Run(SETTINGS["feedback"]).train(0, 4)
    states = torch.load(run.save(), weights_only=True)
    mask = run.pruner.masks["0.weight"]
    assert bool((states["net"]["0.weight"][~mask] == 0).all())
    assert bool((states["pruner"]["stash"]["0.weight"] != 0).all())
    assert states["pruner"]["masks"]["0.weight"].numel() == 7  # 54 bits


def test_rows_beyond_the_checkpoint_are_set_aside_not_doubled(tmp_path):
    path = tmp_path / "rows.jsonl"
    run = Run(SETTINGS["feedback"], path).train(0, 4)
    file = run.save()
    run.train(4, 7).pruner.trajectory.close()  # killed here: one more row than the checkpoint knows
    assert len(path.read_text().splitlines()) == 2
    resumed = Run(SETTINGS["feedback"], path).load(file).train(4, STEPS)
    assert len(path.read_text().splitlines()) == len(resumed.pruner.trajectory) == 2
    assert len((tmp_path / "rows.jsonl.1").read_text().splitlines()) == 2


def test_a_new_run_in_an_old_file_sets_the_old_rows_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    Run(SETTINGS["feedback"], path).train(0, 7)
    old = path.read_text()
    Run(SETTINGS["feedback"], path)
    assert path.read_text() == old, "opening a run loses nothing"
    Run(SETTINGS["feedback"], path).train(0, 4)
    assert len(path.read_text().splitlines()) == 1
    assert (tmp_path / "rows.jsonl.1").read_text() == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "freeze"}, r"trained with mode='feedback', this run has mode='freeze'"),
        ({"scope": "tensor"}, r"scope='global', this run has scope='tensor'"),
        ({"observe_only": True}, r"mode='feedback', this run has mode='observe'"),
        ({"exclude": ["2.*"]}, r"masks belong to other parameters: 2.weight"),
    ],
)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(change, message):
    state = Run(SETTINGS["feedback"]).train(0, 4).pruner.state_dict()
    other = Run(SETTINGS["feedback"] | change).train(0, 4)
    weights = [p.detach().clone() for p in other.net.parameters()]
    rows = list(other.pruner.trajectory)
    with pytest.raises(ValueError, match=message):
        other.pruner.load_state_dict(state)
    assert list(other.pruner.trajectory) == rows
    for parameter, before in zip(other.net.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("damage", ["masks", "stash", "format", "foreign"])
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    state = Run(SETTINGS["feedback"]).train(0, 4).pruner.state_dict()
    if damage == "format":
        state = {**state, "format": 99}
    elif damage == "foreign":
        state = {"hello": 1}
    else:
        state[damage]["2.weight"] = state[damage]["2.weight"][:1]
    run = Run(SETTINGS["feedback"]).train(0, 7)
    before = run.pruner.masks
    with pytest.raises(ValueError, match=r"not the state of an EMP pruner|mask"):
        run.pruner.load_state_dict(state)
    for name, mask in run.pruner.masks.items():
        assert torch.equal(mask, before[name])
