import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks.study.recipe.data import DigitsData, TextData
from emp_callbacks.study.recipe.optimization import decay_groups, warm_restarts, warmup_cosine
from emp_callbacks.study.recipe.tasks import ImageClassification, LanguageModel

TINY_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_GPT = {"n_layer": 1, "n_head": 2, "n_embd": 8, "sequence_length": 16}


def image_task(**settings):
    torch.manual_seed(0)
    return ImageClassification(model_args=TINY_VIT, **settings)


def trainer(**settings):
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **{"max_epochs": 1, **settings},
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "my.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 100)
    return TextData(str(path), sequence_length=16, batch_size=8, seed=0)


def test_image_metrics_have_the_agreed_names_and_equal_the_hand_computation():
    task, data, host = image_task(), DigitsData(seed=0), trainer()
    host.fit(task, datamodule=data)
    assert set(host.callback_metrics) == {"train/loss", "val/loss", "val/accuracy"}
    logged = host.test(task, datamodule=data, verbose=False)[0]
    images, labels = data._parts["test"][:]
    with torch.no_grad():
        logits = task.eval()(images)
    assert set(logged) == {"test/loss", "test/accuracy"}
    assert logged["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert logged["test/loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_accuracy_counts_images_not_classes():
    metric = image_task().val_accuracy
    metric.update(torch.eye(10)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]))
    assert metric.compute() == 0.75  # a mean over the classes would be 0.5


def test_text_metrics_have_the_agreed_names_and_equal_the_hand_computation(text):
    torch.manual_seed(0)
    task, host = LanguageModel(**TINY_GPT), trainer(max_epochs=3)
    host.fit(task, datamodule=text)
    assert set(host.callback_metrics) == {"train/loss", "val/loss", "val/perplexity"}
    assert host.callback_metrics["val/perplexity"] < 200  # uniform guessing has 256
    logged = host.test(task, datamodule=text, verbose=False)[0]
    dataset = text._parts["test"]
    tokens, targets = dataset.__getitems__(list(range(len(dataset))))
    with torch.no_grad():
        chosen = task.eval()(tokens).log_softmax(-1).gather(-1, targets[..., None])
    assert set(logged) == {"test/loss", "test/perplexity"}
    assert logged["test/loss"] == pytest.approx(-chosen.mean().item(), rel=1e-5)
    assert logged["test/perplexity"] == pytest.approx(math.exp(-chosen.mean().item()), rel=1e-5)


def test_a_language_model_does_not_see_the_future():
    task = LanguageModel(**TINY_GPT).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (tokens[0, 10:] + 1) % 256
    with torch.no_grad():
        before, after = task(tokens), task(changed)
    assert before.shape == (1, 16, 256)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def rates_of(task, data, **settings):
    """Return the learning rate after each optimizer step: that of the next one."""
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, host, *args):
            rates.append(host.optimizers[0].param_groups[0]["lr"])

    trainer(callbacks=[Watch()], limit_val_batches=0, **settings).fit(task, datamodule=data)
    return rates


def test_the_learning_rate_rises_and_falls_to_zero_over_all_optimizer_steps():
    task = image_task(lr=0.01, warmup_fraction=0.25)
    rates = rates_of(task, DigitsData(batch_size=100, seed=0), max_epochs=2)  # 20 steps, of which 5 rise
    assert len(rates) == 20
    assert max(rates) == rates[3] == pytest.approx(0.01)  # the rate for the fifth step is set after the fourth
    assert rates[0] == pytest.approx(0.01 * 2 / 5)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_schedule_needs_an_end():
    with pytest.raises(ValueError, match=r"max_epochs or trainer\.max_steps"):
        trainer(max_epochs=-1).fit(image_task(), datamodule=DigitsData())


def test_schedule_without_warmup_starts_at_the_top_and_stays_at_zero_beyond_the_end():
    assert warmup_cosine(0, total=4, warmup=0) == 1
    assert warmup_cosine(9, total=4, warmup=0) == 0


def test_each_segment_of_warm_restarts_is_a_schedule_of_its_own_length():
    factors = [warm_restarts(step, starts=[0, 4, 14], total=20, warmup_fraction=0.5) for step in range(20)]
    # Warm-ups of 2, 5 and 3 steps, then cosines of 2, 5 and 3.
    first = [1 / 2, 1, 1, 0.5]
    second = [i / 5 for i in range(1, 6)] + [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    third = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]
    assert factors == pytest.approx([*first, *second, *third])


def test_one_segment_is_the_schedule_without_restarts():
    for step in range(25):
        assert warm_restarts(step, [0], 20, 0.25) == warmup_cosine(step, total=20, warmup=5)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_both_tasks_begin_their_learning_rate_anew(kind, text):
    settings = {"lr": 0.01, "warmup_fraction": 0.25, "lr_restarts": [0.4, 0.8]}
    task, data = (
        (image_task(**settings), DigitsData(batch_size=50, seed=0))
        if kind == "images"
        else (LanguageModel(**TINY_GPT, **settings), text)
    )
    rates = rates_of(task, data, max_steps=20)  # segments of 8, 8 and 4 steps, of which 2, 2 and 1 rise
    eight = [0.5, 1, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]
    four = [1, *((1 + math.cos(math.pi * i / 3)) / 2 for i in range(3))]
    assert [rate / 0.01 for rate in rates] == pytest.approx([*eight, *eight, *four, 0][1:], abs=1e-9)


