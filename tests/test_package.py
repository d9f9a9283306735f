"""What the package offers, and what importing it does not do."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_distopt
from lightning_distopt import CompressedDDPStrategy, callbacks, compressors, list_strategies, optimizers
from lightning_distopt.compressors import Compressor, Dense, Payload, RandomBlock, ScaledSign, TopK, parse

PROJECT = Path(__file__).parents[1]
HEAVY = ("torchvision", "sklearn", "matplotlib", "wandb", "deepspeed", "pandas", "transformers", "flwr")


def test_the_version_is_the_projects() -> None:
    # tomllib needs Python 3.11
    (version,) = re.findall(r'^version = "(.+?)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert lightning_distopt.__version__ == version


SCRIPT = """
import sys
from lightning.pytorch import Trainer

try:
    Trainer(strategy="compressed_ddp", accelerator="cpu", devices=2)
except ValueError as error:
    print(error)
before = set(sys.modules)
import lightning_distopt
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
Trainer(strategy="compressed_ddp", accelerator="cpu", devices=2, logger=False)
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a fresh interpreter prints that first forgets to import the package, and then does not."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=110, check=True)
    return done.stdout.splitlines()


@pytest.mark.timeout(120)
def test_a_forgotten_import_is_lightnings_error(said: list[str]) -> None:
    # the README quotes it with its cure
    assert said[0].startswith(
        "You selected an invalid strategy name: `strategy='compressed_ddp'`. It must be either a string or an instance of "
        "`lightning.pytorch.strategies.Strategy`. Example choices: auto, ddp, ddp_spawn, deepspeed, ..."
    )


@pytest.mark.timeout(120)
def test_importing_loads_no_heavy_module(said: list[str]) -> None:
    # beyond what `lightning.pytorch` itself loads because it finds it installed
    loaded = set(ast.literal_eval(said[1]))
    assert "lightning_distopt" in loaded
    assert not loaded & {*HEAVY, "rich", "jsonargparse"}


def test_every_public_name_exists() -> None:
    for module in (lightning_distopt, compressors, callbacks, optimizers):
        for name in module.__all__:
            assert hasattr(module, name)
            assert getattr(module, name).__doc__


def test_signatures_that_others_rely_on() -> None:
    arguments = inspect.signature(CompressedDDPStrategy).parameters
    assert list(arguments)[:7] == [
        "compressor",
        "error_feedback",
        "coefficient",
        "averaging_period",
        "server_compression",
        "exchange",
        "dense_steps",
    ]
    defaults = {name: arguments[name].default for name in ("error_feedback", "coefficient", "server_compression")}
    assert defaults == {"error_feedback": "step_ahead", "coefficient": None, "server_compression": None}
    assert (arguments["exchange"].default, arguments["dense_steps"].default) == ("auto", 0)
    assert next(reversed(arguments.values())).kind is inspect.Parameter.VAR_KEYWORD
    for record in list_strategies():
        assert record.name
        assert record.paper
        assert record.description
    for compressor in (
        TopK(0.1),
        TopK(ratio=0.1),
        ScaledSign(),
        Dense(),
        Dense(dtype="float32"),
        RandomBlock(ratio=0.1),
    ):
        assert isinstance(compressor, Compressor)
        assert {type(flag) for flag in (compressor.unbiased, compressor.contractive, compressor.linear)} == {bool}
    assert isinstance(parse("topk:0.01"), TopK)
    assert list(inspect.signature(Compressor.compress).parameters)[:3] == ["self", "tensor", "key"]
    assert list(inspect.signature(Compressor.compress_).parameters)[:3] == ["self", "buffer", "key"]
    assert list(inspect.signature(Compressor.decompress).parameters) == ["self", "payload"]
    assert list(inspect.signature(Compressor.decompress_add_).parameters) == ["self", "payload", "out", "alpha"]
    assert isinstance(Payload.nbytes, property)
    callbacks.CommunicationMonitor()


def test_the_package_is_typed() -> None:
    assert (Path(lightning_distopt.__file__).parent / "py.typed").exists()
