"""Peak memory and seconds of the commands that take a folder, on Llama folders of random weights (Linux).

    OMP_NUM_THREADS=1 python benchmarks/bench_folders.py            # writes benchmarks/results/folders.json
    python benchmarks/bench_folders.py --quick --out folders.json   # one tiny folder: does it run?

Each command runs in a process of its own; its peak is the kernel's own high-water mark of resident memory (wait4).
Beside it stands what a command may take: two blocks + calibration activations + 1 GB (1e9 bytes). "activations" is what
goes into one block for all samples, once: samples x length x width, in the folder's dtype; for `perplexity` the same of
the whole text. Folders are made under --scratch one at a time and deleted: at most twice the largest lies there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# No torch here: the peak of a child begins with what its parent held when it was started.

ROOT = Path(__file__).parents[1]
ALLOWANCE = 10**9
COMMANDS = ("inspect", "magnitude", "wanda", "perplexity")
READS_TEXT = ("wanda", "perplexity")


def main(words: Sequence[str] | None = None) -> None:
    options = parsed(words)
    rows: list[dict[str, Any]] = []
    empty = measured([sys.executable, "-c", "import torch, transformers, safetensors"])
    for layers, hidden in options.folders:
        rows += rows_of(layers, hidden, empty["peak"], options)
        told = {
            "command": "python benchmarks/bench_folders.py " + " ".join(sys.argv[1:] if words is None else words),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "empty_process": empty,
            "allowance": ALLOWANCE,
            "rows": rows,
        }
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    print(table(rows, empty["peak"]))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folders", nargs="+", type=layers_and_width, metavar="LAYERSxWIDTH", help="(three depths, and three sizes)"
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS, help="(all)")
    parser.add_argument("--forward-up-to", type=float, default=1.5e9, help="weights, for what runs a model (1.5e9)")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding (32000)")
    parser.add_argument("--shard-mb", type=int, default=500, help="megabytes of a shard (500)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where folders are made")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/folders.json", help="file of the rows")
    parser.add_argument("--quick", action="store_true", help="a folder of 2 blocks of width 128 alone")
    options = parser.parse_args(words)
    if options.quick:
        options.folders, options.vocabulary, options.shard_mb = [(2, 128)], 384, 1
        options.samples, options.length = 2, 32
    options.folders = options.folders or [(4, 1024), (8, 1024), (20, 1024), (24, 2048), (28, 3072)]
    return options


def layers_and_width(text: str) -> tuple[int, int]:
    layers, hidden = text.split("x")
    return int(layers), int(hidden)


def rows_of(layers: int, hidden: int, empty: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make one folder, run the commands on it, delete it."""
    scratch = Path(tempfile.mkdtemp(prefix="bench_folders_", dir=options.scratch))
    try:
        made = made_folder(layers, hidden, scratch / "model", options)
        text = scratch / "text.txt"
        text.write_text((ROOT / "LICENSE").read_text()[: options.samples * options.length])
        for command in options.commands:
            if command in READS_TEXT and made["parameters"] > options.forward_up_to:
                continue
            found = measured(command_line(command, scratch, options))
            activations = 2 * options.samples * options.length * hidden if command in READS_TEXT else 0
            allowed = 2 * made["block_bytes"] + activations + ALLOWANCE
            row = {
                "layers": layers,
                "hidden": hidden,
                **made,
                "command": command,
                **found,
                "above_empty": found["peak"] - empty,
                "activations": activations,
                "allowed": allowed,
                "holds": found["peak"] <= allowed,
            }
            print(json.dumps(row), flush=True)
            yield row
            shutil.rmtree(scratch / "pruned", ignore_errors=True)
    finally:
        shutil.rmtree(scratch)


def made_folder(layers: int, hidden: int, folder: Path, options: argparse.Namespace) -> dict[str, int]:
    script = [sys.executable, str(ROOT / "benchmarks/make_llama_folder.py"), "--out", str(folder)]
    sizes = {"layers": layers, "hidden": hidden, "vocabulary": options.vocabulary, "shard-mb": options.shard_mb}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*script, *words], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: told[name] for name in ("parameters", "bytes", "block_bytes", "shards")}


def command_line(command: str, scratch: Path, options: argparse.Namespace) -> list[str]:
    """Return the words of a command on the folder `scratch`/model."""
    model, text, pruned = (str(scratch / name) for name in ("model", "text.txt", "pruned"))
    length = ["--length", str(options.length)]
    calibration = ["--text", text, "--samples", str(options.samples), *length, "--no-perplexity"]
    words = {
        "inspect": ["inspect", model, "--scope", "row"],
        "magnitude": ["prune", model, "--criterion", "magnitude", "--scope", "row", "--out", pruned],
        "wanda": ["prune", model, "--criterion", "wanda", "--scope", "row", *calibration, "--out", pruned],
        "perplexity": ["perplexity", model, "--text", text, *length],
    }[command]
    return [sys.executable, "-c", "import sys; from emp_callbacks.cli.main import main; sys.exit(main())", *words]


def measured(words: list[str]) -> dict[str, Any]:
    """Run a command; return its peak resident memory in bytes, seconds on the wall and on the CPU.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}: {said.read()[-3000:]}")
    seconds = time.perf_counter() - started
    return {
        "peak": used.ru_maxrss * 1024,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
    }


def table(rows: Sequence[dict[str, Any]], empty: int) -> str:
    """Return the rows in Markdown, sizes in megabytes (1e6)."""
    head = ["blocks", "width", "weights", "model, MB", "one block", "command", "seconds", "peak", "above empty"]
    head += ["allowed", "holds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        sizes = [f"{row[name] / 1e6:,.0f}" for name in ("bytes", "block_bytes")]
        peaks = [f"{row[name] / 1e6:,.0f}" for name in ("peak", "above_empty", "allowed")]
        cells = [row["layers"], row["hidden"], f"{row['parameters'] / 1e6:,.0f}M", *sizes, row["command"]]
        cells += [f"{row['seconds']:.1f}", *peaks, "yes" if row["holds"] else "NO"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(
        [*lines, "", f"An empty process (import torch, transformers, safetensors): {empty / 1e6:,.0f} MB."]
    )


if __name__ == "__main__":
    main()
