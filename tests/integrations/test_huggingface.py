"""EMPTrainerCallback in a real `transformers.Trainer` on one process; ranks are in tests/distributed."""

import shutil

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate comes with emp-callbacks[hf]")
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from emp_callbacks import EMPCallback, EMPTrainerCallback, Trajectory
from tests.integrations.hf_trainer import Stream, Tokens, attach, gpt2, trainer

QUIET = pytest.mark.filterwarnings("error::UserWarning", "ignore:.*pin_memory:UserWarning")


def trained(folder, settings=None, resume=None, **arguments):
    one = trainer(folder, **arguments)
    emp = attach(one, **settings or {})
    one.train(resume_from_checkpoint=resume)
    return one, emp


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wrong(model, masks):
    """Count the pruned entries of a model that are not zero."""
    named = dict(model.named_parameters())
    return sum(int((named[name][~mask] != 0).sum()) for name, mask in masks.items())


def rows(emp):
    return [(row.step, row.keep, round(row.n_eff, 6)) for row in emp.trajectory]


FORMS = {
    "feedback": {},
    "project": {"mode": "project"},
    "freeze": {"mode": "freeze"},
    "rewire": {"mode": "rewire", "density": 0.5, "evidence_steps": 2},
    "taylor, accumulated": {"criterion": "taylor", "evidence_steps": 2, "every_n_steps": 2},
    "wanda": {"criterion": "wanda", "scope": "row", "every_n_epochs": 1, "every_n_steps": None},
    "heads": {"target": "heads", "criterion": "taylor", "evidence_steps": 2},
    "features": {"target": "features", "include": ["*.act"], "evidence_steps": 2},
}


@QUIET
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_equals_the_one_that_never_stopped(form, tmp_path):
    more = {"gradient_accumulation_steps": 2, "save_steps": 2, "eval_steps": 2} if "accumulated" in form else {}
    whole, emp = trained(tmp_path / "whole", FORMS[form], **more)
    stop = "checkpoint-2" if more else "checkpoint-6"
    shutil.copytree(tmp_path / "whole" / stop, tmp_path / "part" / stop)
    resumed, again = trained(tmp_path / "part", FORMS[form], resume=True, **more)
    assert len(rows(emp)) >= 2
    assert rows(again) == rows(emp)
    assert same(weights(resumed), weights(whole))
    assert same(again.masks, emp.masks)


class Watcher(TrainerCallback):
    """Counts, at every evaluation and save, the pruned entries that are not zero."""

    def __init__(self):
        self.emp, self.found = None, []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.found.append(("evaluate", state.global_step, self.look(model), len(self.emp.trajectory)))

    def on_save(self, args, state, control, model=None, **kwargs):
        self.found.append(("save", state.global_step, self.look(model), len(self.emp.trajectory)))

    def look(self, model):
        return wrong(model, self.emp.pruner.weight_masks)


