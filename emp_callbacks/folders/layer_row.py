"""What was decided on one weight of a folder, and weights of a kind together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LayerRow", "by_kind"]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What was decided on one weight.

    Attributes:
        name: Of the parameter in the model.
        n: Weights.
        n_eff: Effective number, with scope "row" summed over the rows.
        keep: Weights that stay.
        preserved_mass: Share of the scores that stay, in [0, 1].
        note: What was out of the ordinary.
    """

    name: str
    n: int
    n_eff: float
    keep: int
    preserved_mass: float
    note: str = ""


def by_kind(rows: Sequence[LayerRow]) -> dict[str, list[LayerRow]]:
    """Return kinds of layers, their names with the numbers of blocks and experts left open, and their rows.

    Examples:
        >>> rows = [LayerRow(name=f"h.{i}.fc.weight", n=4, n_eff=2.0, keep=2, preserved_mass=1.0) for i in range(2)]
        >>> [(kind, len(of_kind)) for kind, of_kind in by_kind(rows).items()]
        [('h.*.fc.weight', 2)]
    """
    kinds: dict[str, list[LayerRow]] = {}
    for row in rows:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in row.name.split(".")), []).append(row)
    return kinds
