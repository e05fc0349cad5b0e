"""How layers that do not compete share a density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emp_callbacks.core.shares import erk_factor, layer_densities
from emp_callbacks.layer import Layer
from emp_callbacks.targets import few


def check_shares_named(shares: str | Mapping[str, float], layers: Sequence[Layer]) -> None:
    """Raise ValueError where shares by name leave out a layer, or name one that there is not."""
    names = {layer.name for layer in layers}
    if isinstance(shares, Mapping) and shares.keys() != names:
        raise ValueError(f"shares must name each pruned layer once; not in both: {few(sorted(shares.keys() ^ names))}")


def shared_density(density: float, shares: str | Mapping[str, float], layers: Sequence[Layer]) -> dict[str, float]:
    """Return the density of each layer, by name; of layers that came later than the shares, none."""
    named = [layer for layer in layers if not isinstance(shares, Mapping) or layer.name in shares]
    spans = [layer.span for layer in named]
    of_shape = [erk_factor(span.shape[int(span.stacked) :]) for span in spans]  # of experts: of one matrix
    factors = [shares[span.name] for span in spans] if isinstance(shares, Mapping) else of_shape
    sizes = [span.size for span in spans]
    return dict(zip([span.name for span in spans], layer_densities(sizes, factors, density), strict=True))
