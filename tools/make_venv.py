"""Makes the Makefile's virtual environment, or says in one line why it cannot.

    python3 tools/make_venv.py .venv study .installed-study

installs the project with the extra `study` into .venv and leaves a stamp there, for make; with --lowest, of each
dependency the lowest version that pyproject.toml allows. Only the standard library.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ".made-by-make"
OLD_STAMP = ".installed"  # what an earlier Makefile left in what it made
LOWEST = "lowest.txt"  # in the environment: each direct dependency at the lowest version that is allowed
UNREACHABLE = "Retrying|NewConnectionError|NameResolutionError|Failed to fetch|dns error"  # pip and uv
ASK_VERSION = "import sys; print(*sys.version_info[:2], sep='.')"
HERE = ".".join(map(str, sys.version_info[:2]))


class VenvError(Exception):
    """What the user reads, in one line."""


def main() -> int:
    """Make, install or remove; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("extras", nargs="?", help="extras of pyproject.toml, with commas between")
    parser.add_argument("stamps", nargs="*", help="files to leave in the environment when all is installed")
    parser.add_argument("--lowest", action="store_true", help="the lowest version of each direct dependency")
    parser.add_argument("--remove", action="store_true", help="remove the environment if make made it")
    options = parser.parse_args()
    try:
        if options.remove:
            remove(options.venv)
        else:
            prepare(options.venv)
            install(options.venv, options.extras, options.stamps, install_lowest if options.lowest else install_newest)
    except VenvError as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# ---- the environment ----------------------------------------------------------------------------------------------


def prepare(venv: Path) -> None:
    """Leave an environment of this Python with pip, or raise; nothing that make did not make is ever deleted."""
    if not venv.exists() or not any(venv.iterdir()):
        create(venv)
    version = version_of(venv)
    if version is None and is_ours(venv):
        print(f"{venv} was left half-made: made again")
        empty(venv)
        create(venv)
    elif version is None:
        raise VenvError(f"{venv} has no Python that runs and is not made by make: move it away, or set VENV=elsewhere")
    elif version != HERE:
        # Not cleared here: one forgotten PYTHON= would cost a download of gigabytes.
        remedy = "`make clean` removes it" if is_ours(venv) else "move it away, or set VENV=elsewhere"
        keep = f", or set PYTHON={python_of(venv)}" if is_new_enough(version) else ""
        raise VenvError(f"{venv} is of Python {version} and {sys.executable} of {HERE}: {remedy}{keep}")
    if not works(venv, "-m", "pip", "--version") and not works(venv, "-m", "ensurepip"):
        raise VenvError(f"{venv} has no pip, and `{python_of(venv)} -m ensurepip` fails: install pip there")


def create(venv: Path) -> None:
    """Make the environment; the mark comes first, so that what is cut off here is known as ours."""
    venv.mkdir(parents=True, exist_ok=True)
    (venv / OURS).touch()
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        empty(venv)
        raise VenvError(f"`{sys.executable} -m venv` fails (Debian: apt install python3-venv): {last_line(done)}")


def empty(venv: Path) -> None:
    """Delete what is in an environment of ours, but not the mark."""
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OURS:
            path.unlink()


def remove(venv: Path) -> None:
    """Delete an environment of ours."""
    if not venv.exists():
        return
    if not is_ours(venv):
        raise VenvError(f"{venv} was not made by make: remove it yourself")
    empty(venv)
    (venv / OURS).unlink(missing_ok=True)
    venv.rmdir()


def is_ours(venv: Path) -> bool:
    """Tell whether make made the environment."""
    return (venv / OURS).exists() or (venv / OLD_STAMP).exists()


def python_of(venv: Path) -> Path:
    """Return the Python of an environment."""
    return venv / "bin" / "python"


