import pytest

from emp_callbacks.schedule import Ramp, Schedule


def due_at(schedule: Schedule, end: int) -> list[int]:
    return [now for now in range(1, end + 1) if schedule.is_due(now - 1, now)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(unit="step", every=3), [3, 6, 9]),
        (Schedule(unit="step", every=3, start=1), [1, 4, 7, 10]),
        (Schedule(unit="step", every=2, start=5, stop=8), [5, 7]),
        (Schedule(unit="epoch", start=4, stop=4), [4]),
        (Schedule(), []),
    ],
)
def test_positions(schedule, expected):
    assert due_at(schedule, 10) == expected


def test_a_missed_refresh_is_late_and_happens_once():
    schedule = Schedule(unit="step", every=3)
    assert schedule.is_due(2, 5)
    assert not schedule.is_due(5, 5)
    assert schedule.is_due(5, 6)


def test_missed_at_the_stop_is_still_late_not_lost():
    assert Schedule(unit="step", start=4, stop=4).is_due(3, 9)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_bad_period_is_named(unit, every):
    with pytest.raises(ValueError, match=rf"every_n_{unit}s must be an integer >= 1, got"):
        Schedule(unit=unit, every=every)


def test_stop_before_first_refresh_is_refused():
    with pytest.raises(ValueError, match="stop=4 lies before the first refresh at step 5"):
        Schedule(unit="step", start=5, stop=4)
    with pytest.raises(ValueError, match="stop=4 lies before the first refresh at epoch 10"):
        Schedule(unit="epoch", every=10, stop=4)


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 1.5), ("cosine", 1.5), ("cubic", 2.0 - (1 - 0.5**3))], ids=str
)
def test_beta_moves_from_first_to_last(shape, middle):
    beta = Ramp(first=2.0, last=1.0, until=10, shape=shape)
    assert beta.at(0) == 2.0
    assert beta.at(5) == pytest.approx(middle)
    assert beta.at(10) == beta.at(99) == pytest.approx(1.0)
    later = Ramp(first=2.0, last=1.0, begin=20, until=30, shape=shape)
    assert [later.at(at) for at in (0, 20, 25, 30)] == pytest.approx([2.0, 2.0, middle, 1.0])


@pytest.mark.parametrize(
    "wrong",
    [{"first": -0.5}, {"last": float("inf")}, {"until": 0}, {"begin": 10}, {"shape": "square"}],
    ids=lambda w: next(iter(w)),
)
def test_bad_ramp(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}\b"):
        Ramp(**{"first": 2.0, "last": 1.0, "until": 10, **wrong})
