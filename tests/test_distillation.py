"""Knowledge distillation: the loss and the teacher."""

from functools import partial

import pytest
import torch
from torch import nn

from emp_callbacks import Distillation
from emp_callbacks.distillation import load_weights


def test_the_loss_is_the_divergence_of_the_softened_distributions():
    student, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    p, q = (torch.softmax(x.double() / 3.0, -1) for x in (teacher, student))
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    by_position = 9.0 * (p * (p / q).log()).sum(-1)
    how = Distillation(temperature=3.0, weight=0.25)
    close(how.loss(student, teacher).double(), by_position.mean())
    counts = torch.rand(3, 5) < 0.5
    close(how.loss(student, teacher, counts).double(), by_position[counts].mean())
    close(how.loss(student, teacher, counts, total=40).double(), by_position[counts].sum() / 40)
    assert float(how.loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(how.mixed(torch.tensor(8.0), torch.tensor(4.0))) == 7.0
    half = how.loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"teacher's logits are of shape \(3, 5, 6\)"):
        how.loss(student, teacher[..., :6])


def test_a_teacher_is_a_frozen_copy_or_what_a_file_holds(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    teacher = Distillation().teacher_for(model)
    assert not teacher.training
    assert model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    before = teacher[0].weight.clone()
    nn.init.zeros_(model[0].weight)
    assert torch.equal(teacher[0].weight, before)
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in teacher.state_dict().items()}}, tmp_path / "t.pt"
    )
    assert torch.equal(Distillation(teacher=tmp_path / "t.pt").teacher_for(model)[0].weight, before)
    with pytest.raises(ValueError, match=r"holds the weights of another model: it lacks 0\.bias, 0\.weight"):
        load_weights(nn.Sequential(nn.Linear(4, 4)), _saved({"weight": before}, tmp_path / "u.pt"))
    with pytest.raises(FileNotFoundError):
        Distillation(teacher=tmp_path / "none.pt").teacher_for(model)


def _saved(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": 0}, "temperature must be in"),
        ({"weight": 1.5}, "weight must be in"),
        ({"teacher": 3}, "teacher must be a model"),
    ],
)
def test_bad_values_are_named(wrong, told):
    with pytest.raises((ValueError, TypeError), match=told):
        Distillation(**wrong)
