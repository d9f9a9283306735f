"""Small problems that the tests of the primal-dual engine share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.primal_dual import Server, Shard, Worker
from lightning_distopt.primal_dual.messages import Message

Array = NDArray[np.float64]


def sparse_problem(loss: str, n: int = 400, d: int = 150, seed: int = 0) -> tuple[Array, Array]:
    """Gaussian rows of unit norm with 5 % non-zeros, and targets of a linear model with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.05)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    y = x @ rng.standard_normal(d) + 0.1 * rng.standard_normal(n)
    return x, (y if "squared" in loss and "hinge" not in loss else np.where(y > 0, 1.0, -1.0))


def mismatch(server: Server, workers: list[Worker], flying: list[Message]) -> float:
    """The error of the invariant ``w + sum r_k + in flight == v(alpha)``."""
    left = server.model + sum(worker.residual for worker in workers)
    for message in flying:
        if message.indices is not None:
            left[message.indices] += message.values
        elif message.values.size:
            left += message.values
    return float(np.abs(left - model_of([w.shard for w in workers], [w.alpha for w in workers])).max())


def model_of(shards: list[Shard], alphas: list[Array]) -> Array:
    """v(alpha)."""
    return np.sum([shard.contribution(alpha) for shard, alpha in zip(shards, alphas, strict=True)], axis=0)
