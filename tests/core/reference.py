"""Five-line twins of the fast code: exact rational arithmetic and a stable sort."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def exact_n_eff(scores: Tensor) -> Fraction:
    values = [abs(Fraction(float(s))) for s in scores.detach().double().flatten()]
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / squares if squares else Fraction(0)


def reference_mask(scores: Tensor, beta: float = 1.0) -> Tensor:
    flat = scores.detach().double().abs().flatten().numpy()
    nonzero = int((flat > 0).sum())
    keep = min(max(math.floor(Fraction(str(beta)) * exact_n_eff(scores)), 1), nonzero) if nonzero else flat.size
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return torch.from_numpy(mask).view(scores.shape)
