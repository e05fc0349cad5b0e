"""Results of a study at several points, as `emp compare` writes them, with figures made up by a formula."""

import math
import random

import pytest

POINTS = (0.6, 0.4, 0.2, 0.1, 0.05)
N = 20_000
# How fast an arm loses with sparsity, in points of accuracy at density 0.05.
LOSS = {
    "one_shot": 40.0, "one_shot_tensor": 48.0, "one_shot_row": 52.0, "one_shot_erk": 42.0, "one_shot_finetune": 9.0,
    "one_shot_finetune_lr": 6.0, "training_feedback": 7.0, "training_project": 9.0, "training_freeze": 45.0,
    "gmp": 5.0, "sap": 8.0, "rigl": 6.5, "set": 10.0, "fixed_uniform": 14.0, "fixed_erk": 11.0,
    "fixed_magnitude": 8.0, "fixed_emp_shares": 8.5, "random_emp_shares": 22.0, "random_uniform": 30.0, "random": 24.0,
    "small_dense": 16.0,
}  # fmt: skip


def accuracy_of(arm, density, seed):
    """An accuracy that falls with sparsity: 92 % dense, spread over seeds wider where more is lost."""
    level = 92.0 + 0.15 * math.sin(seed)
    if arm == "dense":
        return level / 100
    lost = LOSS[arm] * (math.log(density) / math.log(0.05)) ** 3
    wobble = random.Random(f"{arm} {density} {seed}").gauss(0, 0.1 + 0.02 * lost)
    return min(1.0, (level - lost + wobble) / 100)


def run_of(arm, point, seed, metric):
    density = point or 1.0
    if arm == "training_freeze":  # N_eff decides: not quite its point
        density = 0.9 * density
    keep = round(N * density)
    density = keep / N

    def value(name, kept):
        accuracy = accuracy_of(name, kept, seed)
        return accuracy if metric.endswith("accuracy") else math.exp(2.0 + 8 * (0.92 - accuracy))

    trains = not arm.startswith("one_shot")
    steps = [{"step": step, "epoch": step // 10, metric.replace("test", "val"): value(arm, density) * step / 30}
             for step in (10, 20, 30)]  # fmt: skip
    refreshes = [
        {
            "step": step, "epoch": step // 10, "group": "global", "mode": "feedback", "criterion": "magnitude",
            "scope": "global", "beta": 1.0, "n": N, "n_eff": density * N, "n_eff_fraction": density, "keep": keep,
            "threshold": 0.01, "density": density, "preserved_mass": 0.9, "mass_bound": None, "churn": 0.1,
            "regrown": 2, "seconds": 0.01, "note": "", "layers": [],
        }
        for step in (10, 20, 30)
    ] if arm != "dense" else []  # fmt: skip
    by_design = {"small_dense": ["init"], "sap": ["steps"]}.get(arm, [])
    return {
        "arm": arm, "point": point, "seed": seed, "metrics": {metric: value(arm, density), "test/loss": 0.1},
        "density": density, "n": N, "keep": keep, "parameters": N + 200, "n_eff": density * N,
        "steps": 60 if arm == "sap" else 30, "refreshes": len(refreshes), "seconds": 1.5, "trajectory": refreshes,
        "curve": steps, "init_digest": f"init{seed}" if arm != "small_dense" else f"small{seed}",
        "batches_digest": f"batch{seed}", "fingerprint": "f" * 16, "differs": by_design,
        "explored": min(1.0, 2 * density) if trains and point else None,
        "flops": {"dense": 2.0 * N, "inference": 2.0 * keep + 100, "dense_training": 6e9, "training":
                  6e9 * (0.4 + 0.6 * density) if arm in ("rigl", "set") else 6e9},
        "matched": None if arm in ("dense", "one_shot") else {
            "arm": "one_shot", "density": density, "keep": keep, "metrics": {metric: value("one_shot", density)},
        },
    }  # fmt: skip


def study_at_points(arms=("dense", *LOSS), points=POINTS, seeds=range(5), metric="test/accuracy", margin=0.005):
    return {
        "schema": 1,
        "study": {
            "recipe": "recipes/quick.yaml", "metric": metric, "higher_is_better": metric.endswith("accuracy"),
            "reference": "one_shot", "arms": list(arms), "seeds": list(seeds), "points": list(points),
            "margin": margin, "healing": 0.25,
        },
        "environment": {"torch": "9.8.7"},
        "runs": [
            run_of(arm, point, seed, metric)
            for arm in arms for point in ([None] if arm == "dense" else points) for seed in seeds
        ],
    }  # fmt: skip


@pytest.fixture
def at_points():
    """Makes the results; the arms, points and seeds are its arguments."""
    return study_at_points
