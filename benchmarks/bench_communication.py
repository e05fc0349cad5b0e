"""Collectives, bytes and seconds of a sharded refresh, beside the same in one process and beside gathering the weights.

    python benchmarks/bench_communication.py --sizes 1e6 1e7 1e8 --ranks 2 --out benchmarks/results/communication.json

Ranks are gloo processes on this machine, one thread each; weights are FSDP2 shards. One more process with one thread
holds the same weights whole; it and the ranks refresh in turn (`project`, dense weights put back before each), and
must keep the same number. "refresh / alone" is seconds of the ranks over seconds of the one process. "ratio" is
seconds of gathering, without the selection that would follow it, over seconds of a refresh in the same processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from timing import machine, nothing
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from emp_callbacks import EMPPruner

LAYERS = 8


def measure_shards(sizes: list[int], scope: str, ranks: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row of figures for each number of weights."""
    with tempfile.TemporaryDirectory() as folder:
        turns = mp.get_context("spawn").Barrier(ranks + 1)
        mp.spawn(_work, (ranks, turns, folder, sizes, scope, repeats), nprocs=ranks + 1)
        sharded, whole = (json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, ranks))
    return [_row(shards, alone, scope) for shards, alone in zip(sharded, whole, strict=True)]


def _row(shards: dict[str, Any], alone: dict[str, Any], scope: str) -> dict[str, Any]:
    if shards["keep"] != alone["keep"]:
        raise RuntimeError(f"the ranks keep {shards['keep']:,} of {shards['weights']:,}, one process {alone['keep']:,}")
    seconds = shards["refresh_seconds"]
    return {
        **shards,
        "scope": scope,
        "alone_seconds": alone["refresh_seconds"],
        "alone_ratio": seconds / alone["refresh_seconds"],
        "ratio": shards["gather_seconds"] / seconds,
    }


def _work(rank: int, ranks: int, turns: Barrier, folder: str, sizes: list[int], scope: str, repeats: int) -> None:
    """What a process does: the ranks first, then one that holds everything."""
    torch.set_num_threads(1)
    alone = rank == ranks
    if not alone:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = [_measure(size, scope, turns, alone, repeats) for size in sizes]
    if alone or rank == 0:
        Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    if not alone:
        dist.destroy_process_group()


def _measure(size: int, scope: str, turns: Barrier, alone: bool, repeats: int) -> dict[str, Any]:
    net = _net(size, sharded=not alone)
    parameters = list(net.parameters())
    weights = [_local(parameter) for parameter in parameters]
    dense = [weight.clone() for weight in weights]
    pruner = EMPPruner(net, mode="project", scope=scope)
    sent = _count_bytes(pruner)
    events = pruner.refresh()
    count = sum(parameter.numel() for parameter in parameters)
    row: dict[str, Any] = {"weights": count, "keep": sum(event.keep for event in events)}
    row |= {"collectives_per_refresh": len(sent), "bytes_per_refresh": sum(sent), "bytes_to_gather": 4 * count}

    def restore() -> None:
        for weight, values in zip(weights, dense, strict=True):
            weight.copy_(values)

    row["refresh_seconds"] = _median_in_turn(pruner.refresh, restore, turns, alone, repeats)
    if not alone:
        row["gather_seconds"] = _median_seconds(lambda: [_gathered(p) for p in parameters], repeats)
    turns.wait()  # the process alone must not go on to the next size while the ranks gather
    return row


def _net(size: int, *, sharded: bool) -> nn.Sequential:
    side = round((size / LAYERS) ** 0.5)
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(LAYERS)])
    for layer in [*net, net] if sharded else ():
        fully_shard(layer)
    return net


def _local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def _gathered(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _count_bytes(pruner: EMPPruner) -> list[int]:
    """Return a list that grows by the bytes of every tensor that the pruner's backend reduces."""
    backend = pruner._backend
    sent: list[int] = []
    reduced = backend._reduced

    def counted(value: Tensor, how: Any) -> Tensor:
        sent.append(value.nbytes)
        return reduced(value, how)

    backend._reduced = counted  # type: ignore[method-assign]
    return sent


def _median_in_turn(
    work: Callable[[], object], prepare: Callable[[], None], turns: Barrier, alone: bool, repeats: int
) -> float:
    """Return median seconds of work that the ranks and the process alone do by turns."""
    seconds = []
    for _ in range(repeats + 1):
        prepare()
        for turn_of_ranks in (True, False):
            turns.wait()
            if turn_of_ranks != alone:
                seconds.append(_seconds(work))
    turns.wait()
    return statistics.median(seconds[1:])


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    return statistics.median([_seconds(work) for _ in range(repeats + 1)][1:])


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds until the last rank is done."""
    meet = dist.barrier if dist.is_initialized() else nothing
    meet()
    started = time.perf_counter()
    work()
    meet()
    return time.perf_counter() - started


def _table(rows: list[dict[str, Any]]) -> Table:
    heads = ("refresh s", "alone s", "gather s")
    sent = ("collectives", "bytes per refresh", "bytes to gather")
    table = Table("scope", "weights", *sent, *heads, "refresh / alone", "ratio")
    for row in rows:
        keys = ("weights", "collectives_per_refresh", "bytes_per_refresh", "bytes_to_gather")
        counts = (f"{row[key]:,}" for key in keys)
        seconds = (f"{row[key]:.3f}" for key in ("refresh_seconds", "alone_seconds", "gather_seconds"))
        table.add_row(row["scope"], *counts, *seconds, f"{row['alone_ratio']:.2f}", f"{row['ratio']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8], help="numbers of weights")
    parser.add_argument("--scopes", nargs="+", choices=("global", "tensor", "row"), default=["global"])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after one warm-up (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes]
    rows = [row for scope in options.scopes for row in measure_shards(sizes, scope, options.ranks, options.repeats)]
    Console(width=None if sys.stdout.isatty() else 130).print(_table(rows))
    if options.out:
        record = {"ranks": options.ranks, "machine": {**machine(), "threads": 1}, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
