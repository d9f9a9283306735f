"""The local solver as the specification writes it, in plain Python: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.compressors.randomness import hash64
from lightning_distopt.primal_dual.losses import Loss

__all__ = ["local_sdca", "permutation"]

Array = NDArray[np.float64]


def local_sdca(
    x: Array,
    y: Array,
    weight: Array,
    alpha: Array,
    base: Array,
    order: Sequence[int],
    loss: Loss,
    lam: float,
    total: float,
    sigma: float,
) -> tuple[Array, Array]:
    """Return ``(delta_alpha, u)`` with ``u = 1/(lam N) sum_i c_i delta_alpha_i x_i``; changes nothing.

        z = x_i.(base + sigma u);  D = step(alpha_i + delta_i, y_i, z, sigma c_i |x_i|^2/(lam N))

    Args:
        x: samples, dense, ``(n, d)``.
        y: targets, ``(n,)``.
        weight: c, ``(n,)``.
        alpha: dual variables, ``(n,)``.
        base: what the worker holds, ``(d,)``.
        order: samples to visit.
        loss: a row of the table.
        lam: strength of the regulariser.
        total: N, the weight of all samples of all workers.
        sigma: the safety factor.
    """
    delta, u = np.zeros_like(alpha), np.zeros_like(base)
    for i in order:
        scale = weight[i] / (lam * total)
        z = float(x[i] @ (base + sigma * u))
        q = sigma * scale * float(x[i] @ x[i])
        d = loss.step(float(alpha[i] + delta[i]), float(y[i]), z, q)
        delta[i] += d
        u += scale * d * x[i]
    return delta, u


def permutation(n: int, key: int) -> list[int]:
    """Return the order in which a pass with this key visits ``n`` samples."""
    order = list(range(n))
    for draw, i in enumerate(range(n - 1, 0, -1)):
        j = ((hash64(key, draw) >> 32) * (i + 1)) >> 32
        order[i], order[j] = order[j], order[i]
    return order
