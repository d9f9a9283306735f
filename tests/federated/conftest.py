"""Federations report to nobody, and their loggers are quiet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before Flower is imported


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    names = ("flwr", "lightning.pytorch.utilities.rank_zero", "lightning.pytorch")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
