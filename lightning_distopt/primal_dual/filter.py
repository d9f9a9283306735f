"""The filter: the largest entries of a residual leave it, what is left stays.

    F = r on the k = max(1, floor(rho d)) places of largest |r|, ties to the lower place;  r <- r - F

It is the package's :class:`~lightning_distopt.compressors.TopK`; zeros, which say nothing, are not sent.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_distopt.compressors import TopK

__all__ = ["take_largest"]

Array = NDArray[np.float64]


def take_largest(residual: Array, density: float) -> tuple[NDArray[np.int32], Array]:
    """Return places (ascending) and values of the largest entries, and set them to 0 in ``residual``.

    ``values at places + residual after == residual before``, bit for bit.

    Args:
        residual: float64, ``(d,)``; changed in place.
        density: rho, in (0, 1]; 1 takes all.
    """
    if density >= 1.0:
        places = np.flatnonzero(residual).astype(np.int32)
    else:
        sent = TopK(density).compress(torch.from_numpy(residual), assume_finite=True).fields
        places = _ties_to_the_lower(residual, sent["indices"].numpy())
    values = residual[places]
    residual[places] = 0.0
    return places, values


def _ties_to_the_lower(residual: Array, places: NDArray[np.int32]) -> NDArray[np.int32]:
    """Exchange places of the smallest magnitude among the chosen for the lowest that hold the same, and drop zeros."""
    sizes = np.abs(residual[places])
    least = sizes.min()
    if least == 0.0:
        return places[sizes > 0.0]
    chosen = int(np.count_nonzero(sizes == least))
    tied = np.flatnonzero(np.abs(residual) == least)
    if tied.size == chosen:
        return places
    return np.sort(np.concatenate([places[sizes > least], tied[:chosen].astype(np.int32)]))
