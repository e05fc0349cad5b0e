"""What a refresh and a training step cost on the CPU, beside the same with an earlier revision of this package.

    python benchmarks/bench_before.py 60a3120             # about six minutes for one thread
    python benchmarks/bench_before.py HEAD~1 --quick --only refresh --match "many small"

The package of that revision is taken from git and imported beside this one under another name. Both prune copies of one
model in one process and are timed in turn, who goes first changing each time; the ratio new / old is that of the
medians, with a 95 % bootstrap interval over the rounds. Both must have the same masks in the end. "refresh" is all of
`EMPPruner.refresh()` with older masks in place; "step" is forward, backward and optimizer step of
a small batch, far from a refresh. A figure is called slower where its whole interval lies above --slower.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import Contestant, in_turn, machine, nothing, ratio_of_medians
from torch import Tensor, nn

import emp_callbacks

ROOT = Path(__file__).parents[1]
NAME, EARLIER = "emp_callbacks", "emp_callbacks_before"

AT_STEP_2: dict[str, Any] = {"every_n_steps": 2, "stop": 2, "evidence_steps": 2}
HALF: dict[str, Any] = {"density": 0.5}  # with beta, `freeze` would prune on and on
WARM_UP = 4  # steps; the second refreshes
FEWEST = 9  # rounds


def check_this_checkout() -> None:
    """Raise where the package that is imported is not the one beside this file, which is called new."""
    imported = Path(emp_callbacks.__file__).parents[1]
    if imported != ROOT:
        raise RuntimeError(f"{NAME} is imported from {imported}, not {ROOT}: set PYTHONPATH={ROOT}")


def import_revision(revision: str, folder: Path) -> ModuleType:
    """Return the package as it was at a git revision, written to a folder under the name EARLIER."""
    tar = subprocess.run(["git", "-C", str(ROOT), "archive", revision, NAME], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=BytesIO(tar)) as archive:
        archive.extractall(folder, filter="data")
    package = (folder / NAME).rename(folder / EARLIER)
    for path in package.rglob("*.py"):
        path.write_text(re.sub(rf"\b{NAME}\b", EARLIER, path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(EARLIER)


# ---- models ---------------------------------------------------------------------------------------------------------


def small_layers() -> nn.Module:
    return nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(60)])


def one_large() -> nn.Module:
    return nn.ModuleList([nn.Linear(4096, 4880, bias=False)])


def mlp() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())), nn.Linear(256, 10))


def small_vit() -> nn.Module:
    return _vit(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10)


def vit_tiny() -> nn.Module:
    return _vit(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3)


def _vit(**sizes: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**sizes)


# ---- cases ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is timed; `build` makes it of the class EMPPruner, with what must be in place before and the masks of it."""

    what: str
    build: Callable[[Any], tuple[Contestant, Callable[[], dict[str, Tensor]]]]


def refresh_of(make: Callable[[], nn.Module], dtype: torch.dtype, settings: dict[str, Any], pruner_class: Any) -> Any:
    """Return the refresh of a model, older masks in place, which finds the same masks every time; and those masks."""
    torch.manual_seed(0)
    model = make().to(dtype)
    pruner = pruner_class(model, **settings)
    weights = [parameter.detach() for parameter in model.parameters()]
    dense = copy.deepcopy(weights)

    def restore() -> None:
        for weight, value in zip(weights, dense, strict=True):
            weight.copy_(value)

    # Elsewhere pruned values are behind the masks, or stay 0: writing them would be another thing to find out.
    prepare = restore if settings["mode"] == "project" else nothing
    return Contestant(pruner.refresh, prepare), lambda: pruner.masks


def step_of(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    optimizer_class: Any,
    settings: dict[str, Any],
    pruner_class: Any,
) -> Any:
    """Return a training step after the only refresh, and the masks of that."""
    torch.manual_seed(0)
    model = make()
    optimizer = optimizer_class(model.parameters(), lr=1e-4)
    pruner = pruner_class(model, optimizer, **settings, **AT_STEP_2)
    inputs, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])

    def step() -> None:
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    if not pruner.trajectory:
        raise RuntimeError("no refresh has made masks")
    return Contestant(step), lambda: pruner.masks


