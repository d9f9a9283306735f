"""The quantisers against what is known of them: a golden vector, closed forms, and errors over random data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import ORQ, QSGD, BinGradB, BinGradPB, LinearQuantizer, ScaledSign, TernGrad
from lightning_distopt.compressors.bin_grad_pb import best_magnitude
from lightning_distopt.compressors.kernels import reference_only
from lightning_distopt.compressors.orq import optimal_levels
from lightning_distopt.compressors.quantizer import Quantizer, RandomRounding, clipped
from tests.compressors.table import gaussian

GOLDEN = torch.tensor([-4, -1.5, -0.5, 0, 0.25, 1, 2, 6])


def expected_left(scheme: RandomRounding, v: Tensor) -> float:
    """``E|v - C(v)|² / |v|²`` by definition: what clipping moves, and the variance of rounding between two levels."""
    error = 0.0
    for rows in scheme._buckets(v):
        inside = rows if scheme.clip is None else clipped(rows, scheme.clip)
        table = scheme._table(scheme._side(inside)).double()
        inside = torch.minimum(torch.maximum(inside.double(), table[:, :1]), table[:, -1:])
        cell = (inside.unsqueeze(2) >= table[:, None, 1:-1]).sum(2)
        low, high = table.gather(1, cell), table.gather(1, cell + 1)
        error += float(((high - inside) * (inside - low) + (inside - rows.double()).square()).sum())
    return error / float(v.double().square().sum())


def left(scheme: Quantizer | ScaledSign, v: Tensor) -> float:
    """``|v - C(v)|² / |v|²`` of one draw."""
    residual = v.clone()
    scheme.compress_(residual)
    return float(residual.double().square().sum() / v.double().square().sum())


# ---- the golden vector: one bucket, known to six digits --------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "expected"),
    [(3, [-4, 0.25, 6]), (5, [-4, -1.5, 0.25, 2, 6]), (9, [-4, -4, -1.5, -0.5, 0.25, 1, 2, 6, 6])],
)
def test_orq_finds_the_golden_levels(levels: int, expected: list[float]) -> None:
    with reference_only():  # the kernel's histogram is for larger buckets
        assert ORQ(levels).compress(GOLDEN).fields["levels"].tolist() == expected


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (ORQ(3), 0.314795),
        (ORQ(5), 0.0314795),
        (ORQ(9), 0.00209864),
        (QSGD(3), 0.536201),
        (QSGD(5), 0.171039),
        (QSGD(9), 0.0388248),
        (TernGrad(None), 0.536201),
        (LinearQuantizer(3), 0.380902),
        (LinearQuantizer(5), 0.0975866),
        (LinearQuantizer(9), 0.0188877),
        (BinGradPB(), 0.578174),
    ],
    ids=repr,
)
def test_random_schemes_keep_the_golden_error(scheme: RandomRounding, expected: float) -> None:
    assert expected_left(scheme, GOLDEN) == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize(
    ("threshold", "levels", "expected"),
    [("exact", [-0.392857, 6], 0.377455), ("lloyd", [-1.15, 3], 0.435677), ("mean", [-1.15, 3], 0.435677)],
)
def test_bingrad_b_keeps_the_golden_levels_and_error(threshold: str, levels: list[float], expected: float) -> None:
    scheme = BinGradB(threshold=threshold)  # type: ignore[arg-type]
    assert scheme.compress(GOLDEN).fields["levels"].tolist() == pytest.approx(levels, abs=5e-7)
    assert left(scheme, GOLDEN) == pytest.approx(expected, rel=5e-6)


def test_bingrad_pb_finds_the_golden_level() -> None:
    assert BinGradPB().compress(GOLDEN).fields["levels"].tolist() == pytest.approx([1.5], rel=1e-5)  # by halving
    with reference_only():
        assert BinGradPB().compress(GOLDEN).fields["levels"].tolist() == [1.5]


def test_equal_magnitudes_cost_bingrad_pb_nothing() -> None:
    v = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert left(BinGradPB(), v) == 0


# ---- conditions and closed forms -------------------------------------------------------------------------------------


def _rounding_variance(v: Tensor, levels: tuple[float, ...]) -> float:
    table = torch.tensor(levels, dtype=torch.float64)
    cell = (v.double().unsqueeze(1) >= table[1:-1]).sum(1)
    return float(((table[cell + 1] - v) * (v - table[cell])).sum())


@pytest.mark.parametrize("seed", range(100))
def test_the_middle_level_is_the_best_of_all_elements(seed: int) -> None:
    v = gaussian(2 + seed % 39, seed=seed).double()
    middle = float(optimal_levels(v.view(1, -1), 3)[0, 1])
    ends = float(v.min()), float(v.max())
    best = min(_rounding_variance(v, (ends[0], float(b), ends[1])) for b in v)
    assert _rounding_variance(v, (ends[0], middle, ends[1])) <= best * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_each_level_splits_its_neighbours_by_the_optimal_condition(levels: int) -> None:
    v = gaussian(4096).exp()
    b = optimal_levels(v.view(1, -1), levels)[0].double()
    step = (levels - 1) // 2
    while step:
        for k in range(step, levels - 1, 2 * step):
            a, c = b[k - step], b[k + step]
            inside = v[(v >= a) & (v <= c)].double()
            would_round_up = float(((inside - a) / (c - a)).sum())
            assert abs(int((inside >= b[k]).sum()) - would_round_up) <= 2, "counts are whole, and both ends may tie"
        step //= 2


@pytest.mark.parametrize("seed", range(50))
def test_bingrad_pb_is_at_the_least_of_its_error(seed: int) -> None:
    v = gaussian(1 + seed % 40, seed=seed).double()
    a = v.abs()

    def error(b: float) -> float:
        return float(torch.where(a < b, b * b - a * a, (a - b).square()).sum())

    b = float(best_magnitude(v.view(1, -1)))
    assert b == pytest.approx(float(a[a >= b].sum()) / v.numel(), rel=1e-12) or bool(
        torch.isclose(a, a.new_tensor(b), rtol=1e-12).any()
    )
    around = [b * (1 + x) for x in (-1e-3, -1e-6, 1e-6, 1e-3)]
    assert error(b) <= min(map(error, (*around, *a.tolist()))) * (1 + 1e-12)


@pytest.mark.parametrize("threshold", ["mean", "exact", "lloyd"])
@pytest.mark.parametrize("seed", range(5))
def test_bingrad_b_keeps_means_and_an_orthogonal_error(threshold: str, seed: int) -> None:
    v = (gaussian(1000, seed=seed) + 0.3).double() ** 3
    scheme = BinGradB(250, threshold)  # type: ignore[arg-type]
    sent = scheme.decompress(scheme.compress(v))
    assert float(sent.sum()) == pytest.approx(float(v.sum()), rel=1e-9)
    assert abs(float((sent * (v - sent)).sum())) < 1e-9 * float(v.square().sum())
    assert left(scheme, v) == pytest.approx(1 - float(sent.square().sum() / v.square().sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_the_exact_threshold_is_the_best_split(seed: int) -> None:
    v = gaussian(2 + seed % 30, seed=seed).double() ** 3
    errors = []
    for threshold in v.sort().values[1:]:
        sides = v[v < threshold], v[v >= threshold]
        errors.append(sum(float((side - side.mean()).square().sum()) for side in sides))
    assert left(BinGradB(threshold="exact"), v) * float(v.square().sum()) == pytest.approx(
        min(errors), rel=1e-9, abs=1e-12
    )


def _quantiles(name: str) -> Tensor:
    """Half a million equally likely values of a distribution, so that nothing depends on a draw."""
    p = (torch.arange(1 << 19, dtype=torch.float64) + 0.5) / (1 << 19)
    return {
        "uniform": 2 * p - 1,
        "normal": math.sqrt(2) * torch.erfinv(2 * p - 1),
        "laplace": torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log()),
        "exponential": -(1 - p).log(),
    }[name]


@pytest.mark.parametrize(
    ("name", "b", "pb_left", "levels", "b_left"),
    [
        ("uniform", 0.41421, 0.34315, (-0.5, 0.5), 0.25),
        ("normal", 0.64714, 0.45387, (-0.79788, 0.79788), 0.36338),
        ("laplace", 0.80647, 0.57809, (-1.0, 1.0), 0.5),
        ("exponential", 0.80647, 0.57809, (0.59362, 2.59362), 0.17619),
    ],
)
def test_distributions_have_their_closed_forms(
    name: str, b: float, pb_left: float, levels: tuple[float, float], b_left: float
) -> None:
    v = _quantiles(name)
    assert float(best_magnitude(v.view(1, -1))) == pytest.approx(b, abs=2e-4)
    assert expected_left(BinGradPB(None), v) == pytest.approx(pb_left, abs=2e-4)
    scheme = BinGradB(None, "exact")
    assert scheme.compress(v).fields["levels"].tolist() == pytest.approx(levels, abs=2e-3)
    assert left(scheme, v) == pytest.approx(b_left, abs=2e-4)


def test_the_mean_as_threshold_has_its_closed_form() -> None:
    assert left(BinGradB(None), _quantiles("exponential")) == pytest.approx(0.20901, abs=2e-4)


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_levels_of_a_uniform_are_even(levels: int) -> None:
    found = optimal_levels(_quantiles("uniform").view(1, -1), levels)[0]
    torch.testing.assert_close(found, torch.linspace(-1, 1, levels, dtype=torch.float64), rtol=0, atol=1e-4)


# ---- errors over random data -----------------------------------------------------------------------------------------

# (distribution, bucket, clip): ORQ, QSGD and linear at 3, 5 and 9 levels; BinGrad-b exact, BinGrad-pb, scaled sign
_ERRORS: dict[tuple[str, int, float | None], tuple[float, ...]] = {
    ("normal", 512, None): (1.413, 1.590, 1.446, 0.291, 0.442, 0.387, 0.0670, 0.111, 0.0967, 0.361, 0.453, 0.363),
    ("normal", 2048, None): (1.731, 1.886, 1.763, 0.340, 0.548, 0.493, 0.0772, 0.137, 0.123, 0.363, 0.454, 0.363),
    ("normal", 512, 2.5): (1.004, 1.008, 1.006, 0.224, 0.260, 0.259, 0.0549, 0.0665, 0.0664),
    ("normal", 2048, 2.5): (1.008, 1.009, 1.009, 0.225, 0.260, 0.260, 0.0556, 0.0667, 0.0667),
    ("laplace", 512, None): (2.033, 2.408, 2.539, 0.400, 0.827, 0.777, 0.0910, 0.236, 0.198, 0.490, 0.577, 0.499),
    ("laplace", 2048, None): (2.719, 3.094, 3.405, 0.501, 1.122, 1.124, 0.112, 0.332, 0.296, 0.497, 0.578, 0.499),
    ("laplace", 512, 2.5): (0.874, 0.875, 0.875, 0.220, 0.268, 0.268, 0.0744, 0.0903, 0.0903),
    ("laplace", 2048, 2.5): (0.877, 0.877, 0.877, 0.222, 0.269, 0.269, 0.0757, 0.0911, 0.0911),
}


@pytest.mark.parametrize(("name", "bucket", "clip"), _ERRORS)
def test_errors_over_a_million_values_are_the_known_ones(name: str, bucket: int, clip: float | None) -> None:
    draw = torch.Generator().manual_seed(1)
    v = torch.randn(1 << 20, generator=draw)
    if name == "laplace":
        v = torch.empty(1 << 20).exponential_(generator=draw) * v.sign()
    schemes = [
        make(levels, bucket_size=bucket, clip=clip)  # type: ignore[operator]
        for levels, make in itertools.product((3, 5, 9), (ORQ, QSGD, LinearQuantizer))
    ]
    errors = [expected_left(scheme, v) for scheme in schemes]
    if clip is None:
        blocks = v.view(-1, bucket)
        scales = blocks.abs().mean(1, keepdim=True)
        sign = float((blocks - scales * blocks.sign()).square().sum() / v.square().sum())
        errors += [left(BinGradB(bucket, "exact"), v), expected_left(BinGradPB(bucket), v), sign]
        assert errors[9] <= errors[11] <= errors[10]
    assert errors == pytest.approx(_ERRORS[name, bucket, clip], rel=0.05)
    for level in range(3):
        assert errors[3 * level] <= errors[3 * level + 1], "ORQ errs no more than QSGD"


# ---- bytes and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (BinGradB(), 1.03125),
        (BinGradPB(), 1.015625),
        (ORQ(3), 1.6 + 96 / 2048),
        (TernGrad(bucket_size=2048), 1.6 + 32 / 2048),
        (ORQ(5), 3.078125),
        (ORQ(9), 4.140625),
        (QSGD(5), 3.015625),
        (QSGD(9), 4.015625),
        (LinearQuantizer(5), 3.03125),
    ],
    ids=repr,
)
def test_an_element_costs_the_bits_of_the_table(scheme: Quantizer, bits: float) -> None:
    numel = 2048 * 40
    assert 8 * scheme.nbytes(numel) == bits * numel


def test_the_last_bucket_is_quantised_at_its_own_length() -> None:
    v = gaussian(2048 + 300)
    with reference_only():
        levels = ORQ(5).compress(v).fields["levels"].view(2, 5)
    assert torch.equal(levels[1:], optimal_levels(v[2048:].view(1, -1), 5))
    assert torch.equal(LinearQuantizer().compress(v).fields["levels"][2:], torch.stack(v[2048:].aminmax()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ORQ(4), r"`levels` must be one of 3, 5, 9: got 4"),
        (lambda: ORQ(5.0), r"`levels` must be one of 3, 5, 9: got 5.0"),  # type: ignore[arg-type]
        (lambda: QSGD(4), r"`levels` must be one of 3, 5, 7, ..., 255: got 4"),
        (lambda: QSGD(5, "l3"), r"`norm` must be one of 'linf', 'l2': got 'l3'"),
        (lambda: LinearQuantizer(2), r"`levels` must be one of 3, 4.*got 2"),
        (lambda: LinearQuantizer(5, "log"), r"`grid` must be one of 'minmax', 'quantile': got 'log'"),
        (lambda: BinGradB(threshold="median"), r"`threshold` must be one of 'mean', 'exact', 'lloyd': got 'median'"),
        (lambda: BinGradPB(0), r"`bucket_size` must be an integer >= 1: got 0"),
        (lambda: ORQ(5, clip=0), r"`clip` must be above 0.*got 0"),
        (lambda: TernGrad(math.nan), r"`clip` must be above 0.*got nan"),
    ],
)
def test_an_argument_outside_its_range_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bucket_size_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`bucket_size` must be an integer >= 1 or None: got 2.5"):
        BinGradPB(2.5)  # type: ignore[arg-type]
