"""Documents in files of text, JSON lines and parquet, and in data sets of the hub, from any one on."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from emp_callbacks.extras import needs

__all__ = ["Source", "SplitText", "TextFile", "sources_of"]

_READ = 1 << 18  # bytes
_LONGEST_LINE = 1 << 28  # bytes; a document of JSON lines is in memory as a whole
_TEXT, _LINES, _PARQUET = (".txt", ".text", ".md"), (".jsonl", ".json"), (".parquet",)
_PACKED = (".gz", ".zst")
_HUB = "hf:"


class Source:
    """Documents in some file or data set.

    Attributes:
        name: As it was given, or found in a folder that was.
        size: In bytes, 0 where it is not known.
        read: Bytes that are read of it.
    """

    def __init__(self, name: str, size: int = 0) -> None:
        self.name, self.size, self.read = name, size, 0

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        """Yield the text of each document in parts of any size, after leaving out so many."""
        raise NotImplementedError


class TextFile(Source):
    """A UTF-8 file that is one document, read as Python's `open` does: each line ends with a line feed."""

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        if not first:
            yield self.characters()

    def characters(self) -> Iterator[str]:
        """Yield the text in parts.

        Raises:
            ValueError: It is no UTF-8 (names the byte), or a packed file is damaged.
        """
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
        offset, block = 0, b" "
        with _opened(self) as stream:
            while block:
                block = stream.read(_READ)
                offset += len(block)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    at = offset - len(error.object) + error.start
                    raise ValueError(
                        f"{self.name} is no UTF-8 text: byte 0x{error.object[error.start]:02x} at {at}; give a text "
                        "file, or write it in UTF-8"
                    ) from error
                yield text


class SplitText(TextFile):
    """A text as several documents, each with its share of the characters, in order.

    Args:
        name: See `Source`, also for `size`.
        size: In bytes.
        shares: The part of the characters in each, with a sum of 1.
    """

    def __init__(self, name: str, size: int, shares: Sequence[Fraction]) -> None:
        super().__init__(name, size)
        self._shares = shares

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        total, before = sum(map(len, self.characters())), Fraction(0)
        text = _Characters(self.characters())
        for number, share in enumerate(self._shares):
            part = text.take(int((before + share) * total) - int(before * total))
            before += share
            if number >= first:
                yield part
            for _ in part:  # what nobody took of it
                pass


