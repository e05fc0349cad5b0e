"""A run that is stopped and resumed equals the run that was not, bit for bit."""

import copy
import dataclasses
import io
import warnings

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
    "random neurons": {"criterion": "random", "every_n_steps": 2, "target": "neurons", "beta": 0.8},
    "random features": {"criterion": "random", "every_n_steps": 2, "target": "features", "beta": 0.8},
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
    def __init__(self, settings, path=None, seed=0):
        torch.manual_seed(seed)
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


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_gone_back_within_the_run(kind, stop):
    whole = Run(SETTINGS[kind]).train(0, STEPS)
    run = Run(SETTINGS[kind]).train(0, stop)
    file = run.save()
    with warnings.catch_warnings():
        # Weights that are masked by later masks until the pruner has its own back are no loss.
        warnings.filterwarnings("error", "something other than the optimizer")
        run.train(stop, STEPS).load(file).train(stop, STEPS)
    assert_equal(whole, run)


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_of_two_states_loaded_one_after_the_other_the_last_counts(mode):
    run = Run({"mode": mode, "every_n_steps": 2, "density": 0.5}).train(0, 1)
    early = run.save()
    later = run.train(1, 4).save()
    want = run.net[0].weight.detach().clone()
    run.train(4, STEPS)
    run.net.load_state_dict(torch.load(early, weights_only=True)["net"])
    run.load(later)
    assert torch.equal(run.net[0].weight, want)


def test_zeros_that_were_kept_come_back_as_zeros():
    run = Run(SETTINGS["feedback"])
    with torch.no_grad():
        run.net[0].weight[0] = 0
    file = run.save()
    run.train(0, STEPS)
    assert (~run.pruner.masks["0.weight"][0]).any()
    run.load(file)
    assert not run.net[0].weight[0].any()


@pytest.mark.parametrize("stop", [1, 3])  # a refresh is due at step 3
def test_a_state_between_an_optimizer_step_and_the_pruners_own_counts_it(stop):
    settings = {"every_n_steps": 3, "beta": 0.5}
    whole = Run(settings).train(0, STEPS)
    run = Run(settings).train(0, stop - 1)
    step, run.pruner.step = run.pruner.step, lambda **_: []
    run.train(stop - 1, stop)
    file = run.save()
    run.pruner.step = step
    resumed = Run(settings).load(file)
    resumed.pruner.step()
    assert_equal(whole, resumed.train(stop, STEPS))
    run.pruner.step()
    assert_equal(whole, run.train(stop, STEPS))


@pytest.mark.parametrize(
    ("before", "now", "rows"),
    [
        ({"every_n_steps": 3}, {"every_n_epochs": 1}, [3, 6, 8]),
        ({"every_n_epochs": 1}, {"every_n_steps": 3}, [2, 4, 6, 9]),
    ],
)
def test_a_schedule_in_another_unit_goes_on_from_where_the_run_stands(before, now, rows):
    run = Run(before).train(0, 6)
    resumed = Run(now).load(run.save())
    assert resumed.pruner.clock.last_position == (3 if "every_n_epochs" in now else 6)
    resumed.train(6, 9)
    assert [event.step for event in resumed.pruner.trajectory] == rows


def test_a_copied_pruner_says_that_it_sees_no_step():
    run = Run({"every_n_steps": 1}).train(0, 2)
    other = copy.deepcopy(run)
    with pytest.warns(UserWarning, match="this pruner is a copy, which sees no optimizer step: make a new one"):
        other.train(2, 4)
    assert other.pruner.steps == 2
    assert run.train(2, 4).pruner.steps == 4


@pytest.mark.parametrize("mode", ["project", "freeze"])
def test_lbfgs_begins_anew_at_a_refresh(mode):
    torch.manual_seed(0)
    net, x, y = nn.Linear(12, 3), torch.randn(40, 12), torch.randn(40, 3)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
    pruner = EMPPruner(net, optimizer, mode=mode, density=0.4)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    pruner.refresh()
    state = copy.deepcopy(net.state_dict())
    optimizer.step(closure)
    found = net.weight.detach().clone()
    pruner.finalize()
    net.load_state_dict(state)
    optimizer.state.clear()
    pruner = EMPPruner(net, optimizer, mode=mode, density=0.4)
    pruner.refresh()
    optimizer.step(closure)
    assert torch.equal(net.weight, found)


