"""Gradients compressed inside the backward of a real ``DistributedDataParallel``, beside a slow reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_distopt.compressors import parse
from lightning_distopt.compressors.randomness import derive_key, hash64, uniform
from lightning_distopt.data_parallel import GradientSync
from lightning_distopt.exchange import Meter
from tests.data_parallel.reference import C, on_spans, server_spans, sign, spans_of, top

ONE_EACH = 1e-5  # megabytes: every parameter is a bucket of its own


class Net(nn.Module):
    """Layers of slightly different sizes; every second batch can leave the last layer unused."""

    def __init__(self, layers: int = 4, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [width + (i % 3) for i in range(layers)] + [2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.skipped = nn.Linear(2, 2)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 0.1 * x.mean()
        return x if skip else self.skipped(x)


class Case(NamedTuple):
    """How gradients travel, and how DDP is set up."""

    compressor: str = "sign"
    exchange: str = "all_gather"
    server: bool = False
    dense_steps: int = 0
    dtype: torch.dtype = torch.float64
    layers: int = 4
    steps: int = 8
    accumulate: int = 1
    bucket_cap_mb: float = 4e-4
    find_unused: bool = False
    static: bool = False
    feedback: bool = False
    view: bool = False

    @property
    def name(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults[k]) or "defaults"

    def skips(self, rank: int, step: int) -> bool:
        """With unused parameters, all ranks skip the last layer in every third step, and rank 0 in some others."""
        return self.find_unused and (step % 3 == 2 or (rank == 0 and step % 4 == 1))


def rates(case: Case, step: int) -> tuple[float, float]:
    """Learning rates of weights and of biases; with residuals they change, each in its own way."""
    return (0.05 / (1 + step % 3), 0.02 * (1 + step % 2)) if case.feedback else (0.05, 0.05)


def momentum_sgd(net: nn.Module) -> torch.optim.Optimizer:
    groups = [[p for n, p in net.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias")]
    return torch.optim.SGD([{"params": group} for group in groups], lr=0.05, momentum=0.9)


def set_rates(optimizer: torch.optim.Optimizer, case: Case, step: int) -> dict[Any, float]:
    for group, rate in zip(optimizer.param_groups, rates(case, step), strict=True):
        group["lr"] = rate
    return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def hook(sync, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations by identity, and ours are strings
    return sync.hook(bucket)


def attach(
    net: nn.Module, case: Case, optimizer: torch.optim.Optimizer | None = None, **ddp: Any
) -> tuple[DistributedDataParallel, GradientSync]:
    groups = [] if optimizer is None else optimizer.param_groups
    wrapped = DistributedDataParallel(net, bucket_cap_mb=case.bucket_cap_mb, **ddp)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in net.named_parameters()}
    sync = GradientSync(
        names,
        parse(case.compressor),
        case.exchange,
        case.server,
        case.dense_steps,
        Meter(),  # type: ignore[arg-type]
        residuals=case.feedback,
        rates=lambda: {p: group["lr"] for group in groups for p in group["params"]},
        find_unused=case.find_unused,
    )
    wrapped.register_comm_hook(sync, hook)
    return wrapped, sync


def loss(net: nn.Module, case: Case, rank: int, step: int, micro: int) -> Tensor:
    draw = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    batch = torch.randn(4, 5, generator=draw, dtype=torch.float64).to(case.dtype)
    return net(batch, case.skips(rank, step)).square().sum()  # type: ignore[no-any-return]


# ---- slow, plain, on one process -------------------------------------------------------------------------------------


class Slow:
    """What each rank sends of a gradient, and what all make of the mean, with residuals and starts of all ranks."""

    def __init__(self, case: Case, world: int) -> None:
        self.case = case
        self.world = world
        self.residuals: dict[tuple[int, str], Tensor] = {}
        self.queries: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}

    def begin(self, net: nn.Module, step: int) -> None:
        self.step = step
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.last = self.rates
        now = dict(zip(("weight", "bias"), rates(self.case, step), strict=True))
        self.rates = {name: now[name.rpartition(".")[2]] for name in self.shapes}
        self.handed: dict[tuple[int, str], Tensor] = {}
        self.idle = dict.fromkeys(self.shapes, True)

    def sent(self, rank: int, name: str, gradient: Tensor) -> Tensor:
        case, v = self.case, gradient.reshape(-1).clone()
        self.idle[name] = self.idle[name] and not bool(v.any())
        if case.feedback and (rank, name) in self.residuals:
            v += self.last[name] / self.rates[name] * self.residuals[rank, name]
        self.handed[rank, name] = v
        return v if self.low_rank(name) else compressed(case, v, name, self.step)

    def low_rank(self, name: str) -> bool:
        r, shape = rank_of(self.case), self.shapes[name]
        return bool(r and len(shape) == 2 and r * sum(shape) < shape.numel() and self.step >= self.case.dense_steps)

    def answer(self, name: str, mean: Tensor) -> Tensor:
        """Return what is stepped for a mean of what ranks sent, and keep residuals."""
        case = self.case
        if self.low_rank(name):
            m = mean.view(self.shapes[name])
            if name not in self.queries:
                draw = uniform(derive_key(0, 0, self.step, name), m.shape[1] * rank_of(case))
                self.queries[name] = (draw.double() - 0.5).view(m.shape[1], -1)
            p = torch.linalg.svd(m @ self.queries[name], full_matrices=False).U
            self.queries[name] = m.t() @ p
            out = (p @ p.t() @ m).reshape(-1)
        else:
            out = mean
        if not case.feedback:
            return out
        if case.find_unused and self.idle[name]:
            self.rates[name] = self.last.get(name, self.rates[name])
            return torch.zeros_like(out)
        for rank in range(self.world):
            v = self.handed[rank, name]
            self.residuals[rank, name] = v - (out if self.low_rank(name) else compressed(case, v, name, self.step))
        return out


def rank_of(case: Case) -> int:
    kind, _, number = case.compressor.partition(":")
    return int(number) if kind == "powersgd" else 0


def compressed(case: Case, flat: Tensor, name: str, step: int) -> Tensor:
    """What is sent of one parameter's gradient, by definition."""
    kind, _, ratio = case.compressor.partition(":")
    if step < case.dense_steps or kind == "fp32":  # one all-reduce of float32
        return flat.float().to(case.dtype)
    if kind == "powersgd":
        return flat  # vectors; matrices are dealt with elsewhere
    if kind == "random_block":
        n = flat.numel()
        start = hash64(derive_key(0, 0, step, name), 0) % n
        block = torch.zeros_like(flat)
        block[[(start + i) % n for i in range(max(1, int(n * float(ratio))))]] = 1.0
        return flat * block
    return compress_of(case)(flat)


