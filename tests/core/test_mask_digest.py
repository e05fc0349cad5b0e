import pytest
import torch

from emp_callbacks.core import chunks, device
from emp_callbacks.core.mask_digest import mask_digest


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["host", "accelerator"])
def test_masks_that_differ_in_a_few_places_have_different_digests(at_once, monkeypatch):
    monkeypatch.setattr(device, "_AT_ONCE", at_once)
    monkeypatch.setattr(chunks, "ACCELERATOR_CHUNK", 100)
    mask = torch.rand(30, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    seen = {int(mask_digest(mask))}
    for place in range(330):
        mask.view(-1)[place] ^= True
        seen.add(int(mask_digest(mask)))
    assert len(seen) == 331
    assert int(mask_digest(mask)) == int(mask_digest(mask.clone()))
