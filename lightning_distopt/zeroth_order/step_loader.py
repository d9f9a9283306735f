"""A loader that counts steps: for optimizers that draw their samples themselves from the whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

__all__ = ["Samples", "StepLoader"]


class StepLoader:
    """An epoch of ``steps`` optimizer steps over ``dataset``; loads nothing itself.

    A ``BlackBoxModule`` fetches the samples that its optimizer draws. An ordinary ``DataLoader`` works as well, but its
    batches are loaded for nothing.

    Args:
        dataset: ``dataset[i]`` is sample i; with ``__getitems__`` or as a ``TensorDataset`` it is asked for whole batches.
        steps: of an epoch, at least 1.
        collate_fn: makes a batch of a list of samples; ``None`` is torch's.

    Raises:
        ValueError: if ``steps`` is not at least 1.
    """

    def __init__(self, dataset: Any, steps: int, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer >= 1: got {steps!r}. Write for example `steps=100`.")
        self.dataset, self.steps, self.collate_fn = dataset, steps, collate_fn
        self._start = self._done = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        for step in range(start, self.steps):
            self._done = step + 1
            yield step

    def state_dict(self) -> dict[str, int]:
        """Return the steps done in this epoch: Lightning then resumes within it."""
        return {"done": self._done % self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next epoch go on after so many steps."""
        self._start = self._done = int(state_dict["done"]) % self.steps


class Samples:
    """Batches of a data set by index; the last one is kept, since one batch is asked for at many points.

    Args:
        dataset: see :class:`StepLoader`.
        collate_fn: makes a batch of a list of samples; ``None`` is torch's.
        prepare: what a batch goes through once, such as the way to the device.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, prepare: Callable[[Any], Any]
    ) -> None:
        self.dataset, self.collate, self.prepare = dataset, collate_fn or default_collate, prepare
        self._last: tuple[Tensor, Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __call__(self, indices: Tensor) -> Any:
        """Return the prepared batch of these indices, int64 of shape ``(b,)``."""
        if self._last is None or not torch.equal(self._last[0], indices):
            self._last = indices.clone(), self.prepare(self._batch(indices))
        return self._last[1]

    def _batch(self, indices: Tensor) -> Any:
        if isinstance(self.dataset, TensorDataset) and self.collate is default_collate:
            return [tensor[indices] for tensor in self.dataset.tensors]
        numbers: Sequence[int] = indices.tolist()
        many = getattr(self.dataset, "__getitems__", None)
        return self.collate(many(numbers) if many is not None else [self.dataset[number] for number in numbers])
