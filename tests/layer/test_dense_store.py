"""What a store sees of writes that leave no trace but the values."""

import pytest
import torch
from torch import nn

from emp_callbacks.core import device
from emp_callbacks.layer.dense_store import DenseStore


class Pruner:
    def __init__(self, mask):
        self.mask = mask


def hidden(values, mask):
    store = DenseStore()
    store.members.append(Pruner(mask))
    store.hide(values)
    store.seal(values)
    assert not store.is_touched(values)
    return store


def unstructured(shape):
    return torch.rand(shape) > 0.4


def whole_rows(shape):
    return (torch.rand(shape[0]) > 0.4)[:, None].expand(shape).contiguous()


def whole_columns(shape):
    return (torch.rand(shape[1]) > 0.4).expand(shape).contiguous()


@pytest.mark.parametrize("make_mask", [unstructured, whole_rows, whole_columns])
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (768, 3072), (16, 16384)])
def test_every_row_that_masks_prune_in_is_looked_at(shape, make_mask):
    torch.manual_seed(0)
    mask = make_mask(shape)
    values = torch.ones(shape)
    store = hidden(values, mask)
    version = values._version
    for row in (~mask).any(1).nonzero().flatten().tolist():
        values.data[row] = 1
        assert store.is_touched(values), row
        values.data[row] = mask[row].float()
    assert not store.is_touched(values)
    assert values._version == version, "nothing but the values tells of it"


@pytest.mark.parametrize("make_mask", [unstructured, whole_rows])
def test_columns_are_not_passed_over_by_a_stride(make_mask):
    torch.manual_seed(0)
    mask = make_mask((512, 512))
    values = torch.ones(512, 512)
    store = hidden(values, mask)
    for column in range(512):
        values.data[:, column] = 1
        assert store.is_touched(values), column
        values.data[:, column] = mask[:, column].float()


def test_of_a_small_weight_every_pruned_entry_is_looked_at():
    torch.manual_seed(0)
    mask = unstructured((100, 50))
    values = torch.ones(100, 50)
    store = hidden(values, mask)
    for row, column in (~mask).nonzero().tolist():
        values.data[row, column] = -1e-30
        assert store.is_touched(values)
        values.data[row, column] = 0


LAYOUTS = {
    "channels last": lambda: torch.ones(5, 4, 3, 3).to(memory_format=torch.channels_last),
    "channels last, one channel": lambda: torch.ones(5, 1, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.ones(6, 5).t(),
    "in a buffer": lambda: torch.ones(90)[7:67].view(6, 10).t(),
}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dense_layout_is_looked_at(layout, aligned):
    torch.manual_seed(0)
    values = LAYOUTS[layout]()
    mask = unstructured(values.shape)
    store = hidden(values, torch.empty_like(values, dtype=torch.bool).copy_(mask) if aligned else mask)
    for place in (~mask).nonzero().tolist():
        values.data[tuple(place)] = 2
        assert store.is_touched(values)
        values.data[tuple(place)] = 0
    values.data.add_(mask)
    assert not store.is_touched(values), "kept entries are the user's"


def test_values_with_gaps_between_them_are_left_to_their_version():
    values = torch.ones(6, 8)[:, :5]
    store = hidden(values, torch.zeros(6, 5, dtype=torch.bool))
    values.data.fill_(1)
    assert not store.is_touched(values)
    with torch.no_grad():
        values.fill_(1)
    assert store.is_touched(values)


def test_an_accelerator_is_asked_for_sixteen(monkeypatch):
    monkeypatch.setattr(device, "_AT_ONCE", set())
    values = nn.Linear(64, 64).weight.detach()
    store = hidden(values, torch.zeros(64, 64, dtype=torch.bool))
    values.data.fill_(1)
    assert not store.is_touched(values)
    assert int(store.count_sampled(values)) == 16
