"""Ranks without data: as many batches as the loader has, and a place where it has one."""

from __future__ import annotations

import itertools

from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt import ResumableLoader
from lightning_distopt.strategies.no_data import NO_BATCH, NoData


class Stream(IterableDataset[int]):
    def __iter__(self) -> itertools.count[int]:
        return itertools.count()


def test_it_is_as_long_and_empty() -> None:
    stand_in = NoData(DataLoader(range(5), batch_size=2))
    assert len(stand_in) == 3
    assert list(stand_in) == [NO_BATCH] * 3
    assert not hasattr(stand_in, "load_state_dict")  # Lightning would look for its place


def test_it_has_no_end_where_the_loader_has_none() -> None:
    stand_in = NoData(DataLoader(Stream()))
    assert not hasattr(stand_in, "__len__") or stand_in.__len__ is None
    assert list(itertools.islice(stand_in, 7)) == [NO_BATCH] * 7


def test_a_loader_with_a_place_has_a_stand_in_with_one() -> None:
    stand_in = NoData(ResumableLoader(range(4)))
    stand_in.load_state_dict({"began": None, "position": 2})  # type: ignore[attr-defined]
    assert stand_in.state_dict() == {}  # type: ignore[attr-defined]
    assert len(list(stand_in)) == 4
