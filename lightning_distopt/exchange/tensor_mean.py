"""The mean over ranks of a bucket's tensors, by whatever rounds of communication: what the gradient path works with.

    tensors ──mean_──▶ MeanTensors ──write_──▶ means, the same bits on every rank
       └──────────────────────────────leave_──▶ what this rank has not sent of them

What ``mean_`` returns takes as little memory as what travelled: means of many buckets can wait for each other.

An :class:`Exchange` averages payloads; a scheme of several rounds (PowerSGD) or another result than a mean of payloads
(majority vote) has none, and is one of these directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_distopt.exchange.base import Collective

__all__ = ["Averaging", "MeanTensors", "TensorMean"]


class MeanTensors(ABC):
    """The means of a bucket's tensors, which are there and not yet decoded, alike on all ranks."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether all means are finite: the same answer on all ranks."""

    @abstractmethod
    def write_(self, out: Tensor) -> None:
        """Write the means, end to end, to a 1-D tensor of the bucket's size, whose old values count for nothing."""

    def leave_(self, tensors: Sequence[Tensor]) -> None:  # noqa: B027
        """Make what was handed to ``mean_`` what this rank has not sent of it: ``before == sent + after``."""


Averaging: TypeAlias = Generator[None, None, MeanTensors]
"""Work in stages, see :data:`lightning_distopt.exchange.base.Steps`, which returns means at its end."""


class TensorMean(Collective, ABC):
    """Averages tensors over a process group; several buckets may be under way."""

    @abstractmethod
    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Averaging:
        """Return what all ranks take for the mean of ``tensors``.

        A NaN or an infinity on any rank makes the means of all ranks not finite. The tensors are scratch from here on
        until :meth:`MeanTensors.leave_`, but what was non-finite in them stays, and nothing else becomes so.

        Args:
            names: one a tensor, the same on all ranks.
            tensors: what this rank contributes: views of ``flat``, end to end.
            flat: the whole bucket, 1-D and contiguous.
            step: number of the exchange; enters the keys of randomness.

        Raises:
            ExchangeError: if a collective failed or timed out.
        """

    def settle(self, keep: bool) -> None:
        """Take over what the step has changed in memories that are alike on all ranks, or forget it if not ``keep``."""

    def state_dict(self) -> dict[str, Any]:
        """Return these memories; references."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over; the same on all ranks."""
