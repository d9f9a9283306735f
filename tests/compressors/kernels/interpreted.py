"""GPU kernels run on the CPU by Triton's interpreter, against the CPU kernels and the plain code.

    TRITON_INTERPRET=1 python -m tests.compressors.kernels.interpreted

Triton decides whether it interprets when a kernel is defined, so this is a process of its own. It prints what failed by
name, as JSON; ``test_cuda.py`` starts it and reads that.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.compressors import kernels
from lightning_distopt.compressors.codes import pack_codes
from lightning_distopt.compressors.kernels import kernels_for, reference_only
from lightning_distopt.compressors.quantizer import round_randomly
from lightning_distopt.compressors.randomness import uniform
from tests.compressors.table import ROWS, Row, gaussian

KEYS = (0, 1, 0x0123456789ABCDEF, 2**64 - 1)
# Elements and bucket: one; a short last bucket; whole ones; one that more threads hold; several tiles a bucket.
CASES = ((1, 2048), (7, 8), (100, 48), (2049, 2048), (4096, 1024), (3000, 3000), (18_003, 9000))
WORST = {
    "zeros": lambda numel: torch.zeros(numel),
    "equal": lambda numel: torch.full((numel,), -1.5),
    "huge": lambda numel: gaussian(numel).clamp(-1, 1) * 3.4e38,
    "denormal": lambda numel: gaussian(numel) * 1e-42,
    "ties": lambda numel: gaussian(numel).round(),
    "signed zeros": lambda numel: torch.tensor([0.0, -0.0]).repeat(numel)[:numel],
    "nan": lambda numel: _with(gaussian(numel), float("nan")),
    "infinite": lambda numel: _with(gaussian(numel), float("-inf")),
}


def _with(v: Tensor, bad: float) -> Tensor:
    v[v.numel() // 2] = bad
    return v


def inputs() -> list[tuple[Tensor, int]]:
    """Values, and the size of their buckets."""
    return [(gaussian(numel), size) for numel, size in CASES] + [(make(101), 48) for make in WORST.values()]


def twins() -> tuple[ModuleType, ModuleType]:
    """The GPU's and the CPU's kernels."""
    from lightning_distopt.compressors.kernels import cpu, cuda

    return cuda, cpu


def same(a: Tensor, b: Tensor) -> None:
    """To the last bit, but for the payload of a NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def near(a: Tensor, b: Tensor, rtol: float) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-45, equal_nan=True)


# ---- parts, against the CPU's ----------------------------------------------------------------------------------------


def statistic(name: str, rtol: float) -> None:
    cuda, cpu = twins()
    for v, size in inputs():
        near(getattr(cuda, name)(v, size), getattr(cpu, name)(v, size), rtol)


def absolute_sum() -> None:
    cuda, cpu = twins()
    for v, _ in inputs():
        near(cuda.absolute_sum(v), cpu.absolute_sum(v), 1e-6)  # the CPU sums 4096 of them in float32


def optimal_levels() -> None:
    cuda, cpu = twins()
    for v, size in inputs():
        for symbols in (3, 5, 9) if v.numel() < 5000 else (9,):
            same(cuda.optimal_levels(v, size, symbols, None), cpu.optimal_levels(v, size, symbols, None))
    limits = torch.tensor([[0.5], [1e9], [0.0]])
    same(cuda.optimal_levels(gaussian(100), 48, 5, limits), cpu.optimal_levels(gaussian(100), 48, 5, limits))


def signs() -> None:
    cuda, cpu = twins()
    scale = torch.tensor([0.7])
    for v, _ in inputs():
        for residual in (False, True):
            a, b = v.clone(), v.clone()
            same(cuda.encode_signs(a, scale, residual), packed := cpu.encode_signs(b, scale, residual))
            same(a, b)
        cuda.add_signs_(packed, scale, a)
        cpu.add_signs_(packed, scale, b)
        same(a, b)


