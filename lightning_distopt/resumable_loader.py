"""A loader that knows where it is, so that a run interrupted inside of an epoch goes on with the next batch.

Lightning asks a loader that has ``state_dict`` and ``load_state_dict`` for its place when it saves, and tells it when it
resumes; a plain ``DataLoader`` has none, and its epoch begins again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt.strategies.compat import skip_batches

__all__ = ["ResumableLoader"]


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose order can be taken up again in the middle of an epoch, bit for bit.

    What is random in an epoch (the order, the seeds of worker processes) follows from the state that torch's global
    generator had when the epoch began. That state and the number of batches handed out are the loader's place. Without
    worker processes the batches before it are skipped without being read; with them they are read again and dropped,
    so that the workers' random numbers are those of the run that was interrupted.

    Args:
        *args: of ``torch.utils.data.DataLoader``.
        **kwargs: the same. ``generator`` and ``persistent_workers`` are refused: an order drawn from elsewhere, or
            workers whose random numbers go on from epoch to epoch, could not be taken up again.

    Raises:
        TypeError: for an ``IterableDataset``, which has no order to take up.
        ValueError: for ``generator`` or ``persistent_workers``.

    Example::

        def train_dataloader(self):
            return ResumableLoader(self.train_set, batch_size=32, shuffle=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.dataset, IterableDataset):
            raise TypeError(
                f"`ResumableLoader` needs a dataset with an index: got {type(self.dataset).__name__}, an IterableDataset. "
                "Use a loader of its own that has `state_dict` and `load_state_dict`."
            )
        if self.generator is not None:
            raise ValueError(
                "`generator` must be None for a `ResumableLoader`: got a generator, whose state no checkpoint would hold. "
                "Leave it out; orders are drawn from torch's global generator."
            )
        if self.persistent_workers:
            raise ValueError(
                "`persistent_workers` must be False for a `ResumableLoader`: got True, and random numbers of workers that "
                "live on could not be taken up again. Leave it out."
            )
        self._began: Tensor | None = None
        self._position = 0
        self._resumed: tuple[Tensor, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that everything is drawn with the first batch: when Lightning asks a resumed loader for its
        # iterator, it has not told the sampler yet which epoch it is.
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self._began, self._position = torch.get_rng_state(), 0
            batches = super().__iter__()
        else:
            self._began, self._position = resumed
            now = torch.get_rng_state()
            torch.set_rng_state(self._began)
            batches = super().__iter__()
            if self.num_workers:
                for _ in range(self._position):
                    next(batches)
            else:
                skip_batches(batches, self._position)
            torch.set_rng_state(now)
        for batch in batches:
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place: ``began``, the generator's state when the epoch began, and ``position``, batches handed out."""
        began, position = (self._began, self._position) if self._resumed is None else self._resumed
        return {"began": began, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration there; at the end of an epoch that is a new one.

        Raises:
            TypeError: if the place is none.
            ValueError: if it is outside of the epoch.
        """
        began, position = state.get("began"), state.get("position")
        if type(position) is not int or not (began is None or isinstance(began, Tensor)):
            raise TypeError(
                f"`state` must be that of a `ResumableLoader`: got keys {sorted(state)}. Use the same loader."
            )
        if not 0 <= position <= len(self):
            raise ValueError(
                f"`position` must be in [0, {len(self)}], the batches of an epoch: got {position}. Resume with the data, "
                "the batch size and the number of processes of the run that was interrupted."
            )
        self._resumed = None if began is None or not 0 < position < len(self) else (began.cpu(), position)

    @staticmethod
    def at_end(state: Any) -> Any:
        """Return the place after the last batch that an epoch is to have, which may be before the loader's last one."""
        ours = isinstance(state, dict) and state.keys() == {"began", "position"}
        return {"began": None, "position": 0} if ours else state
