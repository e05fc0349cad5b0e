"""Bytes and seconds of a sharded refresh, beside gathering the weights to select on them.

    python benchmarks/bench_communication.py --sizes 1e6 1e7 1e8 --ranks 2 --out benchmarks/results/communication.json

Ranks are gloo processes on this machine; weights are FSDP2 shards. `ratio` is seconds of gathering over seconds of a
refresh in the same processes; gathering alone is timed, without the selection that would follow it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from emp_callbacks import EMPPruner

LAYERS = 8


def measure_rank(rank: int, ranks: int, folder: str, sizes: list[int], repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = [measure(size, repeats) for size in sizes]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(size: int, repeats: int) -> dict[str, Any]:
    side = round((size / LAYERS) ** 0.5)
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(LAYERS)])
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    pruner = EMPPruner(net, mode="project")
    sent = count_bytes(pruner)
    pruner.refresh()
    bytes_per_refresh = sum(sent)
    return {
        "weights": LAYERS * side * side,
        "bytes_per_refresh": bytes_per_refresh,
        "bytes_to_gather": LAYERS * side * side * 4,
        "refresh_seconds": median_seconds(pruner.refresh, repeats),
        "gather_seconds": median_seconds(lambda: [layer.weight.full_tensor() for layer in net], repeats),
    }


def count_bytes(pruner: EMPPruner) -> list[int]:
    """Return a list that grows by the bytes of every sum that the pruner's backend reduces."""
    backend, sent = pruner._backend, []
    all_sum = backend.all_sum

    def counted(value: Tensor) -> Tensor:
        sent.append(value.numel() * value.element_size())
        return all_sum(value)

    backend.all_sum = counted  # type: ignore[method-assign]
    return sent


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8], help="numbers of weights")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after one warm-up (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [int(size) for size in options.sizes]
        mp.spawn(measure_rank, (options.ranks, folder, sizes, options.repeats), nprocs=options.ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    table = Table("weights", "bytes per refresh", "bytes to gather", "refresh s", "gather s", "ratio")
    for row in rows:
        row["ratio"] = row["gather_seconds"] / row["refresh_seconds"]
        table.add_row(
            f"{row['weights']:,}",
            f"{row['bytes_per_refresh']:,}",
            f"{row['bytes_to_gather']:,}",
            f"{row['refresh_seconds']:.3f}",
            f"{row['gather_seconds']:.3f}",
            f"{row['ratio']:.2f}",
        )
    Console().print(table)
    if options.out:
        machine = {"platform": platform.platform(), "torch": torch.__version__, "threads_per_rank": 1}
        options.out.write_text(json.dumps({"ranks": options.ranks, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
