"""What each target costs a training step of a GPT-2-architecture model, as a ratio to the same step without EMP.

    python benchmarks/bench_overhead.py --repeats 25 --out benchmarks/results/overhead.json

Two copies of one model train side by side in one process, one with EMP, and their steps are timed in turn; the ratio
is that of the medians. "between" is a step far from any refresh, after the masks are in place; "gathering" is a step
of the window before a refresh, in which evidence is gathered; "refresh" is what the refresh itself takes, in steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from emp_callbacks import EMPPruner

SETTINGS: dict[str, dict[str, Any]] = {
    "weights, freeze": {"mode": "freeze"},
    "weights, feedback": {},
    "weights, project": {"mode": "project"},
    "weights, taylor": {"criterion": "taylor"},
    "weights, wanda": {"criterion": "wanda", "scope": "row"},
    "heads": {"target": "heads"},
    "heads, activation": {"target": "heads", "criterion": "activation"},
    "neurons": {"target": "neurons"},
    "neurons, taylor": {"target": "neurons", "criterion": "taylor"},
    "features": {"target": "features"},
    "features, taylor": {"target": "features", "criterion": "taylor"},
    "features, dynamic": {"target": "features", "dynamic": True},
    "attention edges": {"target": "attention_edges"},
}


class Training:
    """One model, its optimizer and the same batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_layer": options.layers, "n_head": 8, "n_embd": options.width, "n_positions": options.tokens}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        self.model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes, **dropouts)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(0, 256, (options.batch, options.tokens))

    def step(self) -> None:
        logits = self.model(input_ids=self.tokens, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Return the ratios of one setting."""
    far = 10**6
    gathering, _, _ = compare(options, **settings, every_n_steps=far, evidence_steps=far)
    between, seconds, refresh = compare(options, **settings, every_n_steps=2, stop=2, evidence_steps=2)
    return {"between": between, "gathering": gathering, "refresh": refresh / seconds}


def compare(options: argparse.Namespace, **settings: Any) -> tuple[float, float, float]:
    """Return the ratio of steps with EMP to steps without, seconds of the latter, and of a refresh if there was one."""
    plain, pruned = Training(options), Training(options)
    pruner = EMPPruner(pruned.model, pruned.optimizer, **settings)

    def step_with_emp() -> None:
        pruned.step()
        pruner.step()

    ratio, seconds = in_turn(plain.step, step_with_emp, options.repeats)
    return ratio, seconds, pruner.trajectory[-1].seconds if pruner.trajectory else 0.0


def in_turn(one: Callable[[], None], other: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Return median seconds of `other` over those of `one`, and the latter; who goes first changes every time."""
    seconds: dict[Callable[[], None], list[float]] = {one: [], other: []}
    for i in range(repeats + 3):
        for work in (one, other) if i % 2 else (other, one):
            started = time.perf_counter()
            work()
            seconds[work].append(time.perf_counter() - started)
    medians = [statistics.median(seconds[work][3:]) for work in (other, one)]
    return medians[0] / medians[1], medians[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--width", type=int, default=256, help="embedding width (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each model after three (default: 15)")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="SETTING", help="these rows alone")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    rows = {name: measure(SETTINGS[name], options) for name in track(options.only or SETTINGS, "steps in turn")}
    weights = sum(p.numel() for p in Training(options).model.parameters())
    table = Table(
        "setting", "between", "gathering", "refresh, in steps", title=f"{weights:,} weights: step / step without"
    )
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("between", "gathering", "refresh")))
    Console().print(table)
    if options.out:
        machine = {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        sizes = {key: getattr(options, key) for key in ("layers", "width", "batch", "tokens", "repeats")}
        record = {"machine": machine, "weights": weights, **sizes, "ratios": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
