"""The contract of all exchanges: every compressor by every exchange that bears it, on 1 to 4 real ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import Compressor, RandomBlock, ScaledSign, TopK
from lightning_distopt.exchange import AllReduceExchange, Exchange, Meter, ShardedServerExchange
from tests.compressors.table import FLOATS, same_payload
from tests.exchange.cases import (
    BUCKETS,
    CASES,
    WORLDS,
    Case,
    Kind,
    Outcome,
    gathered,
    names_of,
    outcomes,
    payloads_of,
    reference,
    runs_on,
)

Runs = Sequence[tuple[Case, int]]


def pairs(
    kinds: Callable[[Kind], bool] = lambda kind: True, dtypes: Sequence[torch.dtype] = FLOATS
) -> pytest.MarkDecorator:
    """Parametrise a test over compressor and exchange: each gets its cases with the numbers of ranks they ran on."""
    chosen: dict[str, list[tuple[Case, int]]] = {}
    for case in CASES:
        if kinds(case.kind) and case.dtype in dtypes:
            name = f"{case.row.text} by {case.kind.name}"
            chosen.setdefault(name, []).extend((case, world) for world in WORLDS if runs_on(case, world))
    return pytest.mark.parametrize("runs", chosen.values(), ids=list(chosen))


def of(case: Case, world: int) -> list[Outcome]:
    return [ranks[case.name] for ranks in outcomes(world)]


def field_eps(case: Case) -> float:
    """The relative spacing of the numbers that travel."""
    dtypes = [field.dtype for field in payloads_of(case, 0, 0, 0)[0].fields.values()]
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def sum_eps(case: Case) -> float:
    """The relative spacing in which sums are taken: an all-reduce sums what travels, the others sum what is decoded."""
    eps = float(torch.finfo(case.dtype).eps)
    return max(eps, field_eps(case)) if case.kind.name == "all_reduce" else eps


def subnormal(case: Case, world: int) -> float:
    """How far sums may be off because float16 ends at 2**-24; 0 where no float16 takes part."""
    dtypes = (case.dtype, *(field.dtype for field in payloads_of(case, 0, 0, 0)[0].fields.values()))
    return 4 * world * 2.0**-24 if torch.float16 in dtypes else 0.0


def residual_of(case: Case, world: int, step: int, name: str, like: Tensor) -> Tensor:
    """The server's residual of one tensor, put together from its owners."""
    whole = torch.zeros_like(like)
    for outcome in of(case, world):
        start, values = outcome.residuals[step].get(name, (0, torch.zeros(0)))
        whole[start : start + len(values)] = values.double()
    return whole


@pairs()
def test_all_ranks_hold_the_same_bits(runs: Runs) -> None:
    for case, world in runs:
        first, *others = of(case, world)
        for other in others:
            for mine, theirs in zip(first.means, other.means, strict=True):
                assert same_payload(mine, theirs)


@pairs()
def test_means_are_flat_and_of_the_payloads_dtype(runs: Runs) -> None:
    for case, world in runs:
        means = of(case, world)[0].means[0]
        for bucket, numels in enumerate(BUCKETS):
            for name, numel in zip(names_of(bucket), numels, strict=True):
                assert (means[name].shape, means[name].dtype) == ((numel,), case.dtype)


@pairs(lambda kind: not kind.two_way)
def test_one_way_the_result_is_the_mean_of_what_was_decoded(runs: Runs) -> None:
    for case, world in runs:
        for step, expected in enumerate(gathered(case.row, case.dtype, world)):
            for name, (mean, size) in expected.items():
                error = (of(case, world)[0].means[step][name].double() - mean).abs()
                # Each of W terms is rounded when it is scaled and when it is added.
                assert bool((error <= 2 * world * sum_eps(case) * size + subnormal(case, world)).all())


