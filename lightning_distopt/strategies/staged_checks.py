"""Modules, Trainer flags and callbacks that pipelines cannot serve: each with the value and the cure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.error_feedback import refuse_unless_contractive
from lightning_distopt.model_parallel.layered import LayeredModule
from lightning_distopt.model_parallel.replicas import ReplicaFeedback
from lightning_distopt.strategies.checks import choice

__all__ = ["checked_cuts", "checked_feedback", "refuse_what_pipelines_cannot"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")


def refuse_what_pipelines_cannot(strategy: ParallelStrategy, trainer: pl.Trainer, handles_window: bool) -> None:
    """Raise for what would train wrongly, or fail later.

    Args:
        strategy: a pipeline.
        trainer: whose settings and callbacks are looked at.
        handles_window: whether the strategy leaves the accumulation of gradients to Lightning.

    Raises:
        MisconfigurationException: with the cure.
    """
    module, name = strategy.lightning_module, type(strategy).__name__
    if not isinstance(module, LayeredModule):
        raise MisconfigurationException(
            f"`{name}` trains a `LayeredModule`: got {type(module).__name__}. Derive it from "
            "`lightning_distopt.LayeredModule`, with `self.layers` and `loss(output, target)`."
        )
    own = [step for step in _STEPS if getattr(type(module), step) is not getattr(LayeredModule, step)]
    if own:
        raise MisconfigurationException(
            f"`{name}` runs layers, loss and metrics in different processes and cannot call "
            f"`{type(module).__name__}.{own[0]}`. Remove it, and return further figures from `metrics(output, target)`."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"`{name}` needs `automatic_optimization=True`: got False. Leave the optimizer's steps to Lightning."
        )
    if strategy._layer_sync is not None:
        raise MisconfigurationException(
            f"`{name}` does not support `sync_batchnorm=True`: the processes of a pipeline hold different layers. "
            "Leave it out."
        )
    if trainer.accumulate_grad_batches != 1 and not handles_window:
        raise MisconfigurationException(
            f"`{name}` counts batches by its own: got `accumulate_grad_batches={trainer.accumulate_grad_batches}`. Use "
            "the strategy's `accumulate`."
        )
    for kind in (OnExceptionCheckpoint, StochasticWeightAveraging):
        if any(isinstance(callback, kind) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"`{name}` does not go with {kind.__name__}, which handles the whole model in each process while a "
                "pipeline is running. Leave it out."
            )
    if any(getattr(callback, "save_on_exception", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"`{name}` cannot gather the model after an exception, when its processes may be anywhere: got "
            "`ModelCheckpoint(save_on_exception=True)`. Leave it out, and save every so many steps."
        )


def checked_cuts(cuts: Any) -> tuple[int, ...]:
    """Return the first layer of every stage but the first.

    Raises:
        TypeError: for something else than a list of integers.
        ValueError: if they do not rise from 1 on.
    """
    if isinstance(cuts, (str, int)) or not all(isinstance(c, int) and not isinstance(c, bool) for c in cuts):
        raise TypeError(
            f"`cuts` must be a list of integers, the first layer of each later stage: got {cuts!r}. Write for "
            "example `cuts=[3, 7]`."
        )
    found = tuple(cuts)
    if any(b <= a for a, b in pairwise((0, *found))):
        raise ValueError(
            f"`cuts` must rise, and begin with 1 or more: got {list(found)}. Write for example `cuts=[3, 7]`."
        )
    return found


def checked_feedback(compressor: Compressor | Specification | None, asked: ReplicaFeedback | None) -> ReplicaFeedback:
    """Return whether residuals are kept between replicas.

    Raises:
        ValueError: if the compressor cannot bear it.
    """
    wanted: ReplicaFeedback = "none"
    if isinstance(compressor, Specification):
        wanted = "gradient" if compressor.keeps_residual else "none"
    elif compressor is not None and compressor.contractive and not compressor.unbiased:
        wanted = "gradient"
    if asked is not None and compressor is not None:
        wanted = choice("error_feedback", asked, ReplicaFeedback)
    if wanted == "gradient" and isinstance(compressor, Compressor):
        refuse_unless_contractive(compressor, wanted)
    return wanted