def compress_of(case: Case) -> C:
    kind, _, ratio = case.compressor.partition(":")
    return {"sign": lambda: sign, "topk": lambda: top(float(ratio))}[kind]()


def answered(case: Case, means: dict[str, Tensor], layout: list[list[str]]) -> dict[str, Tensor]:
    """The means compressed again: by parameter, or by each owner's share of each of DDP's buckets."""
    world = dist.get_world_size()
    answers = {}
    for names in layout:
        sizes = [means[name].numel() for name in names]
        spans = server_spans([sizes], world) if case.exchange == "sharded_server" else spans_of(sizes)
        flat = on_spans(compress_of(case), torch.cat([means[name] for name in names]), spans)
        answers.update(zip(names, flat.split(sizes), strict=True))
    return answers


def reference(case: Case, world: int, layouts: list[list[list[str]]]) -> Iterator[nn.Module]:
    """Train on the batches of all ranks; ``layouts[t]`` is asked for in step ``t``."""
    net = Net(case.layers).to(case.dtype)
    optimizer = momentum_sgd(net)
    slow = Slow(case, world)
    for step in range(case.steps):
        slow.begin(net, step)
        set_rates(optimizer, case, step)
        means = {name: torch.zeros(p.numel(), dtype=case.dtype) for name, p in net.named_parameters()}
        for rank in range(world):
            for micro in range(case.accumulate):
                loss(net, case, rank, step, micro).backward()
            for name, p in net.named_parameters():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                means[name] += slow.sent(rank, name, gradient) / world
            optimizer.zero_grad()
        for name in means:
            means[name] = slow.answer(name, means[name])
        if case.server and step >= case.dense_steps:
            means = answered(case, means, layouts[step])
        unused = all(case.skips(rank, step) for rank in range(world))
        for name, p in net.named_parameters():
            p.grad = None if unused and name.startswith("skipped") else means[name].view_as(p)
        optimizer.step()
        optimizer.zero_grad()
        yield net


def train(rank: int, world: int, case: Case) -> tuple[float, bool, Counts]:
    """Train with DDP beside the reference; the largest difference ever, whether ranks agree, and what was seen."""
    net = Net(case.layers).to(case.dtype)
    optimizer = momentum_sgd(net)
    ddp = {
        "find_unused_parameters": case.find_unused,
        "static_graph": case.static,
        "gradient_as_bucket_view": case.view,
    }
    wrapped, sync = attach(net, case, optimizer, **ddp)
    layouts = spy_on_buckets(sync)
    worst, equal = 0.0, True
    slow = reference(case, world, layouts)
    for step in range(case.steps):
        set_rates(optimizer, case, step)
        for micro in range(case.accumulate):
            with nullcontext() if micro == case.accumulate - 1 else wrapped.no_sync():
                loss(wrapped, case, rank, step, micro).backward()
        sync.raise_if_non_finite()
        optimizer.step()
        optimizer.zero_grad()
        for p, q in zip(net.parameters(), next(slow).parameters(), strict=True):
            worst = max(worst, float((p - q).detach().abs().max()))
        equal = equal and alike(net)
    return worst, equal, Counts(layouts, sync.rounds, sync.meter)


class Counts(NamedTuple):
    layouts: list[list[list[str]]]
    rounds: int
    meter: Meter


def spy_on_buckets(sync: GradientSync) -> list[list[list[str]]]:
    """Record the names in each bucket of each step."""
    layouts: list[list[list[str]]] = [[]]
    original = sync.hook

    def spying(bucket: Any) -> Any:
        layouts[-1].append([sync.names[parameter] for parameter in bucket.parameters()])
        if bucket.is_last():
            layouts.append([])
        return original(bucket)

    sync.hook = spying  # type: ignore[method-assign]
    return layouts


def alike(net: nn.Module) -> bool:
    mine = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine.view(torch.uint8), other.view(torch.uint8)) for other in everyone)
