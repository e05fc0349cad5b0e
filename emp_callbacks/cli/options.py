"""The options of `emp`'s own commands; `fit`, `validate` and `test` have those of Lightning."""

from __future__ import annotations

import argparse

from emp_callbacks.cli.folder_options import add_shown
from emp_callbacks.cli.new_parser import RECIPE, new_parser

__all__ = [
    "compare_parser",
    "export_parser",
    "inspect_parser",
    "prune_parser",
    "recipes_parser",
    "report_parser",
]


def compare_parser() -> argparse.ArgumentParser:
    """Return the options of `emp compare`."""
    from emp_callbacks.study.arms import ARMS

    longest = max(map(len, ARMS))
    arms = "\n".join(f"  {name:<{longest}}  {arm.summary}" for name, arm in ARMS.items())
    parser = new_parser(
        "compare",
        "Train a recipe with several ways of pruning and several seeds, alike in everything else, and report.",
        f"""\
arms (study.arms):
{arms}

examples:
  emp compare --config quickstart
  emp compare --config quickstart --out runs/try --trainer.max_epochs 1 --study.seeds "[0]"
  emp compare --config quickstart --study.arms "[dense, one_shot, training_feedback]"

Any key of the recipe can follow as --KEY VALUE; emp fit --help lists them.
The same command again continues an interrupted study and reuses its finished runs.""",
    )
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help=f"recipe with a study: section, {RECIPE}; given again: settings to lay over it",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: study.out, or runs/RECIPE)")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew; what DIR holds is moved to DIR.old-1, -2, ..."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ARM:SEED", help="run these cells alone, on a cluster say; a last call merges"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="train N cells at a time, each on one CPU thread")
    parser.add_argument("--list-cells", action="store_true", help="print the cells of the study, and train nothing")
    return parser


def recipes_parser() -> argparse.ArgumentParser:
    """Return the options of `emp recipes`."""
    parser = new_parser(
        "recipes",
        "List the recipes that come with the package, or copy one out to edit. Wherever a command takes --config, the "
        "name of one does: emp compare --config quickstart.",
        "examples:\n  emp recipes\n  emp recipes quickstart --out mine.yaml\n  emp recipes cluster --out cluster",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to copy, or cluster for the cluster files")
    parser.add_argument("--out", metavar="FILE", help="where to (default: its own name, in this folder)")
    return parser


def report_parser() -> argparse.ArgumentParser:
    """Return the options of `emp report`."""
    parser = new_parser(
        "report",
        "Write report.html and the pictures of a finished run again.",
        "examples:\n  emp report runs/quickstart\n  emp report lightning_logs/version_0",
    )
    parser.add_argument(
        "folder",
        metavar="RUN_DIR",
        help="folder of a study (results.json) or of a fit (emp_trajectory.jsonl)",
    )
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    """Return the options of `emp inspect`."""
    parser = new_parser(
        "inspect",
        "Show N_eff of weights, and what EMP would keep of them, without training anything.",
        """\
examples:
  emp inspect timm:resnet18 --pretrained
  emp inspect lightning_logs/version_0/checkpoints/last.ckpt --scope tensor
  emp inspect model.safetensors --beta 0.5 --exclude 'head*' --json inspect.json
  emp inspect last.ckpt --data quickstart --criterion wanda

With --data the model is also pruned once, in memory, and what that changes is measured and bounded: every layer's
outputs (wanda), the loss to first order (taylor), the loss by Tr(H). What the recipe's EMPCallback says is then the
default of each setting. Tr(H) takes about 2 * probes * batches training steps and twice their memory.
Files are read as tensors only; code in them never runs.""",
    )
    parser.add_argument(
        "source",
        metavar="CHECKPOINT|timm:NAME",
        help="Lightning .ckpt, state dict (.pt, .pth, .safetensors), Hugging Face folder, or a timm model",
    )
    parser.add_argument("--beta", type=float, help="keep floor(beta * N_eff) weights (default: 1.0)")
    parser.add_argument(
        "--scope",
        choices=("global", "tensor", "row"),
        help="where weights compete: all together, within a tensor, or within an output unit (default: global)",
    )
    parser.add_argument(
        "--include", nargs="+", metavar="GLOB", help="look at these parameters instead of the default choice"
    )
    parser.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave these parameters out")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights (needs a network)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a JSON file")
    data = parser.add_argument_group("with data")
    data.add_argument(
        "--data",
        metavar="RECIPE",
        help=f"recipe that builds the model and its data: {RECIPE}",
    )
    data.add_argument("--target", help="weights, heads, neurons or kan_nodes (default: the recipe's)")
    data.add_argument("--criterion", help="how they are scored (default: the recipe's, or the target's)")
    data.add_argument("--batches", type=int, default=8, metavar="N", help="training batches (default: 8)")
    data.add_argument("--probes", type=int, default=16, metavar="N", help="random vectors for Tr(H) (default: 16)")
    return parser


