"""Every strategy name that this package offers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_distopt.data_parallel import FedMom
from lightning_distopt.strategies.auto import AutoCompressedDDPStrategy
from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_distopt.strategies.dsp import DSPStrategy
from lightning_distopt.strategies.local_update import LocalUpdateStrategy
from lightning_distopt.strategies.ouroboros import OuroborosStrategy
from lightning_distopt.strategies.pipeline import PipelineStrategy
from lightning_distopt.strategies.stale_pipeline import StalePipelineStrategy
from lightning_distopt.strategies.zo_ddp import ZeroOrderDDPStrategy

__all__ = ["StrategyRecord", "StrategyTable", "list_strategies", "register"]


@dataclass(frozen=True)
class StrategyRecord:
    """One name for ``Trainer(strategy=...)``.

    Args:
        name: what the user writes, lower case.
        paper: where the method comes from; "none" for common practice.
        description: one line.
        strategy: the class behind it.
        arguments: what the class is constructed with.
    """

    name: str
    paper: str
    description: str
    strategy: type[Strategy]
    arguments: dict[str, Any] = field(default_factory=dict)


class StrategyTable(list[StrategyRecord]):
    """A list of records that shows itself as a table."""

    def __repr__(self) -> str:
        width = max((len(record.name) for record in self), default=0)
        paper = max((len(record.paper) for record in self), default=0)
        return "\n".join(f"{r.name:<{width}}  {r.paper:<{paper}}  {r.description}" for r in self)


def _gradients(suffix: str, paper: str, description: str, compressor: str, error_feedback: str) -> StrategyRecord:
    """Describe a common choice of what travels inside backward."""
    arguments = {"compressor": compressor, "error_feedback": error_feedback}
    return StrategyRecord(f"compressed_ddp_{suffix}", paper, description, CompressedDDPStrategy, arguments)


def _local(name: str, paper: str, description: str, **arguments: Any) -> StrategyRecord:
    """Describe a method of replicas that talk every so many steps."""
    return StrategyRecord(name, paper, description, LocalUpdateStrategy, arguments)


def _pipeline(name: str, paper: str, description: str, plan: str) -> StrategyRecord:
    """Describe a staleness plan."""
    return StrategyRecord(name, paper, description, StalePipelineStrategy, {"plan": plan})


def _synchronous(schedule: str, paper: str, description: str, name: str) -> StrategyRecord:
    """Describe a schedule of torch."""
    return StrategyRecord(f"pipeline_{schedule}", paper, description, PipelineStrategy, {"schedule": name})


_METHODS = (
    StrategyRecord(
        "compressed_ddp",
        "arXiv:2008.05823",
        "DDP with compressed updates and step-ahead error feedback",
        CompressedDDPStrategy,
    ),
    _gradients(
        "topk",
        "arXiv:1809.07599",
        "DDP with the largest 1 % of each gradient, and error feedback",
        "topk:0.01",
        "gradient",
    ),
    _gradients(
        "sign", "arXiv:1901.09847", "DDP with scaled signs of gradients, and error feedback", "sign", "gradient"
    ),
    _gradients(
        "powersgd", "arXiv:1905.13727", "DDP with gradients of rank 2, and error feedback", "powersgd:2", "gradient"
    ),
    _gradients(
        "bingrad",
        "arXiv:2002.11082",
        "DDP with gradients at two levels a bucket, and error feedback",
        "bingrad_b",
        "gradient",
    ),
    _gradients(
        "orq", "arXiv:2002.11082", "DDP with gradients at five optimal levels a bucket, unbiased", "orq:5", "none"
    ),
    _gradients("bf16", "none", "DDP with gradients in 16 bit, all-reduced", "bf16", "none"),
    StrategyRecord(
        "compressed_ddp_auto",
        "none",
        "DDP that measures, and takes a compressor if it pays, else 16 bit",
        AutoCompressedDDPStrategy,
    ),
    _local("local_sgd", "arXiv:1805.09767", "replicas average their models every 8 steps", weighting="uniform"),
    _local(
        "fedavg",
        "arXiv:1602.05629",
        "replicas average every 20 steps, weighted by samples",
        sync_every=20,
        inner_state="reset",
    ),
    _local(
        "fedmom",
        "arXiv:2002.02090",
        "fedavg with Nesterov momentum on the averaged displacement",
        sync_every=20,
        outer_optimizer=FedMom(),
        inner_state="reset",
    ),
    _local(
        "diloco",
        "arXiv:2311.08105",
        "500 local steps a round, then a Nesterov step, 0.7 and 0.9",
        sync_every=500,
        outer_optimizer=FedMom(0.7, 0.9),
        weighting="uniform",
    ),
    _local(
        "sa_pef",
        "arXiv:2601.20738",
        "5 steps from 0.85 residuals ahead; top 1 % is exchanged",
        sync_every=5,
        compressor="topk:0.01",
        error_feedback="step_ahead",
        coefficient=0.85,
        weighting="uniform",
    ),
    StrategyRecord(
        "zo_ddp",
        "arXiv:1902.06158",
        "zeroth-order DDP: ranks divide the queries and send scalars",
        ZeroOrderDDPStrategy,
    ),
    StrategyRecord(
        "pipeline", "arXiv:2006.09503", "synchronous pipeline: what one device would learn", PipelineStrategy
    ),
    _synchronous("gpipe", "arXiv:1811.06965", "synchronous pipeline, all forwards first", "gpipe"),
    _synchronous("1f1b", "arXiv:2006.09503", "synchronous pipeline, forwards and backwards in turn", "1f1b"),
    _synchronous("interleaved", "arXiv:2104.04473", "synchronous pipeline, several blocks a device", "interleaved"),
    _synchronous("zero_bubble", "arXiv:2401.10241", "synchronous pipeline, backward split in two", "zero_bubble"),
    _pipeline("naive_model_parallel", "none", "layers on several devices, one of which works at a time", "naive"),
    _pipeline("ddg", "arXiv:1804.10574", "pipeline of decoupled backward passes; old weights kept", "ddg"),
    _pipeline("features_replay", "arXiv:1807.04511", "pipeline that keeps inputs and replays them", "features_replay"),
    _pipeline("pipedream", "arXiv:1806.03377", "pipeline without flush, weights of each forward kept", "pipedream"),
    _pipeline("pipedream_2bw", "arXiv:2006.09503", "pipeline without flush, two weight versions", "pipedream_2bw"),
    StrategyRecord("dsp", "arXiv:1909.02625", "pipeline whose every hop is a queue, one weight version", DSPStrategy),
    StrategyRecord(
        "ouroboros", "arXiv:1909.06695", "pipeline whose ends share a device and tied embeddings", OuroborosStrategy
    ),
)
_LAUNCHERS = {
    "": ("popen", "one process a device, started by running the script again"),
    "_spawn": ("spawn", "processes by spawn"),
    "_fork": ("fork", "processes by fork"),
    "_notebook": ("fork", "processes by fork, for notebooks"),
}
_RECORDS = tuple(
    StrategyRecord(
        method.name + suffix,
        method.paper,
        method.description if not suffix else f"{method.description}; {how}",
        method.strategy,
        {**method.arguments, "start_method": start_method},
    )
    for method in _METHODS
    for suffix, (start_method, how) in _LAUNCHERS.items()
)


def list_strategies() -> StrategyTable:
    """Return a record for every strategy name, with ``.name``, ``.paper`` and ``.description``; printing it shows a table."""
    return StrategyTable(_RECORDS)


def register(registry: Any = StrategyRegistry) -> None:
    """Make the names known to ``Trainer(strategy=...)``; calling it again changes nothing."""
    for record in _RECORDS:
        if record.name not in registry:
            registry.register(record.name, record.strategy, description=record.description, **record.arguments)
