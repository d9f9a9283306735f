"""One worker, in process: passes of SDCA straight on the model, and a certificate now and then.

With K = 1 nothing travels, sigma' = 1, and ``m`` of the passes is w itself. A certificate costs about half a pass, so it is
taken after 1, 2, 4, ... passes, and earlier where the rate so far says that the tolerance will have been reached. Small
problems, of which a thousand passes take milliseconds, are solved further than ``tol`` asks, so that what they give does not
depend on the order of samples; a small quadratic one ends with a direct solve.

Where dual variables stop at bounds (hinges), most stay there: a pass over all samples is followed by passes over those that
it moved or that are between the bounds. Nothing is left out for good, so the certificate needs no second look.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.certificate import Certificate, Row, certify
from lightning_distopt.primal_dual.losses import HINGE, SQUARED, SQUARED_HINGE
from lightning_distopt.primal_dual.shard import Shard, pass_key

__all__ = ["solve_alone"]

Array = NDArray[np.float64]
_AT_LEAST = 2**18  # entries visited before the first certificate, some milliseconds
_FEW, _FEW_PASSES = 0.7, 10  # share of the samples that is few, and how often they are visited before all are
_DIRECT = 256  # samples, up to which a system of equations of that size takes milliseconds


def solve_alone(
    shard: Shard,
    tol: float,
    max_rounds: int,
    *,
    alpha: Array | None = None,
    local_steps: int | None = None,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[Array, Array, Certificate, list[Row]]:
    """Return ``(w, alpha, certificate, history)``, with w = v(alpha) computed anew at the end.

    Args:
        shard: all samples.
        tol: of the relative gap.
        max_rounds: passes at most; one over few samples counts too.
        alpha: dual variables to start from, ``(n,)``.
        local_steps: coordinate steps of a round; ``None`` is a pass.
        seed: of the orders of samples.
        on_row: called with every row of the history.
    """
    start = time.perf_counter()
    at = np.zeros(shard.n) if alpha is None else shard.loss.feasible(np.ascontiguousarray(alpha, np.float64), shard.y)
    w = shard.contribution(at)
    history: list[Row] = []

    def note(done: int) -> Certificate:
        found = certify(shard.primal_sum(w), shard.dual_sum(at), w, shard.lam, shard.total)
        history.append(Row(time.perf_counter() - start, done, found.primal, found.dual, found.gap))
        if on_row is not None:
            on_row(history[-1])
        return found

    entries = shard.nonzeros if local_steps is None else local_steps * max(1, shard.nonzeros) / max(1, shard.n)
    ahead, done = max(1, math.ceil(_AT_LEAST / max(1.0, entries))), 0
    if at.any() and note(0).relative <= tol:  # a warm start may be there already
        max_rounds = 0
    while done < max_rounds:
        some = min(ahead, max_rounds - done)
        if local_steps is not None:
            shard.draws(at, w, 1.0, seed, 0, done * local_steps, some * local_steps)
            done += some
        elif shard.loss.code in (HINGE, SQUARED_HINGE):
            end = done + some
            while done < end:
                done += _passes_with_few(shard, at, w, seed, done, end - done)
        else:
            shard.passes(at, w, 1.0, [pass_key(seed, 0, done + k) for k in range(some)])
            done += some
        if note(done).relative <= tol:
            break
        ahead = _rounds_ahead(history, tol)
    if done and shard.n <= _DIRECT and shard.loss.code == SQUARED:
        at = _direct(shard)
    w = shard.contribution(at)
    return w, at, note(done), history


def _passes_with_few(shard: Shard, alpha: Array, w: Array, seed: int, done: int, most: int) -> int:
    """Visit all samples, then up to ``_FEW_PASSES`` times those that moved or are free; return the passes made."""
    before = alpha.copy()
    shard.passes(alpha, w, 1.0, [pass_key(seed, 0, done)])
    beta = np.abs(alpha)
    free = (beta > 0.0) & (beta < (1.0 if shard.loss.code == HINGE else math.inf))
    few = np.flatnonzero(free | (alpha != before)).astype(np.int32)
    passes = min(_FEW_PASSES, most - 1) if few.size < _FEW * shard.n else 0
    order = np.empty(few.size, np.int32)
    for k in range(passes):
        kernels.permutation(order, np.uint64(pass_key(seed, 0, done + 1 + k) & (2**64 - 1)))
        shard.visit(alpha, w, 1.0, few[order])
    return 1 + passes


def _direct(shard: Shard) -> Array:
    """Return the best alpha of the squared loss: ``alpha + X v(alpha) = y``, a positive definite system in sqrt(c) alpha."""
    x = sp.csr_matrix((shard.data, shard.indices, shard.indptr), shape=(shard.n, shard.dim - shard.bias)).toarray()
    x = np.hstack([x.astype(np.float64), np.ones((shard.n, int(shard.bias)))])
    root = np.sqrt(shard.scale)
    rows = root[:, None] * x
    unknown = scipy.linalg.solve(np.eye(shard.n) + rows @ rows.T, root * shard.y, assume_a="pos")
    return np.asarray(shard.y - x @ (rows.T @ unknown))


def _rounds_ahead(history: list[Row], tol: float) -> int:
    """Rounds until the next certificate: as many as were done, or fewer where the gap's rate says so."""
    last = history[-1]
    if len(history) < 2 or last.gap <= 0.0:
        return max(1, last.rounds)
    before = history[-2]
    rate = math.log(max(before.gap, 1e-300) / last.gap) / max(1, last.rounds - before.rounds)
    left = math.log(last.gap / max(tol * max(1.0, abs(last.primal)), 1e-300))
    if rate <= 0.0:
        return max(1, last.rounds)
    return max(1, min(last.rounds, math.ceil(left / rate)))
