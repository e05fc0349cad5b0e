"""How an attention module keeps its heads, and the registry of those that users describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Count = str | Callable[[nn.Module], int]
_PARTS = ("q", "k", "v", "qk", "kv", "qkv", "-qkv", "qkv-")


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Where an attention module keeps its projections, and how the heads lie in them.

    Paths are dotted, below the module. A projection is a Linear, transformers' Conv1D, a convolution, a module that
    holds one of these alone (with a batch norm, a dropout, an activation), or a parameter whose rows are its outputs.

    Attributes:
        inputs: Path of each input projection -> which of query, key and value its rows hold: "q", "k", "v", "qk",
            "kv" or "qkv"; with a "-" before or behind where there are others, of an MLP beside the attention.
        output: Path of the output projection.
        order: What lies outermost in the rows of a fused projection: "parts" (all queries, then all keys, ...; each
            head after head) or "heads" (query, key and value of one head, then of the next; with grouped queries all
            query heads of a key/value head, its key, its value).
        columns: What lies outermost in the columns of the output projection: "heads" (all features of one head, then
            of the next) or "features" (the first feature of every head, then the second).
        heads: Number of query heads: path of an attribute, or a function of the module; None: an attribute of a usual
            name (`num_heads`, `n_head`, ...; `head_dim`; the module's `config`).
        kv_heads: Number of key/value heads, in the same way; None: as the widths of the projections tell.
        per_head: Path of a parameter, buffer or module -> dimension along which the heads lie in it, as equal blocks
            in their order (relative-position tables, logit scales, biases apart from their projection, gates).
        calls_output: Whether the module calls its output projection, not only reads its weight.
        sizes: Attributes, besides the usual ones, that are a multiple of the number of heads and that shrinking
            scales; of the module or of modules below it.
        fixed: Why heads cannot be taken out of the module, as the end of a sentence; "" where they can.

    Raises:
        ValueError: `inputs` is empty or names a part that is none.
    """

    inputs: Mapping[str, str]
    output: str
    order: Literal["parts", "heads"] = "parts"
    columns: Literal["heads", "features"] = "heads"
    heads: Count | None = None
    kv_heads: Count | None = None
    per_head: Mapping[str, int] = field(default_factory=dict)
    calls_output: bool = True
    sizes: tuple[str, ...] = ()
    fixed: str = ""

    def __post_init__(self) -> None:
        if not self.inputs or not set(self.inputs.values()) <= set(_PARTS):
            raise ValueError(
                f"inputs={dict(self.inputs)} must give for each input projection which of query, key and value its "
                f"rows hold, one of {', '.join(_PARTS)}"
            )
        for name, value, known in (
            ("order", self.order, ("parts", "heads")),
            ("columns", self.columns, ("heads", "features")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")


Described = AttentionLayout | Callable[[nn.Module], AttentionLayout]
_REGISTERED: dict[type[nn.Module], Described] = {}


def register_attention(cls: type[nn.Module], layout: Described) -> None:
    """Describe the attention modules of a class, and of its subclasses, for `target="heads"` and `shrink`.

    What is registered goes before what the package knows, and what was registered last before what was earlier.

    Args:
        cls: Class of the attention modules.
        layout: Their layout, or a function that gives the layout of one module where it depends on its settings.

    Raises:
        TypeError: `cls` is no class of modules, or `layout` is neither.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self, width, heads):
        ...         super().__init__()
        ...         self.heads = heads
        ...         self.all_in = nn.Linear(width, 3 * width)
        ...         self.all_out = nn.Linear(width, width)
        >>> register_attention(Attention, AttentionLayout(inputs={"all_in": "qkv"}, output="all_out"))
        >>> registered_layout(Attention(8, 2)).output
        'all_out'
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"{cls!r} is no class of torch.nn.Module: pass the attention's class, not a module of it")
    if not isinstance(layout, AttentionLayout) and not callable(layout):
        raise TypeError(f"layout={layout!r} is neither an AttentionLayout nor a function that gives one")
    _REGISTERED.pop(cls, None)
    _REGISTERED[cls] = layout


def registered_layout(module: nn.Module) -> AttentionLayout | None:
    """Return what the user registered for a module's class; None if nothing."""
    for cls, layout in reversed(_REGISTERED.items()):
        if isinstance(module, cls):
            return layout if isinstance(layout, AttentionLayout) else layout(module)
    return None