def encode_binary() -> None:
    cuda, cpu = twins()
    for v, size in inputs():
        for residual in (False, True):
            a, b = v.clone(), v.clone()
            (levels, codes), (expected, bits) = (
                cuda.encode_binary(a, size, residual),
                cpu.encode_binary(b, size, residual),
            )
            near(levels, expected, 3e-7)  # means in float64, rounded once
            same(codes, bits)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def rounding() -> None:
    """Against the plain code, and its residual; several keys, all numbers of levels."""
    cuda, cpu = twins()
    for number, (v, size) in enumerate(inputs()):
        numel, key = v.numel(), KEYS[number % len(KEYS)]
        buckets = -(-numel // size)
        padded = torch.nn.functional.pad(v, (0, buckets * size - numel)).view(buckets, size)
        draws = torch.nn.functional.pad(uniform(key, numel), (0, buckets * size - numel)).view(buckets, size)
        for symbols in (2, 3, 5, 9, 17, 256) if numel < 5000 else (2, 5):
            table = gaussian(buckets, symbols, seed=1).sort(1).values
            expected = round_randomly(padded, table, draws).view(-1)[:numel]
            a, b = v.clone(), v.clone()
            same(cuda.round_randomly(a, table, size, key, True), expected)
            cpu.round_randomly(b, table, size, key, True)
            same(a, b)
            cuda.add_levels_(expected, table, size, a)
            cpu.add_levels_(expected, table, size, b)
            same(a, b)


def packing() -> None:
    cuda, _ = twins()
    for symbols in (2, 3, 4, 5, 9, 17, 33, 65, 129, 256):
        for numel in (1, 4, 5, 7, 8, 9, 2048, 10_241):
            codes = torch.randint(symbols, (numel,), generator=torch.Generator().manual_seed(numel)).to(torch.uint8)
            packed = cuda.pack(codes, symbols)
            same(packed, pack_codes(codes, symbols))
            same(cuda.unpack(packed, numel, symbols), codes)


def largest() -> None:
    cuda, cpu = twins()
    for v, _ in inputs():
        for k in {1, v.numel() // 3 + 1, v.numel()}:
            places = cuda.select_largest(v, k)
            same(places, cpu.select_largest(v, k))
            a, b = gaussian(v.numel(), seed=1), gaussian(v.numel(), seed=1)
            cuda.scatter_add_(a, places, v[places], -0.3)
            cpu.scatter_add_(b, places, v[places], -0.3)
            same(a, b)
    out = torch.ones(3)
    cuda.scatter_add_(out, torch.empty(0, dtype=torch.int32), torch.empty(0), 1.0)
    same(out, torch.ones(3))


def displacement() -> None:
    cuda, cpu = twins()
    for v, _ in inputs():
        for kept in (0.0, 0.3, 1.0):
            z, x, e = gaussian(v.numel(), seed=1), gaussian(v.numel(), seed=2), v.clone()
            param, expected, residual = z.clone(), z.clone(), v.clone()
            cuda.displace_(param, x, residual, kept)
            cpu.displace_(expected, x, e, kept)
            same(param, expected)
            torch.testing.assert_close(residual, e, equal_nan=True)  # the CPU rounds product and sum once


def parts_of_a_buffer() -> None:
    """Tensors that do not begin where their memory does, nor at a multiple of 16 bytes."""
    cuda, cpu = twins()
    buffer = gaussian(1003)
    a, b = buffer.clone(), buffer.clone()
    table = gaussian(3, 5, seed=1).sort(1).values
    same(cuda.round_randomly(a[3:], table, 400, 7, True), cpu.round_randomly(b[3:], table, 400, 7, True))
    same(a, b)
    same(cuda.largest_magnitudes(a[1:], 400), cpu.largest_magnitudes(b[1:], 400))


# ---- whole schemes, against the plain code ---------------------------------------------------------------------------


def scheme(row: Row) -> None:
    for numel in (9, 300):
        fast, plain = gaussian(numel), gaussian(numel)
        payload = row.make().compress_(fast, KEYS[2])
        decoded = row.make().decompress(payload)
        with reference_only():
            expected = row.make().compress_(plain, KEYS[2]).fields
            same(row.make().decompress(payload), decoded)
        torch.testing.assert_close(fast + decoded, gaussian(numel), rtol=1e-6, atol=1e-6)
        if row.text.startswith("orq"):  # levels come from a histogram, as on the CPU
            continue
        for name, field in payload.fields.items():
            if field.is_floating_point():
                torch.testing.assert_close(field, expected[name], rtol=5e-6, atol=1e-7)
            else:
                assert int((field != expected[name]).sum()) <= 1
        assert int((~torch.isclose(fast, plain, rtol=1e-5, atol=1e-5)).sum()) <= 1


def a_bad_value_is_never_hidden() -> None:
    for row in ROWS:
        for bad in (float("nan"), float("-inf")):
            v = _with(gaussian(101), bad)
            assert not bool(row.make().decompress(row.make().compress(v, 1, assume_finite=True)).isfinite().all()), (
                row.text
            )


def other_dtypes_and_nothing_have_no_kernels() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert kernels_for(torch.ones(3, dtype=dtype)) is None
    assert kernels_for(torch.ones(0)) is None
    for row in ROWS:
        assert row.make().compress(torch.ones(0)).numel == 0


CHECKS: dict[str, Callable[[], None]] = {
    "largest_magnitudes": partial(statistic, "largest_magnitudes", 0.0),
    "ranges": partial(statistic, "ranges", 0.0),
    "lengths": partial(statistic, "lengths", 1e-12),
    "deviations": partial(statistic, "deviations", 1e-9),  # a difference of two sums
    "best_magnitudes": partial(statistic, "best_magnitudes", 5e-6),  # sums in float32, in another order
    "absolute_sum": absolute_sum,
    "optimal_levels": optimal_levels,
    "signs": signs,
    "encode_binary": encode_binary,
    "rounding": rounding,
    "packing": packing,
    "largest": largest,
    "displacement": displacement,
    "parts of a buffer": parts_of_a_buffer,
    "bad values": a_bad_value_is_never_hidden,
    "other dtypes": other_dtypes_and_nothing_have_no_kernels,
    **{row.text: partial(scheme, row) for row in ROWS},
}


def main() -> None:
    """Run all checks with the GPU's kernels in place of the CPU's."""
    libraries: dict[str, Any] = kernels._LIBRARIES
    libraries["cpu"] = libraries["cuda"]
    found = kernels_for(torch.ones(1))
    assert found is not None
    assert found.__name__.endswith("cuda")
    failed = {}
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps({"checks": list(CHECKS), "failed": failed}))


if __name__ == "__main__":
    main()
