"""A model trained with pattern="2:4" computes the same on the GPU's sparse tensor cores."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, to_semi_structured
from tests.gpu.common import ON_A_GPU, REHEARSAL

pytestmark = ON_A_GPU


@pytest.mark.skipif(REHEARSAL, reason="sparse tensor cores are the GPU's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_those_of_the_masked_model(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128), nn.Linear(128, 7)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = EMPPruner(model, optimizer, pattern="2:4", every_n_steps=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(64, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    model.to(dtype).eval()
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        found = to_semi_structured(model)
        assert found.converted == ["0", "2"]
        assert "3" in found.left  # 7 outputs are no multiple of what the hardware takes
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert "SemiStructured" in type(model[0].weight.data).__name__
