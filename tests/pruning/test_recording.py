"""What a CUDA graph may record, and what is refused because its replays would go wrong; no CUDA is needed here."""

import pytest
import torch

from tests.pruning.test_no_waiting import backward, begin, step


@pytest.fixture
def recorded(monkeypatch):
    """Make everything look as if a CUDA graph recorded it."""

    def begin_recording():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin_recording


@pytest.mark.parametrize("mode", ["feedback", "freeze", "project"])
def test_an_optimizer_step_is_refused(mode, recorded):
    net, optimizer, pruner = begin({"mode": mode}, every=100)
    step(net, optimizer, pruner, 0)
    pruner.refresh()
    before = [p.detach().clone() for p in net.parameters()]
    recorded()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"neither count steps nor refresh.*Record forward and backward only"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_gradients_of_freeze_are_refused_and_those_of_feedback_are_not(recorded):
    nets = {mode: begin({"mode": mode}, every=100)[0] for mode in ("feedback", "freeze")}
    recorded()
    backward(nets["feedback"], 0)
    with pytest.raises(RuntimeError, match=r"by the masks of today.*make_graphed_callables"):
        backward(nets["freeze"], 0)


def test_static_features_are_recorded_after_the_first_refresh(recorded):
    net, optimizer, pruner = begin({"target": "features"}, every=100)
    step(net, optimizer, pruner, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"forward pass of '0.act' is recorded"):
            backward(net, 1)
    pruner._refresher.evidence.observe(True, in_eval=False)
    step(net, optimizer, pruner, 1)
    pruner.refresh()
    masks = {layer.name: layer.site.mask for layer in pruner._layers}
    recorded()
    backward(net, 2)
    for layer in pruner._layers:
        layer.put_back(~layer.mask, None)
        assert layer.site.mask is masks[layer.name], "a replay reads the new mask where it read the old one"


@pytest.mark.parametrize("settings", [{"target": "features", "dynamic": True}, {"target": "attention_edges"}])
def test_choices_of_samples_and_rows_are_refused(settings, recorded):
    net, _, _ = begin(settings, every=100)
    recorded()
    with pytest.raises(RuntimeError, match=r"recorded into a CUDA graph"):
        backward(net, 0)


def test_what_gathers_inputs_is_refused_in_its_window_alone(recorded):
    far, near = begin({"criterion": "wanda"}, every=1000)[0], begin({"criterion": "wanda"}, every=1)[0]
    recorded()
    backward(far, 0)
    with pytest.raises(RuntimeError, match=r"recorded into a CUDA graph"):
        backward(near, 0)
