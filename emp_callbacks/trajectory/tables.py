"""The rows of one refresh as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from emp_callbacks.terminal import FittedTable
from emp_callbacks.trajectory.events import Certificate, PruneEvent


def layer_table(events: Sequence[PruneEvent]) -> FittedTable:
    """Return the per-layer table of one refresh for a terminal: N, N_eff, kept, density, preserved mass."""
    first, layers = events[0], [layer for event in events for layer in event.layers]
    certificates = [layer.certificate for layer in layers if layer.certificate is not None]
    sinks = any(layer.first_token is not None for layer in layers)
    n, keep = sum(event.n for event in events), sum(event.keep for event in events)
    table = FittedTable(f"EMP at step {first.step}: {first.criterion}, scope {first.scope}, mode {first.mode}")
    table.add_column("layer", footer="all")
    table.add_column("N", worth=2, footer=f"{n:,}")
    table.add_column("N_eff / N", footer=f"{sum(event.n_eff for event in events) / n:.3f}")
    table.add_column("kept", worth=3, footer=f"{keep:,}")
    table.add_column("density", footer=f"{keep / n:.3f}")
    table.add_column("mass kept", worth=1, footer=_mass_footer(events))
    if sinks:
        table.add_column("first token", worth=4)
    if certificates:
        total = certified_loss_change(events)
        table.add_column(f"{certificates[0].says} <=", worth=1, footer="" if total is None else f"{total:.4g}")
        table.add_column("measured", worth=1)
    for layer in layers:
        sizes = (f"{layer.n:,}", f"{layer.n_eff / layer.n:.3f}", f"{layer.keep:,}", f"{layer.density:.3f}")
        sink = ["" if layer.first_token is None else f"{layer.first_token:.3f}"] if sinks else []
        proved = certificate_cells(layer.certificate) if certificates else ()
        table.add_row(layer.name, *sizes, f"{layer.preserved_mass:.3f}", *sink, *proved)
    return table


def _mass_footer(events: Sequence[PruneEvent]) -> str:
    """Return the preserved mass of a single group and what is guaranteed of it."""
    bound = events[0].tight_mass_bound
    if len(events) > 1 or bound is None:
        return ""
    return f"{events[0].preserved_mass:.3f} (at least {bound:.3f})"


def certificate_cells(certificate: Certificate | None) -> tuple[str, str]:
    """Return what is guaranteed and what was measured as text: errors of outputs relative, in percent."""
    if certificate is None:
        return "-", "-"
    form = ".1%" if certificate.scale else ".4g"
    bound, measured = certificate.relative
    return f"{bound:{form}}", "-" if measured is None else f"{measured:{form}}"


def certified_loss_change(events: Sequence[PruneEvent]) -> float | None:
    """Return the bound over the groups of one refresh; None if no certificate speaks of the loss."""
    found = [event.certificate.bound for event in events if event.certificate is not None]
    return sum(found) if found else None
