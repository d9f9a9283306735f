"""One worker, in process: passes of SDCA straight on the model, and a certificate now and then.

With K = 1 nothing travels, sigma' = 1, and ``m`` of the passes is w itself. A certificate costs about half a pass, so it is
taken after 1, 2, 4, ... passes, and earlier where the rate so far says that the tolerance will have been reached. Small
problems, of which a thousand passes take milliseconds, are solved further than ``tol`` asks, so that what they give does not
depend on the order of samples; a small quadratic one ends with a direct solve.

Where dual variables stop at bounds (hinges), most stay there: a pass over all samples is followed by passes over those that
it moved or that are between the bounds. A certificate looks at all samples anyway, so it also says whom a step would move:
those are the next. Nothing is left out for good, so the certificate needs no second look.
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
from lightning_distopt.primal_dual.certificate import ROUNDING, Certificate, Row, certify, rounds_ahead
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
    """Return ``(w, alpha, certificate, history)``, with v(alpha) computed anew at the end, from which w differs by rounding.

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
    w = np.zeros(shard.dim) if alpha is None else shard.contribution(at)
    history: list[Row] = []
    primal = 0.0

    def note(done: int, v: Array) -> Certificate:
        found = certify(primal, shard.dual_sum(at), v, shard.lam, shard.total, w)
        history.append(Row(time.perf_counter() - start, done, found.primal, found.dual, found.gap))
        if on_row is not None:
            on_row(history[-1])
        return found

    entries = shard.nonzeros if local_steps is None else local_steps * max(1, shard.nonzeros) / max(1, shard.n)
    ahead, done = max(1, math.ceil(_AT_LEAST / max(1.0, entries))), 0
    at_zero = None if at.any() else shard.primal_at_zero
    if at.any():  # a warm start may be there already
        primal = shard.primal_sum(w)
        found = note(0, w)
        if found.relative <= tol:
            return w, at, found, history
    few = _Few(shard, at, w, seed) if shard.loss.code in (HINGE, SQUARED_HINGE) and local_steps is None else None
    while done < max_rounds:
        some = min(ahead, max_rounds - done)
        if local_steps is not None:
            shard.draws(at, w, 1.0, seed, 0, done * local_steps, some * local_steps)
            done += some
        elif few is not None:
            end = done + some
            while done < end:
                done += few.passes(done, end - done)
        else:
            shard.passes(at, w, 1.0, [pass_key(seed, 0, done + k) for k in range(some)])
            done += some
        primal = shard.primal_sum(w) if few is None else few.primal_sum()
        if note(done, w).relative <= tol:
            break
        ahead = rounds_ahead(history, tol, at_zero)
    if done and shard.n <= _DIRECT and shard.loss.code == SQUARED:
        at = _direct(shard)
    v = shard.contribution(at)
    off, size = kernels.apart(v, w)
    if off > ROUNDING * size:
        w = v
        primal = shard.primal_sum(w)
    return w, at, note(done, v), history


class _Few:
    """Passes over the samples that matter: those that a pass over all has moved or left free, or that a certificate names.

    Args:
        shard: all samples.
        alpha: dual variables, changed in place.
        w: the model, changed in place.
        seed: of the orders.
    """

    def __init__(self, shard: Shard, alpha: Array, w: Array, seed: int) -> None:
        self._shard, self._alpha, self._w, self._seed = shard, alpha, w, seed
        self._before, self._few = np.empty(shard.n), np.empty(shard.n, np.int32)
        self._most = 1.0 if shard.loss.code == HINGE else math.inf
        self._count = shard.n  # of the few, as far as they are known

    def passes(self, done: int, most: int) -> int:
        """Visit all samples, unless the few are known, then up to ``_FEW_PASSES`` times these; return the passes made."""
        shard, enough = self._shard, _FEW * self._shard.n
        whole = int(self._count >= enough)
        if whole:
            self._before[:] = self._alpha
            shard.passes(self._alpha, self._w, 1.0, [pass_key(self._seed, 0, done)])
            self._count = kernels.unsettled(self._alpha, self._before, self._most, self._few)
        few = self._few[: self._count]
        passes = min(_FEW_PASSES, most - whole) if self._count < enough else 0
        for k in range(whole, whole + passes):
            kernels.shuffle(few, np.uint64(pass_key(self._seed, 0, done + k) & (2**64 - 1)))
            shard.visit(self._alpha, self._w, 1.0, few)
        self._count = shard.n
        return whole + passes

    def primal_sum(self) -> float:
        """Return that of the shard; the few are known then."""
        total, self._count = self._shard.primal_and_unsettled(self._w, self._alpha, self._most, self._few)
        return total


def _direct(shard: Shard) -> Array:
    """Return the best alpha of the squared loss: ``alpha + X v(alpha) = y``, a positive definite system in sqrt(c) alpha."""
    bounds = np.append(shard.starts, shard.ends[-1:])
    x = sp.csr_matrix((shard.data, shard.indices, bounds), shape=(shard.n, shard.dim - shard.bias)).toarray()
    x = np.hstack([x.astype(np.float64), np.ones((shard.n, int(shard.bias)))])
    root = np.sqrt(shard.factor * shard.weight)
    rows = root[:, None] * x
    unknown = scipy.linalg.solve(np.eye(shard.n) + rows @ rows.T, root * shard.y, assume_a="pos")
    return np.asarray(shard.y - x @ (rows.T @ unknown))
