"""Read, sum and rewrite tensors under one parallel strategy; the only home of torch.distributed."""

from emp_callbacks.backends.detect import detect_backend
from emp_callbacks.backends.local import LocalBackend

__all__ = ["LocalBackend", "detect_backend"]
