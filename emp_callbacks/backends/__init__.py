"""Read, sum and rewrite tensors under one parallel strategy; the only home of torch.distributed."""

from emp_callbacks.backends.base import Backend
from emp_callbacks.backends.detect import detect_backend

__all__ = ["Backend", "detect_backend"]
