"""What each target costs a training step of a GPT-2-architecture model, as a ratio to the same step without EMP.

    python benchmarks/bench_overhead.py --out benchmarks/results/overhead.json      # about 20 minutes on two cores

Two copies of one model train side by side in one process, one with EMP, and their steps are timed in turn; the ratio
is that of the medians, with a 95 % bootstrap interval over the pairs of steps. "between" is a step far from any
refresh, after the masks are in place; "gathering" is a step of the window before a refresh, in which evidence is
gathered; "refresh" is what the refresh itself takes, in steps. "torch prune" is the model under
torch.nn.utils.prune.global_unstructured on the same parameters at the same density, and nothing of ours; beside it and
the plain model a third copy trains with `freeze`. "forward + backward" leaves the optimizer's step out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import Contestant, in_turn, machine, ratio_of_medians
from torch import nn
from torch.nn.utils import prune

from emp_callbacks import EMPPruner

Row = dict[str, Any]

SETTINGS: dict[str, dict[str, Any]] = {
    "weights, freeze": {"mode": "freeze"},
    "weights, feedback": {},
    "weights, project": {"mode": "project"},
    "weights, taylor": {"criterion": "taylor"},
    "weights, taylor, certified": {"criterion": "taylor", "certify": True},
    "weights, wanda": {"criterion": "wanda", "scope": "row"},
    "weights, wanda, certified": {"criterion": "wanda", "scope": "row", "certify": True},
    "heads": {"target": "heads"},
    "heads, activation": {"target": "heads", "criterion": "activation"},
    "neurons": {"target": "neurons"},
    "neurons, taylor": {"target": "neurons", "criterion": "taylor"},
    "features": {"target": "features"},
    "features, taylor": {"target": "features", "criterion": "taylor"},
    "features, dynamic": {"target": "features", "dynamic": True},
    "attention edges": {"target": "attention_edges"},
}


TORCH_PRUNE = "torch prune"
FREEZE_BESIDE_IT = "weights, freeze / torch prune"
FORWARD_BACKWARD = "features, dynamic, forward + backward"

TARGETS = {
    "weights, freeze": 1.02,
    FREEZE_BESIDE_IT: 1.0,
    "weights, feedback": 1.05,
    "features": 1.03,
    FORWARD_BACKWARD: 1.5,
}

AT_STEP_2: dict[str, Any] = {"every_n_steps": 2, "stop": 2, "evidence_steps": 2}
WARM_UP = 3


class Training:
    """One model, its optimizer and the same batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_layer": options.layers, "n_head": 8, "n_embd": options.width, "n_positions": options.tokens}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        settings: dict[str, Any] = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, **sizes, **dropouts}
        self.model = GPT2LMHeadModel(GPT2Config(**settings))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(0, 256, (options.batch, options.tokens))

    def forward_backward(self) -> None:
        logits = self.model(input_ids=self.tokens, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()).backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class PrunedTraining(Training):
    """The same with EMP."""

    def __init__(self, options: argparse.Namespace, **settings: Any) -> None:
        super().__init__(options)
        self.pruner = EMPPruner(self.model, self.optimizer, **settings)

    def step(self) -> None:
        super().step()
        self.pruner.step()


