"""How many weights of a row the effective number keeps: of random rows, and of the matrices of a folder.

    python benchmarks/row_counts.py                       # Gaussian, Laplace and uniform rows of several widths
    python benchmarks/row_counts.py runs/small_llama/model --out benchmarks/results/llm/row_counts.json

For rows as long as one likes, N_eff / N is (E|w|)^2 / E w^2: 2 / pi = 0.6366 for Gaussian weights of any scale, 1/2
for Laplace's, 3/4 for uniform ones. Printed beside it: the share that is pruned, 1 - floor(N_eff) / N, and how far
single rows differ. Of a folder, the linear layers inside the blocks are read, one tensor at a time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.core.effective_number import effective_numbers, keep_counts, score_moments

WIDTHS = (64, 256, 1024, 4096)
ROWS = 2048
# Name -> N_eff / N of endless rows, and what fills a tensor.
FAMILIES: dict[str, tuple[float, Callable[[Tensor, torch.Generator], Tensor]]] = {
    "Gaussian": (2 / math.pi, lambda rows, generator: rows.normal_(generator=generator)),
    "Laplace": (0.5, lambda rows, generator: rows.exponential_(generator=generator)),  # magnitudes of such weights
    "uniform": (0.75, lambda rows, generator: rows.uniform_(generator=generator)),
}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a Hugging Face folder, beside the random rows")
    parser.add_argument("--include", nargs="+", default=["*.layers.*"], metavar="GLOB", help="names (*.layers.*)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(words)
    rows = [*random_rows(), *(folder_rows(options.folder, options.include) if options.folder else ())]
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def random_rows() -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each family and width; always the same."""
    generator = torch.Generator().manual_seed(0)
    for name, (endless, fill) in FAMILIES.items():
        for width in WIDTHS:
            yield {"what": f"{name} rows", "endless": endless, **counted([fill(torch.empty(ROWS, width), generator)])}


def folder_rows(folder: Path, include: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each kind of matrix, by the last part of its name, and one for all of them.

    Raises:
        ValueError: No matrix of the folder is named so.
    """
    files = FolderFiles(folder)
    names = [
        name
        for name, info in files.infos.items()
        if len(info.shape) == 2 and any(fnmatch.fnmatchcase(name, each) for each in include)
    ]
    if not names:
        raise ValueError(f"no matrix of {folder} is named like {' or '.join(include)}; name others with --include")
    kinds = dict.fromkeys(name.split(".")[-2] for name in names)
    for kind in kinds:
        yield {"what": kind, "endless": None, **counted(files.read(n) for n in names if n.split(".")[-2] == kind)}
    yield {"what": "all matrices", "endless": None, **counted(map(files.read, names))}


def counted(matrices: Iterable[Tensor]) -> dict[str, Any]:
    """Return how matrices of shape (rows, N) are counted, each row its own group."""
    shares, weights, kept, widths = [], 0, 0, set()
    for matrix in matrices:
        moments = score_moments(matrix)
        n_eff = effective_numbers(moments)
        shares.append(n_eff / matrix.shape[1])
        weights += matrix.numel()
        kept += int(keep_counts(n_eff, moments.nonzero, 1.0).sum())
        widths.add(matrix.shape[1])
    share = torch.cat(shares)
    return {
        "widths": sorted(widths),
        "rows": len(share),
        "n_eff_fraction": float(share.mean()),
        "sd_of_rows": float(share.std()),
        "pruned": 1 - kept / weights,
    }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| rows | width | number | endless rows | N_eff / N | SD of single rows | pruned |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        endless = "" if row["endless"] is None else f"{row['endless']:.4f}"
        widths = ", ".join(map(str, row["widths"]))
        lines.append(
            f"| {row['what']} | {widths} | {row['rows']:,} | {endless} | {row['n_eff_fraction']:.4f} | "
            f"{row['sd_of_rows']:.4f} | {row['pruned']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
