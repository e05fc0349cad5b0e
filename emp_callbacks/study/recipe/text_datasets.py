"""Text in data sets of Hugging Face, from the hub or from files, tokenised and packed while a model trains on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from emp_callbacks.extras import needs
from emp_callbacks.schedule import check_count
from emp_callbacks.study.recipe.data import Batch, InMemoryData, TensorPart, TokenDataset
from emp_callbacks.study.recipe.loading import ResumableLoader, run_seed
from emp_callbacks.study.recipe.text_tokenizer import TextTokenizer

__all__ = ["PackedWindows", "StreamLoader", "TextDatasetData", "open_dataset", "text_of"]


def open_dataset(path: str, name: str | None, split: str, *, streaming: bool) -> Any:
    """Return a split of a data set as `datasets` has it, from the hub or from a folder of parquet or JSON lines.

    Raises:
        ImportError: datasets is not installed.
        ValueError: There is none; says why.
    """
    needs(f"the data set {path}", "text", "datasets")
    from datasets import load_dataset

    where = str(Path(path).expanduser())
    try:
        return load_dataset(where if Path(where).exists() else path, name, split=split, streaming=streaming)
    except Exception as error:  # of the hub, of pyarrow, of datasets itself
        told = shorten(" ".join(str(error).split()), 300, placeholder=" ...")
        raise ValueError(
            f"the split {split!r} of the data set {path!r} cannot be opened: {told}; give a name of the hub (and a "
            "network), or a folder with train.parquet or train.jsonl and the like"
        ) from error


def text_of(example: Mapping[str, Any], column: str, name: str) -> str:
    """Return the text of an example, empty where it has none.

    Raises:
        ValueError: There is no such column, or it holds no text.
    """
    text = example.get(column, 0)
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{name} has no column {column!r} of text; its columns: {', '.join(example)}; name the one of text"
        )
    return text or ""


class PackedWindows(IterableDataset[Tensor]):
    """Documents one behind the other, cut into windows of `length` + 1 tokens, without end.

    Each window begins with the last token of the one before, so that each token is an input once. When a worker has
    read its part of the data set it begins again, in another order if that is shuffled.

    Args:
        documents: A streamed data set, of this rank's part; its workers share that among themselves.
        tokenizer: What makes the tokens.
        column: Name of the text.
        length: Tokens in a window, without the last target.
        eot: Token behind each document; None: none.

    Attributes:
        skipped: So many batches are left out at the beginning, over all workers of the rank.
        batch_size: Of the batches that are left out.
    """

    def __init__(self, documents: Any, tokenizer: TextTokenizer, column: str, length: int, eot: int | None) -> None:
        self._documents, self._tokenizer, self._column = documents, tokenizer, column
        self._length, self._end = length, [] if eot is None else [eot]
        self.skipped, self.batch_size = 0, 1

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        # Batches come from the workers in turn.
        ahead = len(range(index, self.skipped, workers)) * self.batch_size
        for tokens in self._windows():
            if ahead:
                ahead -= 1
            else:
                yield torch.tensor(tokens)

    def _windows(self) -> Iterator[list[int]]:
        held: list[int] = []
        for text in self._texts():
            held += self._tokenizer(text) + self._end
            start = 0
            while len(held) - start > self._length:
                yield held[start : start + self._length + 1]
                start += self._length
            del held[:start]

    def _texts(self) -> Iterator[str]:
        number = 0  # of the pass over the data
        while True:
            self._documents.set_epoch(number)
            found = False
            for example in self._documents:
                if text := text_of(example, self._column, "the data set"):
                    found = True
                    yield text
            if not found:
                raise ValueError("a rank or worker finds no text in its part of the data set; use fewer of them")
            number += 1


class StreamLoader(ResumableLoader[Any]):
    """Batches of endless windows; an epoch is so many of them, and the next one goes on behind it.

    All ranks thus have equally many batches in an epoch, whatever the lengths of their documents: none waits for
    another that has run out. A resumed fit reads and tokenises again what came before its place, and leaves it out.

    Args:
        windows: What is batched.
        batch_size: Windows in a batch, per rank.
        batches: Batches of an epoch, per rank.
        state: What the place of a batch depends on, besides the windows; equal on all ranks.
        settings: Further arguments of `ResumableLoader`.
    """

    def __init__(
        self, windows: PackedWindows, batch_size: int, *, batches: int, state: Mapping[str, int], **settings: Any
    ) -> None:
        windows.batch_size = batch_size
        super().__init__(windows, batch_size, collate_fn=_inputs_and_targets, **settings)
        self._batches, self._state = batches, dict(state)
        self._stream: Any = None

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, as that of ResumableLoader
        if self._stream is None:
            windows: Any = self.dataset
            if self.trainer is not None and self._is_trained_on(self.trainer):
                windows.skipped = self._batches_before(self.trainer)
            self._stream = DataLoader.__iter__(self)  # kept: in the next epoch the workers go on
        for _ in range(self._batches):
            yield next(self._stream)

    def _batches_before(self, trainer: pl.Trainer) -> int:
        """Return how many batches of all epochs are done in the fit that is resumed."""
        done = int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)
        now = self.state_dict()
        before = self._saved or now
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if done and changed and trainer.is_global_zero:
            warnings.warn(
                f"resumed after {done} batches with {', '.join(changed)}: the documents are shared out in another way, "
                "so that some come twice in this pass over them and others not at all; resume with the old values to "
                "avoid that",
                stacklevel=3,
            )
        return done

    def state_dict(self) -> dict[str, int]:
        """Return what the place of a batch depends on; equal on all ranks."""
        return {"batch_size": self.batch_size or 1, **self._state}


def _inputs_and_targets(windows: list[Tensor]) -> Batch:
    batch = torch.stack(windows)
    return batch[:, :-1], batch[:, 1:]


class TextDatasetData(InMemoryData):
    """Language-model data from a data set of Hugging Face, tokenised as it is read; needs `emp-callbacks[text]`.

    Documents follow each other, with the tokenizer's end-of-text token behind each, and are cut into windows. Each
    document is read once by one worker of one rank before any is read again: whole files (shards) go to ranks if
    their number is a multiple of that of the ranks, else of R ranks each takes every R-th document. An epoch is
    `batches_per_epoch` batches, equally many on all ranks, and the next one goes on where it ended. A fit resumes in
    the middle of an epoch with the batch that is due, see `StreamLoader`. For epochs that have each token just once,
    and for a resumption that costs nothing, write the tokens to a file: `emp tokenize` and `TokenFileData`.

    Args:
        path: Name on the hub, or a folder of parquet files or JSON lines whose names begin with their split.
        tokenizer: Folder or name on the hub of the tokenizer.
        batches_per_epoch: Batches of a training epoch, per rank: one pass over N tokens has about
            N / (sequence_length * batch_size * ranks).
        name: Configuration of the data set.
        text_column: Column of the text.
        sequence_length: Tokens in a window.
        batch_size: See `InMemoryData`, also for `num_workers` and `seed`.
        vocab_size: That of the model's embedding where it has more than the tokenizer. Default: the tokenizer's.
        train_split: Split to train on.
        val_split: Split to validate on.
        test_split: Split to test on, opened when that is asked for.
        eval_windows: Windows that are validated and tested on: the first ones of the split, in memory on each rank.
        shuffle_buffer: Documents that one is drawn from; the order of the files is drawn as well. 0: as they come.
        streaming: Read as it trains; else the whole data set is first copied to the cache of `datasets`.
        end_of_text: Whether the tokenizer's end-of-text token follows each document.

    Raises:
        ImportError: datasets or transformers is not installed.
        ValueError: The data set, a split or the tokenizer cannot be read, or validation text is shorter than a window.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        batches_per_epoch: int,
        name: str | None = None,
        text_column: str = "text",
        sequence_length: int = 1024,
        batch_size: int = 8,
        vocab_size: int | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        eval_windows: int = 512,
        shuffle_buffer: int = 10_000,
        streaming: bool = True,
        end_of_text: bool = True,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for setting, value in {
            "batches_per_epoch": batches_per_epoch,
            "sequence_length": sequence_length,
            "eval_windows": eval_windows,
        }.items():
            check_count(setting, value)
        check_count("shuffle_buffer", shuffle_buffer, least=0)
        needs("TextDatasetData", "text", "datasets", "transformers")
        self.path, self.name, self.text_column, self.streaming = path, name, text_column, streaming
        self.sequence_length, self.batches_per_epoch, self.eval_windows = (
            sequence_length,
            batches_per_epoch,
            eval_windows,
        )
        self.shuffle_buffer, self.end_of_text = shuffle_buffer, end_of_text
        self._splits = {"train": train_split, "val": val_split, "test": test_split}
        self._tokenizer_name, self._given_vocabulary = tokenizer, vocab_size

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, read at its first use."""
        return TextTokenizer(self._tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, all of them smaller."""
        known = self.tokenizer.vocab_size
        if self._given_vocabulary is not None and self._given_vocabulary < known:
            raise ValueError(
                f"vocab_size={self._given_vocabulary} is less than the {known} of the tokenizer {self.tokenizer.name}; "
                "leave it out, or set it to the model's"
            )
        return self._given_vocabulary or known

    def load(self) -> dict[str, TensorPart]:
        return {"val": self._first_windows("val")}

    def train_dataloader(self) -> StreamLoader:
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        documents = self._documents(**ranks)
        workers = min(self.num_workers, documents.num_shards)
        if workers < self.num_workers:
            warnings.warn(
                f"{workers} of num_workers={self.num_workers} read {self.path}: it has so many files for each rank",
                stacklevel=2,
            )
        # Lightning doubts a length beside endless data; it is how many batches this loader stops after.
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        windows = PackedWindows(documents, self.tokenizer, self.text_column, self.sequence_length, self._eot)
        return StreamLoader(
            windows,
            self.batch_size,
            batches=self.batches_per_epoch,
            state={"num_replicas": ranks["num_replicas"], "seed": run_seed(self.seed), "workers": workers},
            trainer=self.trainer,
            num_workers=workers,
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        if "test" not in self._parts:
            self._parts["test"] = self._first_windows("test")
        return super().test_dataloader()

    @property
    def _eot(self) -> int | None:
        return self.tokenizer.end_of_text if self.end_of_text else None

    def _documents(self, num_replicas: int, rank: int) -> Any:
        """Return one rank's part of the training documents, in the order of the seed."""
        from datasets.distributed import split_dataset_by_node

        found = open_dataset(self.path, self.name, self._splits["train"], streaming=self.streaming)
        if not self.streaming:
            found = found.to_iterable_dataset(num_shards=min(len(found), num_replicas * max(self.num_workers, 1)))
        if self.shuffle_buffer:
            found = found.shuffle(seed=run_seed(self.seed), buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(found, rank=rank, world_size=num_replicas)

    def _first_windows(self, part: str) -> TokenDataset:
        """Return the first windows of a split; all ranks hold the same, so that their batches are equally many."""
        split, most = self._splits[part], self.eval_windows * self.sequence_length + 1
        tokens: list[int] = []
        for example in open_dataset(self.path, self.name, split, streaming=self.streaming):
            if text := text_of(example, self.text_column, self.path):
                tokens += self.tokenizer(text) + ([] if self._eot is None else [self._eot])
            if len(tokens) >= most:
                break
        if len(tokens) <= self.sequence_length:
            raise ValueError(
                f"the split {split!r} of {self.path} has {len(tokens)} tokens, fewer than a window of "
                f"sequence_length={self.sequence_length} and its targets; name another split, or choose shorter windows"
            )
        return TokenDataset(torch.tensor(tokens[:most], dtype=torch.int32), self.sequence_length)
