"""Triton's kernels, interpreted on the CPU, beside plain torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emp_callbacks.core.row_parts import RowCuts
from emp_callbacks.core.search import HostSearch
from emp_callbacks.core.threshold import ScoredPart, local_sum
from tests.core.pretended_ranks import PretendedRanks

pytest.importorskip("triton")
from emp_callbacks.core.kernels import choosing, rows, search, survey
from emp_callbacks.core.kernels.choosing import Choice, OneCut, choose_tensors
from emp_callbacks.core.kernels.rows import ALL_TIES, row_moments, row_thresholds
from emp_callbacks.core.kernels.search import DeviceSearch
from emp_callbacks.core.kernels.survey import sample_tensors, survey_tensors, ties_before
from emp_callbacks.core.kernels.tables import addresses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = [1000, 17, 256, 0, 1]  # four tiles, less than one, exactly one, none, one score
FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let a few hundred scores be many tiles, and large groups."""
    monkeypatch.setattr(survey, "BLOCK", 64)
    monkeypatch.setattr(survey, "TILE", 256)
    monkeypatch.setattr(choosing, "BLOCK", 64)
    monkeypatch.setattr(choosing, "TILE", 256)
    monkeypatch.setattr(search, "LEAST_SAMPLE", 128)
    monkeypatch.setattr(search, "SAMPLE", 256)


def key_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def keys(scores, dtype):
    """Return the bit patterns of magnitudes, int64."""
    return scores.abs().to(dtype).view(torch.int64 if dtype == torch.float64 else torch.int32).long()


def tensors(dtype, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(length, generator=generator).to(dtype) for length in lengths]
    values[0][3:60] = 0
    return values


# ---- survey ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tile", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_survey_counts_sums_and_fills_windows(dtype, by_tile):
    scores, key = tensors(dtype), key_of(dtype)
    integer, bits = (torch.int64, 63) if key == torch.float64 else (torch.int32, 31)
    group_of, bins = [1, 0, 1, 0, 0], 32
    shift = torch.tensor([bits - 12, bits - 11], dtype=integer)  # two and four octaves: many lie above
    low = keys(torch.tensor([0.25, 0.01], dtype=key), key).to(integer)
    groups = torch.tensor(group_of, dtype=torch.int32)
    seen = survey_tensors(scores, groups, low, shift, bins, by_tile=by_tile, sums=True)
    expected = torch.zeros((seen.tiles.count, bins) if by_tile else (2, bins), dtype=torch.int64)
    for i, own in enumerate(scores):
        g, wide = group_of[i], own.double().abs()
        exact = torch.stack([wide.sum(), wide.square().sum(), (own != 0).sum()])
        torch.testing.assert_close(seen.moments[i], exact, rtol=1e-12, atol=0)
        bin_n = (keys(own, key) - int(low[g])) >> int(shift[g])
        assert int(seen.above[i]) == int((bin_n >= bins).sum())
        inside = (bin_n >= 0) & (bin_n < bins) & (own != 0)
        tile = (
            torch.arange(len(own)) // survey.TILE + int(seen.tiles.first[i]) if by_tile else torch.full_like(bin_n, g)
        )
        expected.index_put_((tile[inside], bin_n[inside]), torch.tensor(1), accumulate=True)
    assert torch.equal(seen.bins.long(), expected)


