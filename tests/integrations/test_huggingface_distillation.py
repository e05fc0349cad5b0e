"""Distillation in a Hugging Face Trainer."""

import copy
import shutil

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate comes with emp-callbacks[hf]")
from emp_callbacks import Distillation
from tests.integrations.hf_trainer import Tokens, attach, gpt2, trainer


def test_the_trainer_learns_from_the_dense_model_and_goes_on_from_the_same(tmp_path):
    def run(folder, resume=None, how=None, **settings):
        one = trainer(
            folder, model=gpt2(0.0), gradient_accumulation_steps=2, save_steps=2, eval_steps=2, logging_steps=1
        )
        emp = attach(one, distill=how or Distillation(weight=0.9), every_n_steps=2, stop=4, mode="freeze", **settings)
        one.train(resume_from_checkpoint=resume)
        return one, emp

    whole, _ = run(tmp_path / "whole")
    plain, _ = run(tmp_path / "plain", how=Distillation(weight=1e-9))
    logged = [entry["distillation_loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert logged[0] == pytest.approx(0.0, abs=1e-6)  # the teacher is the model itself
    assert logged[-1] > 0
    tokens, loss = torch.stack([one["input_ids"] for one in Tokens(8)]), Distillation().loss
    with torch.no_grad():
        dense = gpt2(0.0)(tokens).logits
        away = [float(loss(one.model.eval()(tokens).logits, dense)) for one in (whole, plain)]
    assert away[0] < 0.8 * away[1]
    for entry in whole.state.log_history:
        assert "eval_distillation_loss" not in entry
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match=r"emp_teacher.safetensors does not exist.*Distillation\(teacher"):
        run(tmp_path / "part", resume=True)
    shutil.copy(tmp_path / "whole" / "emp_teacher.safetensors", tmp_path / "part")
    resumed, _ = run(tmp_path / "part", resume=True)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulated_batches_weigh_as_one(tmp_path):
    torch.manual_seed(1)
    teacher = gpt2(0.0)
    for p in teacher.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        model = copy.deepcopy(gpt2(0.0))
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        one = trainer(tmp_path, model=model, max_grad_norm=0.0, **arguments)
        attach(one, distill=Distillation(teacher=teacher, weight=0.7), observe_only=True)
        one.train()
        found.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
