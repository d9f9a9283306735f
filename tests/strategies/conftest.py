"""Fits on one machine need no name resolution, and say nothing that a failing test would not say."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _local_network(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