def test_a_survey_without_sums_sums_nothing():
    window = torch.zeros(1, dtype=torch.int32), torch.full((1,), 20, dtype=torch.int32)
    groups = torch.zeros(len(LENGTHS), dtype=torch.int32)
    seen = survey_tensors(tensors(torch.float32), groups, *window, 2048, by_tile=False, sums=False)
    assert not seen.moments.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_takes_one_of_every_so_many(dtype):
    scores, steps, counts = tensors(dtype, [1000, 0, 300]), [3.7, 3.7, 1.0], [270, 0, 300]
    key = key_of(dtype)
    sample, groups = sample_tensors(scores, counts, steps, torch.tensor([2, 0, 1], dtype=torch.int32), key)
    assert sample.dtype == key
    assert groups.tolist() == [2] * 270 + [1] * 300
    golden = torch.arange(270, dtype=torch.float64) * 0.6180339887498949
    at = ((torch.arange(270) + golden - golden.floor()) * 3.7).long()
    assert torch.equal(sample[:270], scores[0][at].abs().to(key))
    assert torch.equal(sample[270:], scores[2].abs().to(key))  # at every place once: step 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_before_an_index_are_counted(dtype):
    scores = [(own * 2).round() for own in tensors(dtype)]
    key = key_of(dtype)
    value = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0], dtype=key)
    tiles = survey.tiles_of([len(own) for own in scores], survey.TILE, torch.device("cpu"))
    equal = [own.abs().to(key) == one for own, one in zip(scores, value, strict=True)]
    of_tiles = [part.sum() for own in equal for part in own.split(survey.TILE) if len(part)]
    upto = torch.cat([torch.zeros(1, dtype=torch.int64), torch.stack(of_tiles).cumsum(0)])
    limits = torch.stack([torch.tensor([0, 1, 63, 256, 257, 999, 1000]).clamp(max=len(own)) for own in scores])
    found = ties_before(scores, value, upto, tiles, limits)
    exact = [[int(own[:limit].sum()) for limit in row] for own, row in zip(equal, limits.tolist(), strict=True)]
    assert found.tolist() == exact


# ---- search ---------------------------------------------------------------------------------------------------------


def cut_into(groups, length, one_by_one=False):
    """Return parts of some groups' scores, with the group of each."""
    parts, group_of = [], []
    for g, scores in enumerate(groups):
        for at, piece in enumerate(scores.split(length) if scores.numel() else [scores]):
            start = at * length
            parts.append(ScoredPart(piece, torch.arange(start, start + len(piece)) if one_by_one else start))
            group_of.append(g)
    return parts, group_of


def masks_of(thresholds, parts, group_of):
    masks = {}
    for part, g in zip(parts, group_of, strict=True):
        if thresholds[g] is not None:
            masks.setdefault(g, []).append(thresholds[g].mask(part))
    return {g: torch.cat(own) for g, own in masks.items()}


def check_search(groups, keep, key, parts_of=None, share=lambda fraction: fraction):
    """Assert that both searches find the same of groups, whole, that are searched in some parts; return how many looks.

    Args:
        groups: The scores of each.
        keep: 0: not asked for.
        key: What they compare in.
        parts_of: The parts and the group of each.
        share: As for `look`.
    """
    parts, group_of = parts_of or cut_into(groups, 300)
    sizes = [sum(len(p.scores) for p, g in zip(parts, group_of, strict=True) if g == i) for i in range(len(groups))]
    host = HostSearch(parts, group_of, sizes, key, local_sum)
    device = DeviceSearch(parts, group_of, sizes, key, local_sum)
    torch.testing.assert_close(device.look(share), host.look(share), rtol=1e-12, atol=0)
    expected, found = host.thresholds(keep), device.thresholds(keep)
    assert [one and one.key for one in found] == [one and one.key for one in expected]
    ours, theirs = masks_of(found, parts, group_of), masks_of(expected, parts, group_of)
    assert ours.keys() == {g for g, count in enumerate(keep) if count} == theirs.keys()
    for g, mask in ours.items():
        assert torch.equal(mask, theirs[g])
        assert int(mask.sum()) == keep[g]
    return found


def kind_of_scores(kind, size, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator)
    made = {
        "normal": scores,
        "wide": scores**5,
        "few values": (scores * 2).round(),
        "half 0": scores * (torch.rand(size, generator=generator) < 0.5),
        "all equal": torch.full((size,), -0.75),
        "all 0": torch.zeros(size),
        "tiny": scores * 1e-6,
    }[kind]
    return made.clamp(-6e4, 6e4).to(dtype)