class TorchPrunedTraining(Training):
    """The same under torch's reparametrisation: EMP's parameters, and its density."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        pruner = EMPPruner(self.model, observe_only=True)
        pruner.refresh()
        paths = [name.rpartition(".") for name in pruner.weight_masks]
        places = [(self.model.get_submodule(module), parameter) for module, _, parameter in paths]
        amount = 1 - pruner.density
        pruner.finalize()
        started = time.perf_counter()
        prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=amount)
        self.seconds_to_prune = time.perf_counter() - started
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)


def measure_setting(name: str, options: argparse.Namespace) -> dict[str, Row]:
    """Return the row of one setting of EMP."""
    settings, far = SETTINGS[name], 10**6
    plain, gathering = Training(options), PrunedTraining(options, **settings, every_n_steps=far, evidence_steps=far)
    seconds = steps_in_turn(options, plain=plain, emp=gathering)
    gathered = ratio_of_medians(seconds["emp"], seconds["plain"])
    plain, between = Training(options), PrunedTraining(options, **settings, **AT_STEP_2)
    seconds = steps_in_turn(options, plain=plain, emp=between)
    step = statistics.median(seconds["plain"])
    refresh = between.pruner.trajectory[-1].seconds / step
    ratio = ratio_of_medians(seconds["emp"], seconds["plain"])
    return {name: row(name, ratio, plain_seconds=step, gathering=gathered, refresh=refresh)}


def measure_torch_prune(options: argparse.Namespace) -> dict[str, Row]:
    """Return the row of torch's own pruning, and that of `freeze` beside it."""
    pruned = TorchPrunedTraining(options)
    freeze = PrunedTraining(options, **SETTINGS["weights, freeze"], **AT_STEP_2)
    seconds = steps_in_turn(options, plain=Training(options), pruned=pruned, freeze=freeze)
    step = statistics.median(seconds["plain"])
    refresh = pruned.seconds_to_prune / step
    own = ratio_of_medians(seconds["pruned"], seconds["plain"])
    beside = ratio_of_medians(seconds["freeze"], seconds["pruned"])
    return {
        TORCH_PRUNE: row(TORCH_PRUNE, own, plain_seconds=step, refresh=refresh),
        FREEZE_BESIDE_IT: row(FREEZE_BESIDE_IT, beside, plain_seconds=step),
    }


def measure_forward_backward(options: argparse.Namespace) -> dict[str, Row]:
    """Return the row of features that every sample chooses for itself, without the optimizer's step."""
    plain = Training(options)
    dynamic = PrunedTraining(options, **SETTINGS["features, dynamic"], **AT_STEP_2)
    for _ in range(2):
        dynamic.step()
    if not dynamic.pruner.trajectory:
        raise RuntimeError("no refresh has switched the masks on")
    trainings = {"plain": plain, "emp": dynamic}
    work = {name: Contestant(each.forward_backward, each.optimizer.zero_grad) for name, each in trainings.items()}
    seconds = in_turn(work, options.repeats, WARM_UP)
    ratio = ratio_of_medians(seconds["emp"], seconds["plain"])
    return {FORWARD_BACKWARD: row(FORWARD_BACKWARD, ratio, plain_seconds=statistics.median(seconds["plain"]))}


def steps_in_turn(options: argparse.Namespace, **trainings: Training) -> dict[str, list[float]]:
    return in_turn({name: Contestant(each.step) for name, each in trainings.items()}, options.repeats, WARM_UP)


def row(name: str, between: dict[str, float], **others: Any) -> Row:
    """Return the figures of one row beside its target; it is met where the ratio itself meets it."""
    target = TARGETS.get(name)
    met = None if target is None else between["ratio"] <= target
    return {"between": between, "target": target, "met": met, **others}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Row]]] = {
    **{name: partial(measure_setting, name) for name in SETTINGS},
    TORCH_PRUNE: measure_torch_prune,
    FORWARD_BACKWARD: measure_forward_backward,
}


def table_of(rows: dict[str, Row], weights: int) -> Table:
    heads = ("between", "95 %", "target", "met", "gathering", "95 %", "refresh, in steps")
    table = Table("setting", *heads, title=f"{weights:,} weights: step / step without")
    for name, each in rows.items():
        refresh = f"{each['refresh']:.3f}" if "refresh" in each else ""
        target = "" if each["target"] is None else f"<= {each['target']:g}"
        met = {None: "", True: "yes", False: "NO"}[each["met"]]
        table.add_row(name, *shown(each["between"]), target, met, *shown(each.get("gathering")), refresh)
    return table


def shown(ratio: dict[str, float] | None) -> tuple[str, str]:
    return (f"{ratio['ratio']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}") if ratio else ("", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--width", type=int, default=256, help="embedding width (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--repeats", type=int, default=40, help="timed steps of each model after three (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="SETTING", help="these rows alone")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, Row] = {}
    for name in track(options.only or MEASUREMENTS, "steps in turn"):
        rows |= MEASUREMENTS[name](options)
    weights = sum(p.numel() for p in Training(options).model.parameters())
    Console(width=None if sys.stdout.isatty() else 150).print(table_of(rows, weights))
    if options.out:
        sizes = {key: getattr(options, key) for key in ("layers", "width", "batch", "tokens", "repeats")}
        record = {"machine": machine(), "weights": weights, **sizes, "ratios": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
