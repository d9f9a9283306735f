"""Compiled kernels against the plain code: the same draws, the same packing, the same residuals."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_distopt.compressors import ORQ, BinGradPB, ScaledSign, TopK, kernels
from lightning_distopt.compressors.codes import pack_codes, unpack_codes
from lightning_distopt.compressors.kernels import kernels_for, kernels_of, reference_only
from lightning_distopt.compressors.quantizer import round_randomly
from lightning_distopt.compressors.randomness import uniform
from tests.compressors.table import Row, gaussian, rows

cpu = pytest.importorskip("lightning_distopt.compressors.kernels.cpu", reason="needs numba")
KEY = 0x0123456789ABCDEF
SIZES = (1, 7, 8, 63, 64, 2047, 2048, 2049, 4096, 10_000)


def both(row: Row, v: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    """Fields and residual by kernels, then by plain code."""
    fast, plain = v.clone(), v.clone()
    fields = row.make().compress_(fast, KEY).fields
    with reference_only():
        return fields, fast, row.make().compress_(plain, KEY).fields, plain


# ---- whole schemes ---------------------------------------------------------------------------------------------------


@rows()
def test_floats_are_the_same_to_their_last_bits(row: Row) -> None:
    if row.text.startswith("orq"):
        pytest.skip("levels come from a histogram; see the test of its error")
    for numel in SIZES:
        fields, _, plain, _ = both(row, gaussian(numel))
        for name, field in fields.items():
            if field.is_floating_point():
                torch.testing.assert_close(field, plain[name], rtol=5e-6, atol=1e-7)


@rows()
def test_codes_differ_only_where_a_level_did(row: Row) -> None:
    if row.text.startswith("orq"):
        pytest.skip("levels come from a histogram; see the test of its error")
    for numel in SIZES:
        fields, residual, plain, expected = both(row, gaussian(numel))
        for name, field in fields.items():
            if not field.is_floating_point():
                assert int((field != plain[name]).sum()) <= 1 + numel // 5000
        close = torch.isclose(residual, expected, rtol=1e-5, atol=1e-5)
        assert int((~close).sum()) <= 1 + numel // 5000


@rows()
def test_the_plain_code_decodes_what_kernels_encoded_to_the_same_bits(row: Row) -> None:
    for numel in SIZES:
        payload = row.make().compress(gaussian(numel), KEY)
        decoded = row.make().decompress(payload)
        with reference_only():
            assert torch.equal(row.make().decompress(payload), decoded)


# ---- parts -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(numel=st.integers(1, 9000), size=st.integers(1, 5000), symbols=st.integers(2, 17), key=st.integers(0, 2**64 - 1))
def test_rounding_and_its_draws_are_the_same_bit_for_bit(numel: int, size: int, symbols: int, key: int) -> None:
    v = gaussian(numel)
    buckets = -(-numel // size)
    table = gaussian(buckets, symbols, seed=1).sort(1).values
    padded = torch.nn.functional.pad(v, (0, buckets * size - numel)).view(buckets, size)
    draws = torch.nn.functional.pad(uniform(key, numel), (0, buckets * size - numel)).view(buckets, size)
    expected = round_randomly(padded, table, draws).view(-1)[:numel]
    residual = v.clone()
    assert torch.equal(cpu.round_randomly(residual, table, size, key, True), expected)
    levels = table.gather(1, torch.nn.functional.pad(expected, (0, buckets * size - numel)).view(buckets, size).long())
    assert torch.equal(residual, v - levels.view(-1)[:numel])


@settings(deadline=None, max_examples=50)
@given(numel=st.integers(1, 3000), symbols=st.integers(2, 256), seed=st.integers(0, 1000))
def test_packing_is_the_same_bit_for_bit(numel: int, symbols: int, seed: int) -> None:
    codes = torch.randint(symbols, (numel,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, symbols)
    assert torch.equal(cpu.pack(codes, symbols), packed)
    assert torch.equal(cpu.unpack(packed, numel, symbols), codes)
    assert torch.equal(unpack_codes(packed, numel, symbols), codes)


@settings(deadline=None, max_examples=60)
@given(numel=st.integers(1, 20_000), share=st.floats(0.0, 1.0), seed=st.integers(0, 1000), kinds=st.integers(0, 2))
def test_the_largest_are_chosen_exactly_and_the_first_of_equals(
    numel: int, share: float, seed: int, kinds: int
) -> None:
    v = gaussian(numel, seed=seed)
    if kinds:
        v = (v * kinds).round()  # many ties
    k = max(1, int(numel * share))
    places = cpu.select_largest(v, k)
    expected = (-v.abs()).sort(stable=True).indices[:k].sort().values
    assert torch.equal(places.long(), expected)


def test_a_misleading_sample_still_finds_the_largest() -> None:
    v = torch.zeros(1 << 20)
    v[:600] = torch.arange(600) + 1.0  # all in one stretch of the sample, which sees 8 of 512 of it
    assert cpu.select_largest(v, 500).tolist() == list(range(100, 600))
    v = torch.ones(1 << 20)
    assert cpu.select_largest(v, 10).tolist() == list(range(10))


def test_nan_and_infinity_are_the_largest() -> None:
    v = gaussian(1000)
    v[[3, 500, 900]] = torch.tensor([float("nan"), float("-inf"), -float("nan")])
    assert cpu.select_largest(v, 3).tolist() == [3, 500, 900]


@pytest.mark.parametrize("levels", [3, 5, 9])
@pytest.mark.parametrize("bucket", [64, 2048])
@pytest.mark.parametrize("shape", ["normal", "laplace", "skewed", "shifted"])
def test_a_histogram_costs_orq_less_than_half_a_percent(levels: int, bucket: int, shape: str) -> None:
    v = gaussian(1 << 17)
    v = {"normal": v, "laplace": v * gaussian(1 << 17, seed=1).abs(), "skewed": v.exp(), "shifted": v + 100}[shape]
    scheme = ORQ(levels, bucket)
    found = cpu.optimal_levels(v, bucket, levels, None)
    with reference_only():
        exact = scheme.compress(v, KEY).fields["levels"].view(-1, levels)
    assert torch.equal(found[:, [0, -1]], exact[:, [0, -1]])
    errors = [_variance(v.view(-1, bucket).double(), table.double()) for table in (found, exact)]
    assert errors[0] <= errors[1] * (1.005 if bucket == 2048 else 1.05), "small buckets are chosen from few values"
    assert bool((found.diff() >= 0).all())


def _variance(v: Tensor, table: Tensor) -> float:
    cell = (v.unsqueeze(2) >= table[:, None, 1:-1]).sum(2)
    return float(((table.gather(1, cell + 1) - v) * (v - table.gather(1, cell))).sum())


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38, 0.0])
def test_extreme_ranges_have_finite_ascending_levels(value: float) -> None:
    v = torch.tensor([-value, value] * 50 + [0.0])
    levels = cpu.optimal_levels(v, 101, 9, None)[0]
    assert bool(levels.isfinite().all())
    assert bool((levels.diff() >= 0).all())


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@rows()
def test_a_bad_value_is_never_hidden(row: Row, bad: float) -> None:
    for place in (0, 4, 99):
        v = gaussian(100)
        v[place] = bad
        decoded = row.make().decompress(row.make().compress(v, KEY, assume_finite=True))
        assert not bool(decoded.isfinite().all())


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_a_displacement_is_taken_and_the_model_brought_back(kept: float) -> None:
    z, x, e = gaussian(5000, seed=1), gaussian(5000, seed=2), gaussian(5000, seed=3)
    param, anchor, residual = z.clone(), x.clone(), e.clone()
    cpu.displace_(param, anchor, residual, kept)
    assert torch.equal(param, x)
    assert torch.equal(anchor, x)
    if kept in (0.0, 1.0):
        assert torch.equal(residual, x - z + kept * e)
    else:  # a product and a sum may be rounded once or twice
        torch.testing.assert_close(residual, x - z + kept * e)


def test_an_old_residual_that_counts_for_nothing_is_not_read() -> None:
    residual = torch.full((9,), float("nan"))
    cpu.displace_(torch.zeros(9), torch.ones(9), residual, 0.0)
    assert torch.equal(residual, torch.ones(9))


# ---- choice ----------------------------------------------------------------------------------------------------------


def test_only_float32_has_kernels() -> None:
    assert kernels_for(torch.ones(3)) is cpu
    assert all(kernels_for(torch.ones(3, dtype=d)) is None for d in (torch.float64, torch.float16, torch.bfloat16))
    assert kernels_for(torch.ones(0)) is None


def test_plain_torch_can_be_asked_for() -> None:
    with reference_only():
        assert kernels_for(torch.ones(3)) is None
        assert kernels_of(torch.device("cpu")) == "torch"
    assert kernels_of(torch.device("cpu")) == "cpu"


def test_a_missing_library_is_one_warning_and_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_numba(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "numba":
            raise ImportError("No module named 'numba'")
        return original(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("lightning_distopt.compressors.kernels.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_numba)
    kernels._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"plain torch.*`numba` cannot be used.*NUMBA_CACHE_DIR"):
            ScaledSign().compress(gaussian(10))
        TopK(0.1).compress(gaussian(10))  # and none again, or the test would fail
        BinGradPB().compress(gaussian(10))
    finally:
        kernels._load.cache_clear()
