"""The page of all architectures is what its results say, and a sample of the results is what the sweep finds now."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "benchmarks/results/architectures.json").read_text())
PAGE = ROOT / "docs/architectures.md"

# Depthwise and densely connected convolutions, windows, a table per head, experts, latent attention, two stacks.
SAMPLE = [
    *("timm/mobilenetv4", "timm/densenet", "timm/swin", "timm/levit"),
    *("transformers/gpt2", "transformers/mixtral", "transformers/deepseek_v3", "transformers/t5"),
]


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import sweep_architectures

        yield sweep_architectures


def found(row, target):
    """Return what the page says of a family and target, less the numbers that rounding may move."""
    cell = row[target]
    shrink = cell.get("shrink", {})
    return {
        **{key: cell.get(key) for key in ("layers", "units", "none", "left_out")},
        "shrinks": bool(shrink.get("removed")),
        "refused": shrink.get("refused"),
        "faults": cell.get("faults"),
    }


@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_is_as_the_results_say(family, sweep):
    targets = [target for target in sweep.CRITERIA if target in sweep.TARGETS]
    default = [sweep.criteria_of(target, None)[0] for target in targets]
    row = sweep.run_family(family, targets, default)
    for target in targets:
        assert found(row, target) == found(RECORD["families"][family], target)


def test_the_page_is_made_of_the_results(sweep):
    assert PAGE.read_text() == sweep.page_of(RECORD)


def test_the_results_have_every_family_and_no_fault(sweep):
    assert RECORD["families"].keys() == sweep.FAMILIES.keys()
    assert not list(sweep.faults_of(RECORD["families"]))


def test_a_promise_that_does_not_hold_is_a_fault(sweep, monkeypatch):
    def audit(pruner):
        return clean(pruner).__class__(owner=1, forward=0, optimizer=0, worst="a.weight", worst_count=1)

    clean = sweep.EMPPruner.audit
    monkeypatch.setattr(sweep.EMPPruner, "audit", audit)
    row = sweep.run_family("transformers/gpt2", ["heads"], ["weight_norm"])
    [(family, target, criterion, why)] = sweep.faults_of({"transformers/gpt2": row})
    assert (family, target, criterion) == ("transformers/gpt2", "heads", "weight_norm")
    assert "audit is not clean" in why


def test_a_weight_that_comes_back_is_a_fault(sweep, monkeypatch):
    def step(pruner):
        events = own_step(pruner)
        name, mask = next(iter(pruner.weight_masks.items()))
        pruner._backend.module.get_parameter(name).data[~mask] = 1.0
        return events

    own_step = sweep.EMPPruner.step
    monkeypatch.setattr(sweep.EMPPruner, "step", step)
    row = sweep.run_family("transformers/gpt2", ["weights"], ["magnitude"])
    assert "are not 0" in row["weights"]["faults"]["magnitude"]


def test_a_shrunk_model_that_differs_is_a_fault(sweep, monkeypatch):
    def shrink(model, *call):
        report = own_shrink(model, *call)
        next(model.parameters()).data.add_(1.0)
        return report

    own_shrink = sweep.shrink
    monkeypatch.setattr(sweep, "shrink", shrink)
    row = sweep.run_family("transformers/gpt2", ["heads"], ["weight_norm"])
    assert "differs by" in row["heads"]["faults"]["weight_norm"]
