"""What EMP costs on a GPU: a refresh beside one read of the weights and the paper's sort, and steps of GPT-2 124M.

    python benchmarks/bench_gpu.py                         # all parts: about three minutes on an H100, 60 GiB
    python benchmarks/bench_gpu.py --only refresh --quick  # one part, with fewer repeats
    python benchmarks/bench_gpu.py --show FILE             # the table of a record
    python benchmarks/bench_gpu.py --rehearse              # all parts on the CPU, tiny: that nothing fails, no figures

Parts (--only):
    refresh   EMPPruner.refresh() of 1e9 normal weights, masks of an earlier refresh in place, beside one torch.sum over
              the same tensors and the paper's algorithm on them; and the most memory that it takes above what was held
    steps     training steps of GPT-2 124M at 8 x 1024 far from a refresh, beside the same without pruning: rounds of a
              few steps in turn, ratio of the medians with a 95 % bootstrap interval over the rounds
    launches  kernels that one step and one refresh launch and how often the host waits, beside a step without pruning
    memory    bytes per masked float32 weight that stay allocated between refreshes, and the most during one

Figures stand beside their targets. What fails is named in the table and in the file, the rest goes on, and the
command's status is 1. Writes benchmarks/results/gpu_CARD.json, or what --out names.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import paper_global
from gpu_device import Gpu, Rehearsal
from timing import Contestant, Row, in_turn, machine, ratio_of_medians, row
from torch import Tensor, nn
from torch.nn.utils import prune

from emp_callbacks import EMPPruner

Figures = dict[str, Any]

READS, SORTS = 6.0, 20.0  # a refresh takes at most as many reads of the weights, and the sort as many refreshes
STEP_TARGETS = {"freeze": 1.01, "feedback": 1.02, "features": 1.02}
BYTES_TARGETS = {"freeze": 1.1, "feedback": 5.1}
WAITS_PER_STEP = 0.0

PLAIN, TORCH_PRUNE = "no pruning", "torch prune"
SETTINGS: dict[str, dict[str, Any]] = {
    "freeze": {"mode": "freeze"},
    "feedback": {"mode": "feedback"},
    "project": {"mode": "project"},
    "rewire": {"mode": "rewire", "density": 0.5},
    "features": {"target": "features"},
}
REFRESH_AT = 2
ONCE: dict[str, Any] = {"every_n_steps": REFRESH_AT, "stop": REFRESH_AT, "evidence_steps": REFRESH_AT}
WITH_EVIDENCE = ("rewire", "features")  # which is gone after the refresh: none can be asked for by hand


class Bench:
    """What the parts share: where, how large, how often; and what they found.

    Attributes:
        rows: Figures beside their targets.
        figures: What they were made of.
        failed: What failed, and how.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.gpu = Rehearsal() if options.rehearse else Gpu()
        self.tiny, self.quick = options.rehearse, options.quick
        self.rows: list[Row] = []
        self.figures: Figures = {}
        self.failed: dict[str, str] = {}

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what the work returns; where it fails, record that and return None: time on a GPU is dear."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.failed[what] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.gpu.release()  # not before the error, which holds what its frames held, is gone
        return None

    def add(self, what: str, value: float, unit: str, target: float | None = None, *, at_least: bool = False) -> None:
        """Add a figure beside its target; in a rehearsal nothing meets one or misses it."""
        figure = row(what, value, target, at_least=at_least, unit=unit)
        self.rows.append({**figure, "met": None} if self.tiny else figure)

    @property
    def repeats(self) -> int:
        return 2 if self.quick or self.tiny else 5


# ---- refresh --------------------------------------------------------------------------------------------------------


