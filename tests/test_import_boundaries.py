"""What `import emp_callbacks` costs, seen from a fresh process."""

import subprocess
import sys

import pytest

HEAVY = ["pytorch_lightning", "lightning", "deepspeed", "transformers", "timm", "torchmetrics", "matplotlib", "scipy"]
HEAVY += ["torch.distributed.fsdp", "torch.distributed.tensor"]  # a second each


def imported_by(code: str) -> list[str]:
    check = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True)
    return eval(done.stdout)


@pytest.mark.processes
def test_the_package_imports_only_torch():
    assert imported_by("import emp_callbacks; emp_callbacks.EMPPruner, emp_callbacks.emp_mask") == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "package"), [("EMPCallback", "pytorch_lightning"), ("EffectiveNumber", "torchmetrics")]
)
def test_the_check_can_fail(name, package):
    assert package in imported_by(f"import emp_callbacks; emp_callbacks.{name}")


def test_an_unknown_name_is_an_attribute_error():
    import emp_callbacks

    with pytest.raises(AttributeError, match="no attribute 'EMPCalback'"):
        _ = emp_callbacks.EMPCalback


def test_every_public_name_exists():
    import emp_callbacks

    for name in emp_callbacks.__all__:
        assert getattr(emp_callbacks, name).__doc__
