"""What a refresh would take on a thousand ranks: counts and bytes by formula, checked on a few; seconds by a model.

    python benchmarks/extrapolate_refresh.py --out benchmarks/results/scale.json

First the formula (`emp_callbacks.pruning.traffic`, which `emp check` shows too) is compared with what 2, 3 and 4 gloo
processes on this machine really send; any difference is an error. Then it is evaluated for large models and many ranks,
and turned into seconds by the usual model of an all-reduce: latency of a message, plus its bytes over the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_communication import _count_bytes, _net
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import nn

from emp_callbacks import EMPConfig, EMPPruner
from emp_callbacks.pruning.traffic import Spread, Traffic, refresh_traffic

SCOPES = ("global", "tensor", "row")
LATENCIES, BANDWIDTH = (20e-6, 1e-3), 1.25e9  # seconds of a message; bytes per second: 10 Gbit/s
MODELS = {
    # layers, outputs, inputs
    "22 M weights, 50 layers (ViT-S)": (50, 662, 662),
    "1.3 B weights, 169 layers (Llama)": (169, 2745, 2745),
    "5.0 B weights, 300 layers": (300, 4096, 4096),
}


def said(net: nn.Module, scope: str, spread: Spread) -> Traffic:
    """Return what the formula says of a model's refresh."""
    pruner = EMPPruner(net, scope=scope, mode="project")
    try:
        return refresh_traffic(EMPConfig(scope=scope, mode="project"), pruner._refresher.layers, spread)
    finally:
        pruner.finalize()


def check(ranks: list[int], weights: int) -> list[dict[str, Any]]:
    """Return what some numbers of ranks really send, beside what the formula says.

    Raises:
        RuntimeError: They differ.
    """
    rows = []
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_work, (count, folder, weights), nprocs=count)
            measured = json.loads(Path(folder, "sent.json").read_text())
        for scope, row in measured["scopes"].items():
            traffic = said(_net(weights, sharded=False), scope, Spread(ranks=count, held="slices"))
            row |= {"ranks": count, "scope": scope, "message_seconds": measured["message_seconds"]}
            row |= {"said_collectives": traffic.collectives.least, "said_bytes": traffic.nbytes.least}
            if (row["collectives"], row["bytes"]) != (row["said_collectives"], row["said_bytes"]):
                raise RuntimeError(f"the formula is wrong: {row}")
            rows.append(row)
    return rows


def _work(rank: int, ranks: int, folder: str, weights: int) -> None:
    """What one process does; no two of its random float32 weights that matter are equal."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found: dict[str, Any] = {}
    for scope in SCOPES:
        pruner = EMPPruner(_net(weights, sharded=True), mode="project", scope=scope)
        sent = _count_bytes(pruner)
        pruner.refresh()
        counts = {"collectives": len(sent), "bytes": sum(sent)}
        found[scope] = counts | {"refresh_seconds": _median_seconds(pruner.refresh)}
        pruner.finalize()
    word = torch.zeros(1)
    message = _median_seconds(lambda: dist.all_reduce(word), repeats=51)
    if rank == 0:
        Path(folder, "sent.json").write_text(json.dumps({"scopes": found, "message_seconds": message}))
    dist.destroy_process_group()


def _median_seconds(work: Any, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def extrapolate(ranks: list[int]) -> list[dict[str, Any]]:
    """Return collectives, bytes and seconds of a refresh by formula; at most, where equal scores must be told apart."""
    rows = []
    for model, (layers, outputs, inputs) in MODELS.items():
        with torch.device("meta"):
            net = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(layers)))
        for scope in SCOPES:
            for count in ranks:
                traffic = said(net, scope, Spread(ranks=count, held="slices", by_kernels=True))
                row = {"model": model, "scope": scope, "ranks": count}
                row |= {"collectives": list(traffic.collectives), "bytes": list(traffic.nbytes)}
                row["seconds"] = {
                    f"{way}, {latency:g} s": traffic.seconds(count, latency, BANDWIDTH, way)
                    for latency in LATENCIES
                    for way in ("tree", "ring")
                }
                rows.append(row)
    return rows


def _checked(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "ranks", "scope", "collectives", "said", "bytes", "said", "refresh s (rough)", "one all-reduce s (rough)"
    )
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("collectives", "said_collectives", "bytes", "said_bytes"))
        table.add_row(
            str(row["ranks"]), row["scope"], *counts, f"{row['refresh_seconds']:.3f}", f"{row['message_seconds']:.4f}"
        )
    return table


def _extrapolated(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "scope", "ranks", "collectives", "bytes", *rows[0]["seconds"])
    for row in rows:
        bounds = (" to ".join(f"{one:,}" for one in dict.fromkeys(row[key])) for key in ("collectives", "bytes"))
        seconds = (f"{one:.3g}" for one in row["seconds"].values())
        table.add_row(row["model"], row["scope"], f"{row['ranks']:,}", *bounds, *seconds)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", type=int, default=[2, 3, 4], help="ranks that really run (2 3 4)")
    parser.add_argument("--weights", type=float, default=1e5, help="of the model that really runs (1e5)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1000], help="ranks to extrapolate to")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    checked, extrapolated = check(options.check, int(options.weights)), extrapolate(options.ranks)
    console = Console(width=190)
    console.print(_checked(checked))
    console.print(_extrapolated(extrapolated))
    if options.out:
        settings = {"latencies": LATENCIES, "bandwidth": BANDWIDTH}
        record = {"machine": machine(), **settings, "checked": checked, "extrapolated": extrapolated}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
