"""What layer-wise rates cannot go together with, each refusal with its reason and its cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import DataLoader

from lightning_distopt.callbacks.probes import sparse_message
from lightning_distopt.optimizers import RSGD

if TYPE_CHECKING:
    from lightning_distopt.callbacks.layerwise_rate_scaling import LayerwiseRateScaling

__all__ = ["Skip", "SkipRule", "arguments", "fit", "gradients", "loader_like", "share", "strategy"]

NamedSkip = Literal["norm_bias", "name", "none"]
Skip = NamedSkip | Callable[[str, Parameter], bool]

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class SkipRule:
    """Which tensors keep the whole rate.

    Args:
        skip: see :class:`LayerwiseRateScaling`.
    """

    def __init__(self, skip: Skip) -> None:
        if skip not in ("norm_bias", "name", "none") and not callable(skip):
            raise ValueError(
                f"`skip` must be 'norm_bias', 'name', 'none' or a function of name and parameter: got {skip!r}. "
                "'norm_bias' skips normalisation layers and biases."
            )
        self.skip = skip

    def of(self, module: nn.Module) -> set[Tensor]:
        """Return the skipped parameters of a module."""
        named = dict(module.named_parameters())
        if callable(self.skip):
            return {parameter for name, parameter in named.items() if self.skip(name, parameter)}
        if self.skip == "none":
            return set()
        if self.skip == "name":
            return {parameter for name, parameter in named.items() if "bn" in name or "bias" in name}
        skipped: set[Tensor] = {p for name, p in named.items() if name.rpartition(".")[2].startswith("bias")}
        for layer in module.modules():
            if isinstance(layer, _NORMS) or "Norm" in type(layer).__name__:
                skipped.update(layer.parameters(recurse=False))
        return skipped


def share(name: str, value: Any) -> float:
    """Return ``value`` if it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(
            f"`{name}` must be in [0, 1): got {value!r}. 0 keeps the last value only; write for example 0.9."
        )
    return float(value)


