"""Safetensors files as other files are: readable by whom the umask lets read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that any new file gets; safetensors alone leaves it to its owner.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    from safetensors.torch import save_file

    # Asked of a file, not of the umask: reading that changes it, for all threads.
    with path.open("ab") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)
