"""Size and time of an installation, for the core and each extra, each in a virtual environment of its own.

    python benchmarks/bench_install.py
    python benchmarks/bench_install.py --only core lightning --torch "torch==2.14.1"

Downloads torch once and then takes it from pip's cache. Prints one line per installation and writes
results/install.json; `import` columns are the best of three fresh processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EXTRAS = ("core", "lightning", "study", "hf", "deepspeed", "all")
IMPORTS = {
    "torch": "import torch",
    "emp_callbacks": "import emp_callbacks",
    "EMPPruner": "from emp_callbacks import EMPPruner",
    "EMPCallback": "from emp_callbacks import EMPCallback",
}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXTRAS, default=EXTRAS, metavar="EXTRA")
    parser.add_argument("--torch", default="torch", help="requirement for torch (default: the newest that pip takes)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "install.json")
    options = parser.parse_args()
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder, console.status("installing") as status:
        wheel = _wheel(Path(folder))
        for extra in options.only:
            status.update(f"installing {extra}")
            rows.append(_measured(extra, wheel, options.torch, Path(folder, extra)))
            console.print(rows[-1])
    result = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(_table(rows))


def _wheel(folder: Path) -> Path:
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(words, check=True)
    return next(folder.glob("*.whl"))


def _measured(extra: str, wheel: Path, torch: str, folder: Path) -> dict[str, object]:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    before = _megabytes(folder)
    wanted = f"{wheel}[{extra}]" if extra != "core" else str(wheel)
    started = time.perf_counter()
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", wanted, torch], check=True)
    seconds = time.perf_counter() - started
    parts = {path: _megabytes(path) for path in folder.glob("lib/python*/site-packages/*")}
    cuda = sum(size for path, size in parts.items() if path.name in ("torch", "triton", "nvidia", "torchgen"))
    row: dict[str, object] = {
        "extra": extra,
        "seconds": round(seconds, 1),
        "megabytes": round(_megabytes(folder) - before),
        "of_which_torch": round(cuda),
    }
    works = (
        IMPORTS if extra in ("lightning", "study", "all") else {k: v for k, v in IMPORTS.items() if k != "EMPCallback"}
    )
    row["imports"] = {name: min(_seconds(python, line) for _ in range(3)) for name, line in works.items()}
    subprocess.run(["rm", "-r", str(folder)], check=True)
    return row


def _seconds(python: Path, line: str) -> float:
    started = time.perf_counter()
    subprocess.run([str(python), "-W", "ignore", "-c", line], check=True, cwd=python.parents[1])
    return round(time.perf_counter() - started, 2)


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in (folder, *folder.rglob("*"))) / 1e6


def _table(rows: list[dict[str, object]]) -> Table:
    table = Table(title="Installation in an empty virtual environment")
    for name in (
        "extra",
        "MB",
        "of which torch, CUDA and Triton",
        "seconds",
        *(f"import {name}, s" for name in IMPORTS),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        imports = row["imports"]
        assert isinstance(imports, dict)
        figures = [str(imports.get(name, "-")) for name in IMPORTS]
        table.add_row(
            str(row["extra"]), str(row["megabytes"]), str(row["of_which_torch"]), str(row["seconds"]), *figures
        )
    return table


if __name__ == "__main__":
    main()
