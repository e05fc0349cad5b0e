"""Evidence of a checkpoint is that of these layers, or it is refused."""

import pytest
import torch

from emp_callbacks.checkpoint.evidence import check_evidence
from tests.pruning.test_resume import SETTINGS, Run

DOUBLE = torch.float64


@pytest.fixture
def layers():
    return Run(SETTINGS["neurons taylor"]).pruner._layers  # one layer "0" of 9 units


def fits(name, value, batches, layers):
    try:
        return check_evidence(batches, {name: value}, layers, []) == (batches, {name: value})
    except ValueError as error:
        return "\n" in str(error)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("units:0:4", torch.ones(9, dtype=DOUBLE), True),
        ("units:0:-1", torch.ones(9, dtype=DOUBLE), True),
        ("units:0:4", torch.ones(9), False),
        ("units:0:4", torch.ones(8, dtype=DOUBLE), False),
        ("units:0:four", torch.ones(9, dtype=DOUBLE), False),
        ("units:2:4", torch.ones(9, dtype=DOUBLE), False),
        ("units:0:apart", torch.ones(2, 9, dtype=DOUBLE), True),
        ("units:0:apart", torch.ones(3, 9, dtype=DOUBLE), False),
        ("units:0:folded", torch.ones(2, 9, dtype=DOUBLE), True),
        ("units:0:folded", torch.ones(9, dtype=DOUBLE), False),
        ("folded", torch.tensor(7), True),
        ("folded", torch.tensor(-7), False),
        ("folded", torch.tensor(7.0), False),
        ("folded", torch.ones(9, dtype=torch.int64), False),
        ("site:0:total", torch.ones(9, dtype=DOUBLE), False),
        ("weight:0.weight", torch.ones(9, 6), False),
        ("units:0:4", torch.ones(9, dtype=DOUBLE).to_sparse(), False),
        ("units:0:4", [1.0] * 9, False),
    ],
)
def test_names_shapes_and_types_are_those_of_the_layers(name, value, expected, layers):
    assert fits(name, value, [4, 5], layers) == expected


@pytest.mark.parametrize("batches", [None, (4, 5), [4.0], [True], ["4"], 3])
def test_batches_are_a_list_of_steps(batches, layers):
    with pytest.raises(ValueError, match="the steps of its gradients are"):
        check_evidence(batches, {}, layers, [])
