"""The loss table: value, dual term and coordinate step of each loss, in plain numpy.

    P(w)     = 1/N sum_i c_i phi(x_i.w, y_i) + lam/2 |w|^2                      N = sum_i c_i
    D(alpha) = 1/N sum_i c_i dual(alpha_i, y_i) - lam/2 |v(alpha)|^2            dual(a) = -phi*(-a)
    step     = argmax over D of dual(alpha + D) - z D - q/2 D^2

This is the slow reference; :mod:`lightning_distopt.primal_dual.kernels` holds the same formulas compiled.

Source: the specification's loss table (gingsmith/cocoa, arXiv:1910.04235), each step checked against a search.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSIFICATION", "LOSSES", "REGRESSION", "Loss", "loss_named"]

Array = NDArray[np.float64]
SQUARED, TWICE_SQUARED, HINGE, SQUARED_HINGE, LOGISTIC = range(5)


@dataclass(frozen=True)
class Loss:
    """One row of the table.

    Attributes:
        name: what users write.
        code: which formulas the kernels take.
        smoothing: width s of the quadratic part of the hinge; 0 is the plain hinge.
        labels: whether y is -1 or 1 (otherwise any real number).
        c_factor: LIBLINEAR's ``C`` is ``1 / (lam N c_factor)``: 2 for its squared hinge, which has no 1/2.
        formula: for messages and docs.
    """

    name: str
    code: int
    smoothing: float = 0.0
    labels: bool = True
    c_factor: float = 1.0
    formula: str = ""

    def value(self, z: Array, y: Array) -> Array:
        """Return ``phi(z, y)`` for each sample."""
        if self.code == SQUARED:
            return np.asarray(0.5 * (z - y) ** 2)
        if self.code == TWICE_SQUARED:
            return np.asarray((z - y) ** 2)
        margin = y * z
        if self.code == LOGISTIC:
            return np.asarray(np.logaddexp(0.0, -margin))
        missing = np.maximum(0.0, 1.0 - margin)
        if self.code == SQUARED_HINGE:
            return np.asarray(0.5 * missing**2)
        s = self.smoothing
        return np.asarray(np.where(missing < s, missing**2 / (2 * s), missing - s / 2) if s else missing)

    def dual(self, alpha: Array, y: Array) -> Array:
        """Return ``-phi*(-alpha)`` for each sample, for feasible alpha."""
        if self.code == SQUARED:
            return np.asarray(alpha * y - alpha**2 / 2)
        if self.code == TWICE_SQUARED:
            return np.asarray(alpha * y - alpha**2 / 4)
        beta = y * alpha
        if self.code == LOGISTIC:
            inside = np.clip(beta, np.finfo(float).tiny, 1.0)
            outside = np.clip(1.0 - beta, np.finfo(float).tiny, 1.0)
            return np.asarray(-beta * np.log(inside) - (1.0 - beta) * np.log(outside))
        return np.asarray(beta - (self.smoothing if self.code == HINGE else 1.0) * beta**2 / 2)

    def feasible(self, alpha: Array, y: Array) -> Array:
        """Return the nearest alpha for which the dual is finite."""
        if not self.labels:
            return alpha
        return np.asarray(y * np.clip(y * alpha, 0.0, math.inf if self.code == SQUARED_HINGE else 1.0))

    def step(self, alpha: float, y: float, z: float, q: float) -> float:
        """Return the step of one coordinate; ``q = 0`` (an empty row) is in the domain."""
        if self.code == SQUARED:
            return (y - z - alpha) / (1.0 + q)
        if self.code == TWICE_SQUARED:
            return (y - z - alpha / 2) / (0.5 + q)
        beta, margin = y * alpha, y * z
        if self.code == LOGISTIC:
            return y * (_sigmoid(_logistic_root(margin, q, beta)) - beta)
        if self.code == SQUARED_HINGE:
            return y * (max(0.0, beta + (1.0 - margin - beta) / (1.0 + q)) - beta)
        s = self.smoothing
        slope = 1.0 - margin - s * beta
        if q + s == 0.0:
            return y * ((1.0 if slope > 0 else 0.0) - beta)
        return y * (min(1.0, max(0.0, beta + slope / (q + s))) - beta)


def _sigmoid(u: float) -> float:
    return 1.0 / (1.0 + math.exp(-u)) if u >= 0 else math.exp(u) / (1.0 + math.exp(u))


def _logistic_root(margin: float, q: float, beta: float) -> float:
    """Return u with ``-u - margin - q (sigmoid(u) - beta) = 0`` by bisection: the left side falls with u."""
    low, high = -margin - q * (1.0 - beta), -margin + q * beta
    for _ in range(200):
        u = 0.5 * (low + high)
        if -u - margin - q * (_sigmoid(u) - beta) > 0:
            low = u
        else:
            high = u
    return 0.5 * (low + high)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("squared", SQUARED, labels=False, formula="1/2 (z - y)^2"),
        Loss("twice_squared", TWICE_SQUARED, labels=False, c_factor=1.0, formula="(z - y)^2"),
        Loss("hinge", HINGE, formula="max(0, 1 - yz)"),
        Loss("smoothed_hinge", HINGE, smoothing=1.0, formula="1/2 (1 - yz)^2 for yz in [0, 1], linear below"),
        Loss("squared_hinge", SQUARED_HINGE, c_factor=2.0, formula="1/2 max(0, 1 - yz)^2"),
        Loss("logistic", LOGISTIC, formula="log(1 + exp(-yz))"),
    )
}
CLASSIFICATION = ("squared", "hinge", "smoothed_hinge", "squared_hinge", "logistic")
REGRESSION = ("squared", "twice_squared")


def loss_named(name: str, allowed: tuple[str, ...] = tuple(LOSSES)) -> Loss:
    """Return a row of the table.

    Raises:
        ValueError: if there is none of that name among ``allowed``.
    """
    if name not in allowed:
        close = difflib.get_close_matches(str(name), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"`loss` must be one of {', '.join(allowed)}: got {name!r}.{hint}")
    return LOSSES[name]
