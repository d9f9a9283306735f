"""Fits on one machine need no name resolution, and say nothing that a failing test would not say."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_distopt.compressors import ScaledSign, TopK

# The compiled kernels of what most fits here use are loaded with the first call, once for all processes forked later.
for _compressor in (ScaledSign(), TopK(0.1)):
    _buffer = torch.ones(100)
    _compressor.decompress_add_(_compressor.compress_(_buffer), _buffer)


@pytest.fixture(autouse=True)
def _local_network(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
