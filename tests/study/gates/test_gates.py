"""`emp gates` as a whole: arms within their budgets, on the batches that follow; interrupted, resumed, side by side."""

import json
from itertools import islice

import pytest
import torch
import yaml

from emp_callbacks.cli.main import main
from emp_callbacks.study.comparison import StudyInterrupted
from emp_callbacks.study.gates import study as studying
from emp_callbacks.study.gates.arms import ARMS, Case
from emp_callbacks.study.gates.bench import bench_of
from emp_callbacks.study.gates.gated import first_open
from emp_callbacks.study.gates.masking import FixedHeads, Rescoring
from emp_callbacks.study.gates.study import gates_study
from emp_callbacks.study.gates.token_counts import VARIANTS, TokenCounts
from emp_callbacks.study.once.dense_models import dense_model
from emp_callbacks.study.once.study import run_once_study
from emp_callbacks.study.recipe.recipe import Recipe
from emp_callbacks.targets.heads import attention_heads

STEPS = 12  # of the model's own training, and of each arm


def write(folder, **changes):
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}; " for i in range(1200)))
    recipe = {
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "devices": 1,
            "limit_val_batches": 4,
            "limit_test_batches": 8,
            "val_check_interval": STEPS,
            **changes.get("trainer", {}),
        },
        "model": {
            "class_path": "emp_callbacks.study.recipe.tasks.LanguageModel",
            "init_args": {"n_layer": 2, "n_head": 8, "n_embd": 16, "sequence_length": 16, "lr": 0.02},
        },
        "data": {
            "class_path": "emp_callbacks.study.recipe.data.TextData",
            "init_args": {"file": str(text), "sequence_length": 16, "batch_size": 8},
        },
        "study": {"seeds": [0], "metric": "test/loss", "higher_is_better": False, **changes.get("study", {})},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def words(folder, out, *more):
    given = ["--config", folder / "toy.yaml", "--out", folder / out, "--models", folder / "models"]
    return ["gates", *map(str, given), "--steps", str(STEPS), "--batches", "4", *more]