@pytest.mark.parametrize("kind", ["random", "random neurons", "random features"])
@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_random_scores_of_a_resumed_process_follow_the_seed_of_the_run(kind, seed):
    whole, stopped = (Run(SETTINGS[kind], seed=seed).train(0, last) for last in (STEPS, 3))
    file = stopped.save()
    resumed = Run(SETTINGS[kind], seed=1).load(file).train(3, STEPS)
    assert_equal(whole, resumed)
    for name, scores in whole.pruner.scores().items():
        assert torch.equal(scores, resumed.pruner.scores()[name])
    assert resumed.pruner.state_dict()["seed"] == seed


def test_an_older_state_without_the_seed_leaves_the_seed_of_the_process():
    state = Run(SETTINGS["random"], seed=5).train(0, 3).pruner.state_dict()
    del state["seed"]
    own = Run(SETTINGS["random"], seed=1)
    before = own.pruner.scores()
    own.pruner.load_state_dict(state)
    assert all(torch.equal(scores, before[name]) for name, scores in own.pruner.scores().items())


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


def shorter(tensors, name):
    return {**tensors, name: tensors[name][:1]}


def other_evidence(state, **tensors):
    return {"evidence": {**state["evidence"], "tensors": {**state["evidence"]["tensors"], **tensors}}}


