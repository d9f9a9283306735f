"""One round's replies, folded into one copy of the model as they come.

    g = sum_k weight_k (w - y_k) / divisor

Memory does not grow with the number of clients, with one exception: a robust aggregator has to see all updates. The screening of
norms holds the first few back while it knows no typical norm (in the first round).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from logging import getLogger

import torch
from torch import Tensor

from lightning_distopt.errors import ReplyError
from lightning_distopt.federated.privacy import Privacy, clipped_, norm
from lightning_distopt.federated.records import Update
from lightning_distopt.federated.screening import NormHistory, Screening

__all__ = ["Collected"]

_log = getLogger(__name__)


class Collected:
    """What the clients said in one round.

    Args:
        screening: bounds on norms and examples; those of norms are left to clipping under privacy, because a bound that
            depends on the other clients would leak.
        history: norms of the rounds before; those of this round are added.
        uniform: every client counts the same.
        privacy: clip what comes.
        keep: hold on to all updates, for an aggregator that must see them.

    Attributes:
        total: ``sum_k weight_k (w - y_k)`` by name.
        counters: largest value of each integer array.
        weights: by node, of the accepted replies.
        norms: of their updates, before clipping.
        metrics: of the accepted replies.
        refused: how many replies, by reason.
        updates: all accepted ones, where they are kept.
    """

    def __init__(
        self, screening: Screening, history: NormHistory, uniform: bool, privacy: Privacy | None, keep: bool
    ) -> None:
        self.screening, self.history, self.uniform, self.privacy, self.keep = screening, history, uniform, privacy, keep
        self.total: dict[str, Tensor] = {}
        self.counters: dict[str, Tensor] = {}
        self.weights: dict[int, float] = {}
        self.examples: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.refused: Counter[str] = Counter()
        self.updates: list[Update] = []
        self.nbytes = 0
        self._held: list[tuple[Update, float]] = []
        self._typical = history.typical()

    @property
    def accepted(self) -> int:
        """Replies that count, those held back included."""
        return len(self.weights) + len(self._held)

    def refuse(self, node: int, error: ReplyError) -> None:
        """Count a reply that cannot be used, and say why."""
        self.refused[error.reason] += 1
        _log.warning("The reply of node %d is refused (%s): %s.", node, error.reason, error)

    def offer(self, update: Update) -> None:
        """Take an update, or refuse it."""
        self.nbytes += update.nbytes
        if update.node in self.weights or any(update.node == held.node for held, _ in self._held):
            self.refuse(update.node, ReplyError("it has answered already", "duplicate"))
            return
        length = norm(update.displacement)
        waits = self.privacy is None and self._typical is None and self.screening.norm_factor is not None
        if not waits:
            self._take(update, length)
            return
        self._held.append((update, length))
        if len(self._held) >= self.screening.hold:
            self._decide()

    def _decide(self) -> None:
        """Take those held back, or refuse them, by their own median."""
        if self._held:
            self._typical = statistics.median_low(length for _, length in self._held)  # of two, the shorter
        while self._held:
            self._take(*self._held.pop(0))

    def settle(self) -> None:
        """Decide about those held back, now that all have come."""
        self._decide()
        if self.privacy is None:
            self.history.norms.extend(self.norms.values())

    def _take(self, update: Update, length: float) -> None:
        if self.privacy is None:
            problem = self.screening.problem(length, self._typical)
            if problem is not None:
                self.refuse(update.node, ReplyError(problem, "norm"))
                return
        else:
            clipped_(update.displacement, self.privacy.clip)
        examples = min(update.examples, self.screening.max_examples or update.examples)
        weight = 1.0 if self.uniform else examples
        self.weights[update.node], self.norms[update.node] = weight, length
        self.examples[update.node], self.metrics[update.node] = examples, update.metrics
        if self.keep:
            self.updates.append(update)
        else:
            self._fold(update, weight)

    def _fold(self, update: Update, weight: float) -> None:
        for name, displacement in update.displacement.items():
            if name in self.total:
                self.total[name].add_(displacement, alpha=weight)
            else:
                self.total[name] = displacement.mul_(weight)
        for name, counter in update.counters.items():
            self.counters[name] = torch.maximum(self.counters[name], counter) if name in self.counters else counter

    def mean(self, divisor: float) -> Mapping[str, Tensor]:
        """Return ``total / divisor``."""
        return {name: total / divisor for name, total in self.total.items()}
