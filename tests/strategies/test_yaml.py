"""The strategy from YAML and from the command line, typed, with help for every argument."""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_distopt import CompressedDDPStrategy
from lightning_distopt.compressors import Dense, PowerSGD, RandomBlock, ScaledSign, SignSGD, TopK

CLASS = "lightning_distopt.CompressedDDPStrategy"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI 2.6 calls methods that newer jsonargparse deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


def strategy_from(*words: str) -> Any:
    common = ["--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=[*common, *words])
    return cli.trainer.strategy


def from_yaml(settings: Any, folder: Any) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"strategy": settings}}))
    return strategy_from(f"--config={path}")


def test_by_name(tmp_path: Any) -> None:
    assert type(from_yaml("compressed_ddp_fork", tmp_path)) is CompressedDDPStrategy


def test_by_class_path_alone(tmp_path: Any) -> None:
    strategy = from_yaml({"class_path": CLASS}, tmp_path)
    assert isinstance(strategy.compressor, ScaledSign)
    assert strategy.error_feedback == "step_ahead"


@pytest.mark.parametrize(
    ("text", "compressor"),
    [("sign", ScaledSign), ("topk:0.05", TopK), ("random_block:0.25", RandomBlock), ("bf16", Dense)],
)
def test_a_compressor_as_text(text: str, compressor: type, tmp_path: Any) -> None:
    strategy = from_yaml({"class_path": CLASS, "init_args": {"compressor": text}}, tmp_path)
    assert type(strategy.compressor) is compressor


def test_a_specification_as_text_and_by_class_path(tmp_path: Any) -> None:
    arguments = {"compressor": "signsgd", "error_feedback": "none"}
    assert from_yaml({"class_path": CLASS, "init_args": arguments}, tmp_path).compressor == SignSGD()
    compressor = {"class_path": "lightning_distopt.compressors.PowerSGD", "init_args": {"rank": 4}}
    arguments = {"compressor": compressor, "error_feedback": "gradient"}
    assert from_yaml({"class_path": CLASS, "init_args": arguments}, tmp_path).compressor == PowerSGD(4)


def test_a_compressor_by_class_path_with_its_arguments(tmp_path: Any) -> None:
    compressor = {"class_path": "lightning_distopt.compressors.TopK", "init_args": {"ratio": 0.05}}
    strategy = from_yaml({"class_path": CLASS, "init_args": {"compressor": compressor}}, tmp_path)
    assert repr(strategy.compressor) == "TopK(ratio=0.05)"
    assert strategy.averaging_period == 0


def test_every_argument_of_ours_and_some_of_ddp(tmp_path: Any) -> None:
    arguments = {
        "compressor": "topk:0.1",
        "error_feedback": "step_ahead",
        "coefficient": 0.5,
        "averaging_period": 7,
        "server_compression": True,
        "exchange": "all_gather",
        "dense_steps": 3,
        "sync_every": 2,
        "scope": "model",
        "bucket_mb": 5.0,
        "non_finite": "skip",
        "strict_sidecars": True,
        "allow_noncontractive": True,
        "start_method": "fork",
        "timeout": "0:05:00",
        "find_unused_parameters": True,
    }
    strategy = from_yaml({"class_path": CLASS, "init_args": arguments}, tmp_path)
    for name in ours():
        if name != "compressor":
            assert getattr(strategy, name) == arguments[name]
    assert strategy._timeout == timedelta(minutes=5)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


def test_arguments_of_ddp_as_dict_kwargs(tmp_path: Any) -> None:
    strategy = from_yaml({"class_path": CLASS, "dict_kwargs": {"gradient_as_bucket_view": True}}, tmp_path)
    assert strategy._ddp_kwargs["gradient_as_bucket_view"] is True


def test_on_the_command_line() -> None:
    strategy = strategy_from("--trainer.strategy=CompressedDDPStrategy", "--trainer.strategy.compressor=topk:0.02")
    assert strategy.compressor.ratio == 0.02
    words = [f"--trainer.strategy={CLASS}", "--trainer.strategy.compressor=TopK"]
    strategy = strategy_from(*words, "--trainer.strategy.compressor.ratio=0.03")
    assert strategy.compressor.ratio == 0.03


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compressor": "topk:2"}, "`ratio` must be in (0, 1]"),
        ({"compressor": "gzip"}, "`compressor` must be one of 'topk:0.01', 'sign'"),
        ({"error_feedback": "ahead"}, "error_feedback"),
        ({"sync_every": "often"}, "sync_every"),
        ({"ratio": 0.1}, "ratio"),
    ],
)
def test_a_wrong_argument_ends_with_its_name(
    settings: Any, said: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        from_yaml({"class_path": CLASS, "init_args": settings}, tmp_path)
    assert said in capsys.readouterr().err + str(caught.value)


# --- help -----------------------------------------------------------------------------------------------------------


def ours() -> list[str]:
    parameters = inspect.signature(CompressedDDPStrategy).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with suppress(SystemExit):
        strategy_from(f"--trainer.strategy.help={CLASS}")
    shown = capsys.readouterr().out
    assert "Data parallel training that sends compressed updates instead of gradients" in shown
    described = dict(re.findall(r"\n  --trainer\.strategy\.(\w+) [^\n]*\n? {4,}(.*?)\(type:", shown, re.DOTALL))
    for name in ours():
        text = " ".join(described[name].split())
        assert len(text) > 20, f"{name}: {text!r}"
    order = [name for name in re.findall(r"\n  --trainer\.strategy\.(\w+) ", shown) if name in ours()]
    assert order == ours()  # before those of DDP
    assert {"start_method", "timeout", "find_unused_parameters"} <= set(
        re.findall(r"--trainer\.strategy\.(\w+)", shown)
    )


def test_the_docstring_describes_every_argument() -> None:
    arguments = inspect.getdoc(CompressedDDPStrategy).split("Args:")[1].split("Raises:")[0]
    assert re.findall(r"^    (\*{0,2}\w+):", arguments, re.MULTILINE) == [*ours(), "**ddp_kwargs"]


def test_every_argument_is_typed() -> None:
    for parameter in inspect.signature(CompressedDDPStrategy).parameters.values():
        assert parameter.annotation is not parameter.empty
