"""Samples -> shards: which worker gets which rows of a CSR matrix, whose entries all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.losses import Loss, loss_named
from lightning_distopt.primal_dual.shard import Shard

__all__ = ["as_csr", "make_shard", "parts", "shards_of"]

Array = NDArray[np.float64]
_BLOCK, _BLOCKS = 64, 512


def parts(n: int, workers: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of each worker, ascending: a seeded random partition into parts of equal size, up to a block.

    Many samples are divided by blocks of consecutive rows, at least 512 a worker and at most 64 rows long: memory is read
    much faster in pieces that a processor can foresee, and samples in the order of their labels are divided evenly all the same.
    """
    if workers == 1:
        return [np.arange(n, dtype=np.int64)]
    block = max(1, min(_BLOCK, n // (_BLOCKS * workers)))
    blocks = -(-n // block)
    order, owner = np.empty(blocks, np.int32), np.empty(blocks, np.int32)
    kernels.permutation(order, np.uint64(derive_key(seed, 0, 0, "partition") & (2**64 - 1)))
    owner[order] = np.arange(blocks, dtype=np.int32) % workers
    owner = np.repeat(owner, block)[:n]
    return [np.flatnonzero(owner == k) for k in range(workers)]


def as_csr(x: Any) -> Any:
    """Return samples as CSR with float32 or float64 values; what is CSR of these already is not copied.

    Raises:
        DataError: if a value is not finite, or a row names a feature twice.
    """
    if not sp.issparse(x):
        x = np.asarray(x)
        x = sp.csr_matrix(x if x.dtype in (np.float32, np.float64) else x.astype(np.float64))
    elif x.format != "csr":
        x = x.tocsr()
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float64)
    if not np.isfinite(x.data.sum(dtype=np.float64)) and not np.isfinite(x.data).all():
        bad = int(np.flatnonzero(~np.isfinite(x.data))[0])
        row = int(np.searchsorted(x.indptr, bad, side="right")) - 1
        raise DataError(f"`X` must not hold NaN or infinity: got {x.data[bad]} in row {row}. Remove or replace it.")
    repeated = int(kernels.first_repeated(x.indptr[:-1], x.indptr[1:], x.indices, x.shape[1]))
    if repeated >= 0:
        raise DataError(
            f"`X` must name each feature once a row, below {x.shape[1]}: row {repeated} does not. Call `X.sum_duplicates()`."
        )
    return x


def make_shard(
    x: Any,
    y: Array,
    loss: Loss,
    lam: float,
    total: float,
    weight: Array | None = None,
    bias: bool = False,
    rows: NDArray[np.int64] | None = None,
) -> Shard:
    """Return the shard that holds the rows of ``x`` (CSR), or some of them; entries are shared, not copied."""
    starts, ends = x.indptr[:-1], x.indptr[1:]
    ones = np.ones(x.shape[0]) if weight is None else weight
    if rows is not None:
        starts, ends, y, ones = starts[rows], ends[rows], y[rows], ones[rows]
    return Shard(starts, ends, x.indices, x.data, y, ones, x.shape[1], loss, lam, total, bias)


def shards_of(
    x: Any,
    y: Array,
    workers: int,
    *,
    loss: str = "logistic",
    lam: float = 1e-4,
    weight: Array | None = None,
    bias: bool = False,
    seed: int = 0,
    rows: Sequence[NDArray[np.int64]] | None = None,
) -> list[Shard]:
    """Divide samples among workers: what :func:`simulate` takes.

    Args:
        x: samples, CSR or dense, ``(n, d)``.
        y: targets, ``(n,)``; -1 and 1 for losses of labels.
        workers: K.
        loss: name of a row of the loss table.
        lam: strength of the regulariser, above 0.
        weight: of each sample, from 0; ``None`` is 1.
        bias: append the constant feature 1.
        seed: of the partition.
        rows: rows of each worker, instead.

    Raises:
        ValueError: for an unknown loss.
        DataError: if the samples cannot be used.
    """
    x, y = as_csr(x), np.asarray(y, np.float64)
    ones = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    row, total = loss_named(loss), float(ones.sum())
    if row.labels and not (np.abs(y) == 1).all():
        wrong = y[np.abs(y) != 1][0]
        raise DataError(
            f"`y` must be -1 or 1 for `loss={loss!r}`: got {wrong}. Use an estimator, which takes any labels."
        )
    chosen = parts(len(y), workers, seed) if rows is None else rows
    return [make_shard(x, y, row, lam, total, ones, bias, part) for part in chosen]
