"""PowerSGD: low rank, exact where the rank suffices, alike on all ranks, two all-reduces a bucket, nothing hidden."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import PowerSGD, parse
from lightning_distopt.compressors.base import wide
from lightning_distopt.exchange import Meter, PowerSGDMean, overlap
from lightning_distopt.exchange.power_sgd import orthonormal
from lightning_distopt.exchange.tensor_mean import MeanTensors
from tests.ranks import run_ranks

SHAPES = ((12, 9), (7,), (6, 2, 5), (3, 2), ())
COMPRESSED = (0, 2)  # 2 (12 + 9) < 108, 2 (6 + 10) < 60, but 2 (3 + 2) >= 6


def bucket(
    seed: int, dtype: torch.dtype = torch.float64, shapes: Sequence[Any] = SHAPES
) -> tuple[Tensor, list[Tensor]]:
    """A flat buffer and its views."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return flat, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def arrive(mean: PowerSGDMean, tensors: list[Tensor], flat: Tensor, step: int = 0, keep: bool = True) -> MeanTensors:
    found: list[MeanTensors] = []

    def work() -> Any:
        found.append((yield from mean.mean_([str(i) for i in range(len(tensors))], tensors, flat, step)))

    overlap([work()])
    mean.settle(keep)
    return found[0]


def average(mean: PowerSGDMean, tensors: list[Tensor], flat: Tensor, step: int = 0, keep: bool = True) -> list[Tensor]:
    return written(arrive(mean, tensors, flat, step, keep), tensors)


def written(means: MeanTensors, tensors: list[Tensor]) -> list[Tensor]:
    """The means as flat tensors."""
    numels = [tensor.numel() for tensor in tensors]
    out = torch.full((sum(numels),), float("nan"), dtype=wide(tensors[0].dtype))
    means.write_(out)
    return list(out.split(numels))


def _mean(rank: int, world: int) -> dict[str, Any]:
    mean = PowerSGDMean(2, Meter())
    outs, lefts = [], []
    for step in range(3):
        flat, tensors = bucket(10 * step + rank)
        means = arrive(mean, tensors, flat, step)
        means.leave_(tensors)
        out = written(means, tensors)
        outs.append([o.clone() for o in out])
        lefts.append([t.clone() for t in tensors])
    return {"outs": outs, "lefts": lefts, "sent": dict(mean.meter.sent)}


@pytest.fixture(scope="module")
def averages() -> list[dict[str, Any]]:
    return run_ranks(3, _mean)


def test_all_ranks_get_the_same_bits(averages: list[dict[str, Any]]) -> None:
    for other in averages[1:]:
        for mine, theirs in zip(chain(*averages[0]["outs"]), chain(*other["outs"]), strict=True):
            assert torch.equal(mine, theirs)


def test_matrices_come_back_with_at_most_the_rank_and_the_rest_exactly(averages: list[dict[str, Any]]) -> None:
    for step, out in enumerate(averages[0]["outs"]):
        exact = torch.stack([bucket(10 * step + rank)[0] for rank in range(3)]).mean(0)
        for i, (o, shape, e) in enumerate(
            zip(out, SHAPES, exact.split([torch.Size(s).numel() for s in SHAPES]), strict=True)
        ):
            if i in COMPRESSED:
                assert int(torch.linalg.matrix_rank(o.view(shape[0], -1))) == 2
            else:
                torch.testing.assert_close(o, e, rtol=0, atol=1e-15)


def test_what_is_left_is_what_all_ranks_have_left_out(averages: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(averages):
        for step, left in enumerate(found["lefts"]):
            _, before = bucket(10 * step + rank)
            for i, (e, v, out) in enumerate(zip(left, before, found["outs"][step], strict=True)):
                expected = v - out.view(v.shape) if i in COMPRESSED else torch.zeros_like(v)
                assert torch.equal(e, expected)


def test_bytes_are_those_of_two_all_reduces_a_bucket(averages: list[dict[str, Any]]) -> None:
    up = 2 * (12 + 6) + 7 + 6 + 1  # P of two matrices, and what is sent dense
    down = 2 * (9 + 10)
    ring = [2 * 8 * n * 2 // 3 for n in (up, down)]
    for found in averages:
        assert found["sent"] == {"exchange": 3 * sum(ring)}


def _low_rank(rank: int, world: int) -> float:
    """All ranks' matrices have their columns in one plane, so the mean has rank 2."""
    plane = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flat, tensors = bucket(rank, shapes=[(12, 9)])
    tensors[0].copy_(plane @ tensors[0][:2])
    mean = tensors[0].clone()
    torch.distributed.all_reduce(mean)
    return float((average(PowerSGDMean(2, Meter()), tensors, flat)[0].view(12, 9) - mean / world).abs().max())


def test_a_mean_of_full_rank_for_it_comes_back_exactly() -> None:
    assert max(run_ranks(2, _low_rank)) < 1e-14


def test_warm_starts_approach_the_best_approximation() -> None:
    flat, tensors = bucket(0, shapes=[(12, 9)])
    mean = PowerSGDMean(2, Meter())
    errors = [float((average(mean, tensors, flat, step)[0].view(12, 9) - tensors[0]).norm()) for step in range(200)]
    best = float(torch.linalg.svdvals(tensors[0])[2:].norm())
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-9)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))


