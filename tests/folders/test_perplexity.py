import math

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, log_softmax

from emp_callbacks.folders.perplexity import Scored, perplexity_of, perplexity_windows
from tests.folders.tiny import TEXT, TEXT_MODELS, run, write_folder

WITH_A_HEAD = [name for name in TEXT_MODELS if name != "BertModel"]
CAUSAL = [name for name, (config, _) in TEXT_MODELS.items() if "LM" in name and "Masked" not in name]


def model_of(config):
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).eval()
    with torch.no_grad():  # a model that is far from uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    return model


def ids_of(folder, text=TEXT):
    return transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def losses(model, scored):
    return [scored.loss(i, run(model, inputs).logits) for i, inputs in enumerate(scored.inputs)]


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_a_window_costs_what_the_model_itself_says_of_the_same_labels(name, folder, text):
    config = write_folder(folder, name)
    scored, model = perplexity_windows(folder, config, text, length=48, limit=3), model_of(config)
    assert scored.kind == ("masked perplexity" if "Masked" in name else "perplexity")
    for inputs, targets, (nll, count) in zip(scored.inputs, scored.targets, losses(model, scored), strict=True):
        # A causal model shifts its labels itself.
        labels = targets.roll(1) if name in CAUSAL else targets
        with torch.no_grad():
            expected = run(model, inputs, labels=labels[None]).loss.item()
        assert count == int((targets >= 0).sum())
        assert nll / count == pytest.approx(expected, rel=1e-5)
        assert nll / count > 1.0


@pytest.mark.parametrize("name", CAUSAL)
def test_without_a_stride_it_is_the_perplexity_of_gptq_and_wanda(name, folder, text):
    config, length = write_folder(folder, name), 64
    model, ids = model_of(config), ids_of(folder)
    count, negative_log_likelihoods = ids.shape[1] // length, []
    for i in range(count):
        window = ids[:, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = model(window).logits.double()
        loss = cross_entropy(logits[0, :-1], window[0, 1:])
        negative_log_likelihoods.append(loss * length)
    expected = math.exp(torch.stack(negative_log_likelihoods).sum().item() / (count * length))
    found = losses(model, perplexity_windows(folder, config, text))
    assert len(found) == count > 50
    assert perplexity_of(sum(nll for nll, _ in found), sum(n for _, n in found)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 20, 63])
def test_with_a_stride_each_token_is_scored_once_in_the_context_that_transformers_documents(stride, folder, text):
    config, length = write_folder(folder, "LlamaForCausalLM"), 64
    text.write_text(TEXT[:500])
    model, ids = model_of(config), ids_of(folder, TEXT[:500])
    total, counts, scored_to, size = 0.0, 0, 0, ids.shape[1]
    for begin in range(0, size, stride):
        end = min(begin + length, size)
        target = ids[:, begin:end].clone()
        target[:, : -(end - scored_to)] = -100
        with torch.no_grad():
            wise = log_softmax(model(ids[:, begin:end]).logits.double(), dim=-1)[0, :-1]
        places = (target[0, 1:] != -100).nonzero()[:, 0]
        total -= wise[places, target[0, 1:][places]].sum().item()
        counts += len(places)
        scored_to = end
        if end == size:
            break
    found = losses(model, perplexity_windows(folder, config, text, length=length, stride=stride))
    assert sum(n for _, n in found) == counts == size - 1
    assert sum(nll for nll, _ in found) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_of_an_encoder_decoder_the_second_half_of_each_window_is_scored(name, folder, text):
    config = write_folder(folder, name)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    scored = perplexity_windows(folder, config, text, length=48, limit=2)
    read = "".join(
        reader.decode(inputs["input_ids"][0], skip_special_tokens=True) + reader.decode(targets[targets >= 0])
        for inputs, targets in zip(scored.inputs, scored.targets, strict=True)
    )
    assert TEXT.startswith(read)
    assert len(read) > 80
    assert not any(torch.isin(targets, torch.tensor([0, 1, 2])).any() for targets in scored.targets)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_an_encoder_is_scored_on_a_fixed_share_of_tokens_that_it_does_not_see(name, folder, text):
    config = write_folder(folder, name)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    scored = perplexity_windows(folder, config, text, length=42)
    whole = ids_of(folder)[0, 1:-1]
    assert len(scored.inputs) == len(whole) // 40
    for i, (inputs, targets) in enumerate(zip(scored.inputs, scored.targets, strict=True)):
        hidden = inputs["input_ids"][0] == reader.mask_token_id
        assert hidden.equal(targets >= 0)
        assert hidden.sum() == 6
        seen = torch.where(hidden, targets, inputs["input_ids"][0])
        assert seen[1:-1].equal(whole[40 * i : 40 * (i + 1)])
    same, few = perplexity_windows(folder, config, text, length=42), perplexity_windows(folder, config, text, limit=3)
    other = perplexity_windows(folder, config, text, length=42, seed=1)
    assert torch.stack(list(same.targets)).equal(torch.stack(list(scored.targets)))
    assert not torch.stack(list(other.targets)).equal(torch.stack(list(scored.targets)))
    assert len(few.targets) == 3


