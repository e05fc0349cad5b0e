"""A tokenizer of transformers as training data needs it: documents to numbers, without anything around them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from textwrap import shorten
from typing import Any

from emp_callbacks.extras import needs

__all__ = ["TextTokenizer"]

_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, "split_special_tokens": True}


class TextTokenizer:
    """A tokenizer by its folder or by its name on the Hugging Face hub; no code from files runs.

    Attributes:
        name: As it was given.
        vocab_size: One more than the largest token it can make: what an embedding needs. Entries added to the
            vocabulary count, rows that a model has beyond them do not.
        digest: SHA-256 over its tokens in the order of their numbers, 64 hexadecimal digits.

    Raises:
        ImportError: transformers is not installed.
        ValueError: There is none, it needs code from files, or it knows no word.
    """

    def __init__(self, name: str) -> None:
        needs(f"the tokenizer {name}", "hf", "transformers")
        from transformers import AutoTokenizer

        # Documents are shared between processes; threads of each would wait for those of the others.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            # Left unset, transformers would ask at the terminal whether to run the code.
            self._reader: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the tokenizers package raises plain Exceptions
            told = shorten(str(error), 200, placeholder=" ...")
            if "trust_remote_code" in str(error):
                told = "it would run code from files, which is refused"
            raise ValueError(
                f"no tokenizer can be read from {name!r}: {told}; give a folder with tokenizer.json, or a name of the "
                "Hugging Face hub and a network"
            ) from error
        self.name = name
        vocabulary = sorted((number, token) for token, number in self._reader.get_vocab().items())
        self.vocab_size = vocabulary[-1][0] + 1 if vocabulary else 0
        self.digest = hashlib.sha256(
            "\0".join(f"{number} {token}" for number, token in vocabulary).encode()
        ).hexdigest()
        self._backend: Any = getattr(self._reader, "backend_tokenizer", None)  # None where it is written in Python
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._check_knows_text()

    def __getstate__(self) -> dict[str, Any]:
        # A worker needs no transformers where it has the backend: seconds and 200 MB less for each.
        return {**vars(self), "_reader": None} if self._backend is not None else vars(self)

    def _check_knows_text(self) -> None:
        # transformers 5 makes a tokenizer without words where a folder lacks its files.
        tokens, unknown = set(self("the a 1")), self._reader.unk_token_id
        if not tokens - {unknown}:
            raise ValueError(f"the tokenizer {self.name} knows no word; give a folder that holds its vocabulary")

    @cached_property
    def end_of_text(self) -> int:
        """The token between documents.

        Raises:
            ValueError: The tokenizer has none.
        """
        found: int | None = self._reader.eos_token_id
        if found is None:
            raise ValueError(
                f"the tokenizer {self.name} has no end-of-text token (eos_token) to set between documents; join them "
                "without one (--no-eot), or give another tokenizer"
            )
        return found

    @cached_property
    def marks_beginnings(self) -> bool:
        """Whether a text that is cut behind a line has other tokens than as a whole, as those of SentencePiece have."""
        first, second = "One line of text.\n", "Another one."
        return self(first) + self(second) != self(first + second)

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text, with nothing put around them."""
        return self.encode([text])[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        if self._backend is not None:
            # The text's own "<|endoftext|>" is text: else a document could end itself. Not kept when pickled.
            self._backend.encode_special_tokens = True
            # Twice as fast as the call of transformers, for the characters that a token stands for are not noted.
            return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        found: list[list[int]] = self._reader(list(texts), **_PLAIN)["input_ids"]
        return found
