"""Stands in for a data loader on ranks that read no data: as many batches as rank 0 has, each of them nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["NO_BATCH", "NoData"]

NO_BATCH: tuple[()] = ()


class NoData:
    """As long as another loader, and empty: no worker is started, no sample read.

    Args:
        loader: whose length is taken.
    """

    def __new__(cls, loader: Any) -> NoData:
        """Choose the form without a length for a loader without one, and the one with a place for a loader with one."""
        placed = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        try:
            len(loader)
        except (TypeError, NotImplementedError):
            return super().__new__(_EndlessPlaced if placed else _Endless)
        return super().__new__(_Placed if placed else cls)

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[()]]:
        for _ in range(len(self._loader)):
            yield NO_BATCH

    def __len__(self) -> int:
        return len(self._loader)


class _Endless(NoData):
    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[()]]:
        while True:
            yield NO_BATCH


class _Placed(NoData):
    """For a loader that can be taken up again: Lightning wants a place on all ranks, and counts batches itself."""

    def state_dict(self) -> dict[str, Any]:
        """Return no place."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave it to Lightning to stop at the end of the epoch."""


class _EndlessPlaced(_Endless, _Placed):
    pass