def version_of(venv: Path) -> str | None:
    """Return the version of the Python in there, None if there is none that runs."""
    with contextlib.suppress(OSError):  # no such file, or a link to a Python that is gone
        done = subprocess.run([str(python_of(venv)), "-c", ASK_VERSION], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 and (venv / "pyvenv.cfg").exists() else None
    return None


def is_new_enough(version: str) -> bool:
    """Tell whether the project runs on a Python."""
    return tuple(map(int, version.split("."))) >= (3, 10)


def works(venv: Path, *arguments: str) -> bool:
    """Tell whether the Python of an environment does something without an error."""
    return subprocess.run([str(python_of(venv)), *arguments], capture_output=True).returncode == 0


# ---- pip ----------------------------------------------------------------------------------------------------------


def install(venv: Path, extras: str, stamps: list[str], work: Callable[[Path, str], None]) -> None:
    """Install the project, editable; the stamps come last."""
    for stamp in stamps:
        (venv / stamp).unlink(missing_ok=True)
    check_index(venv)
    print(f"Installing .[{extras}] into {venv}: about 3 minutes and 6 GB the first time", flush=True)
    work(venv, extras)
    for stamp in stamps:
        (venv / stamp).touch()


def install_newest(venv: Path, extras: str) -> None:
    """Install what pip picks."""
    # Two retries instead of five, which take over a minute where there is no network.
    words = ("--quiet", "--retries", "2", "--editable", f"{ROOT}[{extras}]")
    must(pip(venv, "install", *words), f"pip could not install .[{extras}]")


def install_lowest(venv: Path, extras: str) -> None:
    """Install of each direct dependency the lowest version that pyproject.toml allows, or raise where two collide."""
    must(pip(venv, "install", "--quiet", "uv"), "pip could not install uv")
    uv = ("--quiet", "--python", str(python_of(venv)))
    # without dependencies: what is claimed, also where another dependency asks for more; then the install below fails
    listed = ("--resolution", "lowest-direct", "--no-deps", "--no-annotate", "--no-header")
    wanted = [word for extra in extras.split(",") for word in ("--extra", extra)]
    output = ("--upgrade", "--output-file", str(venv / LOWEST))  # or uv keeps what an older file says
    done = run(venv, "uv", "pip", "compile", *uv, *listed, *wanted, *output, str(ROOT / "pyproject.toml"))
    must(done, "uv could not read the lowest versions from pyproject.toml")
    chosen = ("--constraints", str(venv / LOWEST), "--editable", f"{ROOT}[{extras}]")
    must(run(venv, "uv", "pip", "install", *uv, *chosen), f"uv could not install the lowest versions of .[{extras}]")


def must(done: subprocess.CompletedProcess[str], problem: str) -> None:
    """Show what a program wrote as errors, and raise if it failed."""
    sys.stderr.write(done.stderr)
    if done.returncode:
        # An index that had the first package, such as a folder of wheels, may lack the rest.
        network = "no network (see the warnings above): " if re.search(UNREACHABLE, done.stderr) else ""
        raise VenvError(f"{network}{problem}: {last_line(done)}")


def check_index(venv: Path) -> None:
    """Ask pip's index, whichever is configured, for what every install needs; pip itself would try for minutes."""
    (needed,) = re.findall(r'^requires = \["([^"]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        quick = ("--quiet", "--no-deps", "--retries", "0", "--timeout", "15")
        done = pip(venv, "download", *quick, "--dest", folder, needed)
    if done.returncode:
        mirror = "for a mirror, set PIP_INDEX_URL or pip's configuration"
        raise VenvError(f"no network, or no package index: pip cannot get {needed} ({mirror}): {last_line(done)}")


def pip(venv: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip in an environment."""
    return run(venv, "pip", *arguments)


def run(venv: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in an environment."""
    # --user, which some systems configure, contradicts an environment.
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(python_of(venv)), "-m", module, *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last error that a program wrote, or its last line."""
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit code {done.returncode}"])[-1]


if __name__ == "__main__":
    sys.exit(main())