# kind of run, what is changed in its state, what the error says
DAMAGES = {
    "masks": ("feedback", lambda s: {"masks": shorter(s["masks"], "2.weight")}, "36 mask bits need 5 bytes"),
    "a mask less": (
        "neurons",
        lambda s: {"masks": {k: v for k, v in s["masks"].items() if k != "0.bias"}},
        "only some",
    ),
    "no unit mask": ("neurons", lambda s: {"units": {}}, "of '0' it holds only some of the masks"),
    "foreign mask": (
        "feedback",
        lambda s: {"masks": {**s["masks"], "x": s["masks"]["0.weight"]}},
        "other parameters: x",
    ),
    "no masks": ("feedback", lambda s: {"masks": None}, "its masks are no tensors by name"),
    "masks of lists": ("feedback", lambda s: {"masks": {"0.weight": [1]}}, "its masks are no tensors by name"),
    "foreign stash": ("feedback", lambda s: {"stash": {"x": s["stash"]["0.weight"]}}, "dense values behind no mask: x"),
    "stash": ("feedback", lambda s: {"stash": shorter(s["stash"], "2.weight")}, "dense values belong behind the mask"),
    "format": ("feedback", lambda s: {"format": 2}, r"of this version \(format 2, not 3\)"),
    "no format": ("feedback", lambda s: {"format": None}, "not the state of an EMP pruner"),
    "clock": ("feedback", lambda s: {"clock": {**s["clock"], "last_position": 400}}, "a clock that is ahead of itself"),
    "seed": ("random", lambda s: {"seed": "0"}, "its seed is '0', not an integer"),
    "no seed": ("random", lambda s: {"seed": None}, "its seed is None, not an integer"),
    "truth": ("random", lambda s: {"seed": True}, "its seed is True, not an integer"),
    "empty clock": (
        "feedback",
        lambda s: {"clock": {}},
        "nothing of steps, epochs, last_position, steps_at_refresh, steps_at_epoch, epoch_length\\)",
    ),
    "half a clock": ("feedback", lambda s: {"clock": {"steps": 5, "epochs": 2}}, "nothing of last_position, steps_at"),
    "whole numbers": (
        "feedback",
        lambda s: {"stash": {name: values.long() for name, values in s["stash"].items()}},
        "dense values behind the mask of '0.weight' are torch.int64",
    ),
    "no averages": ("feedback", lambda s: {"averages": None}, "its averages are no floating-point tensors by name"),
    "averages of 3": ("feedback", lambda s: {"averages": 3}, "its averages are no floating-point tensors by name"),
    "an average of 3": ("feedback", lambda s: {"averages": [3]}, "its averages are no floating-point tensors by name"),
    "numbers": (
        "feedback",
        lambda s: {"averages": [{"0.weight": [1.0]}]},
        "its averages are no floating-point tensors by name",
    ),
    "codes": (
        "feedback",
        lambda s: {"averages": [{"0.weight": torch.ones(3, dtype=torch.int8)}]},
        "its averages are no floating-point tensors by name",
    ),
    "rows": ("feedback", lambda s: {"trajectory": {**s["trajectory"], "total": -1}}, "1 rows of -1"),
    "row": ("feedback", lambda s: {"trajectory": {"rows": [{"step": 1}], "total": 1, "path": None}}, "'layers'"),
    "no batches": (
        "taylor",
        lambda s: {"evidence": {**s["evidence"], "batches": None}},
        "gradients are None",
    ),
    "no evidence": ("taylor", lambda s: {"evidence": None}, "gradients are None"),
    "no tensors": ("taylor", lambda s: {"evidence": {"batches": [7], "tensors": None}}, "its evidence is NoneType"),
    "list": ("taylor", lambda s: other_evidence(s, **{"weight:0.weight": [1.0]}), "no tensor of numbers"),
    "shape": (
        "taylor",
        lambda s: other_evidence(s, **{"weight:0.weight": torch.ones(9, 5)}),
        r"\(9, 5\).*of this model",
    ),
    "name": ("taylor", lambda s: other_evidence(s, **{"weight:1.weight": torch.ones(9, 6)}), "of this model"),
    "kind": ("taylor", lambda s: other_evidence(s, **{"x": torch.ones(9, 6)}), "'x'.*of this model"),
    "observer": ("wanda", lambda s: other_evidence(s, **{"site:0:total": torch.ones(6)}), "of this model"),
    "observed": ("wanda", lambda s: other_evidence(s, **{"site:0:total": torch.ones(9).double()}), "of this model"),
    "sum": ("wanda", lambda s: other_evidence(s, **{"site:0:sum": torch.ones(6).double()}), "of this model"),
    "units": (
        "neurons taylor",
        lambda s: other_evidence(s, **{"units:0:7": torch.ones(8).double()}),
        "of this model",
    ),
    "batch": (
        "neurons taylor",
        lambda s: other_evidence(s, **{"units:0:x": torch.ones(9).double()}),
        "of this model",
    ),
    "unit": (
        "neurons",
        lambda s: {"units": {"0": {"units": 9, "pruned": [9], "mean": None}}},
        "pruned ones of 9",
    ),
    "twice": ("neurons", lambda s: {"units": {"0": {"units": 9, "pruned": [1, 1], "mean": None}}}, "pruned ones of 9"),
    "size": ("neurons", lambda s: {"units": {"0": {"units": 8, "pruned": [], "mean": None}}}, "8 units of '0'"),
    "mean": ("features mean", lambda s: {"units": {"1": {**s["units"]["1"], "mean": [0.5]}}}, "the means of 9 units"),
    "no mean": ("features mean", lambda s: {"units": {"1": {**s["units"]["1"], "mean": None}}}, "the means of 9 units"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    kind, change, message = DAMAGES[damage]
    state = Run(SETTINGS[kind]).train(0, 5).pruner.state_dict()
    run, same = (Run(SETTINGS[kind]).train(0, 7) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        run.pruner.load_state_dict({**state, **change(state)})
    assert_equal(run, same)
    assert run.pruner.clock == same.pruner.clock
    assert_equal(run.train(7, STEPS + 2), same.train(7, STEPS + 2))


@pytest.mark.parametrize("state", [{}, {"hello": 1}, [], None], ids=str)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="not the state of an EMP pruner"):
        Run(SETTINGS["feedback"]).pruner.load_state_dict(state)


def test_a_state_that_cannot_be_read_in_full_leaves_a_warning_at_the_users_line():
    first = Run({"every_n_steps": 1}).train(0, 20)
    resumed = Run({"every_n_steps": 1})
    resumed.net.load_state_dict(first.net.state_dict())
    with pytest.warns(UserWarning, match=r"last 16 of 20 rows .* the 4 older ones had no file .* at step 5") as told:
        resumed.pruner.load_state_dict(first.pruner.state_dict())
    assert told[0].filename == __file__
    assert [event.step for event in resumed.pruner.trajectory] == [*range(5, 21)]
