"""Names for `Trainer(strategy=...)`: registered by the import, once, in lower case, listed as data."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

import lightning_distopt
from lightning_distopt import (
    AutoCompressedDDPStrategy,
    CompressedDDPStrategy,
    DSPStrategy,
    LocalUpdateStrategy,
    OuroborosStrategy,
    PipelineStrategy,
    StalePipelineStrategy,
    ZeroOrderDDPStrategy,
    list_strategies,
    register,
)
from lightning_distopt.data_parallel import FedMom

METHODS: dict[str, dict[str, Any]] = {
    "compressed_ddp": {},
    "compressed_ddp_topk": {"compressor": "topk:0.01", "error_feedback": "gradient"},
    "compressed_ddp_sign": {"compressor": "sign", "error_feedback": "gradient"},
    "compressed_ddp_powersgd": {"compressor": "powersgd:2", "error_feedback": "gradient"},
    "compressed_ddp_bingrad": {"compressor": "bingrad_b", "error_feedback": "gradient"},
    "compressed_ddp_orq": {"compressor": "orq:5", "error_feedback": "none"},
    "compressed_ddp_bf16": {"compressor": "bf16", "error_feedback": "none"},
    "compressed_ddp_auto": {},
    **(
        LOCAL := {
            "local_sgd": {"weighting": "uniform"},
            "fedavg": {"sync_every": 20, "inner_state": "reset"},
            "fedmom": {"sync_every": 20, "outer_optimizer": FedMom(1.0, 0.9), "inner_state": "reset"},
            "diloco": {"sync_every": 500, "outer_optimizer": FedMom(0.7, 0.9), "weighting": "uniform"},
            "sa_pef": {
                "sync_every": 5,
                "compressor": "topk:0.01",
                "error_feedback": "step_ahead",
                "coefficient": 0.85,
                "weighting": "uniform",
            },
        }
    ),
    "zo_ddp": {},
}
PIPELINES: dict[str, dict[str, str]] = {
    "pipeline": {},
    "pipeline_gpipe": {"schedule": "gpipe"},
    "pipeline_1f1b": {"schedule": "1f1b"},
    "pipeline_interleaved": {"schedule": "interleaved"},
    "pipeline_zero_bubble": {"schedule": "zero_bubble"},
    "naive_model_parallel": {"plan": "naive"},
    "ddg": {"plan": "ddg"},
    "features_replay": {"plan": "features_replay"},
    "pipedream": {"plan": "pipedream"},
    "pipedream_2bw": {"plan": "pipedream_2bw"},
    "dsp": {},
    "ouroboros": {},
}
STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
ARGUMENTS = {**METHODS, **PIPELINES}
NAMES = {method + suffix: (start, ARGUMENTS[method]) for method in ARGUMENTS for suffix, start in STARTS.items()}


def class_of(name: str) -> type[Strategy]:
    if name.startswith("compressed"):
        return AutoCompressedDDPStrategy if "_auto" in name else CompressedDDPStrategy
    if name.startswith("pipeline"):
        return PipelineStrategy
    if any(name.startswith(method) for method in LOCAL):
        return LocalUpdateStrategy
    if name.startswith("zo_"):
        return ZeroOrderDDPStrategy
    if name.startswith("ouroboros"):
        return OuroborosStrategy
    return DSPStrategy if name.startswith("dsp") else StalePipelineStrategy


QUIET = {"accelerator": "cpu", "devices": 2, "logger": False}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_the_class_and_its_launcher(name: str) -> None:
    start_method, arguments = NAMES[name]
    entry = StrategyRegistry[name]
    assert entry["strategy"] is class_of(name)
    assert entry["init_params"] == {**arguments, "start_method": start_method}
    strategy = Trainer(strategy=name, **QUIET).strategy
    assert type(strategy) is class_of(name)
    launcher = strategy.launcher
    assert getattr(launcher, "_start_method", "popen") == start_method
    assert launcher.is_interactive_compatible is (start_method == "fork")


def test_compressed_ddp_is_a_ddp_to_lightning() -> None:
    assert issubclass(CompressedDDPStrategy, DDPStrategy)


def test_upper_case_works_as_with_lightnings_own_names() -> None:
    assert type(Trainer(strategy="Compressed_DDP_fork", **QUIET).strategy) is CompressedDDPStrategy


def test_each_trainer_gets_an_object_of_its_own() -> None:
    first, second = (Trainer(strategy="compressed_ddp_fork", **QUIET).strategy for _ in range(2))
    assert first is not second
    assert first.meter is not second.meter


def test_registering_again_changes_nothing() -> None:
    before = dict(StrategyRegistry)
    register()
    register()
    CompressedDDPStrategy.register_strategies(StrategyRegistry)
    assert dict(StrategyRegistry) == before


def test_the_package_reloads() -> None:
    before = dict(StrategyRegistry)
    importlib.reload(lightning_distopt)
    assert dict(StrategyRegistry) == before


def test_names_go_into_any_registry_as_lightning_asks() -> None:
    registry = _StrategyRegistry()
    CompressedDDPStrategy.register_strategies(registry)
    assert sorted(registry.available_strategies()) == sorted(NAMES)
    assert type(registry.get("compressed_ddp_fork")) is CompressedDDPStrategy


def test_records_describe_every_name() -> None:
    records = list_strategies()
    assert {record.name for record in records} == set(NAMES)
    for record in records:
        assert record.name == record.name.lower()
        known = record.paper.startswith("arXiv:")
        assert known or any(word in record.name for word in ("bf16", "auto", "naive"))
        assert 10 < len(record.description) < 100
        assert "\n" not in record.description
        assert StrategyRegistry[record.name]["description"] == record.description


def test_printing_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print(list_strategies())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert len({line.index("arXiv") for line in lines if "arXiv" in line}) == 1  # aligned