KINDS = ["normal", "wide", "few values", "half 0", "all equal", "all 0", "tiny"]
group_strategy = st.tuples(st.sampled_from(KINDS), st.integers(1, 600), st.floats(0, 1), st.booleans())


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(st.lists(group_strategy, min_size=1, max_size=3), st.integers(0, 1 << 20), st.sampled_from([100, 300, 2000]))
def test_both_searches_find_the_same(dtype, kinds, seed, length):
    groups, keep = [], []
    for at, (kind, size, share, asked) in enumerate(kinds):
        groups.append(kind_of_scores(kind, size, seed + at, dtype))
        nonzero = int((groups[-1] != 0).sum())
        keep.append(max(1, round(share * nonzero)) if asked and nonzero else 0)
    check_search(groups, keep, key_of(dtype), cut_into(groups, length, one_by_one=seed % 2 == 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_sample_is_right_one_pass_finds_the_threshold(monkeypatch, dtype):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = scores.double().abs()
    keep = int(wide.sum() ** 2 / wide.square().sum())
    looks = count_looks(monkeypatch)
    check_search([scores], [keep], key_of(dtype))
    # And one pass that finds the last of the equal scores that are kept, where the first did not count them by tiles.
    assert len(looks) <= {2: 3, 4: 3, 8: 4}[dtype.itemsize]


def count_looks(monkeypatch):
    looks, inner = [], DeviceSearch._survey

    def counted(self, groups, **asked):
        looks.append(groups)
        return inner(self, groups, **asked)

    monkeypatch.setattr(DeviceSearch, "_survey", counted)
    return looks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [0.0, 0.9, 100.0])
def test_windows_that_miss_are_noticed(monkeypatch, dtype, low):
    def wrong(self, share):
        key = int(keys(torch.tensor([low]).to(dtype), self._dtype))  # as a score's: what no score has is 0
        self._blind = 0
        self._low = self._filled(len(self._sizes), key)
        self._shift = self._filled(len(self._sizes), self._empty_bits)

    monkeypatch.setattr(DeviceSearch, "_expect", wrong)
    groups = [kind_of_scores(kind, 500, at, dtype) for at, kind in enumerate(["normal", "few values", "wide"])]
    check_search(groups, [200, 300, 7], key_of(dtype))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64)])
def test_parts_of_one_group_may_have_different_dtypes(dtypes):
    whole = torch.randn(1200, generator=torch.Generator().manual_seed(3))
    parts = [ScoredPart(own.to(dtypes[at % len(dtypes)]), 100 * at) for at, own in enumerate(whole.split(100))]
    key = torch.float64 if torch.float64 in dtypes else torch.float32
    for keep in (1, 500, 1100):
        check_search([whole], [keep], key, (parts, [0] * len(parts)))


def test_empty_parts_and_groups_of_one_score_are_served():
    groups = [torch.tensor([-2.0]), torch.randn(700, generator=torch.Generator().manual_seed(1))]
    parts = [ScoredPart(groups[0], 0), ScoredPart(torch.empty(0), 0), *(cut_into(groups[1:], 300)[0])]
    group_of = [0, 1] + [1] * (len(parts) - 2)
    check_search(groups, [1, 99], torch.float32, (parts, group_of))
    check_search(groups, [0, 99], torch.float32, (parts, group_of))
    check_search(groups, [0, 0], torch.float32, (parts, group_of))


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.37, 1.0])
def test_a_guess_may_be_wrong(share):
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(2))
    for keep in (1, 1000, 2000):
        check_search([scores], [keep], torch.float32, share=lambda f: torch.full_like(f, share))


