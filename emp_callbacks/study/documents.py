"""Documents in pieces that are tokenised at once, from any place on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from emp_callbacks.study.text_sources import Source

__all__ = ["BLOCK", "Piece", "Place", "cut", "pieces"]

BLOCK = 1 << 18
"""Characters of a document that are tokenised at once. A tokenizer takes some 200 bytes of memory for each."""


class Place(NamedTuple):
    """Where a piece begins: so many sources, documents of the next one, and pieces of the next of these lie before."""

    source: int = 0
    document: int = 0
    piece: int = 0
    number: int = 0  # documents with text before it, in all sources


class Piece(NamedTuple):
    """A document or a part of one."""

    text: str
    number: int  # of the document
    ends: bool  # whether the document ends with it
    after: Place
    read: int  # bytes of all sources that are read


def pieces(sources: Sequence[Source], place: Place) -> Iterator[Piece]:
    """Yield the documents of sources in pieces of at most BLOCK characters; those without text are left out.

    What is yielded from a place on is what followed it before: the cuts depend on the text alone.
    """
    number, read = place.number, sum(source.size for source in sources[: place.source])
    for s, source in enumerate(sources[place.source :], start=place.source):
        first = place.document if s == place.source else 0
        for d, document in enumerate(source.documents(first), start=first):
            done = place.piece if (s, d) == place[:2] else 0
            for p, (text, ends) in enumerate(cut(document)):
                if p < done or not text:
                    continue
                after = Place(s, d + 1, 0, number + 1) if ends else Place(s, d, p + 1, number)
                yield Piece(text, number, ends, after, read + source.read)
                number = after.number
        read += source.size


def cut(document: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield pieces of a document of at most BLOCK characters, and whether each is the last one.

    A cut lies behind the last line feed in the block that has other characters than white space on both sides; else
    before the last such space; else at the block's end. There the tokenizers of GPT-2, GPT-4, Llama 3 and BERT split
    the text in any case, so that the tokens are those of the whole document.
    """
    held, start = "", 0
    for part in document:
        held, start = held[start:] + part, 0
        while len(held) - start > BLOCK:
            end = _end_of_piece(held, start)
            yield held[start:end], False
            start = end
    yield held[start:], True


def _end_of_piece(text: str, start: int) -> int:
    for mark, kept in (("\n", 1), (" ", 0)):
        at = start + BLOCK
        while (at := text.rfind(mark, start + 1, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + kept
    return start + BLOCK