@pairs(lambda kind: kind.two_way, dtypes=[torch.float32])
def test_two_way_the_result_is_that_of_the_slow_reference(runs: Runs) -> None:
    for case, world in runs:
        largest: dict[str, Tensor] = {}
        for step, expected in enumerate(reference(case, world)):
            for name, mean in of(case, world)[0].means[step].items():
                # W roundings of terms below 5 W, some more of the scale and the residual; and where the answer is rounded
                # to 16 bit, a value near a tie may go to either neighbour, in this step or an earlier one.
                largest[name] = torch.maximum(largest.get(name, expected[name].abs()), expected[name].abs())
                bound = 20 * world * sum_eps(case) + 2 * field_eps(case) * largest[name]
                assert bool(((mean.double() - expected[name]).abs() <= bound).all())


@pairs(lambda kind: kind.keeps)
def test_the_server_loses_nothing(runs: Runs) -> None:
    """``s_old + mean == answer + s_new`` for every coordinate."""
    for case, world in runs:
        old: dict[str, Tensor] = {}
        for step, expected in enumerate(gathered(case.row, case.dtype, world)):
            for name, (mean, size) in expected.items():
                before, after = old.get(name, torch.zeros_like(mean)), residual_of(case, world, step, name, mean)
                answer = of(case, world)[0].means[step][name].double()
                error = (before + mean - answer - after).abs()
                # A rounding of the sum for each rank's term, and one of the difference.
                size = before.abs() + size + answer.abs() + after.abs()
                assert bool((error <= 2 * (world + 1) * sum_eps(case) * size + subnormal(case, world)).all())
                old[name] = after


@pairs(lambda kind: kind.keeps)
def test_every_coordinate_of_the_servers_residual_has_one_owner(runs: Runs) -> None:
    for case, world in runs:
        for name, mean in of(case, world)[0].means[-1].items():
            owners = torch.zeros(mean.numel(), dtype=torch.int64)
            for outcome in of(case, world):
                start, values = outcome.residuals[-1].get(name, (0, torch.zeros(0)))
                owners[start : start + len(values)] += 1
            assert bool((owners == 1).all())


@pairs()
def test_bytes_are_those_of_the_tensors_handed_to_the_collectives(runs: Runs) -> None:
    for case, world in runs:
        for outcome in of(case, world):
            assert outcome.sent == sum(call.sent for call in outcome.calls)
            assert outcome.received == sum(call.received for call in outcome.calls)


@pairs()
def test_what_all_ranks_send_is_what_all_ranks_receive(runs: Runs) -> None:
    for case, world in runs:
        everyone = of(case, world)
        assert sum(outcome.sent for outcome in everyone) == sum(outcome.received for outcome in everyone)


@pairs(lambda kind: kind.name in ("all_gather", "all_reduce"))
def test_payloads_travel_without_a_byte_more(runs: Runs) -> None:
    for case, world in runs:
        for outcome in of(case, world):
            assert sum(call.given for call in outcome.calls) == (outcome.payload_bytes if world > 1 else 0)


@pairs()
def test_all_ranks_call_the_same_collectives_in_the_same_order(runs: Runs) -> None:
    for case, world in runs:
        first, *others = ([call.name for call in outcome.calls] for outcome in of(case, world))
        assert all(other == first for other in others)
        assert bool(first) == (world > 1)


# ---- what cannot go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "compressor", "cure"),
    [
        (AllReduceExchange, TopK(0.01), r"TopK\(ratio=0.01\) is not linear.*'all_gather'.*'sharded_server'"),
        (AllReduceExchange, ScaledSign(), r"ScaledSign\(\) is not linear.*'all_gather'.*'sharded_server'"),
        (ShardedServerExchange, RandomBlock(0.1), r"RandomBlock\(ratio=0.1\) cannot.*'all_reduce'"),
    ],
    ids=["topk by all_reduce", "sign by all_reduce", "random_block by sharded_server"],
)
def test_impossible_pairs_are_refused_at_construction_with_a_cure(
    exchange: type[Exchange], compressor: Compressor, cure: str
) -> None:
    with pytest.raises(ValueError, match=cure):
        exchange(compressor, Meter())
