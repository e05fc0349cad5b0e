import json

import pytest
import torch
import transformers

from emp_callbacks.folders.samples import text_samples
from tests.folders.tiny import TEXT, TEXT_MODELS, run, write_folder


def model_of(config):
    torch.manual_seed(0)
    return getattr(transformers, config.architectures[0])(config).eval()


def tokens(samples):
    return torch.cat([inputs["input_ids"] for inputs in samples.inputs])


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_model_runs_on_what_its_folder_makes_of_a_text(name, folder, text):
    config = write_folder(folder, name)
    samples = text_samples(folder, config, text, count=3, length=48)
    assert len(samples.inputs) == 3
    assert samples.notes == ()
    for inputs in samples.inputs:
        assert {value.dtype for value in inputs.values()} == {torch.int64}
        answer = run(model_of(config), inputs)[0]
        assert answer.shape[:2] == (1, 24 if config.is_encoder_decoder else 48)
        assert sum(value.numel() for value in inputs.values()) == 48


def test_windows_lie_at_random_places_of_the_whole_text_that_a_seed_fixes(folder, text):
    config = write_folder(folder, "GPT2LMHeadModel")
    whole = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"][0]
    begins = torch.randint(len(whole) - 31, (20,), generator=torch.Generator().manual_seed(0))
    found = tokens(text_samples(folder, config, text, count=20, length=32))
    assert found.equal(torch.stack([whole[begin : begin + 32] for begin in begins]))
    assert found.equal(tokens(text_samples(folder, config, text, count=20, length=32)))
    assert not found.equal(tokens(text_samples(folder, config, text, count=20, length=32, seed=1)))


def test_the_first_windows_are_the_text_from_its_beginning(folder, text):
    config = write_folder(folder, "LlamaForCausalLM")
    whole = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    found = tokens(text_samples(folder, config, text, count=5, length=32, first=True))
    assert found.flatten().tolist() == whole[: 5 * 32]
    assert whole[0] == config.bos_token_id
    assert (found == config.bos_token_id).sum() == 1


def test_an_encoder_gets_in_every_window_what_the_tokenizer_puts_around_a_text(folder, text):
    config = write_folder(folder, "BertModel")
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokens(text_samples(folder, config, text, count=5, length=32))
    assert found[:, 0].tolist() == [reader.cls_token_id] * 5
    assert found[:, -1].tolist() == [reader.sep_token_id] * 5
    assert not torch.isin(found[:, 1:-1], torch.tensor([reader.cls_token_id, reader.sep_token_id])).any()


def test_the_encoder_of_an_encoder_decoder_alone_gets_what_is_behind_a_text(folder, text):
    config = write_folder(folder, "T5ForConditionalGeneration")
    config.architectures, config.is_encoder_decoder = ["T5EncoderModel"], False
    samples = text_samples(folder, config, text, count=5, length=32)
    assert tokens(samples)[:, -1].tolist() == [config.eos_token_id] * 5
    assert run(model_of(config), samples.inputs[0])[0].shape == (1, 32, 16)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_decoder_is_taught_what_follows_what_the_encoder_reads(name, folder, text):
    config = write_folder(folder, name)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    (inputs,) = text_samples(folder, config, text, count=1, length=48, first=True).inputs
    halves = [reader.decode(inputs[name][0], skip_special_tokens=True) for name in ("input_ids", "decoder_input_ids")]
    assert TEXT.startswith("".join(halves))
    assert min(map(len, halves)) > 10
    assert inputs["decoder_input_ids"][0, 0] == config.decoder_start_token_id
    # As the model itself makes them of what its decoder is taught.
    target = torch.cat([inputs["decoder_input_ids"][:, 1:], torch.tensor([[7]])], dim=1)
    own = model_of(config).prepare_decoder_input_ids_from_labels(target)
    assert own.equal(inputs["decoder_input_ids"])


def test_no_window_reaches_into_the_tail_that_is_held_out(folder, text):
    config = write_folder(folder, "GPT2LMHeadModel")
    whole = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"][0]
    kept = len(whole) - round(len(whole) * 0.9)
    found = tokens(text_samples(folder, config, text, count=200, length=2, held_out_tail=0.9))
    places = whole.unfold(0, 2, 1)[: kept - 1]
    assert all((places == window).all(dim=1).any() for window in found)


def test_a_short_text_gives_the_windows_that_fit_beside_each_other_with_a_note(folder, text):
    config = write_folder(folder, "GPT2LMHeadModel")
    text.write_text("a b " * 35)
    samples = text_samples(folder, config, text, count=9, length=32)
    count = len(transformers.AutoTokenizer.from_pretrained(folder)("a b " * 35)["input_ids"])
    assert len(samples.inputs) == count // 32
    assert samples.notes == (f"the text has {count} tokens: {count // 32} windows of 32 instead of 9",)


