"""Random directions that are never stored: each is a 64-bit key, and comes back from it, whole or in pieces.

A direction has one entry for each entry of all parameters, laid end to end in the order in which they are given. Entry
``j`` of the direction with key ``k`` is element ``j`` of ``normals(k)``: the same on every rank, in every piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_distopt.compressors.randomness import derive_key, hashes, normals

__all__ = ["combine", "direction_keys", "pieces", "sphere_scales"]

_PIECE = 1 << 16  # normals that are drawn at once: a few MB of temporary memory, and of cache


def direction_keys(seed: int, step: int, purpose: str, samples: Tensor, directions: int) -> Tensor:
    """Return the keys of the directions of some samples of a step, int64 of shape ``(len(samples), directions)``.

    Args:
        seed: the run's.
        step: number of the step.
        purpose: what the directions are for; other purposes get other directions.
        samples: positions in the batch, int64; the ones that a rank has give it its keys.
        directions: of each sample.
    """
    base = derive_key(seed, 0, step, purpose)
    base = base - (1 << 64) if base >> 63 else base
    keys = hashes(torch.tensor(base), samples)
    return hashes(keys[:, None], torch.arange(directions))


def pieces(start: int, stop: int, rows: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the bounds of pieces so small that ``rows`` rows of one can be held as temporary memory."""
    length = max(1, min(stop - start, max(_PIECE // max(rows, 1), 64)))
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


def combine(keys: Tensor, weights: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return ``sum_k weights[k] u_k[start:stop]``, drawing the directions again.

    Args:
        keys: int64, shape ``(K,)``, on the device of the result.
        weights: float64, shape ``(K,)``.
        start: first entry.
        stop: after the last one.
        dtype: of the result, shape ``(stop - start,)``.
    """
    out = torch.zeros(stop - start, dtype=dtype, device=keys.device)
    weights = weights.to(dtype)
    for first, last in pieces(start, stop, min(len(keys), 256)):
        for some in range(0, len(keys), 256):
            part = slice(some, some + 256)
            out[first - start : last - start] += weights[part] @ normals(keys[part], first, last).to(dtype)
    return out


def sphere_scales(keys: Tensor, numel: int) -> Tensor:
    """Return ``1 / |u_k|`` of whole directions of ``numel`` entries, float64 of shape ``(K,)``."""
    squares = torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
    for some in range(0, len(keys), 256):
        part = slice(some, some + 256)
        for first, last in pieces(0, numel, min(len(keys), 256)):
            squares[part] += normals(keys[part], first, last).double().square().sum(1)
    return squares.rsqrt()
