import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emp_callbacks.core.packing import pack_bits, unpack_bits


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_round_trip(bits):
    mask = torch.tensor(bits)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(packed, len(bits)), mask)


def test_first_bit_is_the_highest():
    assert pack_bits(torch.tensor([True] + [False] * 8)).tolist() == [128, 0]


@pytest.mark.parametrize("packed", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)])
def test_wrong_size_is_refused(packed):
    with pytest.raises(ValueError, match="9 mask bits need 2 bytes"):
        unpack_bits(packed, 9)
