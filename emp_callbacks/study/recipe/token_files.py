"""Tokens in files that are mapped into memory, as `emp tokenize` and nanoGPT write them."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emp_callbacks.schedule import check_count
from emp_callbacks.study.recipe.data import Batch, InMemoryData, TensorPart, TokenWindows, sha256_of
from emp_callbacks.study.recipe.token_format import beside, dtype_for, read_sidecar

__all__ = ["TokenFile", "TokenFileData"]

_SAMPLE = 4096  # tokens that are looked at before training


class TokenFile(TokenWindows):
    """Windows of the tokens of a file.

    The file is mapped, not read: a window is two or three pages of the disk's cache, which all processes share.

    Args:
        path: The tokens and nothing else, little-endian: uint16 up to a vocabulary of 65,536, else uint32.
        sequence_length: Tokens in a window; windows follow each other, one token is an input once.
        vocab_size: Every token is smaller. None: what the file beside it says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be of such tokens, is shorter than a window, or its vocabulary is not known. Later, where
            a window is read: a token is too large.
    """

    def __init__(self, path: Path, sequence_length: int, vocab_size: int | None = None) -> None:
        self.path, self.sequence_length = path, sequence_length
        self.vocab_size = vocabulary_of(path, vocab_size)
        self.sidecar = read_sidecar(path)
        # A vocabulary that a recipe makes larger, as for a model's padded embedding, changes no file.
        self._dtype = dtype_for(self.sidecar["vocab_size"] if self.sidecar else self.vocab_size)
        self._check_size()
        self._check_sample()

    @cached_property
    def tokens(self) -> Any:
        """The whole file as an array of shape (N,), uint16 or uint32, of which nothing is in memory yet."""
        return np.memmap(self.path, self._dtype, mode="c")  # "c": torch asks for arrays that could be written to

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tokens"}  # a worker maps it itself

    def content(self) -> list[Tensor]:
        return [torch.from_numpy(self.tokens)]

    def __getitems__(self, indices: list[int]) -> Batch:
        length = self.sequence_length
        windows = np.stack([self.tokens[i * length : (i + 1) * length + 1] for i in indices])
        self._check_known(windows)
        found = torch.from_numpy(windows.astype(np.int64))
        return found[:, :-1], found[:, 1:]

    def _check_size(self) -> None:
        size, width = self.path.stat().st_size, self._dtype.itemsize
        if size % width:
            raise ValueError(
                f"{self.path} has {size:,} bytes, which are no tokens of {width} bytes; copy it again, or name a "
                "file of tokens"
            )
        if self.sidecar and size != self.sidecar["tokens"] * width:
            raise ValueError(
                f"{self.path} holds {size // width:,} tokens, and {beside(self.path).name} says "
                f"{self.sidecar['tokens']:,}; copy both again"
            )
        if size // width <= self.sequence_length:
            raise ValueError(
                f"{self.path} holds {size // width:,} tokens, and a window with its targets takes "
                f"{self.sequence_length + 1:,}; choose a smaller sequence_length, or tokenise more text"
            )

    def _check_sample(self) -> None:
        first, last = self.tokens[:_SAMPLE], self.tokens[-_SAMPLE:]
        self._check_known(first)
        self._check_known(last)
        if self._dtype.itemsize == 2 and len(first) > 2 and first.any() and not first[1::2].any():
            raise ValueError(
                f"every second token of {self.path} is 0, as if each had 4 bytes; set vocab_size to that of its "
                "tokenizer, which is more than 65,536"
            )

    def _check_known(self, tokens: np.ndarray) -> None:
        if int(tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token {int(tokens.max())}, and the vocabulary has {self.vocab_size}; set "
                "vocab_size to that of its tokenizer, or write tokens without a header before them"
            )


def vocabulary_of(path: Path, given: int | None = None) -> int:
    """Return the size of the vocabulary of a file of tokens: what is beside it, or a larger one that is given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Nobody knows, or the one that is given is smaller.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of tokens {path}; write it: emp tokenize TEXT --out {path.parent}")
    sidecar = read_sidecar(path)
    told: int | None = sidecar["vocab_size"] if sidecar else None
    known = given or told
    if known is None:
        raise ValueError(
            f"the vocabulary of {path} is not known: there is no {beside(path).name}; set vocab_size to that of its "
            "tokenizer (gpt2: 50257)"
        )
    if given is not None and told is not None and given < told:
        raise ValueError(
            f"vocab_size={given} is less than the {told} of {path}; leave it out, or set it to the model's"
        )
    return known


class TokenFileData(InMemoryData):
    """Language-model data in files of tokens: train.bin, val.bin and test.bin in a folder, or files anywhere.

    Each rank and worker maps the files; an epoch has each window of the training file once, over all ranks, in an
    order of its own (8 bytes of memory for each window while an epoch begins, and 40 for each of the rank's own until
    it ends). A fit resumes in the middle of an epoch, see `ResumableLoader`.

    Args:
        folder: Where the files are.
        sequence_length: Tokens in a window.
        batch_size: See `InMemoryData`, also for `num_workers` and `seed`.
        vocab_size: That of the tokenizer, or more where the model's embedding has more. Default: what is beside the
            training file (NAME.bin.json), as `emp tokenize` writes it.
        train: File in the folder, or a path.
        val: The same of validation.
        test: The same of testing; needed to test only.

    Raises:
        FileNotFoundError: A file that is needed is missing.
        ValueError: See `TokenFile`.
    """

    def __init__(
        self,
        folder: str = ".",
        sequence_length: int = 1024,
        batch_size: int = 8,
        vocab_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        train: str = "train.bin",
        val: str = "val.bin",
        test: str = "test.bin",
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_count("sequence_length", sequence_length)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size)
        self.sequence_length, self._given_vocabulary = sequence_length, vocab_size
        home = Path(folder).expanduser()
        self._paths = {name: home / file for name, file in {"train": train, "val": val, "test": test}.items()}

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, all of them smaller."""
        return vocabulary_of(self._paths["train"], self._given_vocabulary)

    def load(self) -> dict[str, TensorPart]:
        # Without a word about its own vocabulary, a file is of the same tokens as the training file.
        return {
            name: TokenFile(path, self.sequence_length, self.vocab_size)
            for name, path in self._paths.items()
            if name != "test" or path.exists()
        }

    @cached_property
    def content_digest(self) -> dict[str, str]:
        """Part -> SHA-256 of its file, 64 hexadecimal digits: what is beside it, or computed where nothing is."""
        if not self._parts:
            return super().content_digest  # which says so
        return {
            name: part.sidecar["sha256"] if isinstance(part, TokenFile) and part.sidecar else sha256_of([part])
            for name, part in self._parts.items()
        }

    def test_dataloader(self) -> DataLoader[Batch]:
        if "test" not in self._parts:
            raise FileNotFoundError(
                f"there is no file of tokens {self._paths['test']} to test on; write it: emp tokenize TEXT --out "
                "FOLDER --test-fraction 0.01"
            )
        return super().test_dataloader()
