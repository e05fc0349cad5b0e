"""Says in one line what `make gpu` lacks in this Python, and is silent where nothing is missing.

python tools/gpu_ready.py
"""

import importlib
import os
import sys

NEEDED = ("torch", "numpy", "pytest", "pytorch_lightning", "timm", "transformers")


def what_is_missing() -> str:
    """Return why the tests or the benchmark cannot run here, or an empty text."""
    absent = []
    for name in (*NEEDED, "emp_callbacks.pruning.pruner", "emp_callbacks.integrations.lightning"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent.append(error.name or name)
    if absent:
        return (
            f"{sys.executable} has no {', '.join(dict.fromkeys(absent))}; name one that has: make gpu PYTHON=python3.x"
        )
    import torch

    if not torch.cuda.is_available() and os.environ.get("EMP_GPU_REHEARSAL") != "cpu":
        return f"torch {torch.__version__} of {sys.executable} sees no CUDA device"
    return ""


if __name__ == "__main__":
    missing = what_is_missing()
    sys.exit(f"make gpu: {missing}" if missing else 0)