def test_a_matrix_that_was_0_for_a_step_is_seen_again() -> None:
    """Its Q is 0 then. The first rows stay 0: a basis that falls back to them would find nothing for ever."""
    flat, tensors = bucket(0, shapes=[(12, 9)])
    mean = PowerSGDMean(2, Meter())
    average(mean, tensors, flat, 0)
    later = tensors[0].clone()
    later[:2] = 0.0
    flat.zero_()
    assert float(average(mean, tensors, flat, 1)[0].abs().max()) == 0.0
    tensors[0].copy_(later)
    assert float(average(mean, tensors, flat, 2)[0].norm()) > 0.3 * float(later.norm())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    means = [PowerSGDMean(2, Meter()) for _ in range(2)]
    for step in range(5):
        outs = []
        for mean, factor in zip(means, (1.0, scale), strict=True):
            flat, tensors = bucket(step, torch.float32, [(12, 9)])
            flat.mul_(factor)
            outs.append(average(mean, tensors, flat, step)[0].double())
        torch.testing.assert_close(outs[1] / scale, outs[0], rtol=1e-3, atol=1e-3)


def _broken(rank: int, world: int, value: float, index: int) -> list[tuple[bool, bool]]:
    """Rank 1 contributes one bad number; tell whether the means show it, and whether a step that is dropped leaves no trace."""
    mean = PowerSGDMean(2, Meter())
    flat, tensors = bucket(rank)
    average(mean, tensors, flat)
    before = copy.deepcopy(mean.state_dict())
    flat, tensors = bucket(10 + rank)
    if rank == 1:
        tensors[index].view(-1)[0] = value
    out = average(mean, tensors, flat, 1, keep=False)
    after = mean.state_dict()["queries"]
    shown = not all(bool(o.isfinite().all()) for o in out)
    clean = rank == 1 or bool(flat.isfinite().all())
    return [(shown, clean and all(torch.equal(after[name], q) for name, q in before["queries"].items()))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 1])
def test_a_bad_number_of_one_rank_shows_on_all_and_can_be_forgotten(value: float, index: int) -> None:
    assert run_ranks(2, _broken, value, index) == [[(True, True)]] * 2


@pytest.mark.parametrize("columns", [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1e-30, 1e30]])
def test_a_basis_is_orthonormal_whatever_it_is_made_of(columns: list[float]) -> None:
    p = torch.ones(20, 2) * torch.tensor(columns)
    basis = orthonormal(p)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis @ (basis.t() @ p), p, rtol=1e-5, atol=0)


def test_half_precision_is_averaged_in_float32() -> None:
    flat, tensors = bucket(0, torch.bfloat16)
    out = average(PowerSGDMean(2, Meter()), tensors, flat)
    assert {o.dtype for o in out} == {torch.float32}
    torch.testing.assert_close(out[1], tensors[1].float(), rtol=0, atol=0)


def test_a_state_shares_no_memory_with_its_source() -> None:
    flat, tensors = bucket(0)
    first, second = PowerSGDMean(2, Meter()), PowerSGDMean(2, Meter())
    average(first, tensors, flat)
    second.load_state_dict(first.state_dict())
    for q in first.state_dict()["queries"].values():
        q.zero_()
    assert all(bool(q.any()) for q in second.state_dict()["queries"].values())


def test_the_specification_is_a_record_of_numbers() -> None:
    assert parse("powersgd:4") == PowerSGD(4)
    with pytest.raises(ValueError, match="`rank` must be an integer >= 1: got 0"):
        PowerSGD(0)
    with pytest.raises(TypeError, match=r"`rank` must be an integer >= 1: got 1\.5"):
        PowerSGD(1.5)  # type: ignore[arg-type]
