"""The EMP paper's table of language models for one folder, with the rows that the paper lacks.

    python benchmarks/llm_table.py FOLDER --calibration train.txt --test test.txt --out runs/llm

Rows: dense; magnitude and Wanda within output rows, at 50 % and at N_eff (beta = 1), as in the paper; both at one fixed
density, equal to what EMP-magnitude and EMP-Wanda came to; magnitude over the whole network at EMP-magnitude's density.
Each for the MLP alone, as in the paper, and for all linear layers; Wanda's inputs from one pass of the dense model, as
in the paper (`one pass`), and from blocks behind pruned ones, as Wanda itself has it (`sequential`).

Prunes and measures block by block, as `emp prune` and `emp perplexity` do. A row that stands in OUT/llm_table.json is
not computed again. Writes OUT/llm_table.json, .md and .png; one pruned folder lies in OUT at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.config import EMPConfig
from emp_callbacks.folders.measuring import measure_perplexity
from emp_callbacks.folders.perplexity import perplexity_windows
from emp_callbacks.folders.pruning import prune_folder
from emp_callbacks.folders.samples import text_samples
from emp_callbacks.folders.skeleton import Skeleton, configuration_of

PARTS: dict[str, list[str] | None] = {"MLP only": ["*.mlp.*"], "all linear layers": None}
ORDERS = {"one pass": "dense", "sequential": "sequential"}
NO_ORDER = "-"  # magnitude reads no data
HALF = 0.5
DENSE = "dense"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        part: Which layers, of PARTS.
        criterion: Of `emp prune`.
        order: Of ORDERS, or NO_ORDER.
        scope: Of `emp prune`.
        keep: "N_eff", a density, or the criterion at whose density by N_eff this one prunes.
    """

    part: str
    criterion: str
    order: str
    scope: str
    keep: str | float

    @property
    def name(self) -> str:
        """What the row is called, once in the table."""
        scope = "" if self.scope == "row" else f", {self.scope}"
        return f"{self.part}: {self.criterion}{scope}, {self.order}, {kept_as(self.keep)}"


def kept_as(keep: str | float) -> str:
    """Return in words what said how many weights stay."""
    if keep == HALF:
        return "50 %"
    return str(keep) if keep == "N_eff" else f"as EMP-{keep}"


def arms(parts: Sequence[str]) -> Iterator[Arm]:
    """Yield the rows, those first whose density others take."""
    keeps = (HALF, "magnitude", "wanda")
    for part in parts:
        yield Arm(part, "magnitude", NO_ORDER, "row", "N_eff")
        yield from (Arm(part, "wanda", order, "row", "N_eff") for order in ORDERS)
        yield from (Arm(part, "magnitude", NO_ORDER, "row", keep) for keep in keeps)
        yield from (Arm(part, "wanda", order, "row", keep) for order in ORDERS for keep in keeps)
        yield Arm(part, "magnitude", NO_ORDER, "global", "magnitude")


