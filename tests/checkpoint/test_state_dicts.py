"""Weights are found under the keys that people keep them under, and never guessed among several."""

import pytest
import torch
from torch import nn

from emp_callbacks.checkpoint.reading import read_checkpoint
from emp_callbacks.checkpoint.state_dicts import find_weights

STATE = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(3, 2)}
OTHER = {"a.weight": torch.zeros(2, 3), "b.weight": torch.ones(3, 2)}


def adam():
    """Return the state of an optimizer after a step."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def found(held):
    return find_weights(held, "x.pt")


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "module", "net", "network", "weights", "params"]
)
def test_a_known_key_is_taken_without_a_word(key):
    held = {"epoch": 3, "step": torch.tensor(7), "optimizer": adam(), key: STATE, "hyper_parameters": {"lr": 0.1}}
    assert found(held) == (STATE, ())


def test_keys_may_lie_over_each_other():
    assert found({"model": {"state_dict": STATE, "epoch": 3}}).tensors == STATE
    assert found({"state_dict": {"model": STATE}}).tensors == STATE
    assert found({"model": {"module": STATE}, "optimizer": adam()}).tensors == STATE
    assert found({"state": {"model": STATE, "optimizers": adam()}, "rng": [{"cpu": torch.ones(9)}]}) == (STATE, ())
    assert found(STATE) == (STATE, ())


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "params_ema"])
def test_an_average_stands_back_behind_the_weights_themselves(average):
    tensors, notes = found({"state_dict": STATE, average: OTHER})
    assert tensors == STATE
    assert notes == (f"took the weights under 'state_dict'; an average of them is there, too, under {average!r}",)
    alone = found({average: OTHER, "optimizer": adam()})
    assert (alone.tensors, alone.notes) == (OTHER, (f"took the weights under {average!r}",))


def test_the_only_other_key_is_taken_and_named():
    held = {"student": STATE, "iteration": torch.tensor(7), "optimizer": adam()}
    assert found(held) == (STATE, ("took the weights under 'student'",))


@pytest.mark.parametrize(
    "held",
    [
        {"student": STATE, "teacher": OTHER, "optimizer": adam(), "epoch": 3},
        {"generator": STATE, "discriminator": OTHER},
        {"state_dict": STATE, "model": OTHER},
    ],
    ids=lambda held: next(iter(held)),
)
def test_several_models_are_named_and_none_is_chosen(held):
    first, second, *_ = held
    says = rf"x.pt holds several models: '{first}' \(2 tensors\), '{second}' \(2 tensors\); save the one you mean: "
    with pytest.raises(ValueError, match=says + rf"torch.save\(torch.load\('x.pt'\)\['{first}'\], 'weights.pt'\)"):
        found(held)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optim", "opt"])
def test_an_optimizers_state_is_never_taken_for_weights(key):
    momenta = {"a.weight": torch.ones(3, 3)} if key != "opt" else {"param_groups": [], "flat": torch.ones(3, 3)}
    for state in (adam(), momenta):
        with pytest.raises(ValueError, match=rf"x.pt holds no state dict \(name -> tensor\), but a dict of '{key}'"):
            found({key: state})


def test_an_optimizers_state_beside_weights_is_no_choice():
    for other in ("optimizer", "lr_scheduler", "scaler", "rng_state", "callbacks"):
        assert found({"generator": STATE, other: OTHER}).tensors == STATE
    assert found(adam() | {"model": STATE}).tensors == STATE


def test_a_mapping_that_holds_itself_comes_to_an_end():
    held = {}
    held["model"] = held
    with pytest.raises(ValueError, match="holds no state dict"):
        found(held)


def test_a_module_in_a_file_is_no_state_dict(tmp_path):
    torch.save({"model": nn.Linear(2, 2), "epoch": 3}, tmp_path / "yolo.pt")
    with pytest.raises(ValueError, match="keeps 'model' as a Python object, and emp never runs code"):
        find_weights(read_checkpoint(tmp_path / "yolo.pt"), "yolo.pt")


PACKED = {
    "gptq": {"up.qweight": torch.ones(1, 16, dtype=torch.int32), "up.scales": torch.ones(1, 16)},
    "bitsandbytes": {"up.weight": torch.ones(64, 1, dtype=torch.uint8), "up.weight.absmax": torch.ones(2)},
    "nf4": {"up.weight": torch.ones(64, 1), "up.weight.quant_state.bitsandbytes__nf4": torch.ones(2)},
    "compressed": {"up.weight_packed": torch.ones(2, 2, dtype=torch.int32)},
    "torch": {"fc._packed_params._packed_params": (torch.ones(2), None), "fc.scale": torch.tensor(1.0)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_of_a_quantized_model_are_refused(kind):
    with pytest.raises(ValueError, match=r"packed weights of a quantized model \((up|fc)\..*take the model"):
        found({**PACKED[kind], "embed.weight": torch.ones(4, 4)})


def test_what_zero_3_leaves_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"names without values, as ZeRO-3 leaves them; python zero_to_fp32.py"):
        found({"module": {name: torch.empty(0) for name in STATE}, "param_shapes": [{"a.weight": torch.Size([2, 3])}]})


def test_a_name_that_no_file_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"names a tensor 'a\\udcff'"):
        found({"a\udcff": torch.ones(2)})