class _Characters:
    """Parts of a text, cut to length."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._held = parts, ""

    def take(self, count: int) -> Iterator[str]:
        while count:
            self._held = self._held or next(self._parts)
            text, self._held = self._held[:count], self._held[count:]
            count -= len(text)
            yield text


class JsonLines(Source):
    """An object in each line, whose `field` is a document."""

    def __init__(self, name: str, size: int, field: str) -> None:
        super().__init__(name, size)
        self._field = field

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        with _opened(self) as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ValueError(
                        f"line {number + 1} of {self.name} has {_LONGEST_LINE:,} bytes or more, so it is no document "
                        "in a line; write an object in each line, or give a .txt file"
                    )
                if number >= first:
                    yield [self._text(line, number)]
                number += 1

    def _text(self, line: bytes, number: int) -> str:
        if not line.strip():
            return ""
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if isinstance(told, dict) and isinstance(text := told.get(self._field, 0), str | None):
            return text or ""
        raise ValueError(
            f'line {number + 1} of {self.name} must hold an object with a "{self._field}" that is text, got '
            f"{line[:40].decode(errors='replace')!r}; name the key of the text: --field NAME"
        )


class Parquet(Source):
    """Rows, whose column `field` is a document."""

    def __init__(self, name: str, size: int, field: str) -> None:
        super().__init__(name, size)
        needs(f"reading {name}", "text", "pyarrow")
        self._field = field

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        from pyarrow import ArrowInvalid, parquet, types

        try:
            # Not the whole row group at once, which may be gigabytes.
            file: Any = parquet.ParquetFile(self.name, buffer_size=1 << 20, pre_buffer=False)
        except ArrowInvalid as error:
            raise ValueError(f"{self.name} is no whole parquet file ({error}); copy it again") from error
        with file:
            schema = file.schema_arrow
            column = schema.field(self._field).type if self._field in schema.names else None
            if column is None or not (types.is_string(column) or types.is_large_string(column)):
                raise ValueError(
                    f"{self.name} has no column {self._field!r} of text; its columns: "
                    f"{', '.join(f'{one.name} ({one.type})' for one in schema)}; name the one of text: --field NAME"
                )
            total = max(file.metadata.num_rows, 1)
            groups, before = _groups_from(file.metadata, first)
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[self._field]):
                for text in batch.column(0).slice(max(first - before, 0)).to_pylist():
                    yield [text or ""]
                before += len(batch)
                self.read = self.size * before // total


def _groups_from(metadata: Any, first: int) -> tuple[list[int], int]:
    """Return the row groups that hold row `first` and later ones, and how many rows lie before them."""
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if before + rows > first:
            return list(range(group, metadata.num_row_groups)), before
        before += rows
    return [], before


class HubDataset(Source):
    """Examples of a data set, whose column `field` is a document; they are streamed, nothing is kept on disk."""

    def __init__(self, name: str, field: str) -> None:
        super().__init__(name)
        self._field = field

    def documents(self, first: int) -> Iterator[Iterable[str]]:
        from emp_callbacks.study.recipe.text_datasets import open_dataset, text_of

        path, _, split = self.name.removeprefix(_HUB).partition("@")
        path, _, config = path.partition(":")
        for example in open_dataset(path, config or None, split or "train", streaming=True).skip(first):
            yield [text_of(example, self._field, self.name)]


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """Lend the unpacked bytes of a file, and note how much of it is read.

    Raises:
        ValueError: A packed file is damaged.
    """
    path = Path(source.name)
    with path.open("rb", buffering=0) as raw:
        noted: Any = io.BufferedReader(_Noted(raw, source))
        try:
            yield _unpacked(path, noted)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); copy it again") from error
        except OSError as error:
            if path.suffix != ".zst" or error.errno is not None:
                raise
            raise ValueError(f"{path} is no whole zstd file ({error}); copy it again") from error


def _unpacked(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        needs(f"reading {path}", "text", "pyarrow")
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


class _Noted(io.RawIOBase):
    """A file that tells its source how much of it is read."""

    def __init__(self, raw: Any, source: Source) -> None:
        self._raw, self._source = raw, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._raw.readinto(buffer)
        self._source.read = self._raw.tell()
        return count


def sources_of(given: Sequence[str], field: str) -> list[Source]:
    """Return the sources that names stand for: files, folders of them in the order of their names, hf:NAME.

    Args:
        given: Files whose names end with .txt, .text, .md or anything unknown (a text), .jsonl or .json (an object in
            each line) or .parquet, the first two packed or not (.gz, .zst); folders, of which such files are taken and
            others left; data sets as hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT.
        field: Key or column of the text.

    Raises:
        FileNotFoundError: There is no such file or folder, or none in a folder.
        ImportError: What reads them is not installed.
    """
    found: list[Source] = []
    for name in given:
        if name.startswith(_HUB):
            needs(f"reading {name}", "text", "datasets")
            found.append(HubDataset(name, field))
            continue
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {name}; a data set of the hub is hf:NAME")
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file)) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"folder {name} holds no {', '.join((*_TEXT, *_LINES, *_PARQUET))}, packed or not")
        found += [_source_of(file, field) for file in files]
    return found


def _kind(path: Path) -> str:
    """Return by which ending a file is read, or an empty string."""
    name = path.with_suffix("") if path.suffix in _PACKED else path
    return name.suffix if name.suffix in (*_TEXT, *_LINES, *_PARQUET) else ""


def _source_of(path: Path, field: str) -> Source:
    size = path.stat().st_size
    if _kind(path) in _LINES:
        return JsonLines(str(path), size, field)
    return Parquet(str(path), size, field) if _kind(path) in _PARQUET else TextFile(str(path), size)
