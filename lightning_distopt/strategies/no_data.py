"""Stands in for a data loader on ranks that read no data: as many batches as rank 0 has, each of them nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["NO_BATCH", "NoData", "has_length"]

NO_BATCH: tuple[()] = ()


def has_length(loader: Any) -> bool:
    """Whether a loader knows how many batches it has."""
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def _always() -> bool:
    return True


class NoData:
    """As long as another loader, and empty: no worker is started, no sample read.

    Args:
        loader: whose length is taken.
        more: says whether another batch comes, where the loader has no length.
    """

    def __new__(cls, loader: Any, more: Callable[[], bool] = _always) -> NoData:
        """Choose the form without a length for a loader without one, and the one with a place for a loader with one."""
        placed = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if not has_length(loader):
            return super().__new__(_StreamPlaced if placed else _Stream)
        return super().__new__(_Placed if placed else cls)

    def __init__(self, loader: Any, more: Callable[[], bool] = _always) -> None:
        self._loader, self._more = loader, more

    def __iter__(self) -> Iterator[tuple[()]]:
        for _ in range(len(self._loader)):
            yield NO_BATCH

    def __len__(self) -> int:
        return len(self._loader)


class _Stream(NoData):
    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[()]]:
        while self._more():
            yield NO_BATCH


class _Placed(NoData):
    """For a loader that can be taken up again: Lightning wants a place on all ranks, and counts batches itself."""

    def state_dict(self) -> dict[str, Any]:
        """Return no place."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave it to Lightning to stop at the end of the epoch."""


class _StreamPlaced(_Stream, _Placed):
    pass