def test_more_kept_than_there_are_is_an_error():
    scores = torch.cat([torch.zeros(600), torch.ones(5)])
    for dtype in (torch.float32, torch.bfloat16):
        found = DeviceSearch([ScoredPart(scores.to(dtype), 0)], [0], [605], torch.float32, local_sum)
        found.look(lambda fraction: fraction)
        with pytest.raises(RuntimeError, match="fewer scores that are not 0"):
            found.thresholds([6])


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), (2, torch.float64), (3, torch.float32)])
def test_ranks_find_what_one_finds(count, dtype):
    kinds = ["normal", "few values", "half 0", "all equal"]
    groups = [kind_of_scores(kind, 400, at, dtype) for at, kind in enumerate(kinds)]
    keep = [150, 200, 60, 0]
    alone = check_search(groups, keep, key_of(dtype))
    parts, group_of = cut_into(groups, 110)

    def work(rank, all_sum):
        own = [ScoredPart(torch.empty(0, dtype=dtype), 0), *parts[rank::count]]  # a rank may hold nothing of a group
        found = DeviceSearch(own, [3, *group_of[rank::count]], [400] * 4, key_of(dtype), all_sum)
        found.look(lambda fraction: fraction)
        return found.thresholds(keep)

    for found in PretendedRanks(count).run(work):
        assert [one and one.key for one in found] == [one and one.key for one in alone]
        ours, theirs = masks_of(found, parts, group_of), masks_of(alone, parts, group_of)
        assert all(torch.equal(ours[g], theirs[g]) for g in theirs)


# ---- masks ----------------------------------------------------------------------------------------------------------

HOW = ["no values", "in place", "into others"]