@pytest.mark.parametrize("restarts", [[0.0, 0.5], [1.0], [0.5, 0.5], [0.8, 0.4], [math.nan]])
def test_restarts_outside_the_training_or_out_of_order_are_an_error(restarts):
    for make in (image_task, LanguageModel):
        with pytest.raises(ValueError, match=r"increasing parts of the training in \(0, 1\), got \["):
            make(lr_restarts=restarts)


@pytest.mark.parametrize(("restarts", "steps"), [([0.5, 0.51], "[5, 5]"), ([0.01], "[0]"), ([0.99], "[10]")])
def test_restarts_that_are_no_steps_of_their_own_are_an_error(restarts, steps):
    with pytest.raises(ValueError, match=r"optimizer steps .* of 10: .*move them apart") as error:
        rates_of(image_task(lr_restarts=restarts), DigitsData(), max_steps=10)
    assert f"optimizer steps {steps} of 10" in str(error.value)


def test_only_matrices_decay_and_no_parameter_is_lost():
    model = image_task().model
    decayed, plain = decay_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in plain["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert {id(p) for p in decayed["params"] + plain["params"]} == {id(p) for p in model.parameters()}
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert [group["params"] for group in decay_groups(frozen, 0.1)] == [[], []]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizers_by_name(name, kind):
    task, host = image_task(optimizer=name, momentum=0.7, lr=0.1), trainer(limit_train_batches=2, max_steps=2)
    host.fit(task, datamodule=DigitsData())
    assert type(host.optimizers[0]) is kind
    assert host.optimizers[0].param_groups[0].get("momentum", 0.7) == 0.7


def test_an_unknown_model_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'resnet10tt'.*resnet10t\b"):
        ImageClassification(model="resnet10tt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"optimizer": "adam"}, "adamw or sgd, got 'adam'"), ({"warmup_fraction": 1.0}, r"\[0, 1\), got 1\.0")],
)
def test_bad_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        image_task(**settings)


def test_text_that_does_not_fit_the_model_is_an_error(text):
    with pytest.raises(ValueError, match="vocabulary has 300 tokens, the data's 256"):
        trainer().fit(LanguageModel(**TINY_GPT, vocab_size=300), datamodule=text)
    with pytest.raises(ValueError, match="sequence_length=16 is longer than the model's 8"):
        trainer().fit(LanguageModel(**{**TINY_GPT, "sequence_length": 8}), datamodule=text)


def test_a_vocabulary_rounded_up_to_a_multiple_of_64_fits_from_scratch_alone(text, tmp_path):
    text.vocab_size = 250
    trainer(limit_train_batches=1, limit_val_batches=0).fit(LanguageModel(**TINY_GPT, vocab_size=256), datamodule=text)
    LanguageModel(**TINY_GPT, vocab_size=256).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary has 256 tokens, the data's 250"):
        LanguageModel(pretrained=str(tmp_path), vocab_size=250)


def test_other_architectures_take_the_same_sizes_and_their_own():
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "sequence_length": 16}
    task = LanguageModel(**sizes, architecture="llama", model_args={"num_key_value_heads": 2, "intermediate_size": 48})
    config = task.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (2, 4, 32)
    assert (config.max_position_embeddings, config.num_key_value_heads, config.intermediate_size) == (16, 2, 48)
    assert task(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 256)
    with pytest.raises(ValueError, match=r"unknown architecture 'lama'; nearest names: llama\b"):
        LanguageModel(architecture="lama")
    with pytest.raises(ValueError, match=r"dropout=0\.1 is of gpt2"):
        LanguageModel(architecture="llama", dropout=0.1)


def test_mixed_targets_and_smoothed_labels_are_trained_on():
    task, plain = image_task(label_smoothing=0.2), image_task()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for one in (task, plain):
        one.log = lambda *_, **__: None
    logits = task(images)
    smoothed = functional.one_hot(labels, 10) * 0.8 + 0.02
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    assert task.training_step((images, labels), 0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain.training_step((images, smoothed), 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_learning_rate_ends_at_a_part_of_the_highest():
    assert rates_of(image_task(lr=0.01, final_lr_fraction=0.1), DigitsData(), max_steps=4)[-1] == pytest.approx(0.001)
    assert warmup_cosine(3, total=6, warmup=0, final=0.2) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"final_lr_fraction must lie in \[0, 1\), got 1"):
        image_task(final_lr_fraction=1)


def test_a_pretrained_model_needs_its_own_vocabulary(tmp_path):
    LanguageModel(**TINY_GPT, vocab_size=300).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"300 tokens, the data's 256.*own tokenizer"):
        LanguageModel(pretrained=str(tmp_path))
    task = LanguageModel(pretrained=str(tmp_path), vocab_size=300, sequence_length=16)
    assert task.model.config.n_embd == 8


def test_a_checkpoint_rebuilds_the_task(tmp_path):
    task, host = image_task(lr=0.02), trainer(limit_train_batches=1)
    host.fit(task, datamodule=DigitsData())
    host.save_checkpoint(tmp_path / "task.ckpt")
    again = ImageClassification.load_from_checkpoint(tmp_path / "task.ckpt")
    assert again.hparams["lr"] == 0.02
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))
