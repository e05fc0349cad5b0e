"""What a speech model in a folder is called with, so that a criterion sees its activations."""

from __future__ import annotations

import wave
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emp_callbacks.extras import is_installed, needs
from emp_callbacks.folders.processors import architecture, check_takes, processor_of, tokenizer_of
from emp_callbacks.folders.samples import (
    Samples,
    check_count,
    counted,
    media_files,
    model_inputs,
    read_each,
    spread,
)
from emp_callbacks.folders.text_calls import MOST_TEXT, decoder_start
from emp_callbacks.folders.text_file import text_pieces
from emp_callbacks.targets.names import few

__all__ = ["sound_samples"]

Sound = NDArray[np.float32]

_SHORTEST, _LONGEST = 0.1, 30.0  # seconds: below, a model's convolutions find nothing; Whisper reads so many at once
_SOUNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def sound_samples(
    folder: Path,
    config: Any,
    sounds: Path,
    *,
    count: int = 128,
    text: Path | None = None,
    tokenizer: Path | None = None,
) -> Samples:
    """Return clips of a folder and its subfolders, as the feature extractor of the model's folder makes them.

    The mean of a clip's channels is taken, at the extractor's sampling rate, and its first 30 seconds.

    Args:
        folder: The model's, with preprocessor_config.json.
        config: The model's, a transformers config.
        sounds: A folder, or one file: .wav, and with the soundfile package .flac, .ogg and .mp3. Of its files, sorted
            by path, `count` evenly spaced ones are taken.
        count: Clips.
        text: What is said in them, a line for each file in that order, UTF-8. An encoder-decoder (Whisper) is taught
            it; without it its decoder sees the token that it starts with and nothing else, which a note says.
        tokenizer: Another folder to take the tokenizer from.

    Raises:
        ImportError: transformers is not installed, or scipy where a clip has another sampling rate.
        OSError: There is no sound, or no such text.
        ValueError: No clip can be read, the lines are not as many as the files, or the model takes no sound.
    """
    check_count(count)
    extractor = processor_of(folder, "AutoFeatureExtractor", "feature extractor")
    check_takes(
        config,
        ["input_features", "input_values"],
        "sounds",
        "give a text or images, or a folder with a model of speech",
    )
    files = media_files(sounds, _SOUNDFILE_SUFFIXES if is_installed("soundfile") else (".wav",))
    said, notes = _decoder_inputs(folder, config, files, text, tokenizer)
    rate, cut = int(extractor.sampling_rate), []

    def read(path: Path) -> dict[str, Tensor]:
        sound = _resampled(*_read(path), rate, path)
        if len(sound) < _SHORTEST * rate:
            raise ValueError(f"shorter than {_SHORTEST} seconds")
        if len(sound) > _LONGEST * rate:
            cut.append(path)
        made = extractor(sound[: int(_LONGEST * rate)], sampling_rate=rate, return_tensors="pt")
        return model_inputs(made) | said.get(path, {})

    inputs, damaged = read_each(spread(files, count), read, (OSError, ValueError, RuntimeError))
    if cut:
        notes += (f"cut after {_LONGEST:.0f} seconds: {few([str(path) for path in cut])}",)
    return Samples(inputs, "seconds of sound", counted(len(inputs), count, "clips") + notes + damaged)


def _decoder_inputs(
    folder: Path, config: Any, files: list[Path], text: Path | None, tokenizer: Path | None
) -> tuple[dict[Path, dict[str, Tensor]], tuple[str, ...]]:
    """Return what the decoder is called with for each file, none where there is no decoder; and notes."""
    if not getattr(config, "is_encoder_decoder", False):
        if text is not None:
            raise ValueError(f"a {architecture(config)} has no decoder that could be taught {text}; leave the text out")
        return {}, ()
    start = decoder_start(config)
    if text is None:
        alone = {"decoder_input_ids": torch.tensor([[start]])}
        note = "the decoder sees no text, only the token that it starts with; give what is said, a line for each file"
        return dict.fromkeys(files, alone), (note,)
    lines = "".join(text_pieces([text], MOST_TEXT, [])).removesuffix("\n").split("\n")
    if len(lines) != len(files):
        raise ValueError(f"{text} has {len(lines)} lines for {len(files)} sound files; give a line for each, in order")
    reader = tokenizer_of(folder, tokenizer)
    most = getattr(config, "max_target_positions", None)
    taught = {}
    for path, line in zip(files, lines, strict=True):
        ids = reader(line)["input_ids"]
        # Whisper's tokenizer puts that token before a text, and as labels a model is taught what follows it.
        shifted = ids[:-1] if ids[0] == start else [start, *ids[:-1]]
        taught[path] = {"decoder_input_ids": torch.tensor([shifted[:most]])}
    return taught, ()


def _read(path: Path) -> tuple[Sound, int]:
    """Return a file's sound, the mean of its channels, and its sampling rate in Hz."""
    if is_installed("soundfile"):
        import soundfile

        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return sound.mean(axis=1), int(rate)
    try:
        with path.open("rb") as file, wave.open(file) as opened:
            width, rate, channels = opened.getsampwidth(), opened.getframerate(), opened.getnchannels()
            data = np.frombuffer(opened.readframes(opened.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"no PCM: {error or 'it ends too early'}; the soundfile package reads other kinds") from error
    # Little-endian samples of any width become the high bytes of int32; those of one byte are unsigned.
    wide = np.zeros((len(data) // width, 4), np.uint8)
    wide[:, 4 - width :] = data[: len(wide) * width].reshape(-1, width) ^ (0x80 if width == 1 else 0)
    sound = wide.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    return sound[: len(sound) // channels * channels].reshape(-1, channels).mean(axis=1), rate


def _resampled(sound: Sound, rate: int, wanted: int, path: Path) -> Sound:
    if rate == wanted:
        return sound
    needs(f"resampling {path} from {rate} to {wanted} Hz", "study", "scipy")
    from scipy.signal import resample_poly

    both = gcd(rate, wanted)
    return np.asarray(resample_poly(sound, wanted // both, rate // both), np.float32)