def arguments(scaling: LayerwiseRateScaling) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        ValueError: naming both.
        TypeError: for a ``heat_map`` that is neither a flag nor a path, or a loader that is none.
    """
    if scaling.mode == "authors" and scaling.rate_in_momentum:
        raise ValueError(
            f"`mode='authors'` applies the rate outside the momentum: got `rate_in_momentum=True` with `rule={scaling.rule!r}`. "
            "Pass `rate_in_momentum=False`, or `mode='default'`."
        )
    if scaling.decay_in_norm and scaling.probe in ("micro", "rank"):
        raise ValueError(
            f"`decay_in_norm=True` needs gradients of probes at hand: got `probe={scaling.probe!r}`, which sees gradients inside "
            "backward, before any decay. Use `probe='loader'` or `'sample'`."
        )
    if scaling.probe_loader is not None and scaling.probe != "loader":
        raise ValueError(
            f"`probe_loader` is read by `probe='loader'` only: got `probe={scaling.probe!r}`. Pass one or the other."
        )
    if scaling.probe_loader is not None and not hasattr(scaling.probe_loader, "__iter__"):
        raise TypeError(
            f"`probe_loader` must give batches: got {scaling.probe_loader!r}. Pass a DataLoader over the training set."
        )
    if not isinstance(scaling.heat_map, (bool, str)):
        raise TypeError(f"`heat_map` must be True, False or a path: got {scaling.heat_map!r}. Write `heat_map=False`.")


def strategy(found: Strategy) -> bool:
    """Return whether ranks are replicas, whose norms are averaged; false where each holds whole tensors of its own.

    Raises:
        MisconfigurationException: for a strategy that cuts or flattens tensors, or that is not known not to.
    """
    if isinstance(found, DDPStrategy):
        return True
    if isinstance(found, SingleDeviceStrategy) or getattr(found, "holds_whole_tensors", False):
        return False
    name = type(found).__name__
    if isinstance(found, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        why = "it flattens or cuts parameters, and the norm of a piece is not that of the tensor"
    else:
        why = "whether it cuts or flattens parameters is not known"
    raise MisconfigurationException(
        f"`LayerwiseRateScaling` does not support `{name}`: {why}. Use one device, `ddp` or `compressed_ddp`; a strategy whose "
        "ranks hold whole tensors says so by `holds_whole_tensors = True`."
    )


def fit(scaling: LayerwiseRateScaling, trainer: pl.Trainer, module: pl.LightningModule, local: bool) -> None:
    """Refuse what cannot train with per-tensor rates, before the first step.

    Args:
        scaling: the callback.
        trainer: with its optimizers.
        module: the model.
        local: whether each rank steps by its own gradient.

    Raises:
        MisconfigurationException: with the reason and the cure.
        TypeError: for layers with sparse gradients.
    """
    me = "`LayerwiseRateScaling`"
    if local and (scaling.rule == "lars" or scaling.mode == "authors"):
        asked = "rule='lars'" if scaling.rule == "lars" else "mode='authors'"
        raise MisconfigurationException(
            f"{me} with `{asked}` needs the norm of the mean gradient, and no rank knows it where updates are exchanged "
            f"(`error_feedback={getattr(trainer.strategy, 'error_feedback', '')!r}`). Use `rule='clars'`, which needs "
            "local norms only, or a gradient path (`error_feedback='gradient'` or `'none'`)."
        )
    clip = trainer.gradient_clip_val
    if scaling.rule == "clars" and clip and not scaling.allow_clip:
        raise MisconfigurationException(
            f"{me} with CLARS does not need `gradient_clip_val`, and got {clip}: clipping shrinks the gradient and not the "
            "norms of the probes, so rates would fall twice. Leave it out, or pass `allow_clip=True`."
        )
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise TypeError(sparse_message(next(n for n, p in module.named_parameters() if p is layer.weight)))
    for name, parameter in module.named_parameters():
        if type(parameter).__name__ in ("FlatParameter", "DTensor") or type(parameter.data).__name__ == "DTensor":
            raise MisconfigurationException(
                f"{me} needs whole tensors: `{name}` is a {type(parameter.data).__name__}, a piece or a concatenation of some. "
                "Use `ddp`."
            )
    if scaling.probe in ("loader", "sample") and scaling.rule == "clars":
        _passes(scaling, module)
    for optimizer in trainer.optimizers:
        _optimizer(scaling, optimizer, getattr(trainer.precision_plugin, "scaler", None) is not None)


def _passes(scaling: LayerwiseRateScaling, module: pl.LightningModule) -> None:
    if not module.automatic_optimization and scaling.probe == "sample":
        raise MisconfigurationException(
            "`probe='sample'` needs automatic optimization, where it knows which batches belong to a step. Use `probe='rank'`."
        )
    if not module.automatic_optimization and not hasattr(module, "probe_loss"):
        raise MisconfigurationException(
            f"`probe={scaling.probe!r}` calls `training_step` for a loss, and in manual optimization that would step. Give the "
            "module a method `probe_loss(batch)` that returns the loss, or use `probe='micro'` or `'rank'`."
        )


def _optimizer(scaling: LayerwiseRateScaling, optimizer: Optimizer, scaler: bool) -> None:
    name = type(optimizer).__name__
    base = optimizer.base if isinstance(optimizer, RSGD) else optimizer
    cure = "Use an optimizer such as SGD or Adam."
    if isinstance(base, LBFGS):
        raise MisconfigurationException(
            f"`LayerwiseRateScaling` does not support {name}: it asks for several gradients in one step. {cure}"
        )
    if hasattr(optimizer, "consolidate_state_dict"):
        raise MisconfigurationException(
            f"`LayerwiseRateScaling` does not support {name}: each rank steps a part of the parameters with groups of its own. "
            "Use the optimizer that it wraps."
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"`LayerwiseRateScaling` scales the learning rate, and a group of {name} has no `lr`. {cure}"
        )
    if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"`LayerwiseRateScaling` needs unscaled gradients, and fused {name} under `precision='16-mixed'` unscales them "
            "inside its step. Use `fused=False`, or `precision='bf16-mixed'`."
        )
    if scaling.rate_in_momentum:
        odd = [
            key
            for group in optimizer.param_groups
            for key in ("dampening", "maximize", "differentiable")
            if group.get(key)
        ]
        if type(base) is not SGD or odd:
            found = f"{type(base).__name__} with {', '.join(odd)}" if odd else type(base).__name__
            raise MisconfigurationException(
                f"`rate_in_momentum=True` scales gradients, which is a rate only for `torch.optim.SGD`: got {found}. Use "
                "`rate_in_momentum=False`, which scales the update of any optimizer."
            )


def gradients(params: Sequence[Parameter], names: dict[Tensor, str]) -> None:
    """Refuse sparse gradients.

    Raises:
        TypeError: naming the parameter.
    """
    for parameter in params:
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise TypeError(sparse_message(names.get(parameter, "a parameter")))


def loader_like(found: Any, size: int, rank: int) -> DataLoader[Any]:
    """Return a shuffled loader over the training set, with random numbers of its own, different on each rank.

    Raises:
        MisconfigurationException: if the training loader has no data set to choose from.
    """
    data = getattr(found, "dataset", None)
    if not isinstance(found, DataLoader) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise MisconfigurationException(
            f"`probe='loader'` shuffles the training data set, and {type(found).__name__} has none with a length. Pass "
            "`probe_loader=DataLoader(...)`, or use `probe='micro'`."
        )
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**62 + 7919 * rank)
    return DataLoader(found.dataset, size, shuffle=True, collate_fn=found.collate_fn, generator=generator)
