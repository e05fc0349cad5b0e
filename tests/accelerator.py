"""The accelerator's path on a CPU's tensors: what would wait for a device there, and how much is launched.

Tensors that code makes without saying where, or on "cpu", are a host's; what is made of host's tensors alone, too. All
others count as the accelerator's.
"""

import os
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import emp_callbacks
from emp_callbacks.core import device
from emp_callbacks.core.kernels.choice import kernels_serve

PACKAGE = str(Path(emp_callbacks.__file__).parent)
SKIPPED = tuple(str(Path(torch.__file__).parent.parent / name) for name in ("torch", "triton", "numpy"))
OPTIMIZERS = str(Path(torch.optim.__file__).parent)  # whose steps the package calls on behalf of a loop
STANDARD = (str(Path(os.__file__).parent) + os.sep, "<frozen", "<string>", "<eval")

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
READS |= {"nonzero", "argwhere", "masked_select", "equal", "allclose", "unique", "unique_consecutive", "bincount"}
READS |= {"is_nonzero", "__contains__", "__array__"}
MAKES = {"zeros", "ones", "empty", "full", "arange", "tensor", "as_tensor", "rand", "randn", "eye", "from_numpy"}
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view", "_reshape_alias", "movedim",
}  # fmt: skip


class WaitError(AssertionError):
    """Something waited."""


def our_frame():
    """Return the nearest frame outside torch and the standard library if it is the package's; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return None if frame.f_code.co_name == "to_device" else frame
        if name.startswith(OPTIMIZERS):
            return None
        outside = name == __file__ or name.startswith(SKIPPED)
        if not outside and not (name.startswith(STANDARD) and "site-packages" not in name):
            return None
        frame = frame.f_back
    return None


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class Watch:
    """What the package's own frames did.

    Attributes:
        waits: What would have waited, by "operation file:line".
        kernels: Operators that run a kernel, by name.
        launches: Launches of Triton's kernels, by name.
    """

    def __init__(self, refuse):
        self.refuse = refuse
        self.waits, self.kernels, self.launches = Counter(), Counter(), Counter()
        self.host = WeakIdKeyDictionary()

    def is_hosts(self, value):
        return value in self.host

    def wait(self, what):
        frame = our_frame()
        at = f"{what} {Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
        self.waits[at] += 1
        if self.refuse:
            raise WaitError(f"{at} would wait for an accelerator")

    @property
    def count(self):
        """All that was launched."""
        return sum(self.kernels.values()) + sum(self.launches.values())


class _Call:
    """One call of torch by the package, and which of its tensors are a host's."""

    def __init__(self, func, args, kwargs, hosts):
        self.name, self.args, self.kwargs, self.hosts = getattr(func, "__name__", ""), args, kwargs, hosts
        self.given = [*tensors_in(args), *tensors_in(kwargs.values())]
        self.where = [one for one in (kwargs.get("device"), *args) if isinstance(one, (str, torch.device))]
        self.all_hosts = bool(self.given) and all(map(hosts, self.given))
        self.goes = any(isinstance(one, torch.device) for one in self.where)

    @property
    def waits(self):
        special = {
            "__getitem__": self._index_waits,
            "__setitem__": self._index_waits,
            "to": lambda: self.all_hosts if self.goes else "cpu" in self.where and not self.all_hosts,
            "tensor": lambda: self.goes,
            "as_tensor": lambda: self.goes,
            "copy_": lambda: len({self.hosts(one) for one in self.given}) > 1,
            "repeat_interleave": lambda: len(self.given) > 1 and "output_size" not in self.kwargs,
        }
        if self.name in special:
            return special[self.name]()
        return self.name in READS and bool(self.given) and not self.all_hosts

    @property
    def gives_hosts(self):
        made = self.name in MAKES and not self.given and self.where in ([], ["cpu"])
        return made or self.name == "cpu" or "cpu" in self.where or (self.all_hosts and not self.goes)

    def _index_waits(self):
        indices = self.args[1] if isinstance(self.args[1], tuple) else (self.args[1],)
        return not self.hosts(self.args[0]) and any(map(self._waits_as_index, indices))

    def _waits_as_index(self, index):
        """Whether its values say how much is selected, or it has to be sent."""
        if isinstance(index, torch.Tensor) and index.dim():
            return index.dtype in (torch.bool, torch.uint8) or self.hosts(index)
        return isinstance(index, (list, torch.Tensor))


class _Calls(TorchFunctionMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if our_frame() is None:
            result = func(*args, **kwargs)
            # What `to_device` gives is a device's, and here would be the host's own tensor.
            return result.clone() if func is torch.Tensor.to and self.watch.is_hosts(result) else result
        call = _Call(func, args, kwargs, self.watch.is_hosts)
        if call.waits:
            self.watch.wait(call.name)
        result = func(*args, **kwargs)
        if call.gives_hosts:
            for value in tensors_in([result]):
                self.watch.host[value] = True
        return result


class _Kernels(TorchDispatchMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE and our_frame() is not None:
            self.watch.kernels[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(refuse=True):
    """Inside the block nothing that the package does may wait for an accelerator; refuse=False: counts what does.

    Yields:
        A `Watch`.
    """
    watch = Watch(refuse)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        _count_launches(patch, watch)
        stack.enter_context(_Kernels(watch))
        stack.enter_context(_Calls(watch))
        yield watch


def _count_launches(patch, watch):
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (InterpretedFunction, JITFunction):
        inner = kind.run

        def run(self, *args, _inner=inner, **kwargs):
            watch.launches[self.fn.__name__] += 1
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                return _inner(self, *args, **kwargs)

        patch.setattr(kind, "run", run)


@contextmanager
def accelerator_path(triton=True):
    """Inside the block a CPU's tensors are worked on as an accelerator's, with Triton's kernels or torch's alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_AT_ONCE", set())
        patch.setenv("EMP_TRITON", "1" if triton else "0")
        assert kernels_serve([torch.zeros(1)]) == triton
        yield
