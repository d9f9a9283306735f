"""Ways to keep replicas alike, by name: what the network benchmarks compare.

A row of :data:`METHODS` says how a replica takes a training step. A new method is one line there; and any compressor that
has a text form can be tried without a line, as ``gradients:<text>`` or ``updates:<text>``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_distopt.advice.auto_sync import TIMED_TO, AutoSync
from lightning_distopt.compressors import Specification, parse
from lightning_distopt.data_parallel import GradientSync, UpdateSync, UpdateSyncConfig
from lightning_distopt.data_parallel.exchanges import ExchangeName, choose_exchange
from lightning_distopt.exchange import Meter

__all__ = ["METHODS", "Method", "Replica", "method"]

Family: TypeAlias = Literal["limit", "PyTorch", "16 bit", "ours"]


class Replica:
    """One host's model, which takes steps without any communication; the base of those that communicate.

    Args:
        model: the same on every host.
        optimizer: of its parameters.
        meter: counts what our methods send, and times them.

    Attributes:
        warm_up: steps that are not timed, at least. PyTorch's PowerSGD sends everything in its first two; DDP cuts its
            buckets anew after the first.
    """

    warm_up = 4

    def __init__(self, model: nn.Module, optimizer: Optimizer, meter: Meter) -> None:
        self.model, self.optimizer, self.meter = model, optimizer, meter
        self.forward: Callable[[Tensor], Tensor] = model

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        self.backward(images, labels)
        self.optimizer.step()

    def backward(self, images: Tensor, labels: Tensor) -> None:
        """Leave the gradients in the parameters."""
        F.cross_entropy(self.forward(images), labels).backward()


class Wrapped(Replica):
    """``DistributedDataParallel``, with a communication hook or without; buffers stay local, as in all methods here."""

    def __init__(self, *args: Any, hook: Callable[..., Any] | None = None, state: object = None, **ddp: Any) -> None:
        super().__init__(*args)
        # torch 2.15 renamed `broadcast_buffers`.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        ddp["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
        self.forward = DistributedDataParallel(self.model, **ddp)
        if hook is not None:
            self.forward.register_comm_hook(state, hook)


class Gradients(Wrapped):
    """Our gradient path: compressed inside backward, with a residual or without."""

    def __init__(
        self, *args: Any, compressor: str, exchange: ExchangeName | None = None, residuals: bool = False, **ddp: Any
    ) -> None:
        super().__init__(*args, hook=lambda replica, bucket: replica.hook(bucket), state=self, **ddp)
        scheme = parse(compressor)
        if isinstance(scheme, Specification):
            exchange = "all_reduce"  # it brings its own
        exchange = exchange or choose_exchange(scheme, dist.get_world_size())
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        answers = exchange == "sharded_server" and not residuals
        self.sync = GradientSync(names, scheme, exchange, answers, 0, self.meter, residuals=residuals)
        self.hook = self.sync.hook

    def backward(self, images: Tensor, labels: Tensor) -> None:
        super().backward(images, labels)
        self.sync.raise_if_non_finite()


class Auto(Gradients):
    """What ``compressed_ddp_auto`` does: 16 bit at first, then what it has chosen."""

    warm_up = TIMED_TO + 1  # what is timed comes after the choice

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, compressor="bf16")
        self.auto = AutoSync(self.sync, "bf16", torch.device("cpu"))
        self.hook = self.auto.hook

    def backward(self, images: Tensor, labels: Tensor) -> None:
        self.auto.between_steps()
        loss = F.cross_entropy(self.forward(images), labels)
        self.auto.begin_backward()
        loss.backward()
        self.sync.raise_if_non_finite()


class Updates(Replica):
    """Our update path: local steps, then compressed displacements, with a residual."""

    def __init__(self, *args: Any, compressor: str, exchange: ExchangeName | None = None, **config: Any) -> None:
        super().__init__(*args)
        scheme = parse(compressor)
        exchange = exchange or choose_exchange(scheme, dist.get_world_size())
        config.setdefault("server_compression", exchange == "sharded_server")
        self.sync = UpdateSync(UpdateSyncConfig(scheme, exchange, **config), self.meter)
        parameters = dict(self.model.named_parameters())
        self.sync.track(parameters, dict.fromkeys(parameters, (0,)))

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.sync.enter()
        super().step(images, labels)
        self.sync.exchange()


def _power_sgd(rank: int) -> Callable[..., Replica]:
    def build(*args: Any) -> Replica:
        # One bucket: with several, the hook's collectives get out of order over Gloo, and it hangs.
        state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        return Wrapped(*args, hook=powerSGD_hook, state=state, bucket_cap_mb=1 << 20)

    return build


@dataclass(frozen=True)
class Method:
    """One way to keep replicas alike.

    Args:
        family: "limit" (no communication), "PyTorch" (what it brings), "16 bit" (our strong baseline), "ours".
        about: a few words for ``--help`` and the tables.
        build: makes a replica of model, optimizer and meter, inside a process group.
    """

    family: Family
    about: str
    build: Callable[[nn.Module, Optimizer, Meter], Replica]


def _gradients(compressor: str, about: str, family: Family = "ours", **options: Any) -> Method:
    return Method(family, about, lambda *args: Gradients(*args, compressor=compressor, **options))


def _updates(compressor: str, about: str, **options: Any) -> Method:
    return Method("ours", about, lambda *args: Updates(*args, compressor=compressor, **options))


METHODS: dict[str, Method] = {
    "none": Method("limit", "no communication at all", Replica),
    "ddp": Method("PyTorch", "DistributedDataParallel, float32", Wrapped),
    "ddp-fp16": Method("PyTorch", "its fp16_compress_hook", lambda *args: Wrapped(*args, hook=fp16_compress_hook)),
    "ddp-powersgd:1": Method("PyTorch", "its powerSGD_hook, rank 1, one bucket", _power_sgd(1)),
    "ddp-powersgd:2": Method("PyTorch", "its powerSGD_hook, rank 2, one bucket", _power_sgd(2)),
    "bf16": _gradients("bf16", "16-bit all-reduce inside backward", "16 bit"),
    "fp16": _gradients("fp16", "16-bit all-reduce inside backward", "16 bit"),
    "auto": Method("ours", "what compressed_ddp_auto takes, after its choice", Auto),
    "sign": _updates("sign", "1 bit, error feedback, step ahead"),
    "sign:model": _updates("sign", "the same, one scale for the whole model", scope="model"),
    "sign:sharded": _updates("sign", "the same, sharded server", exchange="sharded_server"),
    "topk:0.01": _updates("topk:0.01", "the largest 1 %, error feedback, step ahead"),
    "topk:0.001": _updates("topk:0.001", "the largest 0.1 %, error feedback, step ahead"),
    "random_block:0.01": _updates("random_block:0.01", "one shared block of 1 %, error feedback, step ahead"),
    "bingrad_b": _updates("bingrad_b", "1 bit, two levels a bucket, error feedback, step ahead"),
    "bingrad_pb": _updates("bingrad_pb", "1 bit, partly biased, error feedback, step ahead"),
    "orq:5": _gradients("orq:5", "5 optimal levels, unbiased, inside backward"),
    "orq:3": _gradients("orq:3", "3 optimal levels, unbiased, inside backward"),
    "qsgd:5": _gradients("qsgd:5", "5 even levels, unbiased, inside backward"),
    "linear:5": _gradients("linear:5", "5 even levels between the extremes, unbiased, inside backward"),
    "terngrad": _gradients("terngrad", "3 levels, clipped, inside backward"),
    "powersgd:1": _gradients("powersgd:1", "rank 1, error feedback, inside backward, any buckets", residuals=True),
    "powersgd:2": _gradients("powersgd:2", "rank 2, error feedback, inside backward, any buckets", residuals=True),
    "feedback:sign": _gradients("sign", "1 bit, error feedback, inside backward", residuals=True),
    "feedback:bingrad_b": _gradients("bingrad_b", "1 bit, error feedback, inside backward", residuals=True),
    "feedback:topk:0.01": _gradients("topk:0.01", "the largest 1 %, error feedback, inside backward", residuals=True),
    "feedback:topk:0.001": _gradients(
        "topk:0.001", "the largest 0.1 %, error feedback, inside backward", residuals=True
    ),
}


def method(name: str) -> Method:
    """Return a row of the table, or make one of ``gradients:``, ``feedback:`` or ``updates:`` and a compressor.

    Raises:
        ValueError: if there is no such method or compressor.

    Example:
        >>> method("updates:topk:0.1").about
        'TopK(ratio=0.1), error feedback, step ahead'
    """
    if name in METHODS:
        return METHODS[name]
    path, _, text = name.partition(":")
    if path == "gradients" and text:
        return _gradients(text, f"{parse(text)}, inside backward, no residual")
    if path == "feedback" and text:
        return _gradients(text, f"{parse(text)}, error feedback, inside backward", residuals=True)
    if path == "updates" and text:
        return _updates(text, f"{parse(text)}, error feedback, step ahead")
    raise ValueError(
        f"`methods` must be among {', '.join(METHODS)}, or `gradients:`, `feedback:` or `updates:` and a compressor: got "
        f"{name!r}."
    )


def sgd(model: nn.Module, rate: float) -> Optimizer:
    """Return the optimizer of all methods: momentum 0.9, weight decay 5e-4."""
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
