"""The mean over ranks of a bucket's tensors, by whatever rounds of communication: what the gradient path works with.

    tensors ──mean_──▶ means, the same bits on every rank
       └─────leave_──▶ what this rank has not sent of them

An :class:`Exchange` averages payloads; a scheme of several rounds (PowerSGD) or another result than a mean of payloads
(majority vote) has none, and is one of these directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_distopt.exchange.base import Collective, Means

__all__ = ["TensorMean"]


class TensorMean(Collective, ABC):
    """Averages tensors over a process group; several buckets may be under way."""

    @abstractmethod
    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Means:
        """Return what all ranks take for the mean of ``tensors``, one 1-D tensor for each.

        A NaN or an infinity on any rank makes something non-finite in the means of all ranks. The tensors are scratch
        from here on until :meth:`leave_`, but what was non-finite in them stays, and nothing else becomes so.

        Args:
            names: one a tensor, the same on all ranks.
            tensors: what this rank contributes: views of ``flat``, end to end.
            flat: the whole bucket, 1-D and contiguous.
            step: number of the exchange; enters the keys of randomness.

        Raises:
            ExchangeError: if a collective failed or timed out.
        """

    def leave_(self, names: Sequence[str], tensors: Sequence[Tensor], means: Sequence[Tensor]) -> None:
        """Make ``tensors`` what this rank has not sent of them: ``tensors_before == sent + tensors_after``."""

    def settle(self, keep: bool) -> None:
        """Take over what the step has changed in memories that are alike on all ranks, or forget it if not ``keep``."""

    def state_dict(self) -> dict[str, Any]:
        """Return these memories; references."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over; the same on all ranks."""
