"""Curvature of a loss at a model's weights: the trace of the Hessian and its product with one step.

Own loops over torch's double backward: forward-mode products (torch.func.jvp) lack formulas for fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from emp_callbacks.extras import needs

Losses = Callable[[], Iterable[Tensor]]
"""Computes the loss of every batch anew, one after the other, with a graph; their mean is the loss."""


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """Tr(H) and how well it is known.

    Attributes:
        mean: Mean over probes, in units of the loss per squared weight.
        low: Lower end of the Student t interval; None with one probe.
        high: Its upper end. The interval speaks of the probes; the batches are what the Hessian is of.
        confidence: Of the interval, in (0, 1).
        probes: Number of random vectors.
    """

    mean: float
    low: float | None
    high: float | None
    confidence: float
    probes: int


def hessian_trace(
    losses: Losses, parameters: Sequence[Tensor], *, probes: int = 16, seed: int = 0, confidence: float = 0.95
) -> TraceEstimate:
    """Return Hutchinson's estimate of Tr(H): the mean of z^T H z over random signs z.

    Costs per batch one forward and backward, kept with its graph, and per probe one more backward through both: about
    2 * probes times a training step in all, and twice its memory. Equal on every machine for one seed.

    Args:
        losses: The loss, batch by batch.
        parameters: Leaf tensors that the Hessian is taken in; the loss must depend on one at least.
        probes: Number of random vectors, >= 1; the error falls with its square root.
        seed: Of the signs.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: An argument lies outside its range, or `losses` gives no batch.
        RuntimeError: The loss depends on none of the parameters, or has no second derivative in torch.

    Source: Hutchinson, Commun. Stat. Simul. Comput. 18 (1989) 1059; Avron and Toledo, J. ACM 58 (2011) 8.

    Examples:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_trace(lambda: [(w**2 * torch.tensor([1.5, 0.5])).sum()], [w], probes=2).mean
        4.0
    """
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; use 0.95 for a 95 % interval")
    needs("Tr(H) with its interval", "study", "scipy")
    from scipy import stats

    found = torch.zeros(probes, dtype=torch.float64)
    batches = 0
    for gradients in _gradients(losses, parameters):
        for probe in range(probes):
            signs = _signs(parameters, seed, probe)
            found[probe] += _dot(_product(gradients, parameters, signs), signs)
        batches += 1
    found /= batches
    mean = float(found.mean())
    if probes == 1:
        return TraceEstimate(mean=mean, low=None, high=None, confidence=confidence, probes=1)
    half = float(stats.t.ppf(0.5 + confidence / 2, probes - 1)) * float(found.std()) / probes**0.5
    return TraceEstimate(mean=mean, low=mean - half, high=mean + half, confidence=confidence, probes=probes)


def quadratic_change(losses: Losses, parameters: Sequence[Tensor], step: Sequence[Tensor]) -> tuple[float, float]:
    """Return g^T d and d^T H d: to second order a step d changes the loss by the first plus half of the second.

    Costs two training steps.

    Args:
        losses: The loss, batch by batch.
        parameters: Where the gradient g and the Hessian H are taken.
        step: d, one tensor for each parameter.

    Raises:
        ValueError: `losses` gives no batch.
    """
    first, second, batches = 0.0, 0.0, 0
    for gradients in _gradients(losses, parameters):
        first += _dot(gradients, step)
        second += _dot(_product(gradients, parameters, step), step)
        batches += 1
    return first / batches, second / batches


def mean_loss(losses: Losses) -> float:
    """Return the mean of the losses.

    Raises:
        ValueError: There is no batch.
    """
    with torch.no_grad():
        values = [float(loss) for loss in losses()]
    if not values:
        raise ValueError(_NO_BATCH)
    return sum(values) / len(values)


_NO_BATCH = "there is no batch to take the loss of: give at least one (--batches 1)"


def _gradients(losses: Losses, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield each batch's gradient with its graph; parameters that a batch does not reach have a zero one."""
    some = False
    with _twice_differentiable():
        for loss in losses():
            some = True
            found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            if all(gradient is None for gradient in found):
                raise RuntimeError("the loss depends on none of the weights that were named")
            yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    if not some:
        raise ValueError(_NO_BATCH)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    # Fused attention has no second derivative; what it computes is the same.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _product(gradients: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """Return the Hessian times a vector. A gradient that depends on no parameter (a linear loss) has none."""
    pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in parameters]
    outputs, vectors = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, parameters, vectors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for h, p in zip(found, parameters, strict=True)]


def _signs(parameters: Sequence[Tensor], seed: int, probe: int) -> list[Tensor]:
    """Return random signs; drawn anew for every batch, so that no probe is held in memory."""
    generator = torch.Generator().manual_seed((seed << 20) + probe)
    drawn = [torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) for p in parameters]
    return [(2 * bits - 1).to(device=p.device, dtype=p.dtype) for bits, p in zip(drawn, parameters, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(left, right, strict=True))
