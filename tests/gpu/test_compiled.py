"""On a CUDA device: a compiled model, or a compiled optimizer step, trains as one that is not compiled."""

import shutil

import pytest
import torch

from tests.gpu.common import FEATURES, MODES, ON_A_GPU, REHEARSAL, Tolerance, check_alike, forms, trained

COMPILER = "aot_eager" if REHEARSAL else "inductor"  # nothing is gained by a rehearsal of the compiler itself
COMPILED = Tolerance(5e-3, 5e-3, 5e-3)  # a compiler sums in another order
pytestmark = [
    *ON_A_GPU,
    pytest.mark.compiler,
    pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="torch.compile needs a C compiler"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@forms({name: {**MODES, **FEATURES}[name] for name in ("feedback", "freeze", "features")})
def test_a_compiled_model_trains_as_without(settings):
    ours = trained(settings, depth=1, wrap=lambda model: torch.compile(model, backend=COMPILER))
    check_alike(ours, trained(settings, depth=1), COMPILED)


@forms(MODES)
def test_a_compiled_step_trains_as_without(settings):
    def compiled(optimizer):
        return torch.compile(lambda: optimizer.step(), backend=COMPILER)

    check_alike(trained(settings, depth=1, step=compiled), trained(settings, depth=1), COMPILED)
