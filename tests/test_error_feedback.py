from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors import Compressor, Dense, RandomBlock, ScaledSign, TopK
from lightning_distopt.error_feedback import (
    FlatViews,
    average_,
    compensate_,
    compress_,
    refuse_unless_contractive,
    step_ahead_,
)
from lightning_distopt.exchange import Meter
from tests.ranks import run_ranks

SHAPES = [(3, 4), (), (5,), (2, 1, 3)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=[str(dtype).removeprefix("torch.") for dtype in FLOATS])
coefficients = pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])


def tensors(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in SHAPES]


def memory_of(values: list[Tensor]) -> FlatViews:
    memory = FlatViews(values)
    for view, value in zip(memory.views, values, strict=True):
        view.copy_(value)
    return memory


# ---- flat memory -----------------------------------------------------------------------------------------------------


def test_views_have_the_shapes_of_their_tensors_and_share_one_buffer() -> None:
    memory = FlatViews(tensors())
    assert [tuple(view.shape) for view in memory.views] == SHAPES
    assert [flat.dim() for flat in memory.flats] == [1] * len(SHAPES)
    for i, view in enumerate(memory.views):
        view.fill_(i)
    assert memory.flat.tolist() == [0.0] * 12 + [1.0] + [2.0] * 5 + [3.0] * 6


@dtypes
def test_half_precision_tensors_get_float32_memory(dtype: torch.dtype) -> None:
    assert FlatViews(tensors(dtype)).flat.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_memory_begins_at_zero() -> None:
    assert not FlatViews(tensors()).flat.any()


# ---- one round -------------------------------------------------------------------------------------------------------


@dtypes
@coefficients
def test_step_ahead_moves_the_parameters_by_the_residual(dtype: torch.dtype, coefficient: float) -> None:
    params, residual = tensors(dtype), memory_of(tensors(dtype, 0.1))
    expected = [(p.double() - coefficient * e.double()).to(dtype) for p, e in zip(params, residual.views, strict=True)]
    step_ahead_(params, FlatViews(params), residual, coefficient)
    for param, y in zip(params, expected, strict=True):
        torch.testing.assert_close(param, y)  # one rounding, perhaps in another place


@dtypes
def test_step_ahead_keeps_the_common_model_in_the_anchor(dtype: torch.dtype) -> None:
    params = tensors(dtype)
    before, anchor = [p.clone() for p in params], FlatViews(params)
    step_ahead_(params, anchor, memory_of(tensors(dtype)), 1.0)
    assert all(torch.equal(x, old.to(x.dtype)) for x, old in zip(anchor.views, before, strict=True))


@dtypes
@coefficients
def test_a_round_loses_nothing(dtype: torch.dtype, coefficient: float) -> None:
    """``D == e + step`` where ``step = y - z`` is what the optimizer did, whatever the coefficient."""
    params, residual = tensors(dtype), memory_of(tensors(dtype, 0.1))
    before, anchor = residual.flat.double().clone(), FlatViews(params)
    step_ahead_(params, anchor, residual, coefficient)
    y = torch.cat([p.reshape(-1) for p in params]).double()
    for param in params:
        param.sub_(torch.full_like(param, 0.01))
    step = y - torch.cat([p.reshape(-1) for p in params]).double()
    ahead = anchor.flat.double() - y  # alpha * e as the parameters could hold it
    compensate_(params, anchor, residual, coefficient)
    expected = step + ahead + (1 - coefficient) * before
    # Numbers up to 3 are subtracted in the precision of the memory (float32 for half precision).
    eps = torch.finfo(residual.flat.dtype).eps
    torch.testing.assert_close(residual.flat.double(), expected, rtol=0, atol=8 * eps)


def test_residuals_below_the_precision_of_the_model_survive_a_round() -> None:
    """A residual of 1e-10 cannot be seen beside x = 1 in float32, and must not be rounded to it."""
    params = [torch.ones(4)]
    anchor, residual = FlatViews(params), memory_of([torch.full((4,), 1e-10)])
    step_ahead_(params, anchor, residual, 0.0)
    compensate_(params, anchor, residual, 0.0)
    assert residual.flat.tolist() == pytest.approx([1e-10] * 4, rel=1e-6)


@pytest.mark.parametrize("compressor", [ScaledSign(), TopK(0.3), RandomBlock(0.3), Dense("bfloat16")], ids=repr)
def test_what_is_sent_and_what_stays_is_what_was_there(compressor: Compressor) -> None:
    values = tensors(torch.float64)
    memory = memory_of(values)
    payloads = compress_(compressor, memory.flats, list(range(len(values))))
    for value, payload, left in zip(values, payloads, memory.views, strict=True):
        torch.testing.assert_close(compressor.decompress(payload).view(left.shape) + left, value, rtol=0, atol=1e-15)


# ---- averaging -------------------------------------------------------------------------------------------------------


def _averaged(rank: int, world: int) -> tuple[list[Tensor], int]:
    memories = [memory_of([torch.full((3, 2), float(rank)), torch.arange(5.0) * rank]), FlatViews([torch.ones(4)])]
    meter = Meter()
    average_(memories, meter, None, world)
    return [memory.flat for memory in memories], meter.sent["averaging"]


@pytest.mark.parametrize("world", [2, 3])
def test_averaged_residuals_are_the_mean_on_every_rank(world: int) -> None:
    mean = (world - 1) / 2
    expected = torch.cat([torch.full((6,), mean), torch.arange(5.0) * mean])
    for memories, _ in run_ranks(world, _averaged):
        torch.testing.assert_close(memories[0], expected)
        assert not memories[1].any()


def test_averaging_counts_a_dense_all_reduce() -> None:
    assert [sent for _, sent in run_ranks(2, _averaged)] == [2 * 4 * 15 // 2] * 2


def test_averaging_on_one_rank_changes_nothing() -> None:
    memory = memory_of([torch.arange(5.0)])
    average_([memory], Meter(), None, 1)
    assert memory.flat.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert not dist.is_initialized()


# ---- bad input -------------------------------------------------------------------------------------------------------


class _Growing(ScaledSign):
    contractive = False


def test_a_compressor_that_is_not_contractive_is_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match=r"`error_feedback='local'` needs a contractive.*_Growing\(\).*'topk:0.01'"):
        refuse_unless_contractive(_Growing(), "local")


def test_a_contractive_compressor_is_not_refused() -> None:
    refuse_unless_contractive(ScaledSign(), "local")
