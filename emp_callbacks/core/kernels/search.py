"""The thresholds of many groups on an accelerator: passes over all scores, and next to no waiting between them.

A sample tells beforehand how many scores a group will keep, and between which two scores the lowest kept one lies.
So the pass that sums the moments counts those scores, too, and mostly there is no second one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.kernels.sums import sums_of_runs
from emp_callbacks.core.kernels.survey import Surveyed, sample_tensors, survey_tensors, ties_before
from emp_callbacks.core.kernels.tables import EMPTY_BITS, LEAST_SAMPLE, SAMPLE, TILE_BINS, to_device
from emp_callbacks.core.threshold import (
    ALL_TIES,
    DEVIATIONS,
    DIGIT_BITS,
    MANY_GROUPS,
    NARROW_DIGIT_BITS,
    TIE_BITS,
    AllSum,
    ScoredPart,
    Threshold,
    local_sum,
)

BINS = 22  # bits of the number of bins of all groups together
MOST_BINS = 18
_MOST_PASSES = 64


class _Pass(NamedTuple):
    """What a pass over the parts of one dtype has seen: their indices, and their groups on the device."""

    parts: list[int]
    group_of: Tensor
    seen: Surveyed


class DeviceSearch:
    """Scores of many groups on one accelerator.

    Args:
        parts: What this rank counts of them, each a part of one group.
        group_of: The group of each part.
        sizes: Number of scores of each group, over all ranks.
        dtype: float32 or float64, in which scores compare; the same on every rank.
        all_sum: Returns the sum of a tensor over all ranks.
    """

    def __init__(
        self,
        parts: Sequence[ScoredPart],
        group_of: Sequence[int],
        sizes: Sequence[int],
        dtype: torch.dtype,
        all_sum: AllSum,
    ) -> None:
        self._parts, self._group_of, self._sizes = list(parts), list(group_of), list(sizes)
        self._dtype, self._all_sum = dtype, all_sum
        self._device = self._parts[0].scores.device
        wide = dtype == torch.float64
        self._integer, self._bits = (torch.int64, 63) if wide else (torch.int32, 31)
        kinds = {part.scores.dtype for part in self._parts}
        self._empty_bits = 0 if wide else min(EMPTY_BITS.get(kind, 0) for kind in kinds)
        groups = len(self._sizes)
        self._by_tile = self._empty_bits > 0
        over_ranks = all_sum is not local_sum
        self._digit_bits = NARROW_DIGIT_BITS if groups > MANY_GROUPS else DIGIT_BITS
        own_bits = min(MOST_BINS, BINS - (groups - 1).bit_length())
        self._bin_bits = TILE_BINS.bit_length() - 1 if self._by_tile else self._digit_bits if over_ranks else own_bits
        self._low = self._filled(groups, 0)
        self._shift = self._filled(groups, self._bits - self._bin_bits)
        self._passes: list[_Pass] = []
        self._blind = -(-(self._bits - self._bin_bits - self._empty_bits) // self._bin_bits)  # passes that settle none

    def _filled(self, length: int, value: int) -> Tensor:
        return torch.full((length,), value, dtype=self._integer, device=self._device)

    # ---- the first pass -------------------------------------------------------------------------------------------

    def look(self, share: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's moments of each part, shape (T, 3), float64, on the device. Collective.

        Args:
            share: Takes each group's effective number as a fraction of its size, shape (G,), float64, and returns the
                fraction that will be kept of it.
        """
        self._expect(share)
        self._passes = self._survey(range(len(self._sizes)), sums=True)
        moments = torch.zeros(len(self._parts), 3, dtype=torch.float64, device=self._device)
        for one in self._passes:
            moments.index_copy_(0, _index(one.parts, self._device), one.seen.moments)
        return moments

    def _expect(self, share: Callable[[Tensor], Tensor]) -> None:
        """Put the window of each large group where a sample says that its threshold is. Collective."""
        groups = len(self._sizes)
        wanted = max(LEAST_SAMPLE, SAMPLE // groups)
        large = [size >= 2 * wanted for size in self._sizes]
        if not any(large):
            return
        self._blind = 0
        sample, group, lengths, group_of = self._sample(large, wanted)
        known = to_device(torch.tensor(large), self._device)
        count, *means = self._all_sum(self._power_sums(sample, lengths, group_of)).unbind(1)
        m1, m2, m3, m4 = (mean / count for mean in means)
        kept = share(m1.square() / m2).clamp(0.0, 1.0)
        # The sample's N_eff deviates (delta method), and so does the rank of a score in it.
        relative = (4 * m2 / m1.square() - 4 * m3 / (m1 * m2) + m4 / m2.square() - 1).clamp(min=0)
        deviation = (kept * relative.sqrt() + (kept * (1 - kept)).sqrt()) / count.sqrt()
        margin = DEVIATIONS * deviation * count + 1
        ranks = torch.stack([count * kept + margin, count * kept - margin]).nan_to_num(1.0)
        inside = ranks.clamp(min=1.0).minimum(count).long()
        low, high = self._ranked(as_bits(sample).long(), group, count.long(), inside)
        low = torch.where(ranks[0] > count, 0, low)
        high = torch.where(ranks[1] < 1, (1 << self._bits) - 1, high)
        shifts = torch.arange(self._empty_bits, self._bits - self._bin_bits, device=self._device)
        shift = self._empty_bits + ((high - low)[:, None] >> shifts >= 1 << self._bin_bits).sum(1)
        self._low = torch.where(known, low, self._low).to(self._integer)
        self._shift = torch.where(known, shift, self._shift).to(self._integer)

    def _sample(self, large: Sequence[bool], wanted: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Return magnitudes of some scores of each large group, their groups, and how many of which are in a row."""
        found, lengths, group_of = [], [], []
        for parts in self._by_dtype(g for g, is_large in enumerate(large) if is_large):
            groups = [self._group_of[i] for i in parts]
            steps = [self._sizes[g] / wanted for g in groups]
            scores = [self._parts[i].scores for i in parts]
            counts = [int(one.numel() / step) for one, step in zip(scores, steps, strict=True)]
            found.append(sample_tensors(scores, counts, steps, _index(groups, self._device).int(), self._dtype))
            lengths += counts
            group_of += groups
        return torch.cat([one for one, _ in found]), torch.cat([group.long() for _, group in found]), lengths, group_of

    def _power_sums(self, sample: Tensor, lengths: Sequence[int], group_of: Sequence[int]) -> Tensor:
        """Return the sums of the powers 0 to 4 of each group's sample, shape (G, 5), float64."""
        wide = sample.double()
        square = wide.square()
        powers = torch.stack([torch.ones_like(wide), wide, square, square * wide, square.square()], 1)
        first = _index([0, *itertools.accumulate(lengths)], self._device)
        sums = torch.zeros(len(self._sizes), 5, dtype=torch.float64, device=self._device)
        return sums.index_add_(0, _index(group_of, self._device), sums_of_runs(powers, first))

    def _ranked(self, key: Tensor, group: Tensor, count: Tensor, need: Tensor) -> Tensor:
        """Return the key of given rank among each group's, shape (K, G) as `need`. Collective."""
        if self._all_sum is local_sum:
            return _ranked_here(key, group, count, need)
        prefix, done = torch.zeros_like(need), self._bits
        rows = torch.arange(len(need), device=self._device)[:, None] * need.shape[1] + group  # (K, M)
        while done:
            width = min(self._digit_bits, done)
            done -= width
            matches = (key >> done + width) == prefix[:, group]
            place = (rows << width) + ((key >> done) & ((1 << width) - 1))
            counts = torch.zeros(need.numel() << width, dtype=torch.int64, device=self._device)
            counts.index_add_(0, place.flatten(), matches.long().flatten())
            at_least = _at_least(self._all_sum(counts.view(*need.shape, -1)))
            digit = ((at_least >= need[..., None]).sum(-1, keepdim=True) - 1).clamp(min=0)
            following = torch.nn.functional.pad(at_least, (0, 1)).gather(-1, digit + 1)
            need = need - following.squeeze(-1)
            prefix = (prefix << width) | digit.squeeze(-1)
        return prefix

    # ---- passes ---------------------------------------------------------------------------------------------------

    def _by_dtype(self, groups: Iterable[int]) -> list[list[int]]:
        chosen = set(groups)
        kinds: dict[torch.dtype, list[int]] = {}
        for i, part in enumerate(self._parts):
            if self._group_of[i] in chosen:
                kinds.setdefault(part.scores.dtype, []).append(i)
        return list(kinds.values())

    def _survey(self, groups: Iterable[int], *, sums: bool = False, by_tile: bool | None = None) -> list[_Pass]:
        """Look at all parts of some groups once."""
        passes = []
        for parts in self._by_dtype(groups):
            group_of = _index([self._group_of[i] for i in parts], self._device)
            seen = survey_tensors(
                [self._parts[i].scores for i in parts], group_of.int(), self._low, self._shift, 1 << self._bin_bits,
                by_tile=self._by_tile if by_tile is None else by_tile, sums=sums,
            )  # fmt: skip
            passes.append(_Pass(parts, group_of, seen))
        return passes

    def _counts(self) -> Tensor:
        """Return how many scores lie above each group's window and in each of its bins, (G, 1 + bins). Collective."""
        groups = len(self._sizes)
        counts = torch.zeros(groups, 1 + (1 << self._bin_bits), dtype=torch.int64, device=self._device)
        for one in self._passes:
            counts[:, 0].index_add_(0, one.group_of, one.seen.above)
            if self._by_tile:
                counts[:, 1:].index_add_(0, _tile_groups(one), one.seen.bins.long())
            else:
                counts[:, 1:] += one.seen.bins
        return self._all_sum(counts)

    # ---- thresholds -----------------------------------------------------------------------------------------------

    def thresholds(self, keep: Sequence[int]) -> list[Threshold | None]:
        """Return the threshold that keeps exactly so many of each group. Collective, after `look`.

        Args:
            keep: Of each group, between 1 and the number of its scores that are not 0; 0: no threshold is asked for.
        """
        keep_g = to_device(torch.tensor(list(keep)), self._device)
        found: list[Threshold | None] = [None] * len(keep)
        active = [g for g, count in enumerate(keep) if count]
        for _ in range(self._blind if active else 0):  # nor need their outcome be read
            self._narrow(keep_g)
            self._passes = self._survey(active)
        for _ in range(_MOST_PASSES):
            if not active:
                return found
            settled, key, need, ties, digit = self._narrow(keep_g)
            told = torch.stack([settled.long(), key, need, ties]).tolist()  # the one wait of a pass
            done = [g for g in active if told[0][g]]
            cut = [g for g in done if told[2][g] < told[3][g]]
            last_tie = self._last_ties(cut, key, need, digit)
            for g in done:
                found[g] = Threshold(told[1][g], last_tie.get(g, ALL_TIES), self._dtype)
            active = [g for g in active if not told[0][g]]
            if active:
                self._passes = self._survey(active)
        raise RuntimeError(f"groups {active} have fewer scores that are not 0 than are to be kept of them: {keep}")

    def _narrow(self, keep_g: Tensor) -> tuple[Tensor, ...]:
        """Return which groups' thresholds the last pass found, with key, kept ties, ties and bin; move the windows.

        Each shape (G,). Those of groups that were found begin at their key. Collective.
        """
        counts = self._counts()
        above, bins = counts[:, :1], counts[:, 1:]
        at_least = above + _at_least(bins)
        digit = (at_least >= keep_g[:, None]).sum(1, keepdim=True) - 1
        hit = (digit >= 0) & (above < keep_g[:, None])
        digit = digit.clamp(min=0)
        ties = bins.gather(1, digit)
        need = keep_g[:, None] - (at_least.gather(1, digit) - ties)
        low, shift = self._low.long()[:, None], self._shift.long()[:, None]
        key = low + (digit << shift)
        settled = hit & (shift <= self._empty_bits)
        whole = self._bits - self._bin_bits
        self._low = torch.where(hit, key, 0).squeeze(1).to(self._integer)
        narrower = (shift - self._bin_bits).clamp(min=self._empty_bits)
        self._shift = torch.where(hit, narrower, whole).squeeze(1).to(self._integer)
        return tuple(each.squeeze(1) for each in (settled, key, need, ties, digit))

    def _indices(self, parts: Sequence[ScoredPart]) -> Callable[[Tensor], Tensor]:
        """Return what says how many elements of each of T parts lie before positions in their groups, shape (T, K)."""
        if not all(isinstance(part.positions, int) for part in parts):
            return lambda positions: torch.stack(list(map(_index_of, parts, positions)))
        begins = [part.positions if isinstance(part.positions, int) else 0 for part in parts]
        begin = _index(begins, self._device)[:, None]
        size = _index([part.scores.numel() for part in parts], self._device)[:, None]
        return lambda positions: (positions - begin).clamp(min=0).minimum(size)

    # ---- ties -----------------------------------------------------------------------------------------------------

    def _last_ties(self, cut: list[int], key: Tensor, missing: Tensor, digit: Tensor) -> dict[int, int]:
        """Return for some groups the position of the last kept of the equal scores. Collective; waits once."""
        if not cut:
            return {}
        counted = []
        for one in self._passes if self._by_tile else self._survey(cut, by_tile=True):
            # By tile, the last pass has counted them already; else the windows begin at the keys now.
            bins = one.seen.bins
            ties = bins.gather(1, digit[_tile_groups(one)][:, None])[:, 0] if self._by_tile else bins[:, 0]
            upto = torch.nn.functional.pad(ties.long().cumsum(0), (1, 0))
            counted.append((one, upto, self._indices([self._parts[i] for i in one.parts])))
        values, last = as_values(key, self._dtype), torch.zeros_like(missing)
        width, bits = TIE_BITS, max((self._sizes[g] - 1).bit_length() for g in cut)
        for shift in reversed(range(0, bits, width)):
            candidates = last[:, None] + (torch.arange(1, 1 << width, device=self._device) << shift)
            before = torch.zeros_like(candidates)
            for one, upto, places in counted:
                limits = places(candidates[one.group_of])
                scores = [self._parts[i].scores for i in one.parts]
                counts = ties_before(scores, values[one.group_of], upto, one.seen.tiles, limits)
                before.index_add_(0, one.group_of, counts)
            last = last + ((self._all_sum(before) < missing[:, None]).sum(1) << shift)
        told = last.tolist()
        return {g: told[g] for g in cut}


def _ranked_here(key: Tensor, group: Tensor, count: Tensor, need: Tensor) -> Tensor:
    """Return the key of given rank among each group's by a sort: histograms would add at very few addresses."""
    key = key.sort(descending=True).values if len(count) == 1 else _sorted_within(key, group)
    first = count.cumsum(0) - count
    return key[(first + need - 1).clamp(min=0, max=len(key) - 1)]


def _sorted_within(key: Tensor, group: Tensor) -> Tensor:
    order = key.argsort(descending=True)
    return key[order[group[order].argsort(stable=True)]]


def _tile_groups(one: _Pass) -> Tensor:
    """Return the group of each tile, shape (P,), int64."""
    return one.group_of[one.seen.tiles.owner]


def as_values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitudes that have these bit patterns."""
    return keys.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def _at_least(counts: Tensor) -> Tensor:
    """Return how many lie in each bin or a higher one, along the last dimension."""
    return counts.flip(-1).cumsum(-1).flip(-1)


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(list(numbers), dtype=torch.int64), device)


def _index_of(part: ScoredPart, positions: Tensor) -> Tensor:
    """Return how many elements of a part lie before each of some group positions."""
    if isinstance(part.positions, int):
        return (positions - part.positions).clamp(min=0, max=part.scores.numel())
    return torch.searchsorted(part.positions.to(positions.device), positions)
