"""Compiled loops over sparse rows: passes of dual coordinate ascent, and the two sums of the certificate.

Row i has the entries ``starts[i]`` to ``ends[i]`` of ``indices`` and ``data``, so that a shard may be any rows of a matrix
without a copy of their entries.

One worker's state in a pass is ``m = base + sigma u``: what the samples see, and the only vector that a pass writes. So
``u = (m - base) / sigma``, and with one worker (sigma = 1) ``m`` is the model itself.

Samples are visited in an order that is a function of (seed, worker, number of the pass), drawn by SplitMix64 here and in
:mod:`lightning_distopt.primal_dual.reference`. With ``bias`` every row has one more entry, 1, at place ``m.size - 1``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, uint64

from lightning_distopt.compressors.kernels.cpu.common import FUSED, PLAIN, SUMS
from lightning_distopt.primal_dual.prefetch import prefetch

__all__ = [
    "add_rows",
    "apart",
    "begin",
    "dual_sum",
    "end",
    "first_repeated",
    "norms",
    "passes",
    "permutation",
    "primal_and_unsettled",
    "primal_sum",
    "sdca",
    "shuffle",
    "step",
    "unsettled",
]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_FAR = 2**16  # coordinates, above which a model leaves the second-level cache


@njit(**PLAIN)
def _mixed(x):
    x = (x ^ (x >> uint64(30))) * _M1
    x = (x ^ (x >> uint64(27))) * _M2
    return x ^ (x >> uint64(31))


@njit(**PLAIN)
def shuffle(order, key):
    """Bring what is in ``order`` into the order of this key."""
    state = uint64(key)
    for i in range(order.size - 1, 0, -1):
        state += _GAMMA
        j = ((_mixed(state) >> uint64(32)) * uint64(i + 1)) >> uint64(32)
        kept = order[i]
        order[i] = order[j]
        order[j] = kept


@njit(**PLAIN)
def permutation(order, key):
    """Fill ``order`` (int32) with the permutation of this key."""
    for i in range(order.size):
        order[i] = i
    shuffle(order, key)


@njit(**PLAIN)
def _sigmoid(u):
    if u >= 0.0:
        return 1.0 / (1.0 + math.exp(-u))
    e = math.exp(u)
    return e / (1.0 + e)


@njit(**PLAIN)
def _logistic(margin, q, beta):
    """Return sigmoid(u) at the root of ``f(u) = -u - margin - q (sigmoid(u) - beta)``, by Halley's rule within a bracket.

    An exponential is what a step costs, so the last move, at most 1e-3, is made on the Taylor series instead.
    """
    low, high = -margin - q * (1.0 - beta), -margin + q * beta
    u = min(max(-margin, low), high)  # the root itself once sigmoid(-margin) = beta
    for _ in range(25):
        p = _sigmoid(u)
        slope = p * (1.0 - p)
        f = -u - margin - q * (p - beta)
        if f > 0.0:
            low = u
        else:
            high = u
        down = 1.0 + q * slope  # -f'; and -f'' is:
        bend = q * slope * (1.0 - 2.0 * p)
        move = f / (down + 0.5 * f * bend / down)
        if abs(move) <= 1e-3 and down + 0.5 * f * bend / down > 0.5:  # Halley cubes what is left
            return p + slope * move * (1.0 + move * (0.5 * (1.0 - 2.0 * p) + move * (1.0 - 6.0 * slope) / 6.0))
        u += move
        if not low <= u <= high:
            u = 0.5 * (low + high)
    for _ in range(60):
        u = 0.5 * (low + high)
        if -u - margin - q * (_sigmoid(u) - beta) > 0.0:
            low = u
        else:
            high = u
    return _sigmoid(u)


@njit(**PLAIN)
def step(loss, s, alpha, y, z, q):
    """Return the step of one coordinate; codes and formulas are those of ``losses``."""
    if loss == 0:
        return (y - z - alpha) / (1.0 + q)
    if loss == 1:
        return (y - z - 0.5 * alpha) / (0.5 + q)
    beta, margin = y * alpha, y * z
    if loss == 4:
        return y * (_logistic(margin, q, beta) - beta)
    if loss == 3:
        return y * (max(0.0, beta + (1.0 - margin - beta) / (1.0 + q)) - beta)
    slope = 1.0 - margin - s * beta
    if q + s == 0.0:
        return y * ((1.0 if slope > 0.0 else 0.0) - beta)
    return y * (min(1.0, max(0.0, beta + slope / (q + s))) - beta)


@njit(**FUSED)
def _dot(indices, data, start, end, m):
    """Return a row times ``m``, in four sums, so that no product waits for the one before.

    Places are unsigned: there is no look at whether one counts from the end. A vectorised loop would be slower here, since it
    cannot read what the row before has just written.
    """
    first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
    p = start
    while p + 3 < end:
        first += data[p] * m[np.uint64(indices[p])]
        second += data[p + 1] * m[np.uint64(indices[p + 1])]
        third += data[p + 2] * m[np.uint64(indices[p + 2])]
        fourth += data[p + 3] * m[np.uint64(indices[p + 3])]
        p += 4
    while p < end:
        first += data[p] * m[np.uint64(indices[p])]
        p += 1
    return (first + second) + (third + fourth)


@njit(**PLAIN)
def _ask(indices, start, end, m):
    """Ask for the coordinates of ``m`` that a row names."""
    for p in range(start, end):
        prefetch(m, indices[p])


@njit(**FUSED)
def sdca(starts, ends, indices, data, y, weight, factor, q, alpha, order, m, sigma, loss, s, bias):
    """Step along the coordinates of ``order``, changing ``alpha`` and ``m`` in place; sigma is in the curvature too.

    ``factor`` is 1/(lam N). Rows come in no order that a processor could foresee, so they are asked for ahead of time: first
    where they begin, then their entries, and, of a model that is far away, the coordinates that these name.
    """
    last, far, count = m.size - 1, m.size > _FAR, order.size
    for t in range(count):
        if t + 5 < count:
            i = order[t + 5]
            prefetch(starts, i)
            prefetch(ends, i)
        if t + 2 < count:
            i = order[t + 2]
            for p in range(starts[i], ends[i], 8):
                prefetch(data, p)
            for p in range(starts[i], ends[i], 16):
                prefetch(indices, p)
            prefetch(y, i)
            prefetch(weight, i)
            prefetch(q, i)
            prefetch(alpha, i)
        if far and t + 1 < count:
            i = order[t + 1]
            _ask(indices, starts[i], ends[i], m)
        i = order[t]
        start, end = starts[i], ends[i]
        z = _dot(indices, data, start, end, m)
        if bias:
            z += m[last]
        delta = step(loss, s, alpha[i], y[i], z, sigma * q[i])
        if delta != 0.0:
            alpha[i] += delta
            c = sigma * factor * weight[i] * delta
            for p in range(start, end):
                m[np.uint64(indices[p])] += c * data[p]
            if bias:
                m[last] += c


@njit(**FUSED)
def passes(starts, ends, indices, data, y, weight, factor, q, alpha, order, keys, m, sigma, loss, s, bias):
    """One pass over all samples for each key."""
    for key in keys:
        permutation(order, key)
        sdca(starts, ends, indices, data, y, weight, factor, q, alpha, order, m, sigma, loss, s, bias)


@njit(**PLAIN)
def unsettled(alpha, before, most, out):
    """Put into ``out`` the samples whose alpha has moved or is between 0 and ``most``; return how many."""
    count = 0
    for i in range(alpha.size):
        beta = abs(alpha[i])
        out[count] = i
        count += alpha[i] != before[i] or (beta > 0.0 and beta < most)
    return count


@njit(**SUMS)
def norms(starts, ends, data, weight, factor, bias, out):
    """``out[i] = factor weight[i] |x_i|^2``."""
    for i in range(out.size):
        total = 1.0 if bias else 0.0
        for p in range(starts[i], ends[i]):
            total += np.float64(data[p]) * np.float64(data[p])
        out[i] = factor * weight[i] * total


@njit(**PLAIN)
def _value(loss, s, z, y):
    if loss == 0:
        return 0.5 * (z - y) * (z - y)
    if loss == 1:
        return (z - y) * (z - y)
    margin = y * z
    if loss == 4:
        return math.log1p(math.exp(-abs(margin))) + max(0.0, -margin)
    missing = max(0.0, 1.0 - margin)
    if loss == 3:
        return 0.5 * missing * missing
    if missing < s:
        return missing * missing / (2.0 * s)
    return missing - 0.5 * s


@njit(**PLAIN)
def _dual(loss, s, alpha, y):
    if loss == 0:
        return alpha * y - 0.5 * alpha * alpha
    if loss == 1:
        return alpha * y - 0.25 * alpha * alpha
    beta = y * alpha
    if loss == 4:
        total = 0.0
        if beta > 0.0:
            total -= beta * math.log(beta)
        if beta < 1.0:
            total -= (1.0 - beta) * math.log1p(-beta)
        return total
    return beta - 0.5 * (1.0 if loss == 3 else s) * beta * beta


@njit(**FUSED)
def primal_sum(starts, ends, indices, data, y, weight, w, loss, s, bias):
    """Return ``sum_i c_i phi(x_i . w, y_i)``."""
    total, far = 0.0, w.size > _FAR
    for i in range(y.size):
        if far and i + 1 < y.size:
            _ask(indices, starts[i + 1], ends[i + 1], w)
        z = _dot(indices, data, starts[i], ends[i], w)
        if bias:
            z += w[w.size - 1]
        total += weight[i] * _value(loss, s, z, y[i])
    return total


@njit(**FUSED)
def primal_and_unsettled(starts, ends, indices, data, y, weight, w, loss, s, bias, alpha, most, out):
    """:func:`primal_sum`, and into ``out`` the samples whose step at ``w`` is not 0, for the hinges; return sum and how many."""
    total, count, far = 0.0, 0, w.size > _FAR
    smooth = 1.0 if loss == 3 else s
    for i in range(y.size):
        if far and i + 1 < y.size:
            _ask(indices, starts[i + 1], ends[i + 1], w)
        z = _dot(indices, data, starts[i], ends[i], w)
        if bias:
            z += w[w.size - 1]
        total += weight[i] * _value(loss, s, z, y[i])
        beta = y[i] * alpha[i]
        slope = 1.0 - y[i] * z - smooth * beta
        out[count] = i
        count += (slope > 0.0 and beta < most) or (slope < 0.0 and beta > 0.0)
    return total, count


@njit(**SUMS)
def dual_sum(alpha, y, weight, loss, s):
    """Return ``sum_i c_i dual(alpha_i, y_i)``."""
    total = 0.0
    for i in range(y.size):
        total += weight[i] * _dual(loss, s, alpha[i], y[i])
    return total


@njit(**SUMS)
def add_rows(starts, ends, indices, data, factor, weight, alpha, bias, out):
    """``out += factor sum_i weight[i] alpha[i] x_i``."""
    far = out.size > _FAR
    for i in range(alpha.size):
        if far and i + 1 < alpha.size:
            _ask(indices, starts[i + 1], ends[i + 1], out)
        c = factor * weight[i] * alpha[i]
        if c != 0.0:
            for p in range(starts[i], ends[i]):
                out[np.uint64(indices[p])] += c * data[p]
            if bias:
                out[out.size - 1] += c


@njit(**SUMS)
def begin(model, residual, weight, base, m):
    """``base = m = model + weight residual``, in one pass."""
    for j in range(m.size):
        value = model[j] + weight * residual[j]
        base[j] = value
        m[j] = value


@njit(**PLAIN)
def end(m, base, factor, residual):
    """``residual += factor (m - base)``, in one pass; return whether all of it is finite."""
    total = 0.0
    for j in range(m.size):
        moved = factor * (m[j] - base[j])
        total += 0.0 * moved  # NaN as soon as one is not finite
        residual[j] += moved
    return total == 0.0


@njit(**PLAIN)
def apart(v, w):
    """Return the largest ``|v - w|`` and the largest ``|v|``; NaN in either makes the first infinite."""
    most, size = 0.0, 0.0
    for j in range(v.size):
        off = abs(v[j] - w[j])
        most = off if off > most else most
        most = math.inf if off != off else most
        size = max(size, abs(v[j]))
    return most, size


@njit(**PLAIN)
def first_repeated(starts, ends, indices, columns):
    """Return the first row that names a column twice or one out of range, -1 if there is none."""
    seen = np.full(0, -1, np.int64)
    for i in range(starts.size):
        start, end = starts[i], ends[i]
        falls = 0
        for p in range(start + 1, end):
            falls += indices[p] <= indices[p - 1]
        if falls == 0:
            if end > start and (indices[start] < 0 or indices[end - 1] >= columns):
                return i
            continue
        if seen.size == 0:
            seen = np.full(columns, -1, np.int64)
        for p in range(start, end):
            j = indices[p]
            if j < 0 or j >= columns or seen[j] == i:
                return i
            seen[j] = i
    return -1
