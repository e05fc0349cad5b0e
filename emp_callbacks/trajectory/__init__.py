"""The rows of a run: one PruneEvent per refresh and group, in memory and as JSON lines."""

from emp_callbacks.trajectory.events import Certificate, GateStats, LayerStats, PruneEvent
from emp_callbacks.trajectory.held_rows import check_state
from emp_callbacks.trajectory.places import trajectory_file
from emp_callbacks.trajectory.rows import Trajectory
from emp_callbacks.trajectory.tables import certificate_cells, certified_loss_change, layer_table

__all__ = [
    "Certificate",
    "GateStats",
    "LayerStats",
    "PruneEvent",
    "Trajectory",
    "certificate_cells",
    "certified_loss_change",
    "check_state",
    "layer_table",
    "trajectory_file",
]