def measure_refresh(bench: Bench) -> None:
    side, many, few = (64, 3, 1) if bench.tiny else (8192, 15, 2)
    scopes_of = {
        (many, torch.float32): ("global",),
        (many, torch.bfloat16): ("global", "tensor", "row"),
        (few, torch.bfloat16): ("global", "tensor", "row"),
    }
    for (matrices, dtype), scopes in scopes_of.items():
        model = matrices_of(matrices, side, dtype, bench.gpu.where)
        weights = [parameter.detach() for parameter in model.parameters()]
        name = f"{sum(map(torch.numel, weights)):.2g} {str(dtype).removeprefix('torch.')}"
        read = timed(bench, lambda weights=weights: [weight.sum() for weight in weights])
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        bench.add(f"{name}: one read", read * 1e3, "ms")
        bench.figures[name] = {"read_seconds": read, "read_bytes_per_second": size / read, "refresh": {}}
        sort = bench.attempt(f"{name}: paper's sort", partial(measure_sort, bench, name, weights))
        for scope in scopes:
            for mode in ("freeze", "feedback"):
                aims = matrices == many and scope == "global"
                work = partial(measure_one_refresh, bench, name, model, scope, mode, read, sort, aims)
                bench.attempt(f"{name}, {scope}, {mode}", work)
        del model, weights
        bench.gpu.release()


def matrices_of(count: int, side: int, dtype: torch.dtype, where: str) -> nn.Module:
    return nn.Sequential(*(nn.Linear(side, side, bias=False, device=where, dtype=dtype) for _ in range(count)))


@torch.no_grad()
def fill(weights: Iterable[Tensor]) -> None:
    torch.manual_seed(0)
    for weight in weights:
        weight.normal_(std=0.02)


def timed(bench: Bench, work: Callable[[], Any], repeats: int | None = None) -> float:
    """Return the median seconds of a call after one that does not count; of a single one where that takes seconds."""
    bench.gpu.seconds(work)
    taken = [bench.gpu.seconds(work)]
    while len(taken) < (repeats or bench.repeats) and taken[0] < 2.0:
        taken.append(bench.gpu.seconds(work))
    return statistics.median(taken)


