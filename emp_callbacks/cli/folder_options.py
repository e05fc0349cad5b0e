"""The options of what is done with Hugging Face folders of any size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emp_callbacks.cli.new_parser import new_parser

__all__ = ["add_shown", "perplexity_parser"]


def add_shown(parser: argparse.ArgumentParser) -> None:
    """Add what a model in a folder is shown while it is pruned block by block."""
    shown = parser.add_argument_group(
        "a Hugging Face folder into a folder",
        "Weights of FOLDER pruned into --out NAME: one block is in memory at a time, and the same command goes on\n"
        "after a kill. wanda reads inputs, so one of --text, --images, --sounds is needed.",
    )
    shown.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="text that the model reads (calibration)")
    shown.add_argument("--images", type=Path, metavar="DIR", help="images that the model sees")
    shown.add_argument("--sounds", type=Path, metavar="DIR", help="sound files; with --text their transcripts, by line")
    shown.add_argument(
        "--samples", type=int, default=128, metavar="N", help="sequences, images or sounds (default: 128)"
    )
    shown.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a sequence (default: 2048)")
    shown.add_argument("--seed", type=int, default=0, help="of the places in the text (default: 0)")
    shown.add_argument("--first", action="store_true", help="the first sequences of the text, not random places")
    shown.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each block sees what the pruned ones before it return, as Wanda has it; with --no-sequential what the "
        "dense ones do, as the EMP paper has it (default: --sequential)",
    )
    shown.add_argument(
        "--eval-text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text for perplexity before and after (default: the last tenth of --text, which calibration leaves out)",
    )
    shown.add_argument("--eval-windows", type=int, default=64, metavar="N", help="windows of it at most (default: 64)")
    shown.add_argument(
        "--perplexity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure it (default: where it can be)",
    )
    _add_compute(shown)


def _add_compute(parser: Any) -> None:
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer (default: the model's)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: that of the model)"
    )
    parser.add_argument("--device", help="to compute on, such as cuda:1 (default: a GPU if there is one)")


def perplexity_parser() -> argparse.ArgumentParser:
    """Return the options of `emp perplexity`."""
    parser = new_parser(
        "perplexity",
        "Measure the perplexity of a language model in a Hugging Face folder, one block in memory at a time.",
        """\
examples:
  emp perplexity llama --text wikitext_test.txt
  emp perplexity pruned --text wikitext_test.txt --length 2048 --stride 512 --json perplexity.json

Windows of --length tokens follow each other, each token is scored once, as GPTQ, Wanda and the EMP paper have it. With
a smaller --stride windows overlap, and only the last --stride tokens of each are scored. Encoder-decoders are scored on
the second half of each window, encoders with a masked head on 15 % of the tokens, hidden (masked perplexity).""",
    )
    parser.add_argument("source", metavar="FOLDER", help="Hugging Face folder with a language model and its tokenizer")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text, UTF-8")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens of a window (default: the model's, at most 2048)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window to the next (default: --length)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="windows at most (default: all)")
    _add_compute(parser)
    parser.add_argument("--json", metavar="FILE", help="also write what was measured to a JSON file")
    return parser
