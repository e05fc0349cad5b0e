"""N:M patterns: in every mode and criterion, on shards, in checkpoints, beside what a user may ask for."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emp_callbacks import EMPConfig, EMPPruner
from emp_callbacks.core.group_pattern import GroupPattern, group_mask
from emp_callbacks.layer.segment import Span
from emp_callbacks.pruning.groups import Scored
from emp_callbacks.pruning.pattern_decision import decide_pattern
from tests.checkpoint.thread_ranks import ThreadRank, on_ranks

PATTERN = GroupPattern(2, 4)


def net():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(convolutions, nn.Linear(8 * 16, 12), nn.ReLU(), Conv1D(7, 12), nn.Linear(7, 3))


def train(model, pruner, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        yield pruner.step()


def obeys(mask, name, pattern):
    """Whether exactly N of every M stay along the inputs, which Conv1D has first and all others second."""
    keep, size = map(int, pattern.split(":"))
    groups = mask.movedim(0 if name == "3.weight" else 1, -1).reshape(-1, size)
    return bool((groups.sum(1) == keep).all())


@pytest.mark.filterwarnings("ignore:left out of pruning")
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "saliency", "random"])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_a_pattern_holds_at_every_refresh(pattern, mode, criterion):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    settings = {"criterion": criterion, "evidence_steps": 2}
    pruner = EMPPruner(model, optimizer, every_n_steps=2, pattern=pattern, mode=mode, **settings)
    for events in train(model, pruner, optimizer, 4):
        assert events == [] or all(obeys(mask, name, pattern) for name, mask in pruner.masks.items())
        assert events == [] or pruner.audit().clean
    assert list(pruner.masks) == ["0.0.weight", "1.weight", "3.weight"]
    assert [(row.group, row.keep / row.n) for row in pruner.last_events] == [
        (name, GroupPattern.parse(pattern).density) for name in pruner.masks
    ]


def test_rows_say_n_eff_beside_the_pattern_and_what_they_keep_of_the_mass():
    model = net()
    pruner = EMPPruner(model, pattern="2:4")
    free = EMPPruner(net(), scope="tensor")
    rows = pruner.refresh()
    expected = {row.group: row for row in free.refresh()}
    for row in rows:
        scores = dict(net().named_parameters())[row.group].detach().abs()
        mask = pruner.masks[row.group]
        assert row.n_eff == pytest.approx(expected[row.group].n_eff)
        assert row.threshold == float(scores[mask].min())
        assert row.preserved_mass == pytest.approx(float(scores[mask].sum() / scores.sum()))
        assert row.tight_mass_bound == 0.5 <= row.preserved_mass
        assert row.beta is None


@pytest.mark.filterwarnings("ignore:left out of pruning")
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_rewire_replaces_weights_within_their_groups(grow):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"mode": "rewire", "grow": grow, "drop_fraction": 0.4, "evidence_steps": 1}
    pruner = EMPPruner(model, optimizer, every_n_steps=2, pattern="2:4", **settings)
    churn = []
    for events in train(model, pruner, optimizer, 6):
        churn += [event.churn for event in events if event.group == "1.weight"]
        assert events == [] or all(obeys(mask, name, "2:4") for name, mask in pruner.masks.items())
    assert churn[0] == 0.5
    assert all(0.1 < one <= 0.4 for one in churn[1:])  # of all weights; half are kept, 0.4 of these are replaced


class Rank(ThreadRank):
    def all_min(self, value):
        return self.from_all(value).amin(0)


def span_of(shape, output_dim, at, *, replicated):
    sizes = {"shape": torch.Size(shape), "output_dim": output_dim}
    return Span(name="w", positions=at, replicated=replicated, counted=slice(None), **sizes)


def spans(shape, output_dim, cuts, dim):
    """Spans of a tensor cut into flat runs, or along a dimension, and the flat positions of each."""
    size = torch.Size(shape).numel()
    if dim is None:
        parts = [torch.arange(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    else:
        parts = [part.flatten() for part in torch.arange(size).view(shape).tensor_split(cuts, dim)]
    for part in parts:
        at = int(part[:1].sum()) if dim is None else part
        yield part, span_of(shape, output_dim, at, replicated=False)


@pytest.mark.parametrize(
    ("shape", "output_dim"), [((6, 8), 0), ((8, 6), 1), ((4, 8, 3, 3), 0), ((8, 4, 3), 1)], ids=str
)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_shards_decide_as_one_process(shape, output_dim, dim):
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        scores = torch.randint(-5, 6, shape, generator=generator).float()  # many ties, and zeros
        most = scores.numel() if dim is None else shape[dim]
        cuts = sorted(torch.randint(0, most + 1, (2,), generator=generator).tolist())
        held = [(span, scores.flatten()[part]) for part, span in spans(shape, output_dim, cuts, dim)]
        found = on_ranks(3, partial(_decided, held))
        alone = SimpleNamespace(rank=0, world_size=1, all_sum=lambda x: x, all_min=lambda x: x)
        whole = span_of(shape, output_dim, 0, replicated=True)
        (expected,) = decide_pattern([Scored(whole, scores)], PATTERN, alone, 0)
        for (part, _), (decision, mask) in zip(spans(shape, output_dim, cuts, dim), found, strict=True):
            assert torch.equal(mask, expected.mask(0).flatten()[part])
            assert (decision.keep, decision.n_eff, decision.threshold) == (
                expected.keep,
                expected.n_eff,
                expected.threshold,
            )


def _decided(held, rank):
    rank.__class__ = Rank
    (decision,) = decide_pattern([Scored(*held[rank.rank])], PATTERN, rank, 0)
    return decision, decision.mask(0)


def test_inputs_that_are_no_multiple_are_left_out_said_and_refused_by_name():
    with pytest.warns(UserWarning, match=r"its inputs are no multiple of the pattern's M: 4.weight$"):
        pruner = EMPPruner(net(), pattern="2:4")
    assert "4.weight" not in pruner.masks
    assert [one.name for one in pruner.left_out if "multiple" in one.reason] == ["4.weight"]
    with pytest.raises(ValueError, match=r"'4.weight' has 7 inputs, which pattern='2:4' does not divide"):
        EMPPruner(net(), pattern="2:4", include=["*weight"])
    with pytest.raises(ValueError, match="no weight has a multiple of 64 inputs"):
        EMPPruner(nn.Linear(6, 6), pattern="2:64")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"density": 0.5}, "density=None, got 0.5"),
        ({"beta": 0.7}, "beta=1.0, got 0.7"),
        ({"scope": "row"}, "scope='tensor', got 'row'"),
        ({"target": "heads"}, "target='weights', got 'heads'"),
        ({"min_density": 0.1}, "min_density=0.0, got 0.1"),
    ],
)
def test_what_a_pattern_decides_is_not_asked_for_twice(settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        EMPConfig(pattern="2:4", **settings)


def test_a_state_of_another_pattern_is_refused():
    state = EMPPruner(nn.Linear(8, 8), pattern="2:4").state_dict()
    with pytest.raises(ValueError, match="pattern='2:4', this run has pattern='1:4'"):
        EMPPruner(nn.Linear(8, 8), pattern="1:4").load_state_dict(state)


def test_once_takes_a_pattern_in_place_of_a_count_and_the_other_way_round():
    ones = EMPConfig(every_n_steps=1, density=0.3, scope="row").once(pattern="2:4")
    assert (ones.pattern, ones.density, ones.scope) == ("2:4", None, "tensor")
    kept = EMPConfig(every_n_steps=1, pattern="2:4").once(density=None)  # as a study's one-shot arm asks
    assert (kept.pattern, kept.scope) == ("2:4", "tensor")
    back = EMPConfig(every_n_steps=1, pattern="2:4").once(beta=0.5)
    assert (back.pattern, back.beta, back.scope) == (None, 0.5, "global")


def test_groups_lie_along_the_inputs_of_a_convolution():
    model = nn.Conv2d(8, 2, 3)
    pruner = EMPPruner(model, pattern="2:4")
    pruner.refresh()
    expected = group_mask(model.weight.detach().view(2 * 2, 4, 9), 2)
    kept = pruner.masks["weight"].view(4, 4, 9)
    assert torch.equal(kept, expected)
