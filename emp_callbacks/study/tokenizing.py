"""Text to files of tokens, as `emp tokenize` does: in parallel, in bounded memory, and going on after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from emp_callbacks.study.documents import BLOCK, Piece, Place, pieces
from emp_callbacks.study.recipe.text_tokenizer import TextTokenizer
from emp_callbacks.study.recipe.token_format import FORMAT, dtype_for, read_sidecar
from emp_callbacks.study.text_sources import Source, SplitText, TextFile
from emp_callbacks.study.token_output import TokenOutput, no_document

__all__ = ["tokenize"]

_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2**64, as in Knuth's multiplicative hashing

_Done = TypeVar("_Done")


@dataclass
class _Batch:
    """Pieces that are tokenised together, and what there is to know when they are."""

    texts: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)  # of each text
    ends: list[bool] = field(default_factory=list)
    after: Place = field(default_factory=Place)
    read: int = 0

    @property
    def ended(self) -> Counter[int]:
        """Part -> documents that end here."""
        return Counter(part for part, ends in zip(self.parts, self.ends, strict=True) if ends)


def tokenize(
    sources: Sequence[Source],
    outs: Mapping[str, Path],
    tokenizer: TextTokenizer,
    *,
    shares: Mapping[str, Fraction] | None = None,
    end_of_text: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    told: Callable[[int], object] | None = None,
) -> dict[str, Mapping[str, Any]]:
    """Write the tokens of documents into one file for each part of the data, and what is in it beside it.

    A file is the tokens in a row, uint16 or, where the vocabulary has more than 65,536, uint32, little-endian, with
    nothing before them: read it with `np.memmap`. It depends on the texts and the tokenizer, not on `workers` nor on
    how often the work was interrupted. Until it is whole it is called NAME.partial.

    Args:
        sources: The documents. A longer one than BLOCK characters is cut, see `documents.cut`.
        outs: "train" (and "val", "test") -> the file of that part, all in one folder.
        tokenizer: What makes the tokens.
        shares: Part -> its share of the documents, with a sum of 1: of 20 documents, one goes to a part of 0.05. If
            there is just one text, that is cut, and parts are in the order of `outs`. None: all go to the only part.
        end_of_text: Whether the tokenizer's end-of-text token follows each document.
        workers: Processes that tokenise; with 1, this one does.
        overwrite: Whether to replace files that are there, and begin anew.
        told: Is called with the bytes of the sources that are tokenised, as the work goes on.

    Returns:
        Part -> what the file beside it says: see docs/text_data.md.

    Raises:
        BusyError: Another process writes the same file.
        FileExistsError: A file is there, or was begun, that is of other texts or another tokenizer.
        ValueError: A document cannot be read, or a part gets none.
        ChildProcessError: A worker was killed.
    """
    shares = shares or dict.fromkeys(outs, Fraction(1))
    sources = _split_if_one_text(sources, list(shares.values()))
    part_of = _part_of(shares, sources)
    settings = {
        "format": FORMAT,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.end_of_text if end_of_text else None,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.digest,
        "block": BLOCK,
        "shares": {name: str(share) for name, share in shares.items()},
        "sources": [{"name": source.name, "bytes": source.size} for source in sources],
    }
    if not overwrite and (finished := _finished(outs, settings)):
        return finished
    with TokenOutput(outs, settings, overwrite=overwrite) as output:
        work = _batches(_noticed(pieces(sources, output.place), tokenizer), part_of)
        encode = partial(_encode, tokenizer, settings["eot"], len(outs))
        for batch, tokens in _in_order(encode, work, workers):
            output.add(tokens, batch.ended, batch.after)
            if told is not None:
                told(batch.read)
        return output.finish()


def _finished(outs: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]] | None:
    """Return what is beside the files if all are there and of these settings."""
    found = {}
    for name, path in outs.items():
        told = read_sidecar(path) if path.exists() else None
        if path.exists() and (told is None or any(told.get(key) != value for key, value in settings.items())):
            raise FileExistsError(
                f"{path} is there, of other texts, another tokenizer or other options; name another --out, or replace "
                "it: --overwrite"
            )
        if told is not None:
            found[name] = told
    return found if len(found) == len(outs) else None


# ---- which document goes where ------------------------------------------------------------------------------------


def _split_if_one_text(sources: Sequence[Source], shares: Sequence[Fraction]) -> Sequence[Source]:
    (only,) = sources if len(sources) == 1 else (None,)
    if len(shares) > 1 and isinstance(only, TextFile):
        return [SplitText(only.name, only.size, shares)]
    return sources


def _part_of(shares: Mapping[str, Fraction], sources: Sequence[Source]) -> Callable[[int], int]:
    """Return what says to which part a document goes, by its number.

    Multiples of the golden ratio, without what is before the point, fill [0, 1) evenly and without a period.
    """
    if isinstance(sources[0], SplitText):
        return lambda number: number
    bounds = [int(bound * 2**64) for bound in accumulate(list(shares.values())[:-1])]

    def part_of(number: int) -> int:
        return bisect_right(bounds, number * _GOLDEN_RATIO % 2**64)

    if all(isinstance(source, TextFile) for source in sources):
        for part in set(range(len(shares))) - {part_of(number) for number in range(len(sources))}:
            raise no_document(list(shares)[part], len(sources))
    return part_of


# ---- the work -----------------------------------------------------------------------------------------------------


def _batches(stream: Iterable[Piece], part_of: Callable[[int], int]) -> Iterator[_Batch]:
    batch, characters = _Batch(), 0
    for piece in stream:
        batch.texts.append(piece.text)
        batch.parts.append(part_of(piece.number))
        batch.ends.append(piece.ends)
        batch.after, batch.read = piece.after, piece.read
        characters += len(piece.text)
        if characters >= BLOCK:
            yield batch
            batch, characters = _Batch(), 0
    if batch.texts:
        yield batch


def _noticed(stream: Iterable[Piece], tokenizer: TextTokenizer) -> Iterator[Piece]:
    """Pass pieces on, and warn at the first document that is cut, if that changes its tokens."""
    said = False
    for piece in stream:
        if not piece.ends and not said and tokenizer.marks_beginnings:
            said = True
            warnings.warn(
                f"document {piece.number} has more than {BLOCK:,} characters, so it is tokenised in pieces, and the "
                f"tokenizer {tokenizer.name} begins each piece as it begins a text: some tokens at the cuts are others "
                "than those of the whole; give shorter documents to avoid that",
                stacklevel=2,
            )
        yield piece


def _encode(tokenizer: TextTokenizer, eot: int | None, parts: int, batch: _Batch) -> list[bytes]:
    """Return the tokens of a batch for each part, as they stand in its file."""
    found: list[list[int]] = [[] for _ in range(parts)]
    for tokens, part, ends in zip(tokenizer.encode(batch.texts), batch.parts, batch.ends, strict=True):
        found[part] += tokens
        if ends and eot is not None:
            found[part].append(eot)
    return [np.array(tokens, dtype_for(tokenizer.vocab_size)).tobytes() for tokens in found]


def _in_order(
    work: Callable[[_Batch], _Done], batches: Iterable[_Batch], workers: int
) -> Iterator[tuple[_Batch, _Done]]:
    """Yield each batch with what the work on it gave, in order; a few are read ahead for each worker."""
    if workers == 1:
        yield from ((batch, work(batch)) for batch in batches)
        return
    # A fork would copy the threads of the tokenizer's and of pyarrow's libraries in the middle of what they do.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (work,))
    waiting: deque[tuple[_Batch, Future[_Done]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work_on, batch)))
            if len(waiting) > 2 * workers:
                first, done = waiting.popleft()
                yield first, done.result()
        for first, done in waiting:
            yield first, done.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker was killed, perhaps for want of memory; the same command goes on, with fewer --workers if so"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Callable[[_Batch], Any]] = {}  # what a worker does, sent to it once


def _begin_worker(work: Callable[[_Batch], Any]) -> None:
    _worker["work"] = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work_on(batch: _Batch) -> Any:
    return _worker["work"](batch)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])  # which a kill -9 leaves no time to say good-bye
    os._exit(1)
