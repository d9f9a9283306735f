"""FedMom as a strategy of Flower: federated averaging with Nesterov momentum on the server.

    send w to a cohort ─▶ replies, one at a time ─▶ screen, (clip) ─▶ mean ─▶ (noise) ─▶ momentum ─▶ w', v' ─▶ saved
                                                       └─ or a robust aggregator that sees them all

Source: arXiv:2002.02090.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable
from logging import getLogger
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from lightning_distopt.errors import CheckpointError, ReplyError
from lightning_distopt.federated.accountant import Accountant, Release
from lightning_distopt.federated.collect import Collected
from lightning_distopt.federated.conversation import ask_names, sorted_by_name, wait_for_nodes
from lightning_distopt.federated.metrics import over_clients
from lightning_distopt.federated.options import (
    Weighting,
    check_aggregator,
    check_arrays,
    check_fractions,
    check_step,
    replies_needed,
    share,
    upload_compressor,
    weighting_of,
)
from lightning_distopt.federated.privacy import Privacy
from lightning_distopt.federated.records import (
    COMPRESSED_KEY,
    COMPRESSOR_KEY,
    ROUND_KEY,
    SEED_KEY,
    Update,
    metric_record,
    read_metrics,
    read_update,
    release,
    tensors_of,
    to_record,
)
from lightning_distopt.federated.sampling import fixed_cohort, key_of, poisson_cohort
from lightning_distopt.federated.screening import NormHistory, Screening
from lightning_distopt.federated.server_step import mean, next_model, private_mean, trainable_names
from lightning_distopt.federated.service import Service, serve
from lightning_distopt.federated.state import ServerState

__all__ = ["FedMom"]

_log = getLogger(__name__)
_GRACE = 600.0  # seconds, for clocks that differ


class FedMom(FedAvg):
    """Average the clients' displacements and take a Nesterov step along the mean.

    ``g = sum_k p_k (w - y_k)``, ``v' = w - lr g``, ``w' = v' + momentum (v' - v)``. Arithmetic is at least float32. Momentum
    moves trainable arrays only: other floating-point arrays (running means) are averaged, integer ones take the largest
    value. A round without enough usable replies leaves ``w`` and ``v`` as they are. What a client sends is checked first, and
    refused and counted if it is late, damaged, not finite, or far too long.

    Cohorts depend on ``seed``, the round and the clients' names only. With a ``state_dir`` the state is saved after every
    round, and :meth:`start` goes on from it, bit for bit.

    Args:
        lr: server step, above 0, or a function of the round (from 1). 1.0 fits ``"normalized"`` and ``"uniform"``; K/M, all
            clients over those of a round, is the same step for ``"paper"``.
        momentum: in [0, 1); 0 is FedAvg. 0.9 makes the effective step ten times longer: lower ``lr`` if it oscillates.
        weighting: ``"normalized"``: by examples, over the replies of the round; ``"paper"``: examples over ``total_examples``
            of all clients, unbiased and of more variance; ``"uniform"``: all equal. Default: normalized, or uniform with
            privacy or an aggregator, where another is refused.
        total_examples: of all clients together, for ``"paper"``.
        trainable: names of the arrays that get momentum. Default: all floating-point ones but BatchNorm's running means and
            variances.
        seed: of the cohorts.
        screening: what is refused.
        privacy: differential privacy of the clients; not together with an aggregator, whose sensitivity nobody knows.
        aggregator: a strategy of Flower that combines the displacements instead of the mean: ``FedMedian()``,
            ``FedTrimmedAvg(beta=...)``, ``Krum(...)``, ``MultiKrum(...)``, ``Bulyan(...)``. It needs all updates in memory.
        compressor: of the uploads, as text such as ``"topk:0.01"``: displacements of trainable arrays travel compressed.
        service: state folder, deadline, loggers, early stopping.
        **options: of Flower's ``FedAvg``: ``fraction_train``, ``fraction_evaluate``, ``min_train_nodes``, ...
            ``min_available_nodes`` are waited for before the first round only: a client that dies does not stop the others.

    Raises:
        TypeError: for an aggregator that is no strategy of Flower, or has a server step of its own.
        ValueError: if a number is out of range, or two options exclude each other.
    """

    def __init__(
        self,
        lr: float | Callable[[int], float] = 1.0,
        momentum: float = 0.9,
        *,
        weighting: Weighting | None = None,
        total_examples: float | None = None,
        trainable: Collection[str] | None = None,
        seed: int = 0,
        screening: Screening | None = None,
        privacy: Privacy | None = None,
        aggregator: FedAvg | None = None,
        compressor: str | None = None,
        service: Service | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_step(lr, momentum, seed)
        check_fractions(self.fraction_train, self.fraction_evaluate, privacy)
        check_aggregator(aggregator)
        self.weighting = weighting_of(weighting, total_examples, privacy, aggregator)
        self.lr, self.momentum, self.total_examples = lr, momentum, total_examples
        self.trainable = None if trainable is None else frozenset(trainable)
        self.seed, self.screening = seed, screening or Screening()
        self.privacy, self.aggregator = privacy, aggregator
        self.compressor_text, self.compressor = compressor, upload_compressor(compressor)
        self.service = service or Service()
        if privacy is not None and privacy.sampling == "poisson" and self.service.deadline.seconds is not None:
            raise ValueError(
                "`sampling='poisson'` claims amplification, which does not hold if stragglers are dropped: got "
                f"`deadline.seconds={self.service.deadline.seconds}`. Use `sampling='fixed'`, or no deadline."
            )
        self.accountant = None if privacy is None else Accountant(privacy.delta)
        self.secret = secrets.randbits(63)
        self.history = NormHistory()
        self.v: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.collected: Collected | None = None
        self.asked: list[int] = []
        self.evaluated: dict[int, dict[str, float]] = {}
        self._round = 0
        self._sent: dict[str, Tensor] = {}
        self._node_order: list[int] = []

    # What goes out.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort of a round and address the model to it."""
        self._round, self._sent = server_round, tensors_of(arrays)
        check_arrays(self._sent)
        self.collected = None
        config[SEED_KEY] = self.seed
        if self.compressor_text is not None:
            config[COMPRESSOR_KEY] = self.compressor_text
            config[COMPRESSED_KEY] = sorted(trainable_names(self._sent, self.trainable))
        unknown = sorted((self.trainable or frozenset()) - set(self._sent))
        if unknown:
            raise ValueError(
                f"`trainable` must name arrays of the model: {len(unknown)} are not there, such as {unknown[:3]}. Use "
                "the names of its state dict."
            )
        private = 0 if self.privacy is None else share(self.fraction_train, self.privacy.population)
        fixed = private if self.privacy is not None and self.privacy.sampling == "fixed" else 0
        nodes = self._nodes(grid, max(self.min_train_nodes, fixed))
        if self.fraction_train == 0.0:
            self.asked = []
        elif self.privacy is not None and self.privacy.sampling == "poisson":
            self.asked = poisson_cohort(nodes, self.fraction_train, self.secret, server_round)
        else:
            size = fixed or max(share(self.fraction_train, len(nodes)), self.min_train_nodes)
            self.asked = fixed_cohort(nodes, size, self.seed, server_round)
        return self._addressed(server_round, arrays, config, self.asked, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose who evaluates the model, and address it to them."""
        self.evaluated = {}
        if self.fraction_evaluate == 0.0:
            return []
        nodes = self._nodes(grid, self.min_evaluate_nodes)
        size = max(share(self.fraction_evaluate, len(nodes)), self.min_evaluate_nodes)
        cohort = fixed_cohort(nodes, size, key_of(self.seed, "evaluate"), server_round)
        config[SEED_KEY] = self.seed
        return self._addressed(server_round, arrays, config, cohort, MessageType.EVALUATE)

    def _nodes(self, grid: Grid, needed: int) -> list[int]:
        """Return the connected clients in an order that is the same after a restart."""
        # All are waited for before the first round only: a client that dies must not stop the others for ever.
        nodes = wait_for_nodes(grid, needed if self._node_order else max(self.min_available_nodes, needed))
        known, connected = set(self._node_order), set(nodes)
        new = [node for node in nodes if node not in known]
        if new:
            if self.service.identify:
                self.names.update(ask_names(grid, new))
            self._node_order = sorted_by_name({*self._node_order, *new}, self.names)
        return [node for node in self._node_order if node in connected]

    def _addressed(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int], message_type: str
    ) -> list[Message]:
        config[ROUND_KEY] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        lives = self.service.deadline.timeout + _GRACE  # what nobody waits for any more need not be begun
        return [
            Message(content=record, message_type=message_type, dst_node_id=node, group_id=str(server_round), ttl=lives)
            for node in nodes
        ]

    # What comes back.

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the next model, one at a time; ``None`` if the round changes nothing.

        Raises:
            NonFiniteError: if the next model would not be finite.
            RuntimeError: if this is not the round that was configured.
        """
        if server_round != self._round:
            raise RuntimeError(f"Round {self._round} is under way: got replies for {server_round}. Configure it first.")
        trainable = trainable_names(self._sent, self.trainable)
        compressed = trainable if self.compressor is not None else ()
        self.collected = collected = Collected(
            self.screening, self.history, self.weighting == "uniform", self.privacy, self.aggregator is not None
        )
        for message in replies:
            try:
                collected.offer(read_update(message, self._sent, server_round, self.compressor, compressed))
            except ReplyError as error:
                collected.refuse(message.metadata.src_node_id, error)
            release(message)
        collected.settle()
        if self.privacy is not None:
            g = self._private(collected, self.privacy)
        elif collected.accepted < self.least():
            _log.warning(
                "Round %d changes nothing: %d of %d replies can be used, %d are needed.",
                server_round, collected.accepted, len(self.asked), self.least(),
            )  # fmt: skip
            return None, None
        elif self.aggregator is not None:
            g = self._robust(collected.updates, self.aggregator, server_round)
        else:
            g = mean(collected.total, sum(collected.weights.values()), trainable, self.total_examples)
            g.update(collected.counters)
        lr = self.lr(server_round) if callable(self.lr) else self.lr
        arrays, self.v = next_model(self._sent, self.v, g, trainable, lr, self.momentum)
        return to_record(arrays), self._train_metrics(collected)

    def least(self) -> int:
        """Return the number of usable replies without which a round changes nothing."""
        return max(self.service.deadline.min_replies, replies_needed(self.aggregator))

    def _private(self, collected: Collected, privacy: Privacy) -> dict[str, Tensor]:
        """Return the noised mean of clipped displacements, and count it; integer arrays stay, since they would leak."""
        poisson = privacy.sampling == "poisson"
        expected = (
            self.fraction_train * privacy.population
            if poisson
            else float(share(self.fraction_train, privacy.population))
        )
        if self.accountant is not None:
            self.accountant.spend(self.fraction_train if poisson else 1.0, privacy.noise_multiplier)
        deviation = privacy.noise_multiplier * privacy.clip if privacy.noise_multiplier > 0 else 0.0
        return private_mean(collected.total, self._sent, deviation, expected, key_of(self.secret, "noise", self._round))

    def _robust(self, updates: list[Update], aggregator: FedAvg, server_round: int) -> dict[str, Tensor]:
        """Return what the aggregator makes of the displacements, each counted once; medians of the integers."""
        messages = []
        for update in updates:
            assert update.message is not None
            metrics = MetricRecord({aggregator.weighted_by_key: 1})
            update.message.content = RecordDict({"arrays": to_record(update.displacement), "metrics": metrics})
            messages.append(update.message)
        record, _ = aggregator.aggregate_train(server_round, messages)
        if record is None:
            raise RuntimeError(f"{type(aggregator).__name__} made nothing of {len(updates)} updates.")
        counters = {
            name: torch.stack([update.counters[name] for update in updates]).median(0).values
            for name in updates[0].counters
        }
        return {**tensors_of(record), **counters}

    def _train_metrics(self, collected: Collected) -> MetricRecord:
        """Return the clients' metrics; none under privacy, which does not cover them."""
        if self.privacy is not None:
            return MetricRecord()
        nodes = list(collected.metrics)
        metrics = [collected.metrics[node] for node in nodes]
        return metric_record(over_clients(metrics, [collected.examples[node] for node in nodes], self.service.modes))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the clients' metrics: weighted mean, spread, worst tenth; ``None`` if nobody could be used."""
        metrics: dict[int, dict[str, float]] = {}
        weights = []
        for message in replies:
            node = message.metadata.src_node_id
            try:
                told, examples = read_metrics(message, server_round)
            except ReplyError as error:
                _log.warning("The evaluation of node %d is left out (%s): %s.", node, error.reason, error)
                continue
            if node not in metrics:
                metrics[node] = told
                weights.append(min(examples, self.screening.max_examples or examples))
        self.evaluated = metrics
        if not metrics:
            return None
        return metric_record(over_clients(list(metrics.values()), weights, self.service.modes))

    # What is kept.

    def exhausted(self) -> str | None:
        """Say why the privacy budget does not allow another round, or ``None``."""
        if self.privacy is None or self.accountant is None or self.privacy.max_epsilon is None:
            return None
        rate = self.fraction_train if self.privacy.sampling == "poisson" else 1.0
        after = self.accountant.epsilon(Release(rate, self.privacy.noise_multiplier, 1))
        if after <= self.privacy.max_epsilon:
            return None
        return f"one more round would spend epsilon {after:.4g}, above `max_epsilon={self.privacy.max_epsilon:g}`"

    def state(self, arrays: ArrayRecord, record: dict[str, Any] | None = None) -> ServerState:
        """Return what is needed to go on after this round, with what the log will say about it."""
        return ServerState(
            round=self._round,
            arrays=tensors_of(arrays),
            v=dict(self.v),
            seed=self.seed,
            secret=self.secret,
            norms=list(self.history.norms),
            releases=[] if self.accountant is None else self.accountant.state_dict(),
            settings=self.settings(),
            record=record or {},
        )

    def begin(self) -> None:
        """Forget the federation before: no momentum, no typical norm, a new key of the noise. Spent privacy stays spent."""
        self.v, self.history = {}, NormHistory()
        if self._round:  # the same noise twice would be none: the difference of two releases is free of it
            self.secret = secrets.randbits(63)

    def load_state(self, state: ServerState) -> None:
        """Take over a state; a warning says which settings differ from those that it was made with.

        Raises:
            CheckpointError: if privacy was spent that this strategy would not count.
        """
        if state.releases and self.accountant is None:
            raise CheckpointError(
                "The state has spent privacy, and this strategy has no `privacy`: give it the same one."
            )
        odd = {
            key: (state.settings.get(key), now)
            for key, now in self.settings().items()
            if state.settings.get(key) != now
        }
        if odd:
            _log.warning("The federation goes on with other settings (before, now): %s.", odd)
        self._round, self.seed, self.secret = state.round, state.seed, state.secret
        self.v, self.history = dict(state.v), NormHistory(state.norms)
        if self.accountant is not None:
            self.accountant.load_state_dict(state.releases)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run is expected to share, as plain values."""
        return {
            "lr": "scheduled" if callable(self.lr) else float(self.lr),
            "momentum": float(self.momentum),
            "weighting": self.weighting,
            "seed": self.seed,
            "compressor": self.compressor_text or "",
            "aggregator": "" if self.aggregator is None else type(self.aggregator).__name__,
            "fraction_train": float(self.fraction_train),
        }

    def summary(self) -> None:
        """Log the settings."""
        getLogger("flwr").info("FedMom: %s.", ", ".join(f"{key}={value}" for key, value in self.settings().items()))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation, from the state in ``service.state_dir`` if there is one, up to round ``num_rounds``.

        Args:
            grid: Flower's.
            initial_arrays: the model of round 0.
            num_rounds: of the whole federation, those before a resume included.
            timeout: seconds after which a round is closed in any case.
            train_config: sent with the model; the round, the seed and the compressor are added.
            evaluate_config: sent with the model for evaluation.
            evaluate_fn: evaluates ``(round, arrays)`` on the server; also before the first round.
        """
        return serve(
            self, grid, initial_arrays, num_rounds, timeout, train_config or ConfigRecord(), evaluate_config or ConfigRecord(),
            evaluate_fn,
        )  # fmt: skip