def told(results):
    """Return the rows without the time that they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in results["rows"]]


def results_of(folder, out):
    return json.loads((folder / out / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("gates")
    write(home)
    assert main(words(home, "whole")) == 0
    return home


@pytest.fixture
def bench(folder):
    dense = dense_model(Recipe(folder / "toy.yaml"), 0, folder / "models", lambda *_: None)
    assert dense.reused
    with bench_of(dense, gates_study(steps=STEPS, evidence_batches=4).settings) as lent:
        yield lent


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_arm_keeps_exactly_its_budget(folder):
    results = results_of(folder, "whole")
    rows = results["rows"]
    (model,) = [row for row in rows if row["kind"] == "model"]
    arms = [row for row in rows if row["kind"] == "arm"]
    assert 0 < model["keep"] < model["n"] == 16
    assert all(len(set(row["kept"])) == row["keep"] for row in arms)
    for keep in (model["keep"], 4):
        assert {row["arm"] for row in arms if row["keep"] == keep} == set(ARMS) - {"Z"}
        assert len([row for row in arms if (row["arm"], row["keep"]) == ("R", keep)]) == 2
    assert {2, 4, 8, 12, model["keep"]} == {row["keep"] for row in arms if row["arm"] == "F"}
    highest = torch.tensor(model["scores"]).topk(4).indices.sort().values.tolist()
    for arm in "AB":
        assert [row["kept"] for row in arms if (row["arm"], row["keep"]) == (arm, 4)] == [highest]
    assert {row["beta"] for row in rows if row["kind"] == "by_token"} == {0.5, 0.75, 1.0}


def test_gates_begin_as_their_arm_says_and_end_at_what_they_open(folder):
    rows = [row for row in results_of(folder, "whole")["rows"] if row["kind"] == "arm" and "open" in row]
    assert {row["arm"] for row in rows} == {"D", "E", "E'", "F", "G"}
    for row in rows:
        opened = torch.tensor(row["open"])
        assert set(row["kept"]) == set(opened.topk(row["keep"]).indices.tolist())
        if row["arm"] in ("E", "E'"):  # the others have to come down from all heads, in eight steps
            assert row["expected"] == pytest.approx(row["keep"], abs=1.0)
    by_arm = {row["arm"]: row["kept"] for row in rows if row["keep"] == 4}
    assert len({tuple(kept) for kept in by_arm.values()}) > 1


def test_the_report_can_be_written_again(folder, capsys):
    out = folder / "whole"
    first = (out / "report.html").read_text()
    assert (out / "gates.png").read_bytes()[:4] == b"\x89PNG"
    assert "At EMP's own count" in first.replace("&#39;", "'")
    assert "core-minutes" in first
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == first
    assert "Three planned comparisons" in capsys.readouterr().out


def test_interrupted_it_loses_one_arm_and_ends_as_if_it_had_not_been(folder, monkeypatch):
    measured, arm, all_cases = [], studying._arm, studying.cases_of

    def counted(bench, case):
        measured.append(case)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return arm(bench, case)

    monkeypatch.setattr(studying, "_arm", counted)
    monkeypatch.setattr(studying, "cases_of", lambda *given: [c for c in all_cases(*given) if c.arm in "ADGR"][:6])
    study = gates_study(steps=STEPS, evidence_batches=4)
    call = {"models": folder / "models"}
    with pytest.raises(StudyInterrupted):
        run_once_study(study, [Recipe(folder / "toy.yaml")], folder / "cut", **call)
    assert len(list((folder / "cut" / "runs").glob("*.cases"))) == 1
    results = told(run_once_study(study, [Recipe(folder / "toy.yaml")], folder / "cut", **call))
    assert len([row for row in results if row["kind"] == "arm"]) == 6
    assert len(measured) == 7
    whole = told(results_of(folder, "whole"))
    assert all(row in whole for row in results)
    assert not list((folder / "cut" / "runs").glob("*.cases"))


@pytest.mark.processes
@pytest.mark.slow
def test_side_by_side_the_rows_are_the_same(folder):
    assert main(words(folder, "jobs", "--jobs", "2")) == 0
    assert told(results_of(folder, "jobs")) == told(results_of(folder, "whole"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainer": {"max_steps": -1, "max_epochs": 1}}, "set trainer.max_steps"),
        ({"trainer": {"accumulate_grad_batches": 2}}, "accumulate_grad_batches to 1"),
        ({"study": {"metric": "test/perplexity"}}, "set study.metric to test/loss"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys, changes, says):
    write(tmp_path, **changes)
    assert main(words(tmp_path, "out")) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "models").exists()


def test_a_second_recipe_is_refused(folder, capsys):
    assert main(words(folder, "two", "--config", "a.yaml", "b.yaml")) == 2
    assert "name one" in capsys.readouterr().err
    assert not (folder / "two").exists()


def test_too_little_text_is_named(folder):
    dense = dense_model(Recipe(folder / "toy.yaml"), 0, folder / "models", lambda *_: None)
    settings = {**gates_study(steps=10_000).settings}
    with (
        pytest.raises(ValueError, match="training batches, and the model takes 12 and each arm 10000"),
        bench_of(dense, settings),
    ):
        pass


# ---- what all arms share --------------------------------------------------------------------------------------------


def test_the_batches_are_those_that_follow_and_the_loss_is_that_of_the_trainer(bench):
    loader = bench.dense.training.data.train_dataloader()
    for own, (tokens, targets) in zip(bench.batches, islice(loader, STEPS, 2 * STEPS), strict=True):
        assert torch.equal(own[0], tokens)
        assert torch.equal(own[1], targets)
    bench.reset()
    assert bench.loss("test") == pytest.approx(bench.dense.metrics["test/loss"], rel=1e-6)


def columns(bench):
    """Return which heads have an output projection that is not 0, as the mask of all heads."""
    found = []
    for target in attention_heads(bench.module):
        weight = target.heads.projection.weight.detach()
        found += [bool(weight[target.heads.unit_of == head].any()) for head in range(target.units)]
    return torch.tensor(found)


def test_pruned_heads_stay_zero_at_every_step_and_all_else_trains(bench):
    kept = bench.highest(bench.scores, 5)
    bench.reset()
    masking, optimizer, seen = FixedHeads(bench, kept), bench.optimizer(), []
    masking.begin(optimizer)

    def after_step(step):
        masking.after_step(step)
        seen.append(columns(bench))

    bench.train(optimizer, after_step)
    masking.finish()
    assert len(seen) == STEPS
    assert all(torch.equal(now, bench.flat(kept).bool()) for now in seen)
    moved = [name for name, value in bench.module.state_dict().items() if not value.equal(bench.dense.weights[name])]
    assert len(moved) > 20


def test_emps_heads_without_training_are_the_model_with_the_others_zeroed(bench, folder):
    arms = [row for row in results_of(folder, "whole")["rows"] if row["kind"] == "arm"]
    (row,) = [row for row in arms if (row["arm"], row["keep"]) == ("A", 4)]
    bench.reset()
    masks = bench.highest(bench.scores, 4)
    with torch.no_grad():
        for target in attention_heads(bench.module):
            target.heads.projection.weight[~masks[target.name][target.heads.unit_of]] = 0.0
    assert bench.loss("test") == row["test_loss"]


def test_heads_go_a_tenth_at_a_time_and_never_come_back(bench):
    bench.reset()
    masking, optimizer, counts = Rescoring(bench, 4), bench.optimizer(), [16]
    masking.begin(optimizer)
    before = columns(bench)

    def after_step(step):
        nonlocal before
        masking.after_step(step)
        now = columns(bench)
        assert not (now & ~before).any()
        before = now
        counts.append(int(now.sum()))

    bench.train(optimizer, after_step)
    assert counts == [16, 15, 13, 12, 10, 8, 7, 5, 4, 4, 4, 4, 4]


def test_an_arm_depends_on_nothing_that_ran_before_it(bench):
    cases = [Case("D", 4), Case("R", 4, 1)]
    first = [studying._arm(bench, case)["test_loss"] for case in cases]
    assert [studying._arm(bench, case)["test_loss"] for case in reversed(cases)] == first[::-1]


def test_gates_begin_with_emps_scores_or_with_the_same_on_other_heads(bench):
    assert first_open(bench, 5, "open") == "open"
    scores = bench.flat(bench.scores)
    own, other = (
        torch.cat([torch.tensor(part) for part in first_open(bench, 5, init).values()]) for init in ("emp", "permuted")
    )
    assert own.sum() == pytest.approx(5.0, abs=1e-3)
    inside = (own > 0.011) & (own < 0.989)  # the rest is held there
    assert inside.sum() > 8
    assert (own / scores)[inside].tolist() == pytest.approx([float((own / scores)[inside][0])] * int(inside.sum()))
    assert torch.equal(own.sort().values, other.sort().values)
    assert not torch.equal(own, other)


# ---- heads by token -------------------------------------------------------------------------------------------------


def let_heads_differ(bench):
    """Make the weights so large that heads differ between tokens, and what they hand on from what they add."""
    with torch.no_grad():
        for target in attention_heads(bench.module):
            target.heads.module.c_attn.weight.normal_()
            target.heads.projection.weight.normal_().mul_(2.0 ** target.heads.unit_of[:, None])


def test_all_ways_of_counting_keep_as_many_heads_and_none_changes_the_model(bench):
    bench.reset()
    let_heads_differ(bench)
    before = bench.loss("test")
    counts = TokenCounts(bench, 0.6)
    found = {variant: counts.measure(variant) for variant in VARIANTS}
    assert len({row["heads"] for row in found.values()}) == 1
    assert 1 < found["B1"]["heads"] < 8
    assert len({row["test_loss"] for row in found.values()}) == len(VARIANTS)
    assert bench.loss("test") == before == pytest.approx(found["B1"]["dense_loss"])


def test_with_a_large_beta_every_head_is_kept(bench):
    bench.reset()
    counts = TokenCounts(bench, 100.0)
    assert counts.measure("B1")["test_loss"] == bench.loss("test")
    assert (counts.counts == 8).all()


def test_a_tokens_own_count_is_that_of_the_norms_of_what_its_heads_add(bench):
    bench.reset()
    let_heads_differ(bench)
    counts = TokenCounts(bench, 0.75)
    first = attention_heads(bench.module)[0].heads
    caught = []
    handles = first.register(lambda values: caught.append(values.detach()))
    bench.loss("test")
    for handle in handles:
        handle.remove()
    outputs = torch.cat([values.flatten(0, 1) for values in caught]).double()
    weight = first.projection.weight.detach().double()
    norms = torch.stack(
        [(outputs[:, first.unit_of == head] @ weight[first.unit_of == head]).norm(dim=1) for head in range(8)], dim=1
    )
    expected = (0.75 * norms.sum(1) ** 2 / (norms**2).sum(1) + 0.01).floor().clamp(1, 8).long()
    assert len(expected.unique()) > 2
    assert (counts.counts[0] == expected).float().mean() > 0.999  # floor() of float32 beside float64
