"""Compiled twins of the plain-torch code: one pass over memory where torch takes many.

:func:`kernels_for` chooses by device and dtype, and the caller falls back to plain torch where it returns ``None``. numba
compiles for the CPU, Triton for GPUs. Every kernel is tested equal to the plain code. What it may do differently is the
order of a sum, so a level or scale can differ in its last bits; all that is drawn, packed and left over is the same bit
for bit.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["kernels_for", "kernels_of", "reference_only"]


class _Library(NamedTuple):
    module: str
    needs: str
    cure: str


_LIBRARIES = {
    "cpu": _Library(
        "cpu",
        "numba",
        "Install it (extra `fast`), or let the variable NUMBA_CACHE_DIR name a folder that can be written.",
    ),
    "cuda": _Library(
        "cuda",
        "triton",
        "It comes with torch's CUDA packages on Linux, and needs a C compiler (`gcc`) to start kernels.",
    ),
}
_enabled = True


def kernels_for(flat: Tensor) -> ModuleType | None:
    """Return the kernels for a 1-D contiguous tensor, or ``None`` where plain torch is to be used."""
    if not _enabled or flat.dtype is not torch.float32 or not flat.numel():
        return None
    return _load(flat.device.type)


def kernels_of(device: torch.device) -> str:
    """Return the name of the library that encodes float32 tensors on ``device``: ranks must agree on it."""
    found = _load(device.type) if _enabled else None
    return found.__name__.rpartition(".")[2] if found else "torch"


@cache
def _load(device: str) -> ModuleType | None:
    library = _LIBRARIES.get(device)
    if library is None:
        return None
    try:
        return importlib.import_module(f"{__name__}.{library.module}")
    # The latter: numba finds no folder for what it compiled, or Triton cannot start a first kernel.
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"Compressing on {device} falls back to plain torch, several times slower: `{library.needs}` cannot be used "
            f"({error}). {library.cure}",
            stacklevel=2,
        )
        return None


@contextmanager
def reference_only() -> Iterator[None]:
    """Use plain torch inside, the slow reference."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