@QUIET
@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_evaluations_and_saves_of_a_step_see_its_refresh(mode, tmp_path):
    watcher = Watcher()
    arguments = {"bf16": True, "gradient_checkpointing": True, "max_grad_norm": 0.1}
    one = trainer(tmp_path, callbacks=[watcher], eval_strategy="steps", **arguments)
    watcher.emp = attach(one, mode=mode, every_n_steps=None, every_n_epochs=1)
    one.train()
    # An epoch has 6 steps: its last one evaluates and saves behind the masks of its end.
    expected = [(what, step, 0, step // 6) for step in (3, 6, 9, 12) for what in ("evaluate", "save")]
    assert watcher.found == expected


@QUIET
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_the_best_model_comes_back_with_its_own_masks(mode, tmp_path):
    def measure(trainer, at):  # the metric falls until `at`, and rises after it
        original = trainer.evaluate

        def evaluate(*args, **kwargs):
            metrics = original(*args, **kwargs)
            return metrics | {"eval_distance": abs(trainer.state.global_step - at)}

        trainer.evaluate = evaluate

    one = trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="distance", greater_is_better=False)
    measure(one, 6)
    emp = attach(one, mode=mode)
    one.train()
    assert one.state.best_model_checkpoint.endswith("checkpoint-6")
    then = [row.keep for row in emp.trajectory if row.step == 6]
    assert [int(sum(mask.sum() for mask in emp.masks.values()))] == then
    assert [row.step for row in emp.trajectory] == [3, 6, 9, 12]
    assert wrong(one.model, emp.masks) == 0
    best = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6")
    left = {name: p.detach() * emp.masks.get(name, torch.tensor(1)) for name, p in best.named_parameters()}
    assert same(left, weights(one))
    one.save_model(tmp_path / "final")
    assert wrong(GPT2LMHeadModel.from_pretrained(tmp_path / "final"), emp.masks) == 0


@QUIET
def test_the_best_step_is_hardened_with_the_gates_that_it_had(tmp_path):
    one = trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="distance", greater_is_better=False)
    evaluate = one.evaluate

    def measured(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        one.seen[one.state.global_step] = found["eval_loss"]
        return found | {"eval_distance": abs(one.state.global_step - 6)}

    one.seen, one.evaluate = {}, measured
    emp = attach(
        one, target="heads", criterion="taylor", gates="hard_concrete", density=0.5, gate_warmup=1, mode="freeze"
    )
    one.train()
    assert one.state.best_model_checkpoint.endswith("checkpoint-6")
    assert sum(int(mask.sum()) for mask in emp.masks.values()) == 2
    one.evaluate = evaluate
    assert one.evaluate()["eval_loss"] == pytest.approx(one.seen[6], abs=1e-5)
    assert emp.pruner.audit().clean


@QUIET
def test_values_stand_in_the_trainers_logs_and_take_nothing_from_them(tmp_path):
    plain = trainer(tmp_path / "plain", logging_steps=1)
    plain.train()
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    one = trainer(tmp_path / "emp", logging_steps=1, callbacks=[Reporter()])
    emp = attach(one, scope="tensor", trajectory_path=tmp_path / "rows.jsonl")
    one.train()
    logged = [entry for entry in one.state.log_history if "emp/density" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9, 12]
    assert [entry["emp/keep"] for entry in logged] == [
        sum(row.keep for row in emp.trajectory if row.step == step) for step in (3, 6, 9, 12)
    ]
    assert sum("loss" in entry for entry in one.state.log_history) == 12  # each step's own log is still there
    assert sum("loss" in entry for entry in plain.state.log_history) == 12
    name = "transformer.h.0.attn.c_attn.weight"
    assert sum(f"emp/density/{name}" in logs for logs in seen) == 4  # of layers: to the reporters alone
    assert not any(f"emp/density/{name}" in entry for entry in one.state.log_history)
    assert len(Trajectory.read(tmp_path / "rows.jsonl")) == len(emp.trajectory)


@QUIET
def test_a_second_training_goes_on_behind_the_masks_and_another_model_begins_anew(tmp_path):
    one, emp = trained(tmp_path / "one", max_steps=3)
    first = emp.masks
    one.train()
    assert [row.step for row in emp.trajectory] == [3, 6]
    assert not same(emp.masks, first)
    fresh = trainer(tmp_path / "fresh", model=gpt2(), max_steps=3)
    fresh.model_init, emp = lambda: gpt2(), attach(fresh)
    fresh.train()
    fresh.train()
    assert [row.step for row in emp.trajectory] == [3]


@QUIET
@pytest.mark.parametrize("dynamic", [False, True])
def test_features_are_masked_in_evaluations_after_the_training_too(dynamic, tmp_path):
    settings = {"target": "features", "include": ["*.act"], "dynamic": dynamic}
    one, emp = trained(tmp_path, settings)
    masked = one.evaluate()["eval_loss"]
    batch = next(iter(one.get_eval_dataloader()))
    with emp.pruner.masked_forward():
        expected = float(one.prediction_step(one.model, batch, True)[0])
    dense = float(one.prediction_step(one.model, batch, True)[0])
    assert masked == pytest.approx(expected, rel=1e-5)
    assert masked != pytest.approx(dense, rel=1e-5)


@QUIET
def test_padding_is_no_evidence(tmp_path):
    class Padded(Tokens):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            item["attention_mask"][6:], item["labels"] = 0, item["labels"].where(torch.arange(12) < 6, -100)
            return item

    class Cut(Padded):
        def __getitem__(self, i):
            return {key: value[:6] for key, value in super().__getitem__(i).items()}

    settings = {"criterion": "wanda", "scope": "row", "positions": "attention_mask", "every_n_steps": 1}
    found = []
    for data in (Padded(), Cut()):
        model, still = gpt2(dropout=0.0), {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
        found.append(trained(tmp_path, settings, model=model, data=data, **still)[1].masks)
    assert same(*found)


def test_a_checkpoint_of_a_run_without_emp_is_said_and_masks_begin_anew(tmp_path):
    trainer(tmp_path).train()
    for step in (9, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.warns(UserWarning, match="checkpoint-6 was saved without EMP"):
        _, emp = trained(tmp_path, resume=True)
    assert [row.step for row in emp.trajectory] == [9, 12]


def test_masks_of_another_name_are_refused(tmp_path):
    trained(tmp_path, {"name": "first"})
    with pytest.raises(FileNotFoundError, match=r"emp_first.*give the callbacks the names"):
        trained(tmp_path, {"name": "second"}, resume=True)


@QUIET
def test_several_callbacks_have_names_files_and_folders_of_their_own(tmp_path):
    one = trainer(tmp_path, max_steps=3)
    heads, neurons = (attach(one, target=target, density=0.5) for target in ("heads", "neurons"))
    one.train()
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "emp_trajectory_heads.jsonl",
        "emp_trajectory_neurons.jsonl",
    }
    assert {path.name for path in (tmp_path / "checkpoint-3").glob("emp*")} == {"emp_heads", "emp_neurons"}
    assert {"emp/heads/density", "emp/neurons/density"} <= {key for x in one.state.log_history for key in x}
    assert heads.trajectory[0].n != neurons.trajectory[0].n


@QUIET
def test_epochs_of_unknown_length_end_when_the_trainer_says_so(tmp_path):
    one = trainer(tmp_path, data=Stream(), max_steps=12, eval_strategy="no")
    emp = attach(one, every_n_steps=None, every_n_epochs=1)
    one.train()
    assert [row.step for row in emp.trajectory] == [6, 12]


def test_a_training_that_raises_leaves_no_hook(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    one = trainer(tmp_path)
    emp = attach(one)
    one.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        one.train()
    one.remove_callback(Breaks)
    assert wrong(one.model, emp.masks) == 0
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in one.model.parameters())
    one.train()
    assert [row.step for row in emp.trajectory] == [3, 6, 9, 12, 15]


def test_a_schedule_that_asked_for_nothing_is_told_in_the_trainers_words(tmp_path):
    with pytest.warns(UserWarning, match=r"num_train_epochs=2, max_steps=12"):
        trained(tmp_path, {"every_n_steps": 100})


def test_what_is_no_trainer_is_refused_with_the_remedy(tmp_path):
    added = trainer(tmp_path)
    added.add_callback(EMPCallback())
    for wrong in (
        lambda: Trainer(gpt2(), callbacks=[EMPTrainerCallback]),
        lambda: Trainer(gpt2(), callbacks=[EMPCallback()]),
        lambda: EMPTrainerCallback.attach(gpt2()),
        added.train,
    ):
        with pytest.raises(TypeError, match=r"EMPTrainerCallback.attach\(trainer, every_n_steps=500\)"):
            wrong()
    with pytest.raises(TypeError, match="did you mean 'every_n_steps'"):
        EMPTrainerCallback.attach(trainer(tmp_path), every_n_step=5)
    with pytest.raises(ValueError, match="mode must be"):
        EMPTrainerCallback.attach(trainer(tmp_path), mode="thaw")


@pytest.mark.compiler
@pytest.mark.parametrize("settings", [{}, {"target": "features", "include": ["*.act"]}])
def test_a_compiled_model_is_masked(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # older transformers leave theirs behind
    plain, compiled = (
        trained(tmp_path, settings, model=gpt2(0.0), max_steps=6, torch_compile=on, torch_compile_backend="eager")
        for on in (False, True)
    )
    assert same(compiled[1].masks, plain[1].masks)
    assert same(weights(compiled[0]), weights(plain[0]))


def test_trls_trainers_log_what_they_gather_in_their_own_time(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"input_ids": x["input_ids"].tolist()} for x in Tokens()])

    def sft(folder, **settings):
        args = trl.SFTConfig(
            str(folder), per_device_train_batch_size=4, max_steps=6, logging_steps=4, report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, seed=1, save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = _tokenizer()
        return trl.SFTTrainer(gpt2(0.0), args, train_dataset=data, processing_class=tokenizer)

    plain, one = sft(tmp_path / "plain"), sft(tmp_path / "emp")
    emp = attach(one, observe_only=True)
    plain.train()
    one.train()
    gathered = [
        [(e["step"], e["mean_token_accuracy"], e["entropy"]) for e in t.state.log_history if "entropy" in e]
        for t in (plain, one)
    ]
    assert gathered[0] == gathered[1]
    assert gathered[0][0][0] == 4
    assert [row.step for row in emp.trajectory] == [3, 6]


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
