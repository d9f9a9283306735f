"""One client's turn with a Lightning Trainer: fit for a while, or validate."""

from __future__ import annotations

import io
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_distopt.federated.proximal_term import ProximalTerm

__all__ = ["LocalWork", "fit", "validate"]

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class LocalWork:
    """What a client does in a round.

    Args:
        steps: optimizer steps, at least 1; ``None`` if epochs are given.
        epochs: passes over the client's data, at least 1; ``None`` if steps are given.
        optimizer_state: ``"fresh"``: optimizers and schedules begin anew each round (FedAvg); ``"kept"``: they go on where this
            client left them (DiLoCo), which needs clients that keep their state.
        prox: weight of FedProx's term, at least 0; the server's ``proximal-mu`` comes before it.
        trainer: arguments of the Trainer, such as ``{"accelerator": "cpu"}``.

    Raises:
        ValueError: if a number is out of range, or not exactly one of steps and epochs is given.
    """

    steps: int | None = None
    epochs: int | None = None
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    prox: float = 0.0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"One of `local_steps` and `local_epochs` must be given: got {self.steps} and {self.epochs}."
            )
        length = self.epochs if self.steps is None else self.steps
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"`local_steps` or `local_epochs` must be a whole number of at least 1: got {length!r}.")
        if self.optimizer_state not in ("fresh", "kept"):
            raise ValueError(f"`optimizer_state` must be 'fresh' or 'kept': got {self.optimizer_state!r}.")
        if not self.prox >= 0:
            raise ValueError(f"`prox` must be at least 0: got {self.prox}. 0 is FedAvg.")


class _Optimizers(Callback):
    """Puts the state of optimizers and schedulers back at the start, and takes it at the end."""

    def __init__(self, state: bytes | None) -> None:
        self.state = state

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state is None:
            return
        state = torch.load(io.BytesIO(self.state), map_location="cpu", weights_only=True)
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        stream = io.BytesIO()
        torch.save({"optimizers": [one.state_dict() for one in trainer.optimizers], "schedulers": schedulers}, stream)
        self.state = stream.getvalue()


class _Samples(Callback):
    """Counts what was trained on."""

    def __init__(self) -> None:
        self.count = self.batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        self.count += _length(batch)
        self.batches += 1


def fit(
    module: LightningModule, data: LightningDataModule, work: LocalWork, prox: float, state: bytes | None
) -> tuple[int, dict[str, float], bytes | None]:
    """Train ``module`` on one client's data, in place.

    Args:
        module: holds the model that was received.
        data: of the client.
        work: how long, and how.
        prox: weight of FedProx's term.
        state: of the optimizers, from the last call; ``None``: they begin anew.

    Returns:
        The number of examples that the client holds (or, if its loader does not tell, trained on; 0 if its loader gave no
        batch), the logged metrics, and the
        state of the optimizers if it is kept.
    """
    optimizers, samples = _Optimizers(state), _Samples()
    callbacks: list[Callback] = [samples]
    if work.optimizer_state == "kept":
        callbacks.append(optimizers)
    if prox > 0:
        callbacks.append(ProximalTerm(prox))
    options = {**_QUIET, "limit_val_batches": 0, **work.trainer}
    given = options.get("callbacks") or ()  # Lightning takes one, several, or None
    options["callbacks"] = [*([given] if isinstance(given, Callback) else given), *callbacks]
    limit = {"max_steps": work.steps, "max_epochs": -1} if work.steps is not None else {"max_epochs": work.epochs}
    trainer = Trainer(**{**options, **limit})
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    examples = (_held(trainer.train_dataloader) or samples.count) if samples.batches else 0
    return examples, metrics, optimizers.state if work.optimizer_state == "kept" else None


def validate(module: LightningModule, data: LightningDataModule, work: LocalWork) -> tuple[int, dict[str, float]]:
    """Return the number of validation examples of a client, and its metrics."""
    trainer = Trainer(**{**_QUIET, **{k: v for k, v in work.trainer.items() if k != "callbacks"}})
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    loaders = trainer.val_dataloaders
    count = sum(_held(one) for one in (loaders if isinstance(loaders, list) else [loaders]))
    return max(1, count), metrics


def _held(loader: Any) -> int:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else 0


def _length(batch: Any) -> int:
    """Return the samples in a batch: the first dimension of the first tensor in it."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    for part in batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ():
        if (length := _length(part)) > 0:
            return length
    return 0
