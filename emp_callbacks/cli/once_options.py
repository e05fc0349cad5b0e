"""The options of the studies on trained models."""

from __future__ import annotations

import argparse

from emp_callbacks.cli.new_parser import RECIPE, new_parser

__all__ = ["criteria_parser", "gates_parser", "sweep_parser", "violations_parser"]


def sweep_parser() -> argparse.ArgumentParser:
    """Return the options of `emp sweep-beta`."""
    parser = new_parser(
        "sweep-beta",
        "Train each recipe densely and prune it once by EMP for several beta: is beta = 1 where the metric falls?",
        f"""\
examples:
  emp sweep-beta --config paper/fc2 paper/kan paper/gpt
  emp sweep-beta --config paper/gpt --target heads --out runs/sweep_heads
  emp sweep-beta --config quickstart --seeds 0 --betas 0.5 1 2 --trainer.max_epochs 1
{_ONCE_HELP}""",
    )
    _add_once(parser, "sweep_beta")
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA", help="default: 0.5 0.75 1 1.25 1.5 2")
    parser.add_argument("--target", help="weights, heads, neurons or kan_nodes (default: the recipe's)")
    parser.add_argument("--criterion", help="how they are scored (default: the recipe's, or the target's)")
    parser.add_argument("--scope", choices=("global", "tensor", "row"), help="where scores compete")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.5,
        help="harm that counts as none: points of accuracy, or percent of another metric (default: 0.5)",
    )
    return parser


def criteria_parser() -> argparse.ArgumentParser:
    """Return the options of `emp compare-criteria`."""
    parser = new_parser(
        "compare-criteria",
        "Train each recipe densely, prune once by every criterion that fits, and report N_eff, metric and overlap.",
        f"""\
examples:
  emp compare-criteria --config paper/gpt --targets weights heads
  emp compare-criteria --config quickstart --seeds 0 --density 0.3
{_ONCE_HELP}""",
    )
    _add_once(parser, "compare_criteria")
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="what is pruned (default: the recipe's target)")
    parser.add_argument("--scope", choices=("global", "tensor", "row"), help="where scores compete")
    parser.add_argument(
        "--density", type=float, default=0.5, help="fraction kept where all criteria keep alike many (default: 0.5)"
    )
    parser.add_argument(
        "--batches", type=int, default=32, metavar="N", help="training batches that criteria read (default: 32)"
    )
    return parser


def violations_parser() -> argparse.ArgumentParser:
    """Return the options of `emp violations`."""
    parser = new_parser(
        "violations",
        "Train each recipe densely, prune its weights once by several criteria and beta, and set the measured change "
        "of the loss beside every bound.",
        f"""\
examples:
  emp violations --config paper/fc2 paper/kan paper/gpt
  emp violations --config quickstart --seeds 0 --criteria magnitude --betas 0.5 1

Tr(H) takes about 2 * probes * batches training steps per model, with twice their memory.
{_ONCE_HELP}""",
    )
    _add_once(parser, "violations")
    parser.add_argument("--criteria", nargs="+", metavar="NAME", help="default: magnitude wanda taylor saliency random")
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA", help="default: 0.5 0.75 1 1.25 1.5 2")
    parser.add_argument("--scope", choices=("global", "tensor", "row"), default="global", help="default: global")
    parser.add_argument(
        "--batches", type=int, default=8, metavar="N", help="training batches for losses and Hessian (default: 8)"
    )
    parser.add_argument("--probes", type=int, default=16, metavar="N", help="random vectors for Tr(H) (default: 16)")
    return parser


def gates_parser() -> argparse.ArgumentParser:
    """Return the options of `emp gates`."""
    parser = new_parser(
        "gates",
        "Train a language model densely, then train it on with fewer heads: chosen by EMP, or by gates that learn, "
        "with and without EMP's scores to begin with. Then let each token keep its own number of heads.",
        f"""\
examples:
  emp gates --config gates_gpt --jobs 2
  emp gates --config gates_gpt --out runs/gates --data.file mytext.txt --data.max_bytes 40000000
  emp gates --config gates_gpt --out runs/try --seeds 0 --steps 30 --trainer.max_steps 150

Takes one recipe. What is compared and the margin within which arms count as alike are fixed; the report says them.
{_ONCE_HELP}""",
    )
    _add_once(parser, "gates")
    parser.add_argument(
        "--steps", type=int, default=300, help="optimizer steps by which each arm trains the model on (default: 300)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=32,
        metavar="N",
        help="training batches from which EMP scores heads (default: 32)",
    )
    return parser


_ONCE_HELP = """
Any key of the recipes can follow as --KEY VALUE and then holds for all of them. Trained models are kept in --models
and used by sweep-beta, compare-criteria, violations and gates alike; the same command again continues an interrupted
study."""


def _add_once(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        nargs="+",
        metavar="RECIPE",
        help=f"one recipe per model: {RECIPE}",
    )
    parser.add_argument(
        "--out", default=f"runs/{name}", metavar="DIR", help=f"folder of the results (default: runs/{name})"
    )
    parser.add_argument(
        "--models", default="runs/dense", metavar="DIR", help="folder of the trained models (default: runs/dense)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: each recipe's study.seeds")
    parser.add_argument("--jobs", type=int, metavar="N", help="measure N models at a time, each on one CPU thread")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew; what DIR holds is moved to DIR.old-1, -2, ..."
    )
