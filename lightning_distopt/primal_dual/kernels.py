"""Compiled loops over CSR rows: passes of dual coordinate ascent, and the two sums of the certificate.

One worker's state in a pass is ``m = base + sigma u``: what the samples see, and the only vector that a pass writes. So
``u = (m - base) / sigma``, and with one worker (sigma = 1) ``m`` is the model itself.

Samples are visited in an order that is a function of (seed, worker, number of the pass), drawn by SplitMix64 here and in
:mod:`lightning_distopt.primal_dual.reference`. With ``bias`` every row has one more entry, 1, at place ``m.size - 1``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, uint64

from lightning_distopt.compressors.kernels.cpu.common import PLAIN, SUMS

__all__ = [
    "add_rows",
    "begin",
    "dual_sum",
    "end",
    "first_repeated",
    "margins",
    "norms",
    "passes",
    "permutation",
    "primal_sum",
    "sdca",
    "step",
]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


@njit(**PLAIN)
def _mixed(x):
    x = (x ^ (x >> uint64(30))) * _M1
    x = (x ^ (x >> uint64(27))) * _M2
    return x ^ (x >> uint64(31))


@njit(**PLAIN)
def permutation(order, key):
    """Fill ``order`` (int32) with the permutation of this key."""
    for i in range(order.size):
        order[i] = i
    state = uint64(key)
    for i in range(order.size - 1, 0, -1):
        state += _GAMMA
        j = ((_mixed(state) >> uint64(32)) * uint64(i + 1)) >> uint64(32)
        kept = order[i]
        order[i] = order[j]
        order[j] = kept


@njit(**PLAIN)
def _sigmoid(u):
    if u >= 0.0:
        return 1.0 / (1.0 + math.exp(-u))
    e = math.exp(u)
    return e / (1.0 + e)


@njit(**PLAIN)
def _logistic(margin, q, beta):
    """Return sigmoid(u) at the root of ``-u - margin - q (sigmoid(u) - beta)``, by Newton within a bracket."""
    low, high = -margin - q * (1.0 - beta), -margin + q * beta
    u = min(max(-margin, low), high)  # the root itself once sigmoid(-margin) = beta
    p = _sigmoid(u)
    for _ in range(25):
        f = -u - margin - q * (p - beta)
        if f > 0.0:
            low = u
        else:
            high = u
        ahead = u + f / (1.0 + q * p * (1.0 - p))
        if ahead < low or ahead > high:
            ahead = 0.5 * (low + high)
        moved = abs(ahead - u)
        u = ahead
        p = _sigmoid(u)
        if moved <= 1e-7:  # Newton squares this
            return p
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


@njit(**SUMS)
def _dot(indices, data, start, end, m):
    z = 0.0
    for p in range(start, end):
        z += data[p] * m[np.uint64(indices[p])]  # unsigned: no look at whether an index counts from the end
    return z


@njit(**SUMS)
def sdca(indptr, indices, data, y, scale, q, alpha, order, m, sigma, loss, s, bias):
    """Step along the coordinates of ``order``, changing ``alpha`` and ``m`` in place; sigma is in the curvature too."""
    last = m.size - 1
    for t in range(order.size):
        i = order[t]
        start, end = indptr[i], indptr[i + 1]
        z = _dot(indices, data, start, end, m)
        if bias:
            z += m[last]
        delta = step(loss, s, alpha[i], y[i], z, sigma * q[i])
        if delta != 0.0:
            alpha[i] += delta
            c = sigma * scale[i] * delta
            for p in range(start, end):
                m[np.uint64(indices[p])] += c * data[p]
            if bias:
                m[last] += c


@njit(**SUMS)
def passes(indptr, indices, data, y, scale, q, alpha, order, keys, m, sigma, loss, s, bias):
    """One pass over all samples for each key."""
    for key in keys:
        permutation(order, key)
        sdca(indptr, indices, data, y, scale, q, alpha, order, m, sigma, loss, s, bias)


@njit(**SUMS)
def margins(indptr, indices, data, w, bias, out):
    """``out[i] = x_i . w``."""
    for i in range(out.size):
        out[i] = _dot(indices, data, indptr[i], indptr[i + 1], w)
        if bias:
            out[i] += w[w.size - 1]


@njit(**SUMS)
def norms(indptr, data, bias, out):
    """``out[i] = |x_i|^2``."""
    for i in range(out.size):
        total = 1.0 if bias else 0.0
        for p in range(indptr[i], indptr[i + 1]):
            total += np.float64(data[p]) * np.float64(data[p])
        out[i] = total


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


@njit(**SUMS)
def primal_sum(indptr, indices, data, y, weight, w, loss, s, bias):
    """Return ``sum_i c_i phi(x_i . w, y_i)``."""
    total = 0.0
    for i in range(y.size):
        z = _dot(indices, data, indptr[i], indptr[i + 1], w)
        if bias:
            z += w[w.size - 1]
        total += weight[i] * _value(loss, s, z, y[i])
    return total


@njit(**SUMS)
def dual_sum(alpha, y, weight, loss, s):
    """Return ``sum_i c_i dual(alpha_i, y_i)``."""
    total = 0.0
    for i in range(y.size):
        total += weight[i] * _dual(loss, s, alpha[i], y[i])
    return total


@njit(**SUMS)
def add_rows(indptr, indices, data, coefficients, bias, out):
    """``out += sum_i coefficients[i] x_i``."""
    for i in range(coefficients.size):
        c = coefficients[i]
        if c != 0.0:
            for p in range(indptr[i], indptr[i + 1]):
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
def first_repeated(indptr, indices, columns):
    """Return the first row that names a column twice or one out of range, -1 if there is none."""
    seen = np.full(0, -1, np.int64)
    for i in range(indptr.size - 1):
        previous, ascending = np.int64(-1), True
        for p in range(indptr[i], indptr[i + 1]):
            j = np.int64(indices[p])
            if j < 0 or j >= columns:
                return i
            if j <= previous:
                ascending = False
            previous = j
        if not ascending:
            if seen.size == 0:
                seen = np.full(columns, -1, np.int64)
            for p in range(indptr[i], indptr[i + 1]):
                if seen[indices[p]] == i:
                    return i
                seen[indices[p]] = i
    return -1
