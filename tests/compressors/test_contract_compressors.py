"""The contract of all compressors, on every row of the table."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_distopt.compressors import Payload, parse
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange.wire import Wire
from tests.compressors.table import FLOATS, ROWS, TRAITS, Row, dtypes, gaussian, rows, same_payload

KEY = 0x0123456789ABCDEF
SHAPES = ((0,), (1,), (), (7,), (8,), (3, 5), (2, 3, 4), (4, 0, 2), (2049,))


def all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def relative_residual(v: Tensor, decoded: Tensor) -> float:
    return float((v.double() - decoded.double()).square().sum() / v.double().square().sum())


def non_contiguous(like: Tensor) -> Tensor:
    """Zeros of the same shape and dtype of which every other element of a larger tensor is used."""
    return torch.zeros(*like.shape, 2, dtype=like.dtype)[..., 0]


# ---- flags -----------------------------------------------------------------------------------------------------------


@rows()
def test_flags_are_those_of_the_table(row: Row) -> None:
    assert {trait for trait in TRAITS if getattr(row.make(), trait)} == row.traits


@rows()
def test_the_text_form_builds_the_same_compressor(row: Row) -> None:
    assert repr(parse(row.text)) == repr(row.make())


# ---- round trip ------------------------------------------------------------------------------------------------------


@rows()
@dtypes
def test_round_trip_keeps_shape_and_dtype(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    for shape in SHAPES:
        decoded = compressor.decompress(compressor.compress(gaussian(*shape, dtype=dtype), KEY))
        assert (decoded.shape, decoded.dtype) == (shape, dtype)
        assert all_finite(decoded)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, dtype) for row in ROWS for dtype in row.lossless],
    ids=lambda value: getattr(value, "text", str(value)),
)
def test_round_trip_is_exact_where_claimed(row: Row, dtype: torch.dtype) -> None:
    v = gaussian(1000, dtype=dtype)
    assert torch.equal(row.make().decompress(row.make().compress(v, KEY)), v)


@rows()
@dtypes
def test_compress_leaves_its_input_alone(row: Row, dtype: torch.dtype) -> None:
    v = gaussian(100, dtype=dtype)
    before = v.clone()
    row.make().compress(v, KEY)
    assert torch.equal(v, before)


@rows()
@dtypes
def test_a_payload_shares_no_memory_with_its_input(row: Row, dtype: torch.dtype) -> None:
    compressor, v = row.make(), gaussian(100, dtype=dtype)
    payload = compressor.compress(v, KEY)
    before = compressor.decompress(payload)
    v.fill_(float("nan"))
    assert torch.equal(compressor.decompress(payload), before)


@rows()
def test_a_parameter_is_compressed_without_autograd(row: Row) -> None:
    compressor = row.make()
    parameter = torch.nn.Parameter(gaussian(100))
    payload = compressor.compress_(parameter, KEY)
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert not any(field.requires_grad for field in payload.fields.values())


# ---- residual and accumulation ---------------------------------------------------------------------------------------


@rows()
@dtypes
def test_compress_in_place_leaves_exactly_the_residual(row: Row, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        compressor, v = row.make(), gaussian(*shape, dtype=dtype)
        buffer = v.clone()
        payload = compressor.compress_(buffer, KEY)
        assert torch.equal(buffer, v - compressor.decompress(payload))


@rows()
@dtypes
def test_compress_in_place_works_on_a_non_contiguous_buffer(row: Row, dtype: torch.dtype) -> None:
    compressor, v = row.make(), gaussian(20, 10, dtype=dtype)
    buffer = non_contiguous(v).copy_(v)
    payload = compressor.compress_(buffer, KEY)
    assert torch.equal(buffer, v - compressor.decompress(payload))


@rows()
@dtypes
def test_compress_in_place_sends_what_compress_sends(row: Row, dtype: torch.dtype) -> None:
    compressor, v = row.make(), gaussian(100, dtype=dtype)
    assert same_payload(compressor.compress_(v.clone(), KEY).fields, compressor.compress(v, KEY).fields)


@rows()
@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.25, 1 / 3])
def test_decompress_add_accumulates_with_alpha_into_a_non_contiguous_tensor(row: Row, alpha: float) -> None:
    compressor, v = row.make(), gaussian(20, 10, dtype=torch.float64)
    payload = compressor.compress(v, KEY)
    out = non_contiguous(v).copy_(gaussian(20, 10, dtype=torch.float64, seed=1))
    expected = out + alpha * compressor.decompress(payload)
    compressor.decompress_add_(payload, out, alpha)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)  # two roundings of 53 bits, in either order


@rows()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wider_tensor_receives_the_very_numbers_that_the_residual_left_out(row: Row, dtype: torch.dtype) -> None:
    compressor, v = row.make(), gaussian(100, dtype=dtype)
    payload = compressor.compress(v, KEY)
    wide = torch.zeros(100, dtype=torch.float64)
    compressor.decompress_add_(payload, wide)
    assert torch.equal(wide, compressor.decompress(payload).double())


@rows()
def test_decompress_add_refuses_another_number_of_elements(row: Row) -> None:
    payload = row.make().compress(gaussian(10), KEY)
    with pytest.raises(ValueError, match=r"10 elements.*got 11"):
        row.make().decompress_add_(payload, torch.zeros(11))


# ---- what is lost ----------------------------------------------------------------------------------------------------

_HARD = {
    "gaussian": gaussian(1000),
    "heavy tails": gaussian(1000) ** 5,
    "one large": torch.cat((torch.full((1,), 1e4), torch.full((999,), 1e-2))),
    "half zeros": gaussian(1000) * (torch.arange(1000) % 2),
    "constant": torch.full((1000,), -0.3),
}


@rows("contractive", without="random")
@pytest.mark.parametrize("name", _HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_draw_contracts_as_claimed(row: Row, name: str, dtype: torch.dtype) -> None:
    compressor, v = row.make(), _HARD[name].to(dtype)
    left = relative_residual(v, compressor.decompress(compressor.compress(v)))
    assert left < 1.0
    assert left <= row.left(v) * (1 + 1e-5) + 1e-12, "float32 rounding of the scale and of the sums"


@rows("contractive", "random")
@pytest.mark.parametrize("name", _HARD)
def test_the_mean_over_keys_contracts_as_claimed(row: Row, name: str) -> None:
    compressor, v = row.make(), _HARD[name]
    draws = torch.tensor(
        [relative_residual(v, compressor.decompress(compressor.compress(v, key))) for key in range(300)]
    )
    standard_error = float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.mean()) <= row.left(v) * (1 + 1e-5) + 1e-12 + 5 * standard_error


@rows("unbiased")
def test_the_mean_over_keys_is_the_input(row: Row) -> None:
    compressor, v = row.make(), gaussian(200)
    draws = torch.stack([compressor.decompress(compressor.compress(v, key)) for key in range(400)]).double()
    standard_errors = draws.std(0) / math.sqrt(len(draws))
    # 1e-7: float32 values. Five standard errors: a false alarm in 200 elements has probability 1e-4. Next to a level, the
    # other one may be drawn once or never, which tells nothing of the deviation: five draws of the full range in addition.
    rare = 5 * float(v.max() - v.min()) / len(draws)
    assert bool(((draws.mean(0) - v.double()).abs() <= 5 * standard_errors + 1e-7 * v.abs() + rare).all())


# ---- bytes -----------------------------------------------------------------------------------------------------------


@rows()
@dtypes
def test_bytes_are_those_announced_and_those_on_the_wire(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    for numel in (0, 1, 7, 8, 2047, 2048, 2049):
        payload = compressor.compress(gaussian(numel, dtype=dtype), KEY)
        packed = Wire([compressor.layout(numel, dtype)]).pack([payload], torch.device("cpu"))
        assert payload.nbytes == compressor.nbytes(numel, dtype) == packed.nbytes


@rows()
@dtypes
def test_fields_are_those_of_the_layout(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    for numel in (0, 1, 7, 2049):
        fields = compressor.compress(gaussian(numel, dtype=dtype), KEY).fields
        described = [(name, field.dtype, field.numel()) for name, field in fields.items()]
        assert described == list(compressor.layout(numel, dtype))
        assert all(field.dim() == 1 and field.is_contiguous() for field in fields.values())


@rows()
@dtypes
def test_bits_survive_the_wire(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    payloads = [compressor.compress(gaussian(numel, dtype=dtype), KEY) for numel in (13, 0, 1, 200)]
    wire = Wire([compressor.layout(payload.numel, dtype) for payload in payloads])
    received = wire.unpack(wire.pack(payloads, torch.device("cpu")))
    assert all(
        same_payload(dict(sorted(a.items())), dict(sorted(b.fields.items())))
        for a, b in zip(received, payloads, strict=True)
    )


# ---- awkward tensors -------------------------------------------------------------------------------------------------


@rows()
@pytest.mark.parametrize(
    "view",
    [
        gaussian(12, 20).t(),
        gaussian(40, 5)[::3],
        gaussian(5).expand(7, 5),
        gaussian(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "channels last"],
)
def test_a_non_contiguous_tensor_gives_the_payload_of_its_contiguous_copy(row: Row, view: Tensor) -> None:
    assert not view.is_contiguous()
    payload, plain = (
        row.make().compress(tensor, KEY) for tensor in (view, view.clone(memory_format=torch.contiguous_format))
    )
    assert same_payload(payload.fields, plain.fields)
    assert payload.shape == view.shape


@rows()
@dtypes
def test_all_zeros_decode_to_zeros(row: Row, dtype: torch.dtype) -> None:
    v = torch.zeros(100, dtype=dtype)
    assert torch.equal(row.make().decompress(row.make().compress(v, KEY)), v)


_HUGE = {torch.float32: 1e38, torch.bfloat16: 3e38, torch.float16: 6e4, torch.float64: 1e300}


@rows()
@dtypes
@pytest.mark.parametrize("pattern", ["constant", "signs", "one"])
def test_huge_values_neither_overflow_nor_leave_a_non_finite_residual(
    row: Row, dtype: torch.dtype, pattern: str
) -> None:
    for size, numel in product((_HUGE[dtype], torch.finfo(dtype).max), (1, 1000)):
        v = torch.full((numel,), size, dtype=dtype)
        if pattern == "signs":
            v[::2] *= -1
        elif pattern == "one":
            v[1:] = 1.0
        compressor, buffer = row.make(), v.clone()
        assert all_finite(compressor.decompress(compressor.compress_(buffer, KEY)), buffer)


@rows()
@dtypes
def test_denormal_values_stay_finite(row: Row, dtype: torch.dtype) -> None:
    v = torch.arange(1, 101).to(dtype) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool((v > 0).all()), "the platform keeps denormals"
    compressor, buffer = row.make(), v.clone()
    decoded = compressor.decompress(compressor.compress_(buffer, KEY))
    assert all_finite(decoded, buffer)
    # A draw may choose a level on the other side of zero, and levels are at most as large as the length of ``v``.
    assert bool((buffer.abs() <= (2 * v.sum() if "random" in row.traits else v.max())).all())


# ---- bad input -------------------------------------------------------------------------------------------------------


@rows()
@dtypes
def test_non_finite_values_are_counted_and_located(row: Row, dtype: torch.dtype) -> None:
    v = gaussian(10, 10, dtype=dtype)
    v[0, 7], v[3, 3], v[9, 9] = math.inf, math.nan, -math.inf
    with pytest.raises(NonFiniteError, match=r"1 NaN and 2 infinite of 100 elements.*flat index 7\b"):
        row.make().compress(v, KEY)


@rows()
def test_a_refused_buffer_is_left_as_it_was(row: Row) -> None:
    v = gaussian(100)
    v[50] = math.inf
    before = v.clone()
    with pytest.raises(NonFiniteError):
        row.make().compress_(v, KEY)
    assert torch.equal(v, before)


@rows()
@dtypes
def test_what_was_wrongly_vouched_for_decodes_to_something_non_finite(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    for bad, where in product((math.nan, math.inf, -math.inf), (0, 57, 99)):
        v = gaussian(100, dtype=dtype)
        v[where] = bad
        payload = compressor.compress(v, KEY, assume_finite=True)
        assert not all_finite(compressor.decompress(payload))
        # So receivers need not decode to know.
        assert not all_finite(*(field for field in payload.fields.values() if field.is_floating_point()))


@rows()
@pytest.mark.parametrize(
    "tensor",
    [torch.arange(4), torch.tensor([True]), torch.ones(2, dtype=torch.complex64), torch.ones(3).to_sparse()],
    ids=["int64", "bool", "complex64", "sparse"],
)
def test_other_tensors_are_refused_by_kind(row: Row, tensor: Tensor) -> None:
    with pytest.raises(TypeError, match=rf"floating-point.*{tensor.dtype}.*{tensor.layout}"):
        row.make().compress(tensor)


# ---- randomness ------------------------------------------------------------------------------------------------------


@rows()
def test_the_same_key_gives_the_same_bits(row: Row) -> None:
    v = gaussian(1000)
    assert same_payload(row.make().compress(v, KEY).fields, row.make().compress(v, KEY).fields)


@rows("random")
def test_other_keys_give_other_draws(row: Row) -> None:
    compressor, v = row.make(), gaussian(1000)
    assert len({tuple(compressor.decompress(compressor.compress(v, key)).tolist()) for key in range(20)}) > 15


@rows(without="random")
def test_without_draws_the_key_has_no_effect(row: Row) -> None:
    v = gaussian(100)
    a, b = row.make().compress(v, KEY), row.make().compress(v)
    assert (a.key, b.key) == (0, 0)
    assert same_payload(a.fields, b.fields)


@rows()
def test_without_a_key_the_global_seed_decides(row: Row) -> None:
    compressor, v = row.make(), gaussian(1000)

    def draw(seed: int) -> Payload:
        torch.manual_seed(seed)
        return compressor.compress(v)

    a, b = draw(3), draw(3)
    assert a.key == b.key
    assert same_payload(a.fields, b.fields)


@rows("random")
def test_without_a_key_each_call_draws_anew(row: Row) -> None:
    keys = {row.make().compress(gaussian(10)).key for _ in range(20)}
    assert len(keys) == 20
    assert all(0 <= key < 2**64 for key in keys)


# ---- sums and parts --------------------------------------------------------------------------------------------------


@rows("linear")
@dtypes
def test_the_sum_of_fields_decodes_to_the_sum_of_decoded(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    payloads = [compressor.compress(gaussian(1000, dtype=dtype, seed=seed), KEY) for seed in range(3)]
    total = {name: sum(payload.fields[name] for payload in payloads) for name in payloads[0].fields}
    decoded = compressor.decompress(Payload(total, payloads[0].shape, dtype, KEY))
    expected = sum(compressor.decompress(payload).double() for payload in payloads)
    # Each of two sums, and the cast back, rounds once to the coarser of the two formats; terms are below 5.
    eps = max(torch.finfo(dtype).eps, *(torch.finfo(field.dtype).eps for field in total.values()))
    torch.testing.assert_close(decoded.double(), expected, rtol=0, atol=3 * eps * 15)


@rows("splittable")
@dtypes
@pytest.mark.parametrize("cuts", [[], [1, 2], [6, 6, 12], [0, 13]], ids=str)
def test_parts_decode_to_slices(row: Row, dtype: torch.dtype, cuts: list[int]) -> None:
    compressor = row.make()
    unit = compressor.granularity
    numel = 12 * unit + 4
    payload = compressor.compress(gaussian(2, numel // 2, dtype=dtype), KEY)
    bounds = [0, *(min(cut * unit, numel) for cut in cuts), numel]
    whole = compressor.decompress(payload).view(-1)
    parts = compressor.split(payload, bounds)
    assert [part.numel for part in parts] == [b - a for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat([compressor.decompress(part) for part in parts]), whole)


@rows("splittable")
@dtypes
def test_parts_carry_the_bytes_of_their_layout(row: Row, dtype: torch.dtype) -> None:
    compressor = row.make()
    unit = compressor.granularity
    numel = 70 * unit + 1
    for part in compressor.split(compressor.compress(gaussian(numel, dtype=dtype), KEY), [0, unit, 50 * unit, numel]):
        layout = compressor.layout(part.numel, dtype, compressor.entries(part))
        assert Wire([layout]).nbytes == part.nbytes


@rows(without="splittable")
def test_what_cannot_be_split_says_what_to_use(row: Row) -> None:
    with pytest.raises(TypeError, match=r"cannot be split.*all_reduce.*all_gather"):
        row.make().split(row.make().compress(gaussian(16), KEY), [0, 8, 16])


# ---- properties ------------------------------------------------------------------------------------------------------

_WIDTH: dict[torch.dtype, Any] = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(FLOATS))
    limit = float(torch.finfo(dtype).max)
    elements = st.floats(-limit, limit, width=_WIDTH[dtype])
    return torch.tensor(draw(st.lists(elements, max_size=70)), dtype=dtype)


keys = st.integers(0, 2**64 - 1)


@rows()
@settings(deadline=None, max_examples=30)
@given(v=tensors(), key=keys)
def test_any_finite_tensor_makes_the_round_trip(row: Row, v: Tensor, key: int) -> None:
    decoded = row.make().decompress(row.make().compress(v, key))
    assert (decoded.shape, decoded.dtype) == (v.shape, v.dtype)
    assert all_finite(decoded)


@rows()
@settings(deadline=None, max_examples=30)
@given(v=tensors(), key=keys)
def test_any_finite_buffer_keeps_exactly_its_finite_residual(row: Row, v: Tensor, key: int) -> None:
    buffer = v.clone()
    decoded = row.make().decompress(row.make().compress_(buffer, key))
    assert torch.equal(buffer, v - decoded)
    assert all_finite(buffer)


@rows()
@settings(deadline=None, max_examples=30)
@given(numel=st.integers(0, 5000), dtype=st.sampled_from(FLOATS), key=keys)
def test_any_size_has_the_announced_bytes(row: Row, numel: int, dtype: torch.dtype, key: int) -> None:
    payload = row.make().compress(gaussian(numel, dtype=dtype), key)
    assert payload.nbytes == row.make().nbytes(numel, dtype)


@rows("splittable")
@settings(deadline=None, max_examples=30)
@given(v=tensors(), cuts=st.lists(st.integers(0, 8), max_size=4))
def test_any_cut_at_multiples_of_the_granularity_decodes_to_slices(row: Row, v: Tensor, cuts: list[int]) -> None:
    compressor = row.make()
    payload = compressor.compress(v)
    unit = compressor.granularity
    bounds = [0, *sorted(unit * cut for cut in cuts if unit * cut < v.numel()), v.numel()]
    parts = [compressor.decompress(part) for part in compressor.split(payload, bounds)]
    assert torch.equal(torch.cat(parts), compressor.decompress(payload))
