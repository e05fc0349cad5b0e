"""How a run of text becomes one call of a model, by its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emp_callbacks.folders.processors import architecture, check_takes, tokenizer_of
from emp_callbacks.folders.text_file import text_pieces
from emp_callbacks.setting_checks import check_fraction

__all__ = ["MOST_TEXT", "Text", "TextCall", "decoder_start", "read_text", "text_kind"]

MOST_TEXT = 16 << 20
"""Bytes of text that are tokenised at most: more than ten times what 128 windows of 2,048 tokens take."""

Kind = Literal["causal", "encoder", "encoder-decoder"]

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
# Their positions begin behind padding_idx, so the embedding has that many rows more than tokens fit.
_PADDED_POSITIONS = frozenset(
    (
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet"),
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
)
# Their decoder starts with the last token that the tokenizer puts behind a text, whatever the config says.
_STARTS_WITH_THE_LAST = frozenset({"mbart", "plbart"})


def text_kind(config: Any) -> Kind:
    """Return how a model reads text: from left to right, both ways at once, or first the one and then the other."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "encoder" if both_ways or architecture(config).endswith("EncoderModel") else "causal"


@dataclass(frozen=True)
class TextCall:
    """How a run of text tokens becomes one call.

    A causal model is called with the tokens as they are. An encoder gets what the tokenizer puts around a text as well
    ([CLS], [SEP]). An encoder-decoder reads the first half, with that around it, and its decoder is taught the second
    half, shifted right by the token that it starts with.
    """

    kind: Kind
    prefix: tuple[int, ...]  # what the tokenizer puts before a text
    suffix: tuple[int, ...]  # and behind it
    start: int | None = None  # what a decoder starts with
    mask: int | None = None  # the token that hides another from an encoder

    def room(self, length: int) -> int:
        """Return how many tokens of text are in a call of `length` tokens (encoder and decoder together)."""
        if self.kind == "causal":
            return length
        around = len(self.prefix) + len(self.suffix)
        return length - around - (len(self.prefix) if self.kind == "encoder-decoder" else 0)

    def halves(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the encoder reads and what the decoder is taught, without what is put around them."""
        around = len(self.prefix) + len(self.suffix)
        first = max((len(ids) + around + len(self.prefix)) // 2 - around, 1)
        return ids[:first], ids[first:]

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the model's keyword arguments for text tokens of shape (T,): int64 of shape (1, T')."""
        if self.kind == "causal":
            return {"input_ids": ids.clone()[None]}
        prefix, suffix = ids.new_tensor(self.prefix), ids.new_tensor(self.suffix)
        if self.kind == "encoder":
            return {"input_ids": torch.cat([prefix, ids, suffix])[None]}
        read, taught = self.halves(ids)
        decoder = torch.cat([ids.new_tensor([self.start]), prefix, taught[:-1]])
        return {"input_ids": torch.cat([prefix, read, suffix])[None], "decoder_input_ids": decoder[None]}


@dataclass(frozen=True)
class Text:
    """The tokens of a text, and how a model is called with a run of them."""

    ids: Tensor  # (N,), int64; with the tokenizer's prefix (BOS) before it where the model is causal
    call: TextCall
    limit: int | None  # the longest call that the model can take, encoder and decoder together
    notes: tuple[str, ...]

    def cut(self, held_out_tail: float) -> tuple[Tensor, Tensor]:
        """Return the tokens before the tail, and the tail: that fraction of them, at the end."""
        check_fraction("held_out_tail", held_out_tail, lowest_allowed=True)
        first = len(self.ids) - round(len(self.ids) * held_out_tail)
        return self.ids[:first], self.ids[first:]

    def fitting(self, length: int) -> tuple[int, tuple[str, ...]]:
        """Return a length that the model can take, with a note where it is not the one asked for.

        Raises:
            ValueError: It has no room for two tokens of text, or one of encoder and of decoder.
        """
        notes: tuple[str, ...] = ()
        if self.limit is not None and length > self.limit:
            notes = (f"windows of {self.limit} tokens, the longest that the model takes, instead of {length}",)
            length = self.limit
        needed = 2 + length - self.call.room(length)
        if length < needed:
            raise ValueError(f"a length of {length} tokens has no room for text; give at least {needed}: --length")
        return length, notes


def read_text(
    folder: Path,
    config: Any,
    text: Path | Sequence[Path],
    *,
    tokenizer: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Text:
    """Return the tokens of a text, as the tokenizer of a model's folder makes them.

    The whole text is tokenised at once, as Wanda, SparseGPT and GPTQ do, and cut afterwards. What is longer than
    1.5 MiB is tokenised in pieces that end with a line, and past 16 MiB it is not read. The tokenizer's prefix (BOS)
    stands once before the text of a causal model, so that only the window at its very start has it, as in those
    papers' code.

    Args:
        folder: With the tokenizer's files.
        config: The model's, a transformers config.
        text: One file or several: see `text_pieces`.
        tokenizer: Another folder to take the tokenizer from.
        progress: Called with the fraction of the text that is tokenised.

    Raises:
        ImportError: transformers is not installed.
        OSError: A file is missing.
        ValueError: A file is no text, the tokenizer does not fit the model, or the model is called with no text.
    """
    reader = tokenizer_of(folder, tokenizer)
    check_takes(config, ["input_ids"], "text", "give images or sounds, or a folder with a model of text")
    files = [text] if isinstance(text, Path) else list(text)
    notes: list[str] = []
    call = _text_call(config, reader)
    found = [torch.tensor(call.prefix if call.kind == "causal" else (), dtype=torch.int32)]
    for piece in text_pieces(files, MOST_TEXT, notes, progress):
        # Without a name, what the tokenizer says beside the tokens (400 bytes for each) is gone before the next piece.
        found.append(torch.tensor(reader(piece, **_PLAIN)["input_ids"], dtype=torch.int32))
    ids = torch.cat(found).long()
    _check_known(ids[len(found[0]) :], reader, config, files)
    return Text(ids, call, _limit(config, call.kind), tuple(notes))


def _text_call(config: Any, reader: Any) -> TextCall:
    kind = text_kind(config)
    # Tokenizers of transformers 5 no longer say what they put around a text.
    plain = reader("a", add_special_tokens=False)["input_ids"]
    around = reader("a")["input_ids"]
    first = next(i for i in range(len(around)) if around[i : i + len(plain)] == plain)
    prefix, suffix = tuple(around[:first]), tuple(around[first + len(plain) :])
    start = None
    if kind == "encoder-decoder":
        start = suffix[-1] if config.model_type in _STARTS_WITH_THE_LAST else decoder_start(config)
    return TextCall(kind, prefix, suffix, start, reader.mask_token_id)


def decoder_start(config: Any) -> int:
    """Return the token that an encoder-decoder's decoder starts with.

    Raises:
        ValueError: The config does not say.
    """
    start: int | None = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            "config.json does not say what the decoder starts with; write its decoder_start_token_id there"
        )
    return start


def _limit(config: Any, kind: Kind) -> int | None:
    told = config.get_text_config().to_dict()
    found = [told[name] for name in _LENGTHS if isinstance(told.get(name), int) and told[name] > 0]
    if not found:
        return None
    limit: int = min(found)
    if config.model_type in _PADDED_POSITIONS:
        limit -= config.pad_token_id + 1
    return 2 * limit if kind == "encoder-decoder" else limit


def _check_known(ids: Tensor, reader: Any, config: Any, files: Sequence[Path]) -> None:
    """Check that the tokenizer knows the text and the model knows the tokens."""
    names, unknown = ", ".join(map(str, files)), reader.unk_token_id
    if not len(ids) or bool((ids == unknown).all() if unknown is not None else False):
        raise ValueError(
            f"the tokenizer knows no word of {names}: the file is empty, or the folder lacks the tokenizer's "
            "vocabulary; copy it again, or give --tokenizer FOLDER"
        )
    known = getattr(config.get_text_config(), "vocab_size", None)
    if known is not None and int(ids.max()) >= known:
        raise ValueError(
            f"the tokenizer makes token {int(ids.max())} of {names}, and the model knows {known}; give the model's "
            "own: --tokenizer FOLDER"
        )
