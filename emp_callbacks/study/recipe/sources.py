"""Where the data of the studies is read from: gzip idx files, text files, the documentation in the running Python."""

import ast
import gzip
import math
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

_DEFLATE_MOST = 1032  # bytes that one byte of gzip can unpack to
_MOST = 2**31  # bytes of one array: sixty times those of Fashion-MNIST
_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, 2.3.1; dictzip's .dz files are gzip files with an index in an extra field
_PIECE = 2**20  # bytes of text read at once
_DEBIAN_TEXTS = {"gcide.dict.dz": "dict-gcide"}  # file -> package that holds it

# Tests and test data are no documentation; the others are not part of every Python 3 or of this text's kind.
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Return the uint8 array of `dims` dimensions in a gzip idx file.

    Raises:
        FileNotFoundError: No such file; says how to get Fashion-MNIST.
        ValueError: Not a gzip file, truncated, or another magic number or length than an idx file of uint8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} not found in {path.parent}: on Debian or Ubuntu run `apt-get install "
            f"dataset-fashion-mnist` (they are then in /usr/share/datasets/fashion-mnist), or download the "
            f"four files in data/fashion of github.com/zalandoresearch/fashion-mnist and pass --data.folder FOLDER"
        )
    magic, header = 0x0800 + dims, 4 + 4 * dims
    try:
        with gzip.open(path) as stream:
            start = stream.read(header)
            if len(start) < header or int.from_bytes(start[:4], "big") != magic:
                raise ValueError(f"{path} starts with {start[:4].hex()}, not with the idx magic number {magic:08x}")
            shape = tuple(int.from_bytes(start[i : i + 4], "big") for i in range(4, header, 4))
            promised, possible = math.prod(shape), min(_MOST, _DEFLATE_MOST * path.stat().st_size)
            if promised > possible:
                raise ValueError(
                    f"{path} promises {promised:,} bytes in its header, and a file of its size may hold {possible:,}; "
                    "get the file again"
                )
            content = stream.read(promised + 1)  # never more than promised: a small file can unpack to gigabytes
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not a gzip file ({error}); get the file again") from error
    if len(content) != promised:
        held = f"{len(content)}" if len(content) < promised else f"more than {promised}"
        raise ValueError(f"{path} holds {held} bytes of data, its header says {promised}; get the file again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_text(path: Path, max_bytes: int) -> bytearray:
    """Return the first `max_bytes` bytes of a text file, unpacked if it is a gzip file, whatever its name.

    Memory stays near the size of what is returned; the rest of the file is not read.

    Raises:
        FileNotFoundError: No such file; says how to get it.
        ValueError: A gzip file is damaged within that part.
    """
    if not path.is_file():
        package = _DEBIAN_TEXTS.get(path.name)
        remedy = f"on Debian or Ubuntu run `apt-get install {package}`; or " if package else ""
        raise FileNotFoundError(
            f"no text file {path}; {remedy}pass --data.file FILE, or leave it out for Python's own text"
        )
    with path.open("rb") as raw:
        packed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    text = bytearray()
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            while piece := stream.read(min(_PIECE, max_bytes - len(text))):
                text += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); get the file again") from error
    return text


@lru_cache(maxsize=1)
def stdlib_text(max_bytes: int = 2_000_000) -> bytes:
    """Return the standard library's help topics, then its docstrings in sorted file order, as UTF-8.

    The same for every run of one Python release; another release has another text.
    """
    from pydoc_data.topics import topics

    pieces = [topics[name] for name in sorted(topics)]
    size = sum(len(piece.encode()) for piece in pieces)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if size >= max_bytes:
            break
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            found = _docstrings(path)
            pieces += found
            size += sum(len(piece.encode()) for piece in found)
    return "\n\n".join(pieces).encode()[:max_bytes]


def _docstrings(path: Path) -> list[str]:
    tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [docstring for docstring in found if docstring]
