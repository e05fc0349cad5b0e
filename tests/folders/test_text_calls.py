import pytest
import torch

from emp_callbacks.folders.text_calls import TextCall


@pytest.mark.parametrize("prefix", [(), (1,), (1, 2, 3)])
@pytest.mark.parametrize("suffix", [(), (4,), (4, 5, 6, 7, 8)])
@pytest.mark.parametrize("kind", ["causal", "encoder", "encoder-decoder"])
def test_a_call_has_the_length_that_its_room_leaves_for_text(kind, prefix, suffix):
    call = TextCall(kind, prefix, suffix, start=9)
    made = call(torch.arange(100, 100 + call.room(40)))
    assert sum(value.numel() for value in made.values()) == 40
    assert {value.shape[1] for value in made.values()} == ({20} if kind == "encoder-decoder" else {40})


@pytest.mark.parametrize("count", [2, 3, 4, 9])
@pytest.mark.parametrize("suffix", [(), (4,), (4, 5, 6, 7, 8)])
def test_encoder_and_decoder_both_get_a_part_of_the_shortest_text(count, suffix):
    ids = torch.arange(100, 100 + count)
    read, taught = TextCall("encoder-decoder", (1,), suffix, start=9).halves(ids)
    assert torch.cat([read, taught]).equal(ids)
    assert min(len(read), len(taught)) >= 1