def test_a_text_without_one_window_is_refused_with_what_would_fit(folder, text):
    config = write_folder(folder, "BertModel")
    text.write_text("the string")
    message = "has 2 tokens for calibration and a window takes 30; give a longer text, or --length 4 at most"
    with pytest.raises(ValueError, match=message):
        text_samples(folder, config, text, length=32)
    assert tokens(text_samples(folder, config, text, length=4, count=1)).shape == (1, 4)


@pytest.mark.parametrize("name", [name for name in TEXT_MODELS if name != "T5ForConditionalGeneration"])
def test_windows_are_as_long_as_the_model_takes_at_most_with_a_note(name, folder, text):
    config = write_folder(folder, name)
    samples = text_samples(folder, config, text, count=2, length=999)
    most = 128 if config.is_encoder_decoder else 64
    assert samples.notes == (f"windows of {most} tokens, the longest that the model takes, instead of 999",)
    assert sum(value.numel() for value in samples.inputs[0].values()) == most
    model_of(config)(**samples.inputs[0])


def test_a_roberta_has_as_many_positions_less_as_lie_before_its_first(folder, text):
    config = write_folder(folder, "RobertaForMaskedLM")
    ids = tokens(text_samples(folder, config, text, count=1, length=64))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model_of(config)(input_ids=torch.cat([ids, ids[:, :1]], dim=1))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"])
def test_a_folder_without_a_tokenizer_is_refused_and_another_one_can_give_it(name, folder, text, tmp_path):
    config = write_folder(folder, name)
    bare = tmp_path / "bare"
    bare.mkdir()
    config.save_pretrained(bare)
    with pytest.raises(FileNotFoundError, match=r"bare holds no tokenizer \(tokenizer.json, .*--tokenizer FOLDER$"):
        text_samples(bare, config, text)
    found = text_samples(bare, config, text, tokenizer=folder, count=2, length=16)
    assert tokens(found).equal(tokens(text_samples(folder, config, text, count=2, length=16)))


def test_a_tokenizer_that_lost_its_vocabulary_is_refused(folder, text):
    config = write_folder(folder, "BertModel")
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"knows no word of .*text.txt|cannot be used"):
        text_samples(folder, config, text)


def test_a_tokenizer_that_is_code_in_a_file_is_refused_and_not_run(folder, text):
    config = write_folder(folder, "LlamaForCausalLM")
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    told = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be used: (it would run code from files, which is refused|requires)"):
        text_samples(folder, config, text)


def test_a_damaged_tokenizer_is_refused_in_one_line(folder, text):
    config = write_folder(folder, "LlamaForCausalLM")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^the tokenizer of .*model cannot be used: .*; copy its files again.*$"):
        text_samples(folder, config, text)


def test_the_tokenizer_of_a_larger_model_is_refused(folder, text):
    config = write_folder(folder, "LlamaForCausalLM")
    config.vocab_size = 200
    with pytest.raises(ValueError, match=r"makes token 3.. of .*text.txt, and the model knows 200"):
        text_samples(folder, config, text)


def test_an_encoder_decoder_without_a_first_token_is_refused(folder, text):
    config = write_folder(folder, "T5ForConditionalGeneration")
    config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="write its decoder_start_token_id there"):
        text_samples(folder, config, text)


def test_an_mbart_starts_with_the_last_token_behind_a_text_as_its_model_does(folder, text):
    _, reader = TEXT_MODELS["BartForConditionalGeneration"]
    reader.save_pretrained(folder)
    config = transformers.MBartConfig(vocab_size=320, pad_token_id=1, architectures=["MBartForConditionalGeneration"])
    (inputs,) = text_samples(folder, config, text, count=1, length=48).inputs
    assert inputs["decoder_input_ids"][0, :2].tolist() == [2, 0]


def test_a_model_that_reads_no_text_is_refused(folder, text, tmp_path):
    vision, words = tmp_path / "vision", folder
    vision.mkdir()
    write_folder(words, "GPT2LMHeadModel")
    config = write_folder(vision, "ViTForImageClassification")
    with pytest.raises(ValueError, match=r"a ViTForImageClassification takes no input_ids, .*give images or sounds"):
        text_samples(vision, config, text, tokenizer=words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "at least one sample, got 0"),
        ({"length": 1}, "a length of 1 tokens has no room for text; give at least 2"),
        ({"held_out_tail": 1.5}, "held_out_tail must be a fraction"),
        ({"held_out_tail": 1.0}, "the text has 0 tokens for calibration"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings, message, folder, text):
    config = write_folder(folder, "GPT2LMHeadModel")
    with pytest.raises(ValueError, match=message):
        text_samples(folder, config, text, **settings)
