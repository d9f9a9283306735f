"""The rounds of a federation: ask, fold, save, evaluate, log, stop.

restore ─▶ [ train ─▶ save ─▶ evaluate ─▶ log ─▶ stop? ] ... ─▶ Result
                      │        └ a server that dies here evaluates and logs this round, and goes on with the next
                      └ one that dies before repeats this round
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from lightning.pytorch.loggers import Logger

from lightning_distopt.federated.conversation import Deadline, replies_of
from lightning_distopt.federated.history import History
from lightning_distopt.federated.records import metrics_of, tensors_of, to_record
from lightning_distopt.federated.state import ServerState
from lightning_distopt.federated.stopping import RoundStopping

if TYPE_CHECKING:
    from lightning_distopt.federated.fedmom import FedMom

__all__ = ["Service", "serve"]

_log = getLogger(__name__)
_progress = getLogger("flwr")  # whose handler prints Flower's own lines
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class Service:
    """How a federation is run.

    Args:
        state_dir: folder of the server's state and of the log of rounds; ``None``: nothing is kept, nothing is resumed.
        deadline: how long a round waits for its clients.
        loggers: of Lightning (``WandbLogger``, ``CSVLogger``, ...); metrics by round.
        stopping: when to end before the last round.
        modes: ``"max"`` or ``"min"`` by metric, where the name does not tell which end is the worst.
        identify: ask clients for their names, so that cohorts are the same after a restart; else Flower's ids are used, which
            a simulation draws anew each time.
        per_client: log each client's evaluation as ``<metric>/client_<name>``, too.
    """

    state_dir: str | None = None
    deadline: Deadline = field(default_factory=Deadline)
    loggers: Sequence[Logger] = ()
    stopping: RoundStopping | None = None
    modes: Mapping[str, str] | None = None
    identify: bool = True
    per_client: bool = False


def serve(
    strategy: FedMom,
    grid: Grid,
    initial: ArrayRecord,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
    evaluate_fn: EvaluateFn | None,
) -> Result:
    """Run the rounds of ``strategy``; see :meth:`FedMom.start`.

    Raises:
        CheckpointError: if the state folder holds something else than a state of this model, or cannot be written.
        ValueError: if ``num_rounds`` is below 1.
    """
    if num_rounds < 1:
        raise ValueError(f"`num_rounds` must be at least 1: got {num_rounds}.")
    service = strategy.service
    history, result, arrays, first = History(service.state_dir), Result(arrays=initial), initial, 1
    limit = min(timeout, service.deadline.timeout)
    seconds = service.deadline.seconds
    deadline = replace(service.deadline, timeout=limit, seconds=None if seconds is None else min(seconds, limit))
    strategy.summary()

    def finish(record: dict[str, Any]) -> str | None:
        """Evaluate the model after a round, log the round, and say why to stop, if so."""
        begun, server_round = time.monotonic(), record["round"]
        messages = strategy.configure_evaluate(server_round, arrays, evaluate_config, grid)
        evaluated = strategy.aggregate_evaluate(server_round, replies_of(grid, messages, deadline, lambda: 0))
        if evaluated is not None:
            result.evaluate_metrics_clientapp[server_round] = evaluated
        central = None if evaluate_fn is None else evaluate_fn(server_round, arrays)
        if central is not None:
            result.evaluate_metrics_serverapp[server_round] = central
        _add_evaluation(strategy, record, time.monotonic() - begun, evaluated, central)
        history.add(record)
        _log_round(strategy, record)
        return service.stopping.reason(record["metrics"]) if service.stopping is not None else None

    before, why = _restored(strategy, initial, history)
    if before is not None:
        arrays, first = to_record(before.arrays), before.round + 1
        result.arrays = arrays
        _progress.info("The federation goes on after round %d.", before.round)
    elif evaluate_fn is not None and (metrics := evaluate_fn(0, initial)) is not None:
        result.evaluate_metrics_serverapp[0] = metrics
    status = "failed"
    try:
        if before is not None and before.record:
            why = finish(before.record)
        for server_round in range(first, num_rounds + 1):
            if why is not None:
                _progress.info("The federation ends after round %d: %s.", server_round - 1, why)
                break
            if (spent := strategy.exhausted()) is not None:
                _log.warning("The federation ends before round %d: %s.", server_round, spent)
                break
            begun = time.monotonic()
            messages = strategy.configure_train(server_round, arrays, train_config, grid)
            replies = replies_of(grid, messages, deadline, lambda: _accepted(strategy))
            following, trained = strategy.aggregate_train(server_round, replies)
            if following is not None:
                arrays = result.arrays = following
            if trained is not None:
                result.train_metrics_clientapp[server_round] = trained
            record = _record(strategy, server_round, time.monotonic() - begun, arrays, trained)
            if service.state_dir is not None:
                strategy.state(arrays, record).save(service.state_dir)
            why = finish(record)
        status = "success"
    finally:
        for logger in service.loggers:
            logger.save()
            logger.finalize(status)
    return result


def _accepted(strategy: FedMom) -> int:
    return 0 if strategy.collected is None else strategy.collected.accepted


def _restored(strategy: FedMom, initial: ArrayRecord, history: History) -> tuple[ServerState | None, str | None]:
    """Load the state and bring the stopping rule to where it was; return both, ``None`` if there is no state or no reason.

    The state's record is empty if its round is in the log.
    """
    folder = strategy.service.state_dir
    state = None if folder is None else ServerState.load(folder)
    if folder is None or state is None:
        strategy.begin()
        history.keep(0)  # of a state that was removed
        return None, None
    state.fits(tensors_of(initial), folder)
    strategy.load_state(state)
    why = None
    for record in history.keep(state.round):
        if record["round"] == state.round:
            state.record = {}
        if strategy.service.stopping is not None:
            why = strategy.service.stopping.reason(record["metrics"])
    return state, why


def _record(
    strategy: FedMom, server_round: int, seconds: float, arrays: ArrayRecord, trained: MetricRecord | None
) -> dict[str, Any]:
    """Return a round as plain values, before it is evaluated: the beginning of its line in the log."""
    collected = strategy.collected
    assert collected is not None
    refused = sum(collected.refused.values())
    asked, answered = len(strategy.asked), len(collected.weights) + refused
    sent = asked * sum(len(array.data) for array in arrays.values())
    metrics: dict[str, float] = {
        "federated/participants": len(collected.weights),
        "federated/asked": asked,
        "federated/refused": refused,
        "federated/dropped": asked - answered,
        "federated/bytes_sent": sent,
        "federated/bytes_received": collected.nbytes,
        "federated/round_seconds": seconds,
    }
    metrics |= {f"federated/refused_{reason}": float(count) for reason, count in collected.refused.items()}
    if strategy.accountant is not None and strategy.privacy is not None:
        metrics["federated/epsilon"] = strategy.accountant.epsilon()
        metrics["federated/noise_multiplier"] = strategy.privacy.noise_multiplier
    elif collected.norms:
        metrics["federated/update_norm"] = sum(collected.norms.values()) / len(collected.norms)
    clients: dict[str, Any] = {"asked": [_name(strategy, node) for node in strategy.asked]}
    if strategy.privacy is None:
        clients["weights"] = {_name(strategy, node): weight for node, weight in collected.weights.items()}
        clients["norms"] = {_name(strategy, node): norm for node, norm in collected.norms.items()}
    return {"round": server_round, "metrics": _finite({**metrics, **_told(trained)}), "clients": clients}


def _add_evaluation(
    strategy: FedMom,
    record: dict[str, Any],
    seconds: float,
    evaluated: MetricRecord | None,
    central: MetricRecord | None,
) -> None:
    """Complete a round's record, in place."""
    record["metrics"]["federated/round_seconds"] += seconds
    record["metrics"] |= _finite({**_told(evaluated), **_told(central)})
    record["clients"]["evaluated"] = {_name(strategy, node): told for node, told in strategy.evaluated.items()}


def _name(strategy: FedMom, node: int) -> str:
    return strategy.names.get(node, str(node))


def _told(record: MetricRecord | None) -> dict[str, float]:
    return {} if record is None else metrics_of(record)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _log_round(strategy: FedMom, record: dict[str, Any]) -> None:
    """Give a round's metrics to the loggers."""
    metrics = dict(record["metrics"])
    if strategy.service.per_client:
        for client, told in record["clients"]["evaluated"].items():
            metrics |= {f"{name}/client_{client}": value for name, value in told.items()}
    for logger in strategy.service.loggers:
        logger.log_metrics(metrics, step=record["round"])
    _progress.info("Round %d: %s.", record["round"], ", ".join(f"{k}={v:.4g}" for k, v in record["metrics"].items()))
