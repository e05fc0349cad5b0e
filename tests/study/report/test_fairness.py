import pytest

from emp_callbacks.study.report.fairness import fairness_checks

ARMS = ("dense", "one_shot", "training_feedback", "rigl", "fixed_magnitude", "small_dense", "sap")


def failed(results):
    return {check.name: check.detail for check in fairness_checks(results) if not check.passed}


def named(results, name):
    return next(check for check in fairness_checks(results) if check.name == name)


def run_of(results, arm, point=0.1, seed=1):
    return next(r for r in results["runs"] if (r["arm"], r["point"], r["seed"]) == (arm, point, seed))


@pytest.fixture
def fair(at_points):
    return at_points(ARMS, points=(0.4, 0.1), seeds=range(2))


def test_a_fair_study_passes_and_says_what_differs_by_design(fair):
    assert failed(fair) == {}
    assert len(fairness_checks(fair)) == 5
    assert named(fair, "Same initial weights").detail.endswith("by design: small_dense has other initial weights")
    assert named(fair, "Same number of optimizer steps").detail.endswith("by design: sap has another number of steps")
    assert "by design" not in named(fair, "Same batches in the same order").detail


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("init_digest", "other", "Same initial weights"),
        ("batches_digest", "other", "Same batches in the same order"),
        ("steps", 31, "Same number of optimizer steps"),
        ("density", 0.1051, "Density of the point"),
        ("density", float("nan"), "Density of the point"),
        ("keep", 2021, "One-shot pruned at exactly the same density"),
    ],
)
def test_each_cheat_is_caught_at_its_point(key, value, name, fair):
    run_of(fair, "rigl")[key] = value
    found = failed(fair)
    assert list(found) == [name]
    assert "rigl @ 0.1" in found[name]
    assert "seed 1" in found[name]


@pytest.mark.parametrize("arm", ["small_dense", "sap"])
def test_what_differs_by_design_excuses_nothing_else(arm, fair):
    run_of(fair, arm)["batches_digest"] = "other"
    assert list(failed(fair)) == ["Same batches in the same order"]


def test_what_differs_without_being_said_is_a_cheat(fair):
    for run in fair["runs"]:
        run["differs"] = []
    assert list(failed(fair)) == ["Same initial weights", "Same number of optimizer steps"]


def test_where_n_eff_decides_the_density_may_differ_and_is_named(fair):
    run_of(fair, "training_feedback", seed=0)["density"] = 0.12
    run_of(fair, "training_feedback", seed=1)["density"] = 0.14
    check = named(fair, "Density of the point")
    assert check.passed
    assert check.detail.endswith("N_eff decides elsewhere: training_feedback @ 0.1 (0.130)")


@pytest.mark.parametrize(("density", "fair_enough"), [(0.12, False), (0.104, True), (0.11, False), (0.4, False)])
def test_an_arm_of_a_given_density_has_that_of_the_point(density, fair_enough, fair):
    run_of(fair, "training_feedback")["density"] = 0.12
    run_of(fair, "fixed_magnitude")["density"] = density
    assert named(fair, "Density of the point").passed is fair_enough


def test_a_pair_that_was_not_recorded_is_named(fair):
    for run in fair["runs"]:
        if run["arm"] == "training_feedback":
            run["matched"] = None
    check = named(fair, "One-shot pruned at exactly the same density")
    assert check.passed
    names = ("training_feedback @ 0.4", "training_feedback @ 0.1")
    assert check.detail.endswith("".join(f"; none recorded for {name}" for name in names))
