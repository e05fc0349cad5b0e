import importlib.util
import wave

import numpy as np
import pytest
import torch
import transformers
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from emp_callbacks.folders import sound_samples as module
from emp_callbacks.folders.sound_samples import sound_samples
from tests.folders.tiny import bpe_tokenizer, write_folder

RATE = 16000


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture
def sounds(tmp_path):
    path = tmp_path / "sounds"
    path.mkdir()
    for i in range(3):
        write_wav(path / f"{i}.wav", tone(200 + 100 * i))
    return path


def tone(frequency, seconds=0.5, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def write_wav(path, sound, width=2, rate=RATE):
    """Write a sound of shape (T,) or (T, channels) in -1 to 1 as PCM of that many bytes."""
    values = np.round(sound * (2 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    data = b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in values.flatten())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def test_a_model_of_speech_runs_on_what_its_folder_makes_of_sounds(folder, sounds):
    config = write_folder(folder, "Wav2Vec2ForCTC")
    samples = sound_samples(folder, config, sounds, count=3)
    assert samples.unit == "seconds of sound"
    assert samples.notes == ()
    model = transformers.Wav2Vec2ForCTC(config).eval()
    for inputs in samples.inputs:
        assert {name: (value.shape, value.dtype) for name, value in inputs.items()} == {
            "input_values": ((1, 8000), torch.float32)
        }
        assert model(**inputs).logits.shape[::2] == (1, 32)


def test_an_encoder_decoder_of_speech_is_taught_what_is_said(folder, sounds, tmp_path):
    config = write_folder(folder, "WhisperForConditionalGeneration")
    reader = bpe_tokenizer("<s> $A </s>")
    reader.save_pretrained(folder)
    said = ["Return self", "the value of a str", "type " * 40]
    text = tmp_path / "said.txt"
    text.write_text("\n".join(said) + "\n")
    samples = sound_samples(folder, config, sounds, count=3, text=text)
    assert samples.notes == ()
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for inputs, line in zip(samples.inputs, said, strict=True):
        assert inputs["input_features"].dtype == torch.float32
        # The tokenizer puts the token that the decoder starts with before a text, and it is not doubled.
        assert inputs["decoder_input_ids"][0].tolist() == reader(line)["input_ids"][:-1][:16]
        labels = torch.tensor([reader(line)["input_ids"][1:]])
        if labels.shape[1] <= 16:
            assert shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id).equal(
                inputs["decoder_input_ids"]
            )
        answer = model(**inputs, use_cache=False).logits
        assert answer.shape == (1, inputs["decoder_input_ids"].shape[1], config.vocab_size)


def test_without_a_text_the_decoder_sees_its_first_token_only_and_that_is_said(folder, sounds):
    config = write_folder(folder, "WhisperForConditionalGeneration")
    samples = sound_samples(folder, config, sounds, count=3)
    assert samples.notes == (
        "the decoder sees no text, only the token that it starts with; give what is said, a line for each file",
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for inputs in samples.inputs:
        assert inputs["decoder_input_ids"].tolist() == [[config.decoder_start_token_id]]
        assert model(**inputs, use_cache=False).logits.shape == (1, 1, config.vocab_size)


def test_a_tokenizer_that_puts_nothing_before_a_text_gets_the_first_token_put_before_it(folder, sounds, tmp_path):
    config = write_folder(folder, "WhisperForConditionalGeneration")
    bpe_tokenizer("$A </s>").save_pretrained(folder)
    text = tmp_path / "said.txt"
    text.write_text("Return\nself\nvalue")
    ids = bpe_tokenizer()("Return")["input_ids"]
    samples = sound_samples(folder, config, sounds, text=text)
    assert samples.inputs[0]["decoder_input_ids"][0].tolist() == [config.decoder_start_token_id, *ids]


def test_lines_that_are_not_as_many_as_the_sounds_are_refused(folder, sounds, tmp_path):
    config = write_folder(folder, "WhisperForConditionalGeneration")
    text = tmp_path / "said.txt"
    text.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"said.txt has 2 lines for 3 sound files"):
        sound_samples(folder, config, sounds, text=text)


def test_a_model_without_a_decoder_is_taught_no_text(folder, sounds, tmp_path):
    config = write_folder(folder, "Wav2Vec2ForCTC")
    with pytest.raises(ValueError, match=r"a Wav2Vec2ForCTC has no decoder that could be taught .*said.txt"):
        sound_samples(folder, config, sounds, text=tmp_path / "said.txt")


@pytest.mark.parametrize(("width", "error"), [(1, 2**-7), (2, 2**-15), (3, 2**-20), (4, 2**-20)])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_any_width_is_read_as_the_mean_of_its_channels(width, error, channels, tmp_path):
    sound = np.stack([tone(300), tone(450)][:channels], axis=1)
    write_wav(tmp_path / "a.wav", sound, width)
    found, rate = module._read(tmp_path / "a.wav")
    assert rate == RATE
    assert np.abs(found - sound.mean(axis=1)).max() <= error


@pytest.mark.skipif(not importlib.util.find_spec("soundfile"), reason="soundfile is not installed")
def test_other_formats_are_read_where_soundfile_is_installed(folder, sounds, tmp_path):
    import soundfile

    config = write_folder(folder, "Wav2Vec2ForCTC")
    (sounds / "0.wav").unlink()
    soundfile.write(sounds / "0.flac", np.stack([tone(200), tone(200)], axis=1), RATE)
    samples = sound_samples(folder, config, sounds, count=3)
    extractor = transformers.Wav2Vec2FeatureExtractor()
    expected = extractor(tone(200), sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert torch.allclose(samples.inputs[0]["input_values"], expected, atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_a_sound_of_another_rate_is_the_same_sound_resampled(rate, folder, tmp_path):
    config = write_folder(folder, "Wav2Vec2ForCTC")
    write_wav(tmp_path / "a.wav", tone(300, rate=rate), rate=rate)
    (inputs,) = sound_samples(folder, config, tmp_path / "a.wav", count=1).inputs
    expected = torch.tensor(tone(300) / tone(300).std(), dtype=torch.float32)
    found = inputs["input_values"][0]
    assert abs(len(found) - len(expected)) <= 1
    assert torch.allclose(found[1000:7000], expected[1000:7000], atol=0.02)


def test_another_rate_without_scipy_is_refused_with_what_to_install(folder, tmp_path, monkeypatch):
    config = write_folder(folder, "Wav2Vec2ForCTC")
    write_wav(tmp_path / "a.wav", tone(300, rate=8000), rate=8000)
    monkeypatch.setattr("emp_callbacks.extras.is_installed", lambda name: name != "scipy")
    with pytest.raises(ImportError, match=r"resampling .*a.wav from 8000 to 16000 Hz needs scipy"):
        sound_samples(folder, config, tmp_path / "a.wav")


def test_long_clips_are_cut_and_that_is_said(folder, sounds):
    config = write_folder(folder, "Wav2Vec2ForCTC")
    write_wav(sounds / "1.wav", tone(300, seconds=31, rate=RATE))
    samples = sound_samples(folder, config, sounds, count=3)
    assert [inputs["input_values"].shape[1] for inputs in samples.inputs] == [8000, 30 * RATE, 8000]
    assert samples.notes == (f"cut after 30 seconds: {sounds / '1.wav'}",)


def test_sounds_that_cannot_be_read_are_named_and_left_out_with_their_lines(folder, sounds, tmp_path):
    config = write_folder(folder, "WhisperForConditionalGeneration")
    bpe_tokenizer("<s> $A </s>").save_pretrained(folder)
    (sounds / "0.wav").write_bytes(b"no sound")
    write_wav(sounds / "1.wav", tone(300, seconds=0.05))
    text = tmp_path / "said.txt"
    text.write_text("Return\nself\nvalue\n")
    samples = sound_samples(folder, config, sounds, count=3, text=text)
    assert [inputs["decoder_input_ids"].tolist() for inputs in samples.inputs] == [
        [bpe_tokenizer("<s> $A")("value")["input_ids"]]
    ]
    assert samples.notes[0] == "1 of the 3 clips that were asked for"
    assert importlib.util.find_spec("soundfile") or "0.wav (no PCM: " in samples.notes[1]
    assert "1.wav (shorter than 0.1 seconds)" in samples.notes[1]


def test_a_model_of_text_gets_no_sounds(folder, sounds, tmp_path):
    speech = tmp_path / "speech"
    speech.mkdir()
    write_folder(speech, "Wav2Vec2ForCTC")
    config = write_folder(folder, "GPT2LMHeadModel")
    with pytest.raises(ValueError, match="a GPT2LMHeadModel takes no input_features or input_values"):
        sound_samples(speech, config, sounds)