def measure_sort(bench: Bench, name: str, weights: Sequence[Tensor]) -> float:
    """Return the seconds of the paper's algorithm; where memory does not hold it, from a part of the weights."""
    fill(weights)
    part, seconds = list(weights), None
    while seconds is None:
        try:
            seconds = timed(bench, partial(paper_global, part), 3) * len(weights) / len(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        if seconds is None:
            part = part[: max(1, len(part) // 4)]
            bench.gpu.release()
    told = "" if len(part) == len(weights) else f", from {len(part)} of {len(weights)} tensors"
    bench.add(f"{name}: paper's sort{told}", seconds * 1e3, "ms")
    bench.figures[name] |= {"sort_seconds": seconds, "sorted_tensors": len(part), "tensors": len(weights)}
    return seconds


def measure_one_refresh(
    bench: Bench, name: str, model: nn.Module, scope: str, mode: str, read: float, sort: float | None, aims: bool
) -> None:
    what = f"{name}, {scope}, {mode}"
    fill(model.parameters())
    pruner = EMPPruner(model, scope=scope, mode=mode)
    try:
        pruner.refresh()
        density = must_prune(what, share_not_zero(model.parameters()))
        seconds = timed(bench, pruner.refresh)
        busy = bench.gpu.busy(pruner.refresh)
        peak = bench.gpu.peak(pruner.refresh) / sum(p.numel() for p in model.parameters())
    finally:
        pruner.detach()
    bench.add(f"{what}: refresh", seconds * 1e3, "ms")
    bench.add(f"{what}: refresh / one read", seconds / read, "reads", READS if aims else None)
    bench.add(f"{what}: refresh / one read, on the device alone", busy / read, "reads", READS if aims else None)
    if aims:
        bench.add(f"{what}: most memory above", peak, "bytes per weight")
    if aims and sort is not None:
        bench.add(f"{what}: sort / refresh", sort / seconds, "x", SORTS, at_least=True)
    figures = {"seconds": seconds, "device_seconds": busy, "density": density, "peak_bytes_per_weight": peak}
    bench.figures[name]["refresh"][f"{scope}, {mode}"] = figures


def share_not_zero(weights: Iterable[Tensor]) -> float:
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in weights]
    return sum(kept for kept, _ in counts) / sum(size for _, size in counts)


def must_prune(what: str, density: float) -> float:
    """Return the density; raise where nothing is pruned, because such a figure says nothing."""
    if not 0 < density < 1:
        raise RuntimeError(f"{what}: density {density}, so nothing was measured")
    return density


# ---- steps ----------------------------------------------------------------------------------------------------------


def gpt2(tiny: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa", **(sizes | ends if tiny else {})))


class Training:
    """A copy of one model, its optimizer, and steps on one batch.

    Args:
        bench: Where.
        base: The model to copy.
        tokens: Shape (B, T), int64.
        low: Whether the weights themselves are bfloat16, else float32 under autocast.
        clips: Whether each step clips the norm of the gradients.
    """

    def __init__(self, bench: Bench, base: nn.Module, tokens: Tensor, *, low: bool = False, clips: bool = True) -> None:
        self.gpu, self.tokens, self.low, self.clips = bench.gpu, tokens, low, clips
        self.model = copy.deepcopy(base).to(bench.gpu.where, torch.bfloat16 if low else torch.float32)
        self.pruner: EMPPruner | None = None
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def prune(self, **settings: Any) -> None:
        self.pruner = EMPPruner(self.model, self.optimizer, **settings, **ONCE)

    def prune_by_torch(self) -> None:
        """Put torch's reparametrisation around the weights that EMP prunes, with its masks."""
        observer = EMPPruner(self.model, observe_only=True)
        observer.refresh()
        masks = observer.weight_masks
        observer.finalize()
        for name, mask in masks.items():
            module, _, parameter = name.rpartition(".")
            prune.custom_from_mask(self.model.get_submodule(module), parameter, mask)
        self.optimizer = self.make_optimizer()

    def density(self) -> float:
        """Return the share that forward sees of what is pruned: of the features, else of the blocks' matrices."""
        if self.pruner is not None and not self.pruner.weight_masks:
            return self.pruner.density
        blocks = (module for name, module in self.model.named_modules() if name.startswith("transformer.h."))
        weights = (getattr(module, "weight", None) for module in blocks)
        return share_not_zero(weight.detach() for weight in weights if weight is not None and weight.dim() == 2)

    def step(self) -> None:
        with torch.autocast(self.gpu.where, torch.bfloat16, enabled=not self.low):
            logits = self.model(input_ids=self.tokens, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.tokens[:, 1:].flatten())
        loss.backward()
        if self.clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner is not None:
            self.pruner.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
        self.gpu.wait()


def contestant(name: str, bench: Bench, base: nn.Module, tokens: Tensor, **form: bool) -> tuple[Training, float | None]:
    """Return a training whose masks are in place, and its density; None where nothing is pruned."""
    training = Training(bench, base, tokens, **form)
    if name == TORCH_PRUNE:
        training.prune_by_torch()
    elif name != PLAIN:
        training.prune(**SETTINGS[name])
    training.steps(REFRESH_AT)
    density = training.density()
    training.steps(2)  # the first steps after a refresh may make what the next ones find
    return training, None if name == PLAIN else must_prune(name, density)


def batch(bench: Bench, base: nn.Module, rows: int, length: int) -> Tensor:
    rows, length = (2, 16) if bench.tiny else (rows, length)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.config.vocab_size, (rows, length), generator=generator).to(bench.gpu.where)


def measure_steps(bench: Bench) -> None:
    base = gpt2(bench.tiny)
    tokens = batch(bench, base, 8, 1024)
    variants = {"autocast, clips": {"clips": True}, "autocast": {"clips": False}}
    variants |= {"bfloat16 weights, clips": {"clips": True, "low": True}}
    for variant, form in list(variants.items())[: 1 if bench.quick else None]:
        bench.attempt(f"steps, {variant}", partial(measure_variant, bench, variant, base, tokens, form))
        bench.gpu.release()


def measure_variant(bench: Bench, variant: str, base: nn.Module, tokens: Tensor, form: dict[str, bool]) -> None:
    each_round, rounds, warm_up = (1, 2, 1) if bench.tiny else (4, 6 if bench.quick else 10, 1)
    trainings: dict[str, Training] = {}
    densities: dict[str, float | None] = {}
    for name in (PLAIN, *SETTINGS, TORCH_PRUNE):
        made = bench.attempt(f"step, {variant}: {name}", partial(contestant, name, bench, base, tokens, **form))
        if made is not None:
            trainings[name], densities[name] = made
    work = {name: Contestant(partial(training.steps, each_round)) for name, training in trainings.items()}
    seconds = in_turn(work, rounds, warm_up)
    # Of the device alone: what a slow or busy host adds differs from round to round.
    busy = {name: bench.gpu.busy(each.work) / each_round for name, each in work.items()}
    figures: Figures = {}
    for name, taken in seconds.items():
        ratio = ratio_of_medians(taken, seconds[PLAIN])
        figures[name] = {**ratio, "seconds": [each / each_round for each in taken], "density": densities[name]}
        figures[name]["device_seconds"] = busy[name]
        if name == PLAIN:
            bench.add(f"step, {variant}: {name}", statistics.median(taken) / each_round * 1e3, "ms")
            bench.add(f"step, {variant}: {name}, on the device alone", busy[name] * 1e3, "ms")
            continue
        # The targets are of plain bf16 training as most run it: autocast, gradients clipped.
        target = STEP_TARGETS.get(name) if variant == "autocast, clips" else None
        spread = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        bench.add(f"step, {variant}: {name} / {PLAIN} ({spread})", ratio["ratio"], "x", target)
        bench.add(f"step, {variant}: {name} / {PLAIN}, on the device alone", busy[name] / busy[PLAIN], "x", target)
    bench.figures[variant] = figures


# ---- launches and waits ---------------------------------------------------------------------------------------------


def measure_launches(bench: Bench) -> None:
    base = gpt2(bench.tiny)
    tokens = batch(bench, base, 1, 128)
    plain = counted(bench, contestant(PLAIN, bench, base, tokens)[0].step)
    bench.figures[PLAIN] = plain
    bench.add(f"{PLAIN}: launches per step", plain["launches"], "launches")
    bench.add(f"{PLAIN}: waits per step", plain["torch_waits"], "waits")
    for name in (*SETTINGS, TORCH_PRUNE):
        bench.attempt(f"launches, {name}", partial(measure_launches_of, bench, name, base, tokens, plain))
        bench.gpu.release()


def measure_launches_of(bench: Bench, name: str, base: nn.Module, tokens: Tensor, plain: dict[str, int]) -> None:
    training, _ = contestant(name, bench, base, tokens)
    step = counted(bench, training.step)
    bench.figures[name] = {"step": step}
    bench.add(f"{name}: launches per step, more than {PLAIN}", step["launches"] - plain["launches"], "launches")
    target = None if name == TORCH_PRUNE else WAITS_PER_STEP
    waits = max(step[kind] - plain[kind] for kind in ("waits", "torch_waits"))
    bench.add(f"{name}: waits per step, more than {PLAIN}", waits, "waits", target)
    if training.pruner is None or name in WITH_EVIDENCE:
        return
    refresh = counted(bench, training.pruner.refresh)
    bench.figures[name]["refresh"] = refresh
    bench.add(f"{name}: launches per refresh", refresh["launches"], "launches")
    bench.add(f"{name}: waits per refresh", max(refresh["waits"], refresh["torch_waits"]), "waits")


def counted(bench: Bench, work: Callable[[], Any]) -> dict[str, int]:
    """Return the driver's calls in one call of the work, and torch's own count of waits in another."""
    work()
    return {**bench.gpu.calls(work), "torch_waits": bench.gpu.waits(work)}


# ---- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(bench: Bench) -> None:
    for mode in ("freeze", "feedback", "project"):
        bench.attempt(f"memory, {mode}", partial(measure_memory_of, bench, mode))
        bench.gpu.release()


def measure_memory_of(bench: Bench, mode: str) -> None:
    count, side = (2, 64) if bench.tiny else (16, 4096)
    model = matrices_of(count, side, torch.float32, bench.gpu.where)
    weights = list(model.parameters())
    fill(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD(weights, lr=1e-6)
    before = bench.gpu.allocated()
    pruner = EMPPruner(model, optimizer, mode=mode)
    pruner.refresh()
    density = must_prune(mode, share_not_zero(weights))
    optimizer.step()  # what a step leaves behind is held, too
    masked = sum(mask.numel() for mask in pruner.weight_masks.values())
    held = (bench.gpu.allocated() - before) / masked
    peak = bench.gpu.peak(pruner.refresh) / masked
    stepping = bench.gpu.peak(optimizer.step) / masked
    bench.figures[mode] = {"held": held, "peak_of_refresh": peak, "peak_of_step": stepping, "density": density}
    bench.add(f"{mode}: held between refreshes", held, "bytes per weight", BYTES_TARGETS.get(mode))
    bench.add(f"{mode}: most during a refresh, above", peak, "bytes per weight")
    bench.add(f"{mode}: most during an optimizer step, above", stepping, "bytes per weight")


# ---- command --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], None]] = {
    "refresh": measure_refresh,
    "steps": measure_steps,
    "launches": measure_launches,
    "memory": measure_memory,
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a part found."""
    bench, started = Bench(options), time.perf_counter()
    bench.attempt(name, partial(PARTS[name], bench))
    bench.gpu.release()
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "rows": bench.rows, "figures": bench.figures, "failed": bench.failed}


def table_of(name: str, part: dict[str, Any]) -> str:
    """Return a part's rows as text: rich may not be there."""
    width = max((len(each["what"]) for each in part["rows"]), default=0)
    lines = ["", f"{name} ({part['seconds']:.0f} s)"]
    lines += [f"  {each['what']:<{width}} {shown(each):<27} {beside(each)}".rstrip() for each in part["rows"]]
    lines += [f"  FAILED: {what}: {why}" for what, why in part["failed"].items()]
    return "\n".join(lines)


def shown(each: Row) -> str:
    value = each["value"]
    exact = value == math.floor(value) and abs(value) < 1e6
    return f"{value:>10.0f} {each['unit']}" if exact else f"{value:>10.4g} {each['unit']}"


def beside(each: Row) -> str:
    if each["target"] is None:
        return ""
    bound = f"target {'>=' if each['at_least'] else '<='} {each['target']:g}"
    return bound + {None: "", True: ": ok", False: ": missed"}[each["met"]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="these parts alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes; writes where --out says")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_CARD.json")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file, and measure nothing")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.show:
        return show(json.loads(options.show.read_text()))
    if not options.rehearse and not torch.cuda.is_available():
        print("bench_gpu.py: no CUDA device is at hand; --rehearse runs all of it on the CPU, without figures")
        return 1
    gpu = Rehearsal() if options.rehearse else Gpu()
    card = re.sub(r"\W+", "_", gpu.name.lower()).strip("_")
    out = options.out or (None if options.rehearse else Path("benchmarks/results") / f"gpu_{card}.json")
    record: dict[str, Any] = {
        "card": gpu.name,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rehearsal": options.rehearse,
        "quick": options.quick,
        "machine": machine(),
        "cuda": torch.version.cuda,
        "parts": {},
    }
    for name in options.only or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        record["parts"][name] = measure(name, options)
        if out is not None:  # after each part: a machine may be taken away
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return show(record, out)


def show(record: dict[str, Any], out: Path | None = None) -> int:
    """Print a record's table; return 1 where a measurement failed."""
    parts = record["parts"]
    rows = [each for part in parts.values() for each in part["rows"]]
    failed = sum(len(part["failed"]) for part in parts.values())
    print(f"\n{record['card']}{': sizes are tiny and no figure means anything' if record['rehearsal'] else ''}")
    for name, part in parts.items():
        print(table_of(name, part))
    missed = sum(each["met"] is False for each in rows)
    print(f"\n{missed} targets missed, {failed} measurements failed" + (f"; wrote {out}" if out else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
