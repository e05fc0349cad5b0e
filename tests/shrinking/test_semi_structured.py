import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, to_semi_structured
from emp_callbacks.shrinking.semi_structured import obeys_pattern


def test_a_pattern_is_recognised():
    pruner = EMPPruner(layer := nn.Linear(16, 8), pattern="2:4")
    assert not obeys_pattern(layer.weight)
    pruner.refresh()
    assert obeys_pattern(layer.weight)
    assert obeys_pattern(layer.weight, 4, 8)
    assert not obeys_pattern(layer.weight, 1, 4)
    assert not obeys_pattern(torch.zeros(3, 6))


def test_where_no_gpu_is_it_is_refused_before_anything_changes():
    EMPPruner(model := nn.Sequential(nn.Linear(64, 64)), pattern="2:4").refresh()
    weight = model[0].weight
    with pytest.raises(RuntimeError, match="the model is on cpu: move the model to a CUDA device of compute"):
        to_semi_structured(model)
    assert model[0].weight is weight


def test_layers_that_do_not_fit_are_told(monkeypatch):
    from emp_callbacks.shrinking import semi_structured

    monkeypatch.setattr(semi_structured, "_check_device", lambda layers: None)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="none of the 2 Linear layers of Sequential is 2:4"):
        to_semi_structured(model)
    EMPPruner(model[0], pattern="2:4").refresh()
    found = to_semi_structured(model)  # torch itself refuses the CPU
    assert found.converted == []
    assert found.left == {"1": "not 2:4", "0": found.left["0"]}
    assert "CUDA" in found.left["0"]


def test_weights_that_torchs_own_kernels_read_stay_dense(monkeypatch):
    from emp_callbacks.shrinking import semi_structured

    class Compressed(torch.Tensor):
        """Stands in for the form that a GPU knows."""

    monkeypatch.setattr(semi_structured, "_check_device", lambda layers: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.as_subclass(Compressed))
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval()
    EMPPruner(model, pattern="2:4").refresh()
    found = to_semi_structured(model)
    assert found.converted == ["1"]
    assert found.left["0.self_attn.out_proj"] == "MultiheadAttention reads it in a kernel of its own"
    assert found.left["0.linear1"] == "TransformerEncoderLayer reads it in a kernel of its own"
