"""What travels between a worker and the server, and how many bytes that is.

    header   [magic, run, kind, seq, version, encoding, entries, scalars]     int64[8], always, first
    indices  ascending coordinates, only if the vector is sparse               int32[entries]
    values   of those coordinates, or of all                                   float64[entries]
    scalars  sums of the certificate                                           float64[scalars]

A vector is dense where that is fewer bytes: 12 an entry against 8 a coordinate. Empty parts are not sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEADER_BYTES", "Kind", "Message", "is_dense", "vector"]

HEADER_BYTES = 64
_SPARSE_ENTRY, _DENSE_ENTRY = 12, 8
Array = NDArray[np.float64]
Places = NDArray[np.int32]


class Kind(IntEnum):
    """What a message says.

    A worker sends HELLO (who it is), UPDATE (its largest entries), RESIDUAL (the rest, and its share of the dual), LOSSES
    (its share of the primal), FINAL (its exact part of the model); the server sends REPLY (what changed), MODEL (all of
    it), SYNC (send the rest), EVALUATE (a model, to keep or only to evaluate), FINISH, STOP, and ERROR.
    """

    HELLO = 0
    UPDATE = 1
    RESIDUAL = 2
    LOSSES = 3
    FINAL = 4
    REPLY = 11
    SYNC = 12
    EVALUATE = 13
    FINISH = 14
    STOP = 15
    ERROR = 16
    MODEL = 17


def _empty() -> Array:
    return np.empty(0)


@dataclass(frozen=True)
class Message:
    """One message; vectors are not changed after they are in one.

    Attributes:
        kind: what it says.
        version: of the server's model, that it belongs to.
        indices: places of ``values``; ``None`` if they are all coordinates, or none.
        values: float64.
        scalars: float64; their meaning depends on the kind.
        purpose: under which the meter counts it: "update", "flush", "certificate" or "setup".
    """

    kind: Kind
    version: int = 0
    indices: Places | None = None
    values: Array = field(default_factory=_empty)
    scalars: Array = field(default_factory=_empty)
    purpose: str = "update"

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        places = 0 if self.indices is None else self.indices.nbytes
        return HEADER_BYTES + places + self.values.nbytes + self.scalars.nbytes


def is_dense(entries: int, dim: int) -> bool:
    """Whether a vector with so many entries is fewer bytes when all of it is sent."""
    return entries * _SPARSE_ENTRY > dim * _DENSE_ENTRY


def vector(indices: Places | None, values: Array, dim: int, whole: Array | None = None) -> tuple[Places | None, Array]:
    """Return the cheaper encoding of a vector: its entries at ``indices``, or all of it.

    Args:
        indices: ascending places, or ``None`` for all.
        values: at those places.
        dim: of the vector.
        whole: what a dense message copies; ``None`` puts 0 everywhere else.
    """
    if indices is None:
        return None, values.copy() if whole is None else whole.copy()
    if not is_dense(indices.size, dim):
        return indices, values
    dense = np.zeros(dim) if whole is None else whole.copy()
    dense[indices] = values
    return None, dense
