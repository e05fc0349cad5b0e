"""What is installed besides the light core, and the one line that a missing package is worth."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "lightning": ("pytorch_lightning", "torchmetrics"),
    "study": (
        "pytorch_lightning",
        "torchmetrics",
        "timm",
        "jsonargparse",
        "yaml",
        "jinja2",
        "matplotlib",
        "scipy",
        "sklearn",
    ),
    "hf": ("transformers", "accelerate"),
    "text": ("transformers", "accelerate", "datasets", "pyarrow"),
    "deepspeed": ("deepspeed",),
}
"""Extra -> the packages that it brings, by the names under which they are imported."""


def is_installed(name: str) -> bool:
    """Return whether a module can be imported; nothing but its parents is."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return False
    # A folder of that name in the working directory is found as a package without a file.
    return spec is not None and spec.origin is not None


def needs(what: str, extra: str, *packages: str) -> None:
    """Raise unless what is about to be imported is installed.

    Args:
        what: What the user asked for.
        extra: A key of EXTRAS.
        packages: Import names; default all that the extra brings.

    Raises:
        ImportError: One line: what needs which packages, and the command that brings them.

    Examples:
        >>> needs("a matrix", "lightning", "numpy", "no_such_package")
        Traceback (most recent call last):
        ImportError: a matrix needs no_such_package, which is not installed: pip install 'emp-callbacks[lightning]'
    """
    missing = [name for name in packages or EXTRAS[extra] if not is_installed(name)]
    if missing:
        are = "which is" if len(missing) == 1 else "which are"
        raise ImportError(
            f"{what} needs {', '.join(missing)}, {are} not installed: pip install 'emp-callbacks[{extra}]'"
        )
