"""What moves the clock, and what is said where nothing does."""

import warnings

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, Ramp


def begin(**settings):
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, EMPPruner(net, optimizer, **settings)


def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()


def test_an_epoch_without_a_step_at_its_end_is_refreshed_at_its_end():
    net, optimizer, pruner = begin(every_n_epochs=1)
    for epoch in range(3):
        for batch in range(5):
            if batch in (1, 3):
                step(net, optimizer)
            pruner.step(end_of_epoch=batch == 4)
        assert pruner.epochs == epoch + 1
    assert [(e.step, e.epoch) for e in pruner.trajectory] == [(2, 0), (4, 1), (6, 2)]


def test_a_step_before_end_epoch_counts():
    net, optimizer, pruner = begin(every_n_epochs=1)
    step(net, optimizer)
    (event,) = pruner.end_epoch()
    assert (event.step, event.epoch) == (1, 0)


def test_the_length_of_the_epoch_that_begins_places_the_window():
    net, optimizer, pruner = begin(every_n_epochs=1, criterion="taylor", evidence_steps=2)
    for length in (6, 2, 4):
        pruner.start_epoch(length)
        for batch in range(length):
            step(net, optimizer)
            if batch == length - 2:
                assert len(pruner._refresher.evidence.batches) == 1
            pruner.step(end_of_epoch=batch == length - 1)
    assert [e.step for e in pruner.trajectory] == [6, 8, 12]


def test_steps_that_are_never_seen_are_said_within_a_hundred_calls():
    net, _, pruner = begin(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            pruner.step()
    with pytest.warns(UserWarning, match=r"step\(\) was called 100 times and no optimizer .* has made a step"):
        pruner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            pruner.step()
    del net


def test_a_schedule_that_asked_for_nothing_is_said_also_without_a_step():
    _, _, pruner = begin(every_n_epochs=3)
    pruner.step()
    with pytest.warns(UserWarning, match=r"schedule \(every_n_epochs=3\) asked for no refresh in 0 steps"):
        pruner.finalize()


@pytest.mark.parametrize(("until", "said"), [(3, False), (6, True)])
def test_a_ramp_that_training_did_not_finish_is_said_at_the_end(until, said):
    net, optimizer, pruner = begin(every_n_steps=1, density=Ramp(1.0, 0.25, until=until))
    for _ in range(3):
        step(net, optimizer)
        pruner.step()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner.finalize()
    expected = [
        "density stands at 0.625, on its way from 1 to 0.25: its Ramp ends at step 6, the last refresh was at step 3"
    ]
    assert [str(one.message).split(". End it")[0] for one in told] == expected * said


def test_and_where_step_was_forgotten():
    net, optimizer, pruner = begin(every_n_steps=1)
    step(net, optimizer)
    with pytest.warns(UserWarning, match=r"nothing was pruned. Call pruner.step\(\) after every optimizer step"):
        pruner.finalize()


def test_but_not_where_nothing_trained():
    _, _, pruner = begin(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()


def test_a_refresh_without_evidence_is_late_not_an_end():
    net, optimizer, pruner = begin(every_n_steps=2, criterion="wanda")
    direct = net.weight
    for batch in range(3):
        optimizer.zero_grad()
        (torch.randn(8, 6) @ direct.T).square().mean().backward()  # the module itself is not called
        optimizer.step()
        if batch == 1:
            with pytest.warns(UserWarning, match=r"the refresh due at step 2 is late: nothing passed"):
                pruner.step()
        else:
            pruner.step()
    assert not pruner.trajectory
    step(net, optimizer)
    (event,) = pruner.step()
    assert event.step == 4
    with pytest.raises(RuntimeError, match="nothing passed"):
        pruner.refresh()
