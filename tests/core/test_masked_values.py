import pytest
import torch

from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned


def case(dtype, shape=(7, 5), layout=torch.contiguous_format, density=0.6):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator) * 100).to(dtype).contiguous(memory_format=layout)
    return values, torch.rand(shape, generator=generator) < density


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "flat": {},
    "channels-last": {"shape": (2, 3, 4, 5), "layout": torch.channels_last},
    "none pruned": {"density": 2.0},
    "all pruned": {"density": 0.0},
    "empty": {"shape": (0,)},
}


@pytest.mark.parametrize("chunk", [1, 8, 1 << 18])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_take_zero_and_put_are_masked_select_fill_and_scatter(monkeypatch, dtype, layout, chunk):
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", chunk)
    dense, mask = case(dtype, **LAYOUTS[layout])
    values = dense.clone()
    taken = take_pruned(values, mask)
    assert torch.equal(taken, dense.masked_select(~mask))
    assert torch.equal(values, dense)
    zero_pruned(values, mask)
    assert torch.equal(values, dense.masked_fill(~mask, 0))
    put_pruned(values, mask, taken)
    assert torch.equal(values, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_zeroed_and_come_back_bit_for_bit(dtype):
    dense = torch.tensor([torch.nan, torch.inf, -0.0, 1.0], dtype=dtype)
    mask = torch.tensor([False, False, False, True])
    values = dense.clone()
    taken = take_pruned(values, mask)
    zero_pruned(values, mask)
    assert values.tolist() == [0.0, 0.0, 0.0, 1.0]
    put_pruned(values, mask, taken)
    assert torch.equal(values.view(torch.uint8), dense.view(torch.uint8))


def test_a_view_of_a_larger_tensor_is_changed_where_it_lies():
    owner = torch.arange(1.0, 13.0)
    zero_pruned(owner[4:8].view(2, 2), torch.tensor([[True, False], [False, True]]))
    assert owner.tolist() == [1, 2, 3, 4, 5, 0, 0, 8, 9, 10, 11, 12]