def test_a_held_out_tail_is_what_calibration_has_not_seen(folder, text):
    config = write_folder(folder, "LlamaForCausalLM")
    whole = ids_of(folder)[0]
    tail = whole[len(whole) - round(0.25 * len(whole)) :]
    scored = perplexity_windows(folder, config, text, length=64, held_out_tail=0.25)
    found = torch.cat([inputs["input_ids"][0] for inputs in scored.inputs])
    assert found.equal(tail[: len(found)])
    assert len(tail) - len(found) < 64


def test_what_is_not_scored_is_said(folder, text):
    config = write_folder(folder, "GPT2LMHeadModel")
    count = ids_of(folder).shape[1]
    assert perplexity_windows(folder, config, text, length=64).notes == (
        f"the last {count % 64} tokens are less than a window and not scored",
    )
    assert perplexity_windows(folder, config, text, limit=5).notes == (f"the first 5 of {count // 64} windows",)
    text.write_text("one two three")
    short = perplexity_windows(folder, config, text, stride=50)
    size = ids_of(folder, "one two three").shape[1]
    assert short.notes == (f"one window of all {size} tokens of the text instead of windows of 64",)
    assert [inputs["input_ids"].shape for inputs in short.inputs] == [(1, size)]


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_a_text_of_a_few_tokens_is_one_window(name, folder, text):
    config = write_folder(folder, name)
    text.write_text("Return the")
    ((nll, count),) = losses(model_of(config), perplexity_windows(folder, config, text))
    assert nll > 0
    assert count >= 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("BertModel", {}, "a BertModel has no head that says the next token or a hidden one"),
        ("GPT2LMHeadModel", {"stride": 65}, "stride must be 1 to 64, .*; got 65"),
        ("GPT2LMHeadModel", {"stride": 0}, "stride must be 1 to 64, .*; got 0"),
        ("GPT2LMHeadModel", {"length": 0}, "a length of 0 tokens has no room"),
        ("GPT2LMHeadModel", {"limit": 0}, "limit must be at least 1 window, got 0"),
        ("GPT2LMHeadModel", {"held_out_tail": 1e-9}, "the text has 0 tokens to score"),
        ("BertForMaskedLM", {"stride": 8}, "stride=8 is for causal models"),
        ("T5ForConditionalGeneration", {"stride": 8}, "stride=8 is for causal models"),
    ],
)
def test_what_cannot_be_scored_is_refused(name, settings, message, folder, text):
    config = write_folder(folder, name)
    with pytest.raises(ValueError, match=message):
        perplexity_windows(folder, config, text, **settings)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("BertLMHeadModel", "BertForMaskedLM"),
        ("XLNetLMHeadModel", "GPT2LMHeadModel"),
        ("GPT2ForSequenceClassification", "GPT2LMHeadModel"),
    ],
)
def test_an_architecture_whose_losses_would_mean_nothing_is_refused(name, of, folder, text):
    config = write_folder(folder, of)
    config.architectures = [name]
    if name.startswith("XLNet"):
        config.model_type = "xlnet"
    with pytest.raises(ValueError, match=f"a {name} has no head"):
        perplexity_windows(folder, config, text)


def test_a_tokenizer_without_a_mask_token_cannot_hide_any(folder, text, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    write_folder(words, "T5ForConditionalGeneration")
    config = write_folder(folder, "BertForMaskedLM")
    with pytest.raises(ValueError, match="has no mask token"):
        perplexity_windows(folder, config, text, tokenizer=words)


WINDOW = Scored([{}], [torch.tensor([3, -100, 1])], "perplexity")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_named_by_their_window(wrong):
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 3] = wrong
    with pytest.raises(FloatingPointError, match=r"^the loss on window 1 of 1 is (nan|inf): .*$"):
        WINDOW.loss(0, logits)


def test_words_that_a_model_never_says_do_not_disturb():
    logits = torch.zeros(1, 3, 5)
    logits[..., 4] = -math.inf
    assert WINDOW.loss(0, logits) == (pytest.approx(2 * math.log(4)), 2)


def test_logits_of_other_positions_are_refused():
    with pytest.raises(ValueError, match=r"window 1 has 3 positions and the model answers logits of shape \(1, 1, 5\)"):
        WINDOW.loss(0, torch.zeros(1, 1, 5))


def test_the_loss_of_a_large_vocabulary_takes_its_logits_in_parts(monkeypatch):
    seen = []

    def watched(logits, *args, **settings):
        seen.append(logits.shape)
        return cross_entropy(logits, *args, **settings)

    monkeypatch.setattr("emp_callbacks.folders.perplexity.cross_entropy", watched)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 600, 50, generator=generator).bfloat16()
    targets = torch.randint(50, (600,), generator=generator)
    nll, count = Scored([{}], [targets], "perplexity").loss(0, logits)
    assert nll == pytest.approx(cross_entropy(logits[0].double(), targets, reduction="sum").item(), rel=1e-6)
    assert count == 600
    assert max(rows for rows, _ in seen) <= 256


@pytest.mark.parametrize(("nll", "tokens", "expected"), [(math.log(8) * 5, 5, 8.0), (0.0, 1, 1.0), (1e6, 1, math.inf)])
def test_perplexity_is_the_exponential_of_the_mean(nll, tokens, expected):
    assert perplexity_of(nll, tokens) == pytest.approx(expected)


def test_without_a_scored_token_there_is_no_perplexity():
    with pytest.raises(ValueError, match="no token is scored"):
        perplexity_of(0.0, 0)
