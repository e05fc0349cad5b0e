"""Where a batch holds its mask of positions, and which activations have such positions."""

import collections

import pytest
import torch

from emp_callbacks.targets.positions import counted_rows, positions_of

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def twice(batch):
    return batch[0] * 2


def test_a_batch_gives_its_mask():
    assert positions_of({"attention_mask": MASK}, "attention_mask") is MASK
    assert positions_of(collections.UserDict(mask=MASK), "mask") is MASK
    assert positions_of({"x": MASK}, "attention_mask") is None
    assert positions_of([MASK, MASK], "attention_mask") is None
    assert positions_of({"attention_mask": MASK}, None) is None
    assert torch.equal(positions_of((MASK,), twice), 2 * MASK)
    assert positions_of((MASK,), lambda batch: None) is None


def test_a_function_is_named_by_where_it_is():
    assert torch.equal(positions_of(MASK, "torch.relu"), MASK)
    with pytest.raises(ValueError, match=r"positions 'no_such_module.f' cannot be imported.*'module.function'"):
        positions_of({}, "no_such_module.f")


@pytest.mark.parametrize(
    ("found", "error"), [(torch.ones(3), ValueError), (torch.ones(1, 1, 3), ValueError), ([1], TypeError)]
)
def test_what_is_no_such_mask_is_refused(found, error):
    with pytest.raises(error, match=r"positions='attention_mask' must .*\(B, T\)"):
        positions_of({"attention_mask": found}, "attention_mask")


def test_which_activations_have_these_positions():
    mask = MASK.bool()
    assert counted_rows(mask, (2, 3, 5)) is mask
    assert counted_rows(mask, (2, 3, 4, 5)) is mask
    assert torch.equal(counted_rows(mask, (6, 5)), mask.flatten())
    assert counted_rows(mask, (2, 3)) is None, "the last dimension counts features"
    assert counted_rows(mask, (2, 4, 5)) is None
    assert counted_rows(mask, (5, 6)) is None
    assert counted_rows(mask, (6,)) is None
    assert counted_rows(None, (2, 3, 5)) is None
