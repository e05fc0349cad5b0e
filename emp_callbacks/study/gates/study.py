"""`emp gates`: do learned gates add anything to EMP's choice of heads, and does a count that follows the token?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.config import EMPConfig
from emp_callbacks.study.gates.arms import GATED, Case, cases_of
from emp_callbacks.study.gates.bench import Bench, bench_of
from emp_callbacks.study.gates.findings import page
from emp_callbacks.study.gates.gated import Gates, first_open
from emp_callbacks.study.gates.masking import FixedHeads, NoMask, Rescoring, hold
from emp_callbacks.study.gates.token_counts import VARIANTS, TokenCounts
from emp_callbacks.study.once.dense_models import DenseModel
from emp_callbacks.study.once.measuring import Cases, OnceStudy
from emp_callbacks.study.once.results import Row
from emp_callbacks.study.recipe.recipe import Recipe

__all__ = ["MARGIN", "gates_study"]

MARGIN = 0.005
"""Nats of test loss, half a percent of perplexity, within which arms count as alike: fixed before any run."""

BETAS = (0.5, 0.75, 1.0)
_DRAWS = 2
_PROBE = 8  # batches of validation text, for the course of the loss


def gates_study(*, steps: int = 300, evidence_batches: int = 32) -> OnceStudy:
    """Return the study.

    Args:
        steps: Optimizer steps by which every arm trains the model on, >= 10; gates learn for the first two thirds.
        evidence_batches: Training batches from which EMP scores the heads, >= 1.

    Raises:
        ValueError: An argument is invalid.
    """
    if steps < 10:
        raise ValueError(f"steps must be >= 10, got {steps}: a tenth of the steps lies between two prunings")
    EMPConfig(evidence_steps=evidence_batches)
    settings = {
        "steps": steps,
        "gated_steps": 2 * steps // 3,
        "gate_lr": 0.1,
        "gate_warmup": steps // 3,
        "lr_share": 1 / 3,
        "evidence_batches": evidence_batches,
        "draws": _DRAWS,
        "margin": MARGIN,
        "betas": list(BETAS),
    }
    return OnceStudy(
        command="gates", settings=settings, measure=measure, page=page, check=_any, check_recipe=check_recipe
    )


def _any(recipe: EMPConfig, settings: Mapping[str, Any]) -> None:
    """Take what a recipe prunes, which does not matter here."""


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError unless a recipe trains a language model for so many steps, one batch each."""
    resolved = recipe.resolved()
    trainer, model = resolved["trainer"], resolved["model"]["class_path"]
    if not model.endswith(".LanguageModel"):
        raise ValueError(f"emp gates is about language models, and {recipe.called} has {model}; use LanguageModel")
    if recipe.study.metric != "test/loss":
        raise ValueError(f"emp gates compares losses in nats: set study.metric to test/loss, not {recipe.study.metric}")
    if trainer["max_steps"] < 1 or trainer["accumulate_grad_batches"] != 1:
        raise ValueError(
            "emp gates goes on with the batches that follow those of the recipe's training: set trainer.max_steps, and "
            f"accumulate_grad_batches to 1 (got {trainer['max_steps']}, {trainer['accumulate_grad_batches']})"
        )


def measure(dense: DenseModel, settings: Mapping[str, Any], cases: Cases) -> list[Row]:
    """Return a row about the model, one for each arm and budget, and one for each way of counting heads by token."""
    with bench_of(dense, settings) as bench:
        budgets = bench.emp_keep, max(1, bench.n // 4)
        if bench.emp_keep == bench.n:
            raise ValueError(f"EMP keeps all {bench.n} heads of seed {dense.seed}: there is nothing to gate")
        named: dict[str, Callable[[], list[Row]]] = {"the model": lambda: [_model(bench)]}
        for case in cases_of(bench.n, budgets, settings["draws"]):
            named[case.name] = lambda case=case: [_arm(bench, case)]  # type: ignore[misc]
        for beta in settings["betas"]:
            named[f"heads by token, beta {beta:g}"] = lambda beta=beta: _by_token(bench, beta)  # type: ignore[misc]
        rows: list[Row] = []
        for done, (name, make) in enumerate(named.items()):
            cases(done, len(named))
            rows += cases.rows(name, make)
    return rows


def _model(bench: Bench) -> Row:
    bench.reset()
    return {
        "kind": "model",
        "n": bench.n,
        "heads": list(bench.heads.values()),
        "n_eff": bench.n_eff,
        "keep": bench.emp_keep,
        "scores": bench.flat(bench.scores).tolist(),
        "val_loss": bench.loss("val"),
        "test_loss": bench.loss("test"),
    }


def _arm(bench: Bench, case: Case) -> Row:
    """Return what an arm makes of the model within its budget."""
    started = time.perf_counter()
    bench.reset()
    told: Row = {}
    if case.arm == "A":
        pruner = hold(bench, None, bench.highest(bench.scores, case.keep))
        kept = pruner.masks
        pruner.finalize()
    else:
        masking, curve = _masking(bench, case), []
        optimizer = bench.optimizer()
        masking.begin(optimizer)
        every = max(1, bench.settings["steps"] // 6)

        def after_step(step: int) -> None:
            masking.after_step(step)
            if step % every == 0:
                curve.append([step, bench.loss("val", _PROBE)])

        bench.train(optimizer, after_step)
        kept = masking.finish()
        told = {"curve": curve, "gated_steps": bench.settings["gated_steps"], **masking.told()}
    at = bench.flat(kept).nonzero().flatten().tolist()
    if len(at) != case.keep:
        raise RuntimeError(f"{case.name}: {len(at)} heads are kept, not {case.keep}")
    return {
        "kind": "arm",
        **case._asdict(),
        "kept": at,
        "val_loss": bench.loss("val"),
        "test_loss": bench.loss("test"),
        **told,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _masking(bench: Bench, case: Case) -> NoMask:
    if case.arm in GATED:
        gates, init = GATED[case.arm]
        return Gates(bench, case.keep, gates, first_open(bench, case.keep, init))
    if case.arm == "C":
        return Rescoring(bench, case.keep)
    if case.arm == "Z":
        return NoMask(bench)
    return FixedHeads(bench, bench.highest(bench.scores if case.arm == "B" else _random(bench, case), case.keep))


def _random(bench: Bench, case: Case) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * bench.dense.seed + case.draw)
    return bench.split(torch.rand(bench.n, generator=generator, dtype=torch.float64))


def _by_token(bench: Bench, beta: float) -> list[Row]:
    """Return one row for each way of choosing how many heads a token keeps."""
    started = time.perf_counter()
    bench.reset()
    counts = TokenCounts(bench, beta)
    rows = [{"kind": "by_token", "beta": beta, "variant": variant, **counts.measure(variant)} for variant in VARIANTS]
    return [{**row, "seconds": round((time.perf_counter() - started) / len(rows), 1)} for row in rows]
