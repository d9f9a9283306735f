"""A loader that is taken up again gives the batches that were left, and leaves the global generator alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distopt import ResumableLoader

DATA = TensorDataset(torch.arange(20))


class Noisy(torch.utils.data.Dataset[Any]):
    """Numbers with noise drawn when they are read."""

    reads = 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        Noisy.reads += 1
        return index + torch.rand(())


def loader(**settings: Any) -> ResumableLoader:
    return ResumableLoader(Noisy(), batch_size=4, shuffle=True, **settings)


def batches(loader: Any, first: int = 99) -> list[Any]:
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == first:
            break
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rest_of_an_epoch_and_the_next_one(workers: int) -> None:
    torch.manual_seed(3)
    one = loader(num_workers=workers)
    iterator = iter(one)
    for _ in range(2):
        next(iterator)
    place, generator = one.state_dict(), torch.get_rng_state()
    rest, following = list(iterator), list(one)

    torch.manual_seed(99)
    other = loader(num_workers=workers)
    other.load_state_dict(place)
    torch.set_rng_state(generator)
    assert same(list(other), rest)
    assert same(list(other), following)


def test_what_is_before_the_place_is_not_read() -> None:
    one = loader()
    batches(one, 3)
    place = one.state_dict()
    other = loader()
    other.load_state_dict(place)
    Noisy.reads = 0
    list(other)
    assert Noisy.reads == 8


def test_the_place_is_plain_values_that_a_checkpoint_can_hold(tmp_path: Any) -> None:
    one = loader()
    batches(one, 3)
    torch.save(one.state_dict(), tmp_path / "place.pt")
    place = torch.load(tmp_path / "place.pt", weights_only=True)
    assert place["position"] == 3
    other = loader()
    other.load_state_dict(place)
    assert other.state_dict()["position"] == 3, "before it begins, too"


def test_at_the_end_a_new_epoch_begins() -> None:
    torch.manual_seed(3)
    one = loader()
    list(one)
    other = loader()
    other.load_state_dict(one.state_dict())
    assert len(list(other)) == 5
    cut = ResumableLoader.at_end({"began": torch.get_rng_state(), "position": 3})
    other.load_state_dict(cut)
    assert len(list(other)) == 5
    assert ResumableLoader.at_end({"of": "another"}) == {"of": "another"}


def test_lightning_takes_it_for_a_loader_with_a_place() -> None:
    assert isinstance(loader(), _Stateful)
    assert not isinstance(DataLoader(DATA), _Stateful)


def test_what_could_not_be_taken_up_again_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(TypeError, match="got Stream, an IterableDataset"):
        ResumableLoader(Stream())
    with pytest.raises(ValueError, match="`generator` must be None"):
        loader(generator=torch.Generator())
    with pytest.raises(ValueError, match="`persistent_workers` must be False"):
        loader(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match=r"`position` must be in \[0, 5\].*got 6"):
        loader().load_state_dict({"began": torch.get_rng_state(), "position": 6})
    with pytest.raises(TypeError, match="must be that of a `ResumableLoader`"):
        loader().load_state_dict({"position": "3"})
