"""Text in files, in pieces that a tokenizer takes at once."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

__all__ = ["PIECE", "text_pieces"]

# The test sets that perplexities are compared on (WikiText-2, PTB) are smaller, so they are tokenised in one go. A
# tokenizer takes some 200 bytes of memory for every byte of a piece.
PIECE = 3 << 19
_JSON_LINES = (".json", ".jsonl")


def text_pieces(
    files: Sequence[Path], most: int, notes: list[str], progress: Callable[[float], None] | None = None
) -> Iterator[str]:
    r"""Yield the text of files in pieces of about 1.5 MiB that end with a line; files are joined by an empty line.

    A file is UTF-8 and read as it is, but for line ends of Windows. `.jsonl` and `.json` hold an object with a "text"
    in each line (as C4 does), and their texts are joined by an empty line; `.gz` behind either is decompressed.

    Args:
        files: In the order of the text.
        most: Bytes after which no more is read.
        notes: Gets a line where there was more.
        progress: Called with the fraction of all files' bytes that is read.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is no UTF-8 (names the byte), or a line is no such object.
    """
    left, sizes = most, [file.stat().st_size for file in files]
    for index, file in enumerate(files):
        with file.open("rb") as raw:
            for block, offset in _blocks(file, raw):
                if left <= 0:
                    notes.append(f"of the text, the first {most / (1 << 20):.0f} MiB are read: {file} goes on")
                    return
                left -= len(block)
                text = _decoded(block, offset, file)
                yield ("\n\n" if index and not offset else "") + text
                if progress is not None:
                    progress((sum(sizes[:index]) + raw.tell()) / max(sum(sizes), 1))


def _blocks(file: Path, raw: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines, and the byte at which they begin."""
    stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
    offset = 0
    while lines := _lines(file, stream):
        yield b"".join(lines), offset
        offset += sum(map(len, lines))


def _lines(file: Path, stream: IO[bytes] | gzip.GzipFile) -> list[bytes]:
    try:
        return stream.readlines(PIECE)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is no whole gzip file ({error}); copy it again") from error


def _decoded(block: bytes, offset: int, file: Path) -> str:
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text: byte 0x{block[error.start]:02x} at {offset + error.start}; give a text file, or "
            "write it in UTF-8"
        ) from error
    text = text.removeprefix("\ufeff") if not offset else text
    if set(file.suffixes[-2:]) & set(_JSON_LINES):
        ahead = "\n\n" if offset else ""
        return ahead + "\n\n".join(_text_of(line, file) for line in text.split("\n") if line.strip())
    return text.replace("\r\n", "\n")


def _text_of(line: str, file: Path) -> str:
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("text"), str):
        raise ValueError(f'{file} must hold an object with a "text" in each line, got {line[:40]!r}; give a .txt file')
    return str(told["text"])