def prune_parser() -> argparse.ArgumentParser:
    """Return the options of `emp prune`."""
    parser = new_parser(
        "prune",
        "Prune a finished model once by EMP, and write its weights as safetensors.",
        """\
examples:
  emp prune timm:resnet18 --pretrained --out pruned.safetensors
  emp prune timm:resnet18 --pretrained --target neurons --shrink --out small.safetensors
  emp prune last.ckpt --config quickstart --target heads --criterion taylor --out pruned.safetensors
  emp prune last.ckpt --config quickstart --beta auto --tolerance 0.02 --out pruned.safetensors
  emp prune llama --criterion wanda --scope row --text train.txt --out llama-pruned
  emp prune llama --criterion magnitude --scope row --include '*.mlp.*' --density 0.5 --out llama-pruned

With --config, what the recipe's EMPCallback says is the default of each setting. Criteria that read gradients, inputs
or activations take them from --batches of the recipe's training data; the weights are not trained.
Heads and neurons need modules: --config RECIPE, timm:NAME, or a Hugging Face folder with config.json.""",
    )
    _add_source(parser)
    parser.add_argument("--target", help="weights, heads, neurons or kan_nodes (default: weights)")
    parser.add_argument("--criterion", help="how they are scored (default: the target's: magnitude, weight_norm, ...)")
    parser.add_argument(
        "--scope",
        choices=("global", "tensor", "row"),
        help="where scores compete (default: tensor for neurons and KAN nodes, row for wanda on a folder, else global)",
    )
    parser.add_argument(
        "--beta",
        type=_beta,
        metavar="BETA|auto",
        help="keep floor(beta * N_eff) (default: 1.0); auto: the smallest beta within --tolerance",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="how much beta auto may raise the loss on --batches, or on a text, relative to dense (default: 0.01)",
    )
    parser.add_argument("--density", type=float, help="keep this fraction instead of N_eff")
    parser.add_argument("--pattern", metavar="N:M", help="keep N of every M neighbours along the inputs, such as 2:4")
    parser.add_argument("--min-density", type=float, help="keep at least this fraction of each group (default: 0)")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="prune these parameters (or modules) only")
    parser.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave these parameters (or modules) out")
    parser.add_argument(
        "--batches",
        type=int,
        default=32,
        metavar="N",
        help="training batches for criteria that read data, and for --tolerance (default: 32)",
    )
    add_shown(parser)
    return parser


def _beta(text: str) -> float | str:
    return text if text == "auto" else float(text)


def export_parser() -> argparse.ArgumentParser:
    """Return the options of `emp export`."""
    parser = new_parser(
        "export",
        "Write the masked weights of a run as plain safetensors: no callback, no reparametrisation.",
        """\
examples:
  emp export lightning_logs/version_0/checkpoints/last.ckpt --out model.safetensors
  emp export last.ckpt --config quickstart --shrink --out small.safetensors

The names fit your own module: of a Lightning checkpoint the first part that all names share ("model.") is left out.
  model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
  emp_callbacks.load_shrunk(model, "small.safetensors")
With --shrink --uniform the library of the model itself can load it; the command prints how.""",
    )
    _add_source(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="CHECKPOINT|timm:NAME",
        help="Lightning .ckpt, state dict (.pt, .pth, .safetensors), Hugging Face folder, or a timm model",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.safetensors|DIR",
        help="file to write, or folder: model.safetensors, and of a transformers or timm model the configuration and "
        "what else the source folder holds, so that its library loads it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file; what DIR holds is moved to DIR.old-1, -2, ..."
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="RECIPE",
        help=f"recipe that builds the model (and its data): {RECIPE}",
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="remove pruned heads, neurons and channels; KAN nodes stay, as zeros",
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="with --shrink: equal counts in all layers of a kind, so that the model's own library can load it",
    )
    parser.add_argument("--prefix", help="start of the names to leave out; '' for none (default: 'model.' or the like)")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights (needs a network)")
    parser.add_argument(
        "--input-size",
        nargs="+",
        type=int,
        metavar="N",
        help="example input for --shrink, such as 3 32 32 (default: from the data or the model)",
    )
