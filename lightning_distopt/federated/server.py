"""A server app for federations of Lightning clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_distopt.federated.client import shared_state
from lightning_distopt.federated.fedmom import FedMom
from lightning_distopt.federated.local_training import LocalWork, validate
from lightning_distopt.federated.records import metric_record, tensors_of, to_record

__all__ = ["lightning_server_app", "trainable_entries"]


def trainable_entries(module: LightningModule, local_keys: Sequence[str] = ()) -> frozenset[str]:
    """Return the names of a module's parameters that travel, all names of tied ones: what momentum moves."""
    named = frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))
    return named & frozenset(shared_state(module, local_keys))


def lightning_server_app(
    module_factory: Callable[[], LightningModule],
    strategy_factory: Callable[[Context], FedMom],
    num_rounds: int,
    *,
    datamodule_factory: Callable[[], LightningDataModule] | None = None,
    local_keys: Sequence[str] = (),
    train_config: dict[str, Any] | None = None,
    on_end: Callable[[Result], None] | None = None,
    trainer: dict[str, Any] | None = None,
) -> ServerApp:
    """Return a Flower ``ServerApp`` that runs a :class:`FedMom` on a LightningModule.

    The module's parameters get momentum, its buffers do not, whatever their names are.

    Args:
        module_factory: makes the module whose initial state is sent; the same as the clients'.
        strategy_factory: makes the strategy from Flower's context, whose ``run_config`` it may read.
        num_rounds: of the whole federation, at least 1; ``num-server-rounds`` in the run config comes before it.
        datamodule_factory: data on which the server validates the model after each round; ``None``: it does not.
        local_keys: patterns of entries that stay on the clients; the same as theirs.
        train_config: sent with the model; for example ``{"proximal-mu": 0.1}``.
        on_end: gets Flower's ``Result``.
        trainer: arguments of the server's Trainer.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        module = module_factory()
        strategy = strategy_factory(context)
        if strategy.trainable is None:
            strategy.trainable = trainable_entries(module, local_keys)
        work = LocalWork(steps=1, trainer=dict(trainer or {}))

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            assert datamodule_factory is not None
            judged = module_factory()
            judged.load_state_dict({**judged.state_dict(), **tensors_of(arrays)})
            _, metrics = validate(judged, datamodule_factory(), work)
            return metric_record({f"server/{name}": value for name, value in metrics.items()})

        result = strategy.start(
            grid,
            to_record(shared_state(module, local_keys)),
            int(context.run_config.get("num-server-rounds", num_rounds)),
            train_config=ConfigRecord(dict(train_config or {})),
            evaluate_fn=None if datamodule_factory is None else evaluate,
        )
        if on_end is not None:
            on_end(result)

    return app
