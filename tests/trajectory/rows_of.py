"""Rows without a training run."""

from emp_callbacks.trajectory import LayerStats, PruneEvent


def row(step, group="global", **changes):
    layer = LayerStats(name="a", n=10, n_eff=4.5, keep=4, density=0.4, preserved_mass=0.9)
    given = {
        "step": step,
        "epoch": 0,
        "group": group,
        "mode": "feedback",
        "criterion": "magnitude",
        "scope": "tensor",
        "beta": 1.0,
        "n": 10,
        "n_eff": 4.5,
        "n_eff_fraction": 0.45,
        "keep": 4,
        "threshold": 0.1,
        "density": 0.4,
        "preserved_mass": 0.9,
        "mass_bound": None,
        "churn": 0.0,
        "regrown": 0,
        "seconds": 0.1 + step,
        "note": "",
        "layers": (layer,),
    }
    return PruneEvent(**given | changes)


def steps_in(path):
    from emp_callbacks import Trajectory

    return [event.step for event in Trajectory.read(path)]
