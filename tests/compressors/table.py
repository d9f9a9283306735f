"""The table of compressors: a new one is a row, and every contract test of compressors and exchanges runs on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import (
    ORQ,
    QSGD,
    BinGradB,
    BinGradPB,
    Compressor,
    Dense,
    LinearQuantizer,
    OneBit,
    RandomBlock,
    ScaledSign,
    TernGrad,
    TopK,
)
from lightning_distopt.compressors.bin_grad_pb import best_magnitude

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Row(NamedTuple):
    """What one compressor claims.

    Args:
        text: the form that :func:`lightning_distopt.compressors.parse` reads.
        make: builds the compressor.
        traits: flags that must be true; all others of ``TRAITS`` must be false.
        left: the claimed bound of ``|v - C(v)|² / |v|²`` (of its expectation where it draws), for float32 and float64.
        lossless: dtypes that survive the round trip bit for bit.
    """

    text: str
    make: Callable[[], Compressor]
    traits: frozenset[str]
    left: Callable[[Tensor], float]
    lossless: tuple[torch.dtype, ...] = ()


TRAITS = ("unbiased", "contractive", "linear", "shared_randomness", "per_tensor", "splittable", "random")


def _row(
    text: str,
    make: Callable[[], Compressor],
    traits: str,
    left: Callable[[Tensor], float],
    lossless: tuple[torch.dtype, ...] = (),
) -> Row:
    return Row(text, make, frozenset(traits.split()), left, lossless)


def _not_kept(ratio: float) -> Callable[[Tensor], float]:
    return lambda v: 1.0 - max(1, int(v.numel() * ratio)) / v.numel()


def _sign_left(v: Tensor) -> float:
    v = v.double()
    return 1.0 - float(v.abs().sum() ** 2 / (v.numel() * v.square().sum()))


def _binary_left(bucket: int) -> Callable[[Tensor], float]:
    """A loose bound: two means keep more than ``1 / d`` of a bucket's energy."""
    return lambda v: 1.0 - 1.0 / min(bucket, v.numel())


def _clipped_left(bucket: int) -> Callable[[Tensor], float]:
    """The expected error of rounding inside of ``[-b, b]`` and clipping outside, by its definition."""

    def left(v: Tensor) -> float:
        rest = 0.0
        for part in v.double().split(bucket):
            b = best_magnitude(part.view(1, -1))
            a = part.abs()
            rest += float(torch.where(a < b, b.square() - a.square(), (a - b).square()).sum())
        return rest / float(v.double().square().sum())

    return left


def _anything(v: Tensor) -> float:
    return math.inf


_SPARSE = "contractive per_tensor splittable"
_UNBIASED = "unbiased per_tensor splittable random"
_BLOCK = "contractive linear shared_randomness per_tensor random"

ROWS = (
    _row("topk:0.01", lambda: TopK(0.01), _SPARSE, _not_kept(0.01)),
    _row("topk:0.3", lambda: TopK(0.3), _SPARSE, _not_kept(0.3)),
    _row("topk:1", lambda: TopK(1), _SPARSE, lambda v: 0.0, FLOATS),
    _row("sign", lambda: ScaledSign(), "contractive per_tensor splittable", _sign_left),
    _row(
        "float32",
        lambda: Dense("float32"),
        "unbiased contractive linear splittable",
        lambda v: (
            2.0**-48 if v.dtype is torch.float64 else 0.0
        ),  # rounding to 24 bits errs by at most 2**-24 of a value
        (torch.float32, torch.bfloat16, torch.float16),
    ),
    _row("float16", lambda: Dense("float16"), "contractive linear splittable", lambda v: 2.0**-22, (torch.float16,)),
    _row("bfloat16", lambda: Dense("bfloat16"), "contractive linear splittable", lambda v: 2.0**-16, (torch.bfloat16,)),
    _row("onebit", lambda: OneBit(), "per_tensor splittable", _anything),
    _row("bingrad_b:bucket_size=48", lambda: BinGradB(48), "contractive per_tensor splittable", _binary_left(48)),
    _row(
        "bingrad_b:bucket_size=64,threshold=exact",
        lambda: BinGradB(64, "exact"),
        "contractive per_tensor splittable",
        _binary_left(64),
    ),
    _row(
        "bingrad_b:threshold=lloyd",
        lambda: BinGradB(threshold="lloyd"),
        "contractive per_tensor splittable",
        _binary_left(2048),
    ),
    _row(
        "bingrad_pb:bucket_size=64",
        lambda: BinGradPB(64),
        "contractive per_tensor splittable random",
        _clipped_left(64),
    ),
    _row("orq:3,bucket_size=60", lambda: ORQ(3, 60), _UNBIASED, _anything),
    _row("orq:5", lambda: ORQ(5), _UNBIASED, _anything),
    _row("orq:9,bucket_size=100,clip=2.5", lambda: ORQ(9, 100, 2.5), "per_tensor splittable random", _anything),
    _row("qsgd:5,bucket_size=72", lambda: QSGD(5, bucket_size=72), _UNBIASED, _anything),
    _row("qsgd:255,norm=l2,bucket_size=128", lambda: QSGD(255, "l2", 128), _UNBIASED, _anything),
    _row("terngrad", lambda: TernGrad(), "per_tensor splittable random", _anything),
    _row("terngrad:clip=none,bucket_size=40", lambda: TernGrad(None, 40), _UNBIASED, _anything),
    _row("linear:5,bucket_size=64", lambda: LinearQuantizer(5, bucket_size=64), _UNBIASED, _anything),
    _row(
        "linear:16,grid=quantile,bucket_size=100",
        lambda: LinearQuantizer(16, "quantile", 100),
        _UNBIASED,
        _anything,
    ),
    _row("random_block:0.01", lambda: RandomBlock(0.01), _BLOCK, _not_kept(0.01)),
    _row("random_block:0.3", lambda: RandomBlock(0.3), _BLOCK, _not_kept(0.3)),
)


def rows(*traits: str, without: str = "") -> pytest.MarkDecorator:
    """Parametrise a test over the rows that claim all ``traits`` and do not claim ``without``."""
    chosen = [row for row in ROWS if row.traits.issuperset(traits) and without not in row.traits]
    return pytest.mark.parametrize("row", chosen, ids=[row.text for row in chosen])


dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=[str(dtype).removeprefix("torch.") for dtype in FLOATS])


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw normal values, the same whenever the same are asked for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_payload(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two payloads have the same fields, in the same order, with the same bits."""
    return list(a) == list(b) and all(
        a[name].dtype is b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )
