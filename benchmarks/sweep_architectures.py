"""Prune the architectures of timm and transformers at tiny sizes: what is found, and whether every promise holds.

    python benchmarks/sweep_architectures.py --out benchmarks/results/architectures.json --table docs/architectures.md
    python benchmarks/sweep_architectures.py --families "timm/vit*" "*/gpt2" --targets heads
    python benchmarks/sweep_architectures.py --show AFTER.json --compare BEFORE.json    # nothing runs

Every family is trained three steps with each target and criterion, with a refresh after each step. Held to: the loss is
finite; a weight is 0 where its mask says so; the masks keep as many as the row of the refresh says; the audit is clean.
Then the heads, neurons and experts that were pruned are removed, and the smaller model is compared with the masked one
on another batch. What the package refuses with a ValueError or NotImplementedError is written down in its words. Any
other exception, and any promise that does not hold, is a FAULT: it is named, and the exit status is 1.

Untrained models have units that are all alike and gradients that are not: units are pruned to 0.7 N_eff, and every
group keeps at least 0.3, so that the signal passes. Weights compete within layers by "taylor", in rows by "wanda".
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES, Batch, Family
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from emp_callbacks import EMPPruner
from emp_callbacks.config import TARGETS
from emp_callbacks.criteria import DEFAULT_CRITERIA, fitting_criteria
from emp_callbacks.pruning.signatures import SAID_OF_A_REFRESH
from emp_callbacks.shrinking import shrink

Row = dict[str, Any]

STEPS = 3
UNITS = ("heads", "neurons", "experts")
CRITERIA = {
    "weights": ("magnitude", "taylor", "wanda"),
    "heads": ("weight_norm", "taylor", "activation"),
    "neurons": ("weight_norm", "taylor", "activation"),
    "experts": ("", "taylor"),  # "": the target's default
}
BETA = {"weights": 1.0, "heads": 0.7, "neurons": 0.7, "experts": 0.7}
SCOPES = {("weights", "taylor"): "tensor", ("weights", "wanda"): "row"}  # else the target's default
MIN_DENSITY = 0.3
TOLERANCE = 1e-4  # of what is left after shrinking, relative to the largest output
SHORT = 200  # characters of a message that are kept


class BrokenPromiseError(Exception):
    """What the package says does not hold."""


# ---- one family, target and criterion -------------------------------------------------------------------------------


class Trial:
    """One model in training with one target and criterion.

    Attributes:
        told: The package's own warnings.
    """

    def __init__(self, family: Family, target: str, criterion: str) -> None:
        torch.manual_seed(0)
        self.family, self.target = family, target
        self.model = stirred(family.build()).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        settings = {"scope": SCOPES.get((target, criterion)), "beta": BETA[target], "min_density": MIN_DENSITY}
        self.told: list[str] = []
        with warnings.catch_warnings(record=True) as self._caught:
            warnings.simplefilter("always")
            try:
                self.pruner = EMPPruner(
                    self.model, self.optimizer, target=target, criterion=criterion, every_n_steps=1, **settings
                )
                for _ in range(STEPS):
                    self.step()
                self.pruner.finalize()
                self.check()
            finally:
                self.told = ours(self._caught)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, self.family.batch())
        if not loss.isfinite():
            raise BrokenPromiseError(f"the loss is {loss.item()} at step {self.pruner.steps}")
        loss.backward()
        self.optimizer.step()
        if not self.pruner.step():
            late = [line for line in ours(self._caught) if "refresh" in line]
            raise NotImplementedError(late[-1]) if late else BrokenPromiseError("no refresh, and no word of it")
        self.check()

    def check(self) -> None:
        """Raise where the masks, the rows and the weights do not agree."""
        masks, parameters = self.pruner.masks, dict(self.model.named_parameters(remove_duplicate=False))
        for name, mask in self.pruner.weight_masks.items():
            if wrong := int((parameters[name].detach()[~mask] != 0).sum()):
                raise BrokenPromiseError(f"{wrong} pruned weights of {name} are not 0")
        for layer in self.pruner.layers:
            if (kept := int(masks[layer.name].sum())) != layer.keep:
                raise BrokenPromiseError(f"the mask of {layer.name} keeps {kept}, its row says {layer.keep}")
        rows = sum(event.keep for event in self.pruner.last_events)
        scored = {layer.name for layer in self.pruner.layers}  # a layer that nothing reached keeps its mask
        if (kept := sum(int(masks[name].sum()) for name in scored)) != rows:
            raise BrokenPromiseError(f"the masks keep {kept}, the rows say {rows}")
        if not (audit := self.pruner.audit()).clean:
            raise BrokenPromiseError(f"the audit is not clean: {audit}")

    def found(self) -> Row:
        masks = self.pruner.masks.values()
        return {"layers": len(masks), "units": sum(mask.numel() for mask in masks)}

    def left_out(self) -> dict[str, float]:
        """Return the share of the model's weights that is not pruned, by reason."""
        shares: Counter[str] = Counter()
        for one in self.pruner.left_out:
            shares[one.reason] += one.size
        total = sum(p.numel() for p in self.model.parameters())
        return {reason: round(size / total, 4) for reason, size in shares.most_common()}

    def shrunk(self) -> Row:
        """Remove what is pruned; return what was removed, what stayed and why, and the largest relative difference."""
        masks = {name: mask for name, mask in self.pruner.masks.items() if not mask.all()}
        if not masks:
            return {"pruned": 0, "removed": 0}
        first, second = self.family.batch(), self.family.batch()
        before = outputs(self.model, second)
        args, kwargs = call_of(first)
        try:
            report = shrink(self.model, self.pruner.masks, args, kwargs)
        except (ValueError, NotImplementedError) as error:
            if not same(before, outputs(self.model, second)):
                raise BrokenPromiseError("a refused shrink changed the model") from error
            return {"pruned": sum(int((~mask).sum()) for mask in masks.values()), "refused": short(error)}
        # Without an expert the router chooses others: only shrink itself can keep the masked model from choosing it.
        is_comparable = self.target != "experts"
        difference = largest_difference(before, outputs(self.model, second)) if is_comparable else report.difference
        if not difference <= TOLERANCE:
            raise BrokenPromiseError(f"the shrunk model differs by {difference:.2g} of the largest output")
        stays: Counter[str] = Counter()
        for layer in report.layers:
            if layer.removed < layer.pruned:
                stays[in_general(getattr(layer, "reason", ""))] += layer.pruned - layer.removed
        return {
            "pruned": sum(layer.pruned for layer in report.layers),
            "removed": sum(layer.removed for layer in report.layers),
            "parameters": list(report.parameters),
            "difference": float(f"{difference:.1g}"),
            **({"stays": dict(stays)} if stays else {}),
        }


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """Move every constant parameter: biases of 0, scales of 1 or 1e-6, behind which a wrong cut could hide."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.empty_like(parameter).uniform_(0.1, 0.4))
    return model


def call_of(batch: Batch) -> tuple[tuple[Tensor, ...], Batch]:
    return ((batch["x"],), {}) if "x" in batch else ((), batch)


def floats(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor) and held.is_floating_point():
        yield held
    elif isinstance(held, (Mapping, list, tuple)):
        for value in held.values() if isinstance(held, Mapping) else held:
            yield from floats(value)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared distance of everything the model gives from random targets."""
    args, kwargs = call_of(batch)
    return torch.stack([(out - torch.randn_like(out)).square().mean() for out in floats(model(*args, **kwargs))]).sum()


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    args, kwargs = call_of(batch)
    training = model.training
    found = list(floats(model.eval()(*args, **kwargs)))
    model.train(training)
    return found


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max(
        float((old - new).abs().max()) / (float(old.abs().max()) or 1.0) for old, new in zip(before, after, strict=True)
    )


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what this package warned of, at the line that called it, which is here; not that tiny models are tiny."""
    texts = [short(one.message) for one in caught if one.filename == __file__]
    return list(dict.fromkeys(text for text in texts if not re.match(SAID_OF_A_REFRESH, text)))


def in_general(reason: str) -> str:
    """Return a reason without the names of modules and the words of torch's own errors; "not told" of none."""
    text = re.sub(r"'[^']*' \((\w+)\)", r"a \1", reason)
    text = re.sub(r"\((\w+Error)\b.*\)", r"(\1)", re.sub(r"'[^']*'", "'...'", text))
    return short("; ".join(dict.fromkeys(re.split(r"; |, (?=joined)", text)))) if reason else "not told"


