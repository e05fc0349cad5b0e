"""`emp tokenize`: text to files of tokens, for TokenFileData."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_callbacks.cli.console import say_first
from emp_callbacks.cli.new_parser import new_parser
from emp_callbacks.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["tokenize", "tokenize_parser"]


def tokenize_parser() -> argparse.ArgumentParser:
    """Return the options of `emp tokenize`."""
    parser = new_parser(
        "tokenize",
        "Write text as tokens into a file that training maps into memory (TokenFileData), as nanoGPT's .bin.",
        """\
examples:
  emp tokenize books/ --tokenizer gpt2 --out data/ --val-fraction 0.005
  emp tokenize train.jsonl.gz --val val.jsonl --tokenizer llama --out data/
  emp tokenize shakespeare.txt --tokenizer gpt2 --out data.bin
  emp tokenize hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer gpt2 --out data/ --val-fraction 0.0005

TEXT is a text file (one document), .jsonl or .parquet (a document in each line or row), text and JSON lines packed or
not (.gz, .zst), a folder of these, or a data set of the Hugging Face hub: hf:NAME:CONFIG@SPLIT (default split: train).
After a kill the same command goes on; the file is the same as if there had been none, with any number of workers.""",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="files, folders, or hf:NAME")
    parser.add_argument(
        "--tokenizer", required=True, metavar="NAME", help="a folder, or a name of the Hugging Face hub"
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="NAME.bin, or a folder for train.bin, val.bin and test.bin"
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="key or column of the text (default: text)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--eot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the tokenizer's end-of-text token behind each document (default: --eot)",
    )
    for part in ("val", "test"):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(f"--{part}", nargs="+", metavar="TEXT", help=f"texts of {part}.bin")
        group.add_argument(
            f"--{part}-fraction",
            type=_fraction,
            metavar="F",
            help=f"of the documents for {part}.bin; of one text, the end",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, and begin anew")
    return parser


def tokenize(words: list[str]) -> None:
    """Tokenise texts into one file, or into those of a folder."""
    options = tokenize_parser().parse_args(words)
    shares, others = _shares(options), {part: found for part in ("val", "test") if (found := getattr(options, part))}
    folder = not options.out.endswith(".bin")
    if not folder and (len(shares) > 1 or others):
        raise ValueError(f"--out {options.out} is one file; name a folder, for train.bin, val.bin and test.bin")
    say_first(f"tokenize: reading {', '.join(options.texts)}")
    from emp_callbacks.schedule import check_count
    from emp_callbacks.study.recipe.text_tokenizer import TextTokenizer
    from emp_callbacks.study.text_sources import sources_of
    from emp_callbacks.study.tokenizing import tokenize as work

    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    check_count("workers", workers)
    out, console = Path(options.out), make_console()
    calls: list[tuple[list[str], dict[str, Fraction]]] = [(options.texts, shares)]
    calls += [(texts, {part: Fraction(1)}) for part, texts in others.items()]
    found = [sources_of(texts, options.field) for texts, _ in calls]
    tokenizer = TextTokenizer(options.tokenizer)
    (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
    for sources, (_, parts) in zip(found, calls, strict=True):
        outs = {part: out / f"{part}.bin" if folder else out for part in parts}
        settings = {"end_of_text": options.eot, "workers": workers, "overwrite": options.overwrite}
        try:
            with _bar(console, sum(source.size for source in sources)) as told:
                held = work(sources, outs, tokenizer, shares=parts, told=told, **settings)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
        _show(console, outs, held)


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise argparse.ArgumentTypeError(f"{text!r} divides by zero") from None


def _shares(options: argparse.Namespace) -> dict[str, Fraction]:
    """Return the share of each part that comes from the main texts.

    Raises:
        ValueError: A fraction is none, or nothing is left to train on.
    """
    given = {part: share for part in ("val", "test") if (share := getattr(options, f"{part}_fraction")) is not None}
    for part, share in given.items():
        if not 0 < share < 1:
            raise ValueError(f"--{part}-fraction must lie in (0, 1), got {float(share):g}")
    left = 1 - sum(given.values(), Fraction(0))
    if left <= 0:
        raise ValueError("--val-fraction and --test-fraction leave nothing for train.bin; give smaller ones")
    return {"train": left, **given}


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of the sources are tokenised, on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=total or None)
        yield lambda read: bars.update(task, completed=read)


def _show(console: Console, outs: Mapping[str, Path], found: Mapping[str, Mapping[str, Any]]) -> None:
    for part, told in found.items():
        console.print(
            f"{outs[part]}: {told['tokens']:,} tokens ({told['dtype']}, vocabulary of {told['vocab_size']:,}) of "
            f"{told['documents']:,} documents",
            highlight=False,
            soft_wrap=True,
        )