def main(words: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing, then write table and picture."""
    options = parsed(words)
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(options.out / "llm_table.json", settings_of(options))
    planned = [None, *arms(options.parts)]
    for number, arm in enumerate(planned, start=1):
        name = arm.name if arm else DENSE
        if name not in table.rows:
            table.add(name, pruned_row(arm, table, options) if arm else measured(options.folder, options))
        row = table.rows[name]
        print(
            f"[{number}/{len(planned)}] {name}: density {row['density']:.4f}, perplexity {row['perplexity']:.4g}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    (options.out / "llm_table.md").write_text(markdown(table.rows))
    draw(table.rows, options.parts).savefig(options.out / "llm_table.png")
    print(markdown(table.rows))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face folder of a language model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="text that Wanda reads")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="text that perplexity is of")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences (128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a calibration sequence (2048)")
    parser.add_argument("--test-length", type=int, help="tokens of a test window (as --length)")
    parser.add_argument(
        "--first", action="store_true", help="the first windows of the text, as the paper has, not random"
    )
    parser.add_argument("--device", type=torch.device, help="where the model computes, such as cuda (cpu)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which layers (both)")
    options = parser.parse_args(words)
    options.test_length = options.test_length or options.length
    return options


# ---- one row --------------------------------------------------------------------------------------------------------


def pruned_row(arm: Arm, table: Table, options: argparse.Namespace) -> Row:
    """Prune as a row says, measure, and delete what was pruned."""
    started, out = time.perf_counter(), options.out / "pruned"
    budget = {} if arm.keep == "N_eff" else {"density": density_for(arm, table)}
    config = EMPConfig(every_n_steps=1).once(
        criterion=arm.criterion, scope=arm.scope, include=PARTS[arm.part], **budget
    )
    samples = None
    if arm.order != NO_ORDER:
        samples = text_samples(
            options.folder,
            configuration_of(options.folder),
            options.calibration,
            count=options.samples,
            length=options.length,
            first=options.first,
        )
    order = ORDERS.get(arm.order, "dense")
    report = prune_folder(options.folder, out, config, samples=samples, order=order, device=options.device)
    n_eff = sum(layer.n_eff for layer in report.rows) / sum(layer.n for layer in report.rows)
    row = {**asdict(arm), "n_eff_fraction": n_eff, **measured(out, options), **kept_in(options.folder, out)}
    shutil.rmtree(out)
    return {**row, "seconds": time.perf_counter() - started}


def density_for(arm: Arm, table: Table) -> float:
    """Return a given density, or that of EMP by a criterion, in its own order of calibration, else the first."""
    if isinstance(arm.keep, float):
        return arm.keep
    order = NO_ORDER if arm.keep == "magnitude" else next(iter(ORDERS)) if arm.order == NO_ORDER else arm.order
    return float(table.rows[Arm(arm.part, arm.keep, order, "row", "N_eff").name]["density"])


def measured(folder: Path, options: argparse.Namespace) -> Row:
    """Return the perplexity of a folder on the test text."""
    skeleton = Skeleton(folder, device=options.device)
    windows = perplexity_windows(folder, skeleton.config, options.test, length=options.test_length)
    found = measure_perplexity(skeleton, windows)
    return {"density": 1.0, "perplexity": found.value, "tokens": found.tokens, "seconds": found.seconds}


def kept_in(dense: Path, pruned: Path) -> Row:
    """Return what is left of the tensors that pruning changed, from the files themselves.

    Raises:
        ValueError: Nothing was pruned, or a weight that stayed has another value.
    """
    before, after = FolderFiles(dense), FolderFiles(pruned)
    n = kept = 0
    for name in before.names:
        old, new = before.read(name), after.read(name)
        if old.equal(new):
            continue
        if not old[new != 0].equal(new[new != 0]):
            raise ValueError(f"{name} of {pruned} holds weights that are neither 0 nor those of {dense}")
        n, kept = n + new.numel(), kept + int(new.count_nonzero())
    if not n:
        raise ValueError(f"{pruned} holds the weights of {dense}: nothing was pruned")
    return {"n": n, "kept": kept, "density": kept / n}


# ---- the table ------------------------------------------------------------------------------------------------------


class Table:
    """Rows by name in a JSON file, which is whole at any moment.

    Raises:
        ValueError: The file holds rows of other texts, another folder, or other lengths.
    """

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[str, Row] = {}
        if path.exists():
            told = json.loads(path.read_text())
            differing = [name for name in settings if told["settings"].get(name) != settings[name]]
            if differing:
                raise ValueError(f"{path} was made with another {', '.join(differing)}; name another --out")
            self.rows = told["rows"]

    def add(self, name: str, row: Row) -> None:
        """Take a row and write the file."""
        self.rows[name] = row
        text = json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n"
        part = self.path.with_suffix(".part")
        part.write_text(text)
        os.replace(part, self.path)


def settings_of(options: argparse.Namespace) -> Row:
    """Return what rows of one table have in common; texts by their digests, weights by names, sizes and config."""
    infos = FolderFiles(options.folder).infos
    model = json.dumps({name: [str(info.dtype), info.shape] for name, info in infos.items()}, sort_keys=True)
    config = (options.folder / "config.json").read_bytes()
    return {
        "folder": hashlib.sha256(config + model.encode()).hexdigest(),
        "calibration": hashlib.sha256(options.calibration.read_bytes()).hexdigest(),
        "test": hashlib.sha256(options.test.read_bytes()).hexdigest(),
        "samples": options.samples,
        "first": options.first,
        "length": options.length,
        "test_length": options.test_length,
    }


def markdown(rows: dict[str, Row]) -> str:
    """Return the rows in Markdown."""
    head = ("layers", "criterion", "scope", "inputs", "kept", "N_eff / N", "density", "perplexity", "change from dense")
    dense = rows[DENSE]["perplexity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", f"| | dense | | | | | 1 | {dense:.4g} | |"]
    for row in rows.values():
        if row is rows[DENSE]:
            continue
        change = row["perplexity"] - dense
        cells = [row["part"], row["criterion"], row["scope"], row["order"], kept_as(row["keep"])]
        cells += [
            f"{row['n_eff_fraction']:.4f}",
            f"{row['density']:.4f}",
            f"{row['perplexity']:.4g}",
            f"{change:+.3g} ({change / dense:+.1%})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, Row], parts: Sequence[str]) -> Figure:
    """Draw perplexity against density: lines of fixed densities, stars where N_eff itself chose."""
    figure = Figure(figsize=(5.2 * len(parts), 4.6), dpi=150, layout="constrained")
    looks = {("magnitude", NO_ORDER): ("tab:blue", "o"), ("wanda", "one pass"): ("tab:orange", "s")}
    looks[("wanda", "sequential")] = ("tab:green", "^")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        for (criterion, order), (color, marker) in looks.items():
            mine = [row for row in rows.values() if (row.get("part"), row.get("criterion")) == (part, criterion)]
            mine = [row for row in mine if row["order"] == order]
            label = criterion if order == NO_ORDER else f"{criterion}, {order}"
            fixed = sorted(
                (r["density"], r["perplexity"]) for r in mine if r["keep"] != "N_eff" and r["scope"] == "row"
            )
            chosen = [(r["density"], r["perplexity"]) for r in mine if r["keep"] == "N_eff"]
            wide = [(r["density"], r["perplexity"]) for r in mine if r["scope"] == "global"]
            axis.plot(*zip(*fixed, strict=True), color=color, marker=marker, label=f"{label}, fixed density")
            axis.plot(*zip(*chosen, strict=True), "*", color=color, markersize=15, mec="black", label=f"EMP-{label}")
            if wide:
                axis.plot(*zip(*wide, strict=True), "D", color=color, mfc="none", label=f"{label}, whole network")
        axis.axhline(rows[DENSE]["perplexity"], color="black", linewidth=1, label=DENSE)
        axis.set_title(part, fontsize=11, fontweight="bold", loc="left")
        axis.set_xlabel("density of these layers")
        axis.set_ylabel("perplexity")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


if __name__ == "__main__":
    main()