def refreshes() -> list[Case]:
    shapes = {"many small": small_layers, "vit tiny": vit_tiny, "one large": one_large}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    cases = []
    for shape, make in shapes.items():
        for scope in ("global", "tensor", "row"):
            for name, dtype in dtypes.items():
                how = {"scope": scope, "mode": "project"}
                cases.append(Case(f"{shape}, {scope}, {name}, project", partial(refresh_of, make, dtype, how)))
        for mode, how in (("feedback", {}), ("freeze", HALF)):
            build = partial(refresh_of, make, torch.float32, {"mode": mode, **how})
            cases.append(Case(f"{shape}, global, fp32, {mode}", build))
    for target in ("neurons", "heads"):
        for mode, how in (("feedback", {}), ("freeze", HALF), ("project", {})):
            how = {"target": target, "mode": mode, "criterion": "weight_norm", **how}
            cases.append(Case(f"vit tiny, {target}, {mode}", partial(refresh_of, vit_tiny, torch.float32, how)))
    return cases


def steps() -> list[Case]:
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "mlp": (mlp, (32, 256)),
        "small vit": (small_vit, (8, 3, 32, 32)),
    }
    optimizers = {"SGD": partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}
    settings = {mode: {"mode": mode} for mode in ("feedback", "freeze", "project")}
    settings |= {"features": {"target": "features"}}
    cases = []
    for model, (make, shape) in models.items():
        for optimizer, optimizer_class in optimizers.items():
            for name, how in settings.items():
                build = partial(step_of, make, shape, optimizer_class, how)
                cases.append(Case(f"{model}, {optimizer}, {name}", build))
    return cases


PARTS: dict[str, Callable[[], list[Case]]] = {"refresh": refreshes, "step": steps}


def measure(case: Case, before: ModuleType, seconds: float) -> dict[str, Any]:
    """Return the figures of one case: as many rounds as fit in so many seconds. Raises where the masks differ."""
    new, masks = case.build(emp_callbacks.EMPPruner)
    old, masks_before = case.build(before.EMPPruner)
    ways = {"new": new, "old": old}
    started = time.perf_counter()
    in_turn(ways, 2, 1)
    rounds = max(FEWEST, math.ceil(3 * seconds / (time.perf_counter() - started)))
    taken = in_turn(ways, rounds)
    _check_same(case.what, masks(), masks_before())
    median = {f"{name}_seconds": sorted(own)[len(own) // 2] for name, own in taken.items()}
    return {**ratio_of_medians(taken["new"], taken["old"]), "rounds": rounds, **median}


def _check_same(what: str, masks: dict[str, Tensor], masks_before: dict[str, Tensor]) -> None:
    if masks.keys() != masks_before.keys() or not all(torch.equal(masks[name], masks_before[name]) for name in masks):
        raise RuntimeError(f"{what}: the two revisions prune different weights")


# ---- command --------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("revision", help="git revision to compare with")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="refresh, step (default: both)")
    add("--match", default="", help="only cases whose name matches this regular expression")
    add("--seconds", type=float, default=5.0, help="for each case, both together (default: 5)")
    add("--quick", action="store_true", help="half a second for each case")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    add("--slower", type=float, default=1.02, help="ratio above which new is called slower (default: 1.02)")
    add("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    options = parse()
    check_this_checkout()
    torch.set_num_threads(options.threads)
    seconds = 0.5 if options.quick else options.seconds
    cases = [(part, case) for part in options.only for case in PARTS[part]() if re.search(options.match, case.what)]
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = import_revision(options.revision, Path(folder))
        for part, case in track(cases, "in turn"):
            figures[f"{part}: {case.what}"] = measure(case, before, seconds)
    table = Table("case", "new / old", "95 %", "slower", "old, ms", "rounds", title=f"beside {options.revision}")
    for what, own in figures.items():
        own["slower"] = own["low"] > options.slower
        interval, slower = f"{own['low']:.3f} to {own['high']:.3f}", "YES" if own["slower"] else ""
        ratio, milliseconds = f"{own['ratio']:.3f}", f"{own['old_seconds'] * 1e3:.3f}"
        table.add_row(what, ratio, interval, slower, milliseconds, str(own["rounds"]))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if options.out:
        record = {"revision": options.revision, "machine": machine(), "figures": figures}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
