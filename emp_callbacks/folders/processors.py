"""What a model's folder says about the model's call: its class, its tokenizer, its image or sound processor."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from textwrap import shorten
from typing import Any

from emp_callbacks.extras import needs

__all__ = ["architecture", "check_takes", "processor_of", "tokenizer_of"]

# One of these says that the folder has a tokenizer; transformers 5 makes one that knows no word where none is.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
)


def architecture(config: Any) -> str:
    """Return the name of the class that a config is of, "AutoModel" where it names none."""
    names: Any = getattr(config, "architectures", None)
    return str(names[0]) if names else "AutoModel"


def check_takes(config: Any, names: Collection[str], what: str, remedy: str) -> None:
    """Check that a model can be called with one of these arguments, as far as transformers knows its class.

    Raises:
        ValueError: It takes none; names the architecture, what was given and the remedy.
    """
    import transformers

    name = architecture(config)
    forward = getattr(getattr(transformers, name, None), "forward", None)
    if forward is not None and not set(names) & set(inspect.signature(forward).parameters):
        raise ValueError(f"a {name} takes no {' or '.join(names)}, so it cannot be called with {what}; {remedy}")


def tokenizer_of(folder: Path, tokenizer: Path | None = None) -> Any:
    """Return the tokenizer of a folder, or of another one in its place; no code from files runs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: The folder holds none.
        ValueError: transformers cannot read it, or it needs code from files.
    """
    where = tokenizer or folder
    if not any((where / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{where} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the tokenizer's files from where the "
            "model came from, or name a folder that has them: --tokenizer FOLDER"
        )
    return processor_of(where, "AutoTokenizer", "tokenizer")


def processor_of(folder: Path, loader: str, what: str) -> Any:
    """Return what one of transformers' Auto classes reads from a folder; no code from files runs.

    Args:
        folder: The model's.
        loader: "AutoTokenizer", "AutoImageProcessor" or "AutoFeatureExtractor".
        what: The same in words, for the message.

    Raises:
        ImportError: transformers is not installed.
        ValueError: It cannot be read, or needs code from files.
    """
    needs(f"reading the {what} of {folder}", "hf", "transformers")
    import transformers

    try:
        # Left unset, transformers would ask at the terminal whether to run the code.
        return getattr(transformers, loader).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain Exceptions
        told = shorten(str(error), 240, placeholder=" ...")
        if "trust_remote_code" in str(error):
            told = "it would run code from files, which is refused"
        remedy = "copy its files again from where the model is from, or install what they need"
        raise ValueError(f"the {what} of {folder} cannot be used: {told}; {remedy}") from error