def short(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= SHORT else text[: SHORT - 3] + "..."


# ---- all criteria of a family and target ----------------------------------------------------------------------------


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; 0: never."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_target(family: Family, target: str, criteria: list[str], limit: float = 0) -> Row:
    """Return the cell of one family and target.

    It holds "layers" and "units", "kept" by criterion, "left_out" of weights, "shrink" of units, and "told"; or "none",
    why nothing is found. Where something is wrong it has "faults", by criterion.
    """
    cell: Row = {}
    for criterion in criteria:
        try:
            with limited(limit):
                cell |= run_trial(family, target, criterion, cell, is_first=criterion == criteria[0])
        except (ValueError, NotImplementedError) as error:
            cell.setdefault("refused", {})[criterion] = short(error)
        except Exception as error:  # the sweep goes on, and ends with status 1
            cell.setdefault("faults", {})[criterion] = fault(error)
        gc.collect()
    refused = cell.get("refused", {})
    if len(refused) == len(criteria) and len(set(refused.values())) == 1:
        del cell["refused"]
        cell["none"] = next(iter(refused.values())).partition(":")[0]
    return {key: value for key, value in cell.items() if value != []}


def run_trial(family: Family, target: str, criterion: str, cell: Row, *, is_first: bool) -> Row:
    """Return what one criterion adds to the cell; the first also says what is left out, and is shrunk."""
    trial = Trial(family, target, criterion)
    kept = sum(int(mask.sum()) for mask in trial.pruner.masks.values())
    told = list(dict.fromkeys([*cell.get("told", ()), *trial.told]))
    added = {**trial.found(), "kept": {**cell.get("kept", {}), criterion: kept}, "told": told}
    if not is_first:
        return added
    return {**added, **({"left_out": trial.left_out()} if target == "weights" else {"shrink": trial.shrunk()})}


def fault(error: Exception) -> str:
    """Return the error, and the last line of this package that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "emp_callbacks" in frame.filename]
    name = "" if isinstance(error, BrokenPromiseError) else f"{type(error).__name__}: "
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{name}{short(error)}{where}"


def criteria_of(target: str, wanted: list[str] | None = None) -> list[str]:
    named = [criterion or DEFAULT_CRITERIA[target] for criterion in CRITERIA[target]]
    fitting = [criterion for criterion in named if criterion in fitting_criteria(target)]
    return [criterion for criterion in fitting if wanted is None or criterion in wanted]


def run_family(name: str, targets: list[str], criteria: list[str] | None = None, limit: float = 0) -> Row:
    """Return the row of a family: its parameters, seconds, and one cell for each target."""
    started = time.perf_counter()
    family = FAMILIES[name]
    row: Row = {"parameters": sum(p.numel() for p in family.build().parameters())}
    for target in targets:
        if chosen := criteria_of(target, criteria):
            row[target] = run_target(family, target, chosen, limit)
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


# ---- what is shown --------------------------------------------------------------------------------------------------


def faults_of(rows: Mapping[str, Row]) -> Iterator[tuple[str, str, str, str]]:
    for family, row in rows.items():
        for target in TARGETS:
            for criterion, why in row.get(target, {}).get("faults", {}).items():
                yield family, target, criterion, why


def summary(rows: Mapping[str, Row]) -> dict[str, int]:
    """Return of how many families each thing is true."""
    cells = {target: [row[target] for row in rows.values() if target in row] for target in ("weights", *UNITS)}
    counts = {f"families with {target} found": sum("layers" in cell for cell in cells[target]) for target in cells}
    for target in UNITS:
        shrunk = [cell["shrink"] for cell in cells[target] if "shrink" in cell]
        counts[f"shrinks of {target} that removed something"] = sum(bool(one.get("removed")) for one in shrunk)
        counts[f"shrinks of {target} that removed all that is pruned"] = sum(
            bool(one.get("removed")) and one["removed"] == one["pruned"] for one in shrunk
        )
        counts[f"shrinks of {target} refused"] = sum("refused" in one for one in shrunk)
        counts[f"shrinks of {target} in which something stays only since the forward fails without it"] = sum(
            any("needs them" in why or "does not run" in why for why in (*one.get("stays", ()), one.get("refused", "")))
            for one in shrunk
        )
    return {"families": len(rows), **counts, "faults": sum(1 for _ in faults_of(rows))}


def comparison(rows: Mapping[str, Row], before: Mapping[str, Row] | None) -> Table:
    """Return the summary, beside that of the same families before."""
    table = Table("", *(["before"] if before is not None else []), "now" if before is not None else "")
    now = summary(rows)
    then = summary({name: row for name, row in (before or {}).items() if name in rows})
    for what, count in now.items():
        table.add_row(what, *([str(then[what])] if before is not None else []), str(count))
    return table


LEGEND = """# Architectures

What EMP finds in {families} families of timm {timm} and transformers {transformers} at tiny sizes, made by

    {command}

Each was trained three steps with every target and criterion ({criteria}), with a refresh after each step. Unless
a cell says FAULT, the loss was finite, pruned weights were 0 after every step, the masks kept what the rows say and the
audit was clean; and a model whose pruned heads, neurons or experts were removed gave on another batch what
the masked one gave, to {tolerance:g} of its largest output (without experts: what it gave where its routers never chose
them). `tests/test_architecture_sweep.py` runs a sample again.

| column | what it says |
|---|---|
| weights left out | share of a model's weights that are not pruned, and why; less biases, norms, embeddings |
| heads, neurons, experts | layers / units that are found; "none" where a ValueError says that there are none |
| shrink | units removed of those pruned (to 0.7 N_eff); what stayed and why; what was refused |
| told | what the package warned of |

{summary}
"""


def page_of(record: Row) -> str:
    """Return the page for docs/ of a results file."""
    rows = record["families"]
    tested = "; ".join(f"{target}: {', '.join(criteria)}" for target, criteria in record["criteria"].items())
    lines = ["| | families |", "|---|---|", *(f"| {what} | {count} |" for what, count in summary(rows).items())]
    head = LEGEND.format(
        families=len(rows),
        **{key: record["versions"][key] for key in ("timm", "transformers")},
        command="python benchmarks/sweep_architectures.py --out benchmarks/results/architectures.json "
        "--table docs/architectures.md",
        criteria=tested,
        tolerance=TOLERANCE,
        summary="\n".join(lines),
    )
    return head + "\n" + "\n".join(markdown(rows)) + "\n"


def markdown(rows: Mapping[str, Row]) -> Iterator[str]:
    heads = ("family", "weights left out", *UNITS, "shrink", "told")
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for family, row in rows.items():
        cells = [family, shares(row.get("weights", {})), *(found(row.get(target)) for target in UNITS)]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in (*cells, shrinks(row), told(row)))} |"


EXPECTED = ("a vector: bias, norm or scale", "a norm or an embedding, or tied to one")


def shares(cell: Row) -> str:
    listed = [f"{share:.1%} {why}" for why, share in cell.get("left_out", {}).items() if why not in EXPECTED]
    listed += [f"{criterion}: {why}" for criterion, why in cell.get("refused", {}).items()]
    return "; ".join([*listed, *faults_in(cell)])


def found(cell: Row | None) -> str:
    if cell is None:
        return ""
    listed = [f"{cell['layers']} / {cell['units']}"] if "layers" in cell else ["none"] if "none" in cell else []
    listed += [f"{criterion}: {why}" for criterion, why in cell.get("refused", {}).items()]
    return "; ".join([*listed, *faults_in(cell)])


def faults_in(cell: Row) -> list[str]:
    return [f"FAULT, {criterion}: {why}" for criterion, why in cell.get("faults", {}).items()]


def shrinks(row: Row) -> str:
    listed = []
    for target in UNITS:
        one = row.get(target, {}).get("shrink")
        if not one or not one["pruned"]:
            continue
        if "refused" in one:
            listed.append(f"{target} refused: {one['refused']}")
            continue
        why = ", ".join(f"{count} stay: {reason}" for reason, count in one.get("stays", {}).items())
        listed.append(f"{target} {one['removed']} of {one['pruned']}{f' ({why})' if why else ''}")
    return "; ".join(listed)


def told(row: Row) -> str:
    return "; ".join(dict.fromkeys(line for target in CRITERIA for line in row.get(target, {}).get("told", ())))


# ---- the command ----------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--families", nargs="+", metavar="PATTERN", default=["*"], help='these alone, as "timm/vit*" (default: all)')
    add("--targets", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="these alone (default: all)")
    add("--criteria", nargs="+", metavar="NAME", help="these alone, of those that the sweep knows for the target")
    add("--out", type=Path, metavar="FILE", help="JSON file for the results; families in it that do not run stay")
    add("--table", type=Path, metavar="FILE", help="Markdown page of the results")
    add("--show", type=Path, metavar="FILE", help="read these results instead of running anything")
    add("--compare", type=Path, metavar="FILE", help="print the summary beside that of these earlier results")
    add("--limit", type=float, default=120, help="seconds of a family, target and criterion; more is a fault (120)")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    return parser.parse_args()


def versions() -> dict[str, str]:
    import timm
    import transformers

    return {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}


def run(options: argparse.Namespace, console: Console) -> Row:
    """Return the record of all rows asked for, and of those that the file for the results holds already."""
    targets = [target for target in options.targets if target in TARGETS]
    for target in set(options.targets) - set(targets):
        console.print(f"skipped: this version has no target {target!r}")
    names = [name for name in FAMILIES if any(fnmatch.fnmatch(name, pattern) for pattern in options.families)]
    if not names:
        raise SystemExit(f"no family matches {options.families}; they are {', '.join(FAMILIES)}")
    held = json.loads(options.out.read_text())["families"] if options.out and options.out.exists() else {}
    for name in track(names, "families", console=console):
        row = run_family(name, targets, options.criteria, options.limit)
        held[name] = {**held.get(name, {}), **row}
        for _, target, criterion, why in faults_of({name: row}):
            console.print(escape(f"FAULT {name}, {target}, {criterion}: {why}"))
        if options.out:
            write(options.out, record_of(held, targets))
    return record_of(held, targets)


def record_of(rows: Mapping[str, Row], targets: list[str]) -> Row:
    order = {name: rows[name] for name in FAMILIES if name in rows}
    return {"versions": versions(), "criteria": {target: criteria_of(target) for target in targets}, "families": order}


def write(path: Path, record: Row) -> None:
    """Write a record, a line for each family."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in record["families"].items())
    rest = json.dumps({key: value for key, value in record.items() if key != "families"})
    path.write_text(f'{rest[:-1]}, "families": {{\n{rows}\n}}}}\n')


def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    record = json.loads(options.show.read_text()) if options.show else run(options, console)
    if options.table:
        options.table.write_text(page_of(record))
    before = json.loads(options.compare.read_text())["families"] if options.compare else None
    console.print(comparison(record["families"], before))
    return int(any(faults_of(record["families"])))


if __name__ == "__main__":
    sys.exit(main())