def check_choice(scores, cuts, kept, dtype, how, within_old, old, same_mask=False):
    """Assert that masks, values and counts of one launch are those of torch; `kept`: what cuts alone would keep."""
    sources = [None if how == "no values" else torch.randn(own.shape).to(dtype) for own in scores]
    before = [None if one is None else one.clone() for one in sources]
    targets = sources if how != "into others" else [torch.full_like(one, 9) for one in sources]
    was = [None if one is None else one.clone() for one in old]
    new = [torch.zeros(own.shape, dtype=torch.bool) for own in scores]
    if same_mask:
        new = [mask if one is None else one for mask, one in zip(new, old, strict=True)]
    counted = [(own.numel() // 7, own.numel() - own.numel() // 5) for own in scores]
    choices = [Choice(*each) for each in zip(scores, cuts, counted, old, new, sources, targets, strict=True)]
    key = key_of(scores[0].dtype)
    found = choose_tensors(choices, key, within_old=within_old)
    for i, own in enumerate(scores):
        held = torch.ones_like(kept[i]) if was[i] is None else was[i]
        mask = kept[i] & held if within_old else kept[i]
        assert torch.equal(new[i], mask)
        if how != "no values":
            assert torch.equal(targets[i], torch.where(mask, before[i], 0))
        if how == "into others":
            assert torch.equal(sources[i], before[i])
        at = slice(*counted[i])
        mask, held = mask.reshape(-1)[at], held.reshape(-1)[at]
        mass = own.abs().to(key).reshape(-1)[at][mask].double().sum()
        exact = [mask.sum(), mass, (mask ^ held).sum(), (mask & ~held).sum()]
        assert found[i].tolist() == pytest.approx([float(one) for one in exact], rel=1e-12, nan_ok=True)


def some_masks(scores):
    masks = [torch.rand(own.shape) > 0.4 for own in scores]
    return [None, *masks[1:]]


@pytest.mark.parametrize("within_old", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_one_cut_each(dtype, how, within_old):
    scores = [(own * 2).round() / 2 for own in tensors(dtype)]
    cuts = [OneCut(0.5, 400), OneCut(1.0, 9), OneCut(0.0, 0), OneCut(1.0, 0), OneCut(0.5, 1)]
    scores[0][399:401], kept = 0.5, []  # the last tie that is kept and the first that is not
    for own, cut in zip(scores, cuts, strict=True):
        magnitude = own.abs().double()
        kept.append((magnitude > cut.value) | ((magnitude == cut.value) & (torch.arange(len(own)) < cut.ties_end)))
    check_choice(scores, cuts, kept, dtype, how, within_old, some_masks(scores))
    check_choice(scores, cuts, kept, dtype, how, within_old, some_masks(scores), same_mask=True)


def test_a_value_compares_in_the_dtype_of_the_scores():
    scores = torch.tensor([0.1, 0.1 + 1e-12, 0.1 - 1e-12], dtype=torch.float64)
    check_choice(
        [scores], [OneCut(0.1, 1)], [torch.tensor([True, True, False])], torch.float64, "in place", False, [None]
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_that_are_not_aligned(dtype):
    scores = [torch.randn(1001)[1:], torch.randn(130)[1:]]
    assert addresses([scores], torch.device("cpu"))[1] == 1
    cuts = [OneCut(0.7, 0), OneCut(0.2, 0)]
    kept = [own.abs() > cut.value for own, cut in zip(scores, cuts, strict=True)]
    old = [torch.rand(1003)[3:] > 0.5, None]
    check_choice(scores, cuts, kept, dtype, "in place", True, old)


@pytest.mark.parametrize("within_old", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", [(1, 6, 50), (4, 3, 7), (5, 1, 80)])  # rows of A * B scores each
def test_masks_of_a_cut_for_each_row(shape, how, within_old):
    for dtype in DTYPES:
        scores = [(torch.randn(shape) * 2).round().to(dtype) / 2, torch.randn(2, 0, 3).to(dtype)]
        scores[0][0, 0, 1] = torch.nan  # of the row that is kept whole
        key, count = key_of(dtype), shape[1]
        value = torch.full((count,), 0.5, dtype=key)
        value[0] = -torch.inf
        last_tie = torch.arange(count) * 3
        last_tie[-1] = ALL_TIES if count > 1 else 0
        columns = (torch.arange(shape[0])[:, None] * shape[2] + torch.arange(shape[2]))[:, None]
        magnitude = scores[0].abs().to(key)
        lowest = value[None, :, None]
        below = (magnitude < lowest) | ((magnitude == lowest) & (columns > last_tie[None, :, None]))
        cuts = [RowCuts(value, last_tie, shape[2]), RowCuts(value[:0], last_tie[:0], 3)]
        kept = [~below, torch.ones_like(scores[1], dtype=torch.bool)]
        assert kept[0][:, 0].all()
        check_choice(scores, cuts, kept, dtype, how, within_old, some_masks(scores[:1]) + some_masks(scores[1:]))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [1 << 14, 16], ids=["in registers", "read again"])
@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(st.integers(0, 3), st.integers(1, 50), st.integers(0, 1 << 20), st.booleans())
def test_rows_equal_a_stable_sort(resident, dtype, count, size, seed, tied):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, size, generator=generator)
    scores = (scores * 2).round().to(dtype) if tied else scores.to(dtype)
    keep = torch.randint(1, size + 1, (count,), generator=generator)
    before, rows.RESIDENT = rows.RESIDENT, resident
    try:
        value, last_tie = row_thresholds(scores, keep, key_of(dtype))
    finally:
        rows.RESIDENT = before
    magnitude = scores.abs().to(key_of(dtype))
    beyond = torch.arange(size) > last_tie[:, None]
    mask = (magnitude > value[:, None]) | ((magnitude == value[:, None]) & ~beyond)
    order = magnitude.sort(dim=1, descending=True, stable=True).indices
    ranked = torch.arange(size).expand(count, size) < keep[:, None]
    assert torch.equal(mask, torch.zeros(count, size, dtype=torch.bool).scatter(1, order, ranked))
    wide = magnitude.double()
    exact = torch.stack([wide.sum(1), wide.square().sum(1), (wide != 0).sum(1).double()], 1)
    torch.testing.assert_close(row_moments(scores), exact, rtol=1e-12, atol=0)


def test_moments_of_rows_longer_than_a_block():
    scores = torch.randn(2, 5000)
    exact = torch.stack([scores.double().abs().sum(1), scores.double().square().sum(1), torch.full((2,), 5e3)], 1)
    torch.testing.assert_close(row_moments(scores), exact.double(), rtol=1e-12, atol=0)
