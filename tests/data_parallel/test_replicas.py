from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.data_parallel.agreement import Agreement, agree
from lightning_distopt.data_parallel.replicas import broadcast_, check_alike
from lightning_distopt.errors import RankMismatchError
from lightning_distopt.exchange import Meter
from tests.data_parallel.together import together
from tests.ranks import run_ranks

CPU = torch.device("cpu")


# ---- broadcast -------------------------------------------------------------------------------------------------------


def _values(rank: int) -> list[Tensor]:
    return [
        torch.arange(6.0).view(2, 3) + rank,
        torch.tensor(5 + rank),
        torch.zeros(0) + rank,
        torch.tensor([True, False, bool(rank)]),
        torch.ones(3, dtype=torch.bfloat16) * (1 + rank),
        (torch.arange(6.0).view(2, 3) + 10 * rank).t(),
        nn.Parameter(torch.ones(2, 2) + rank),
    ]


def _broadcast(rank: int, world: int) -> tuple[list[Tensor], int, int, int]:
    values, meter = _values(rank), Meter()
    sent = broadcast_(values, meter, "buffers")
    return [value.detach() for value in values], sent, meter.sent["buffers"], meter.received["buffers"]


def test_all_ranks_get_the_values_of_rank_0_whatever_their_dtype_and_shape() -> None:
    for values, *_ in run_ranks(3, _broadcast):
        assert all(torch.equal(value, first) for value, first in zip(values, _values(0), strict=True))
        assert [value.dtype for value in values] == [value.dtype for value in _values(0)]


def test_broadcast_bytes_are_those_of_the_tensors() -> None:
    nbytes = sum(value.nbytes for value in _values(0))
    counted = [(sent, counted, received) for _, sent, counted, received in run_ranks(2, _broadcast)]
    assert counted == [(nbytes, nbytes, 0), (0, 0, nbytes)]


def test_broadcast_of_nothing_sends_nothing() -> None:
    assert run_ranks(2, _broadcast_nothing) == [0, 0]


def _broadcast_nothing(rank: int, world: int) -> int:
    return broadcast_([], Meter(), "buffers") + broadcast_([torch.zeros(0)], Meter(), "buffers")


# ---- agreement -------------------------------------------------------------------------------------------------------


def _check(rank: int, world: int, lines: list[list[str]], doing: str) -> str:
    try:
        check_alike(lines[rank], Meter(), CPU, doing=doing if rank == 2 else "")
    except RankMismatchError as error:
        return str(error)
    return ""


ALIKE: dict[str, tuple[list[list[str]], str]] = {
    "": ([["a", "b"]] * 3, ""),
    "ranks [1] differ from rank 0 (number of parameters by rank: [2, 1, 2])": ([["a", "b"], ["a"], ["a", "b"]], ""),
    "ranks [1, 2] differ from rank 0": ([["a", "b"], ["b", "a"], ["c", "a"]], ""),
    "ranks [2] differ from rank 0 (number of parameters by rank: [1, 1, 1])": ([["a"]] * 3, "something else"),
}


@pytest.mark.parametrize("expected", ALIKE)
def test_ranks_that_differ_are_named_on_all_ranks(expected: str) -> None:
    messages = together(3, _check, list(ALIKE.values()), ALIKE[expected])
    assert messages == messages[:1] * 3
    assert expected in messages[0]
    assert bool(messages[0]) == bool(expected)


def _agree(rank: int, world: int, given: list[tuple[int, int | None, bool]]) -> tuple[Agreement, dict[str, int]]:
    meter = Meter()
    return agree(*given[rank], meter, CPU), dict(meter.sent)


AGREED: list[tuple[list[tuple[int, int | None, bool]], Agreement]] = [
    ([(7, None, False)] * 3, Agreement(True, None, False)),
    ([(7, None, False), (8, None, False), (7, None, False)], Agreement(False, None, False)),
    ([(0, None, False), (0, None, True), (0, None, False)], Agreement(True, None, True)),
    ([(7, 0, False), (7, None, False), (7, None, False)], Agreement(True, (0, 0), False)),
    ([(7, None, False), (7, 5, False), (7, None, False)], Agreement(True, (1, 5), False)),
    ([(7, None, False), (7, 5, False), (7, 3, False)], Agreement(True, (1, 5), False)),
    ([(2**32 - 1, None, False)] * 3, Agreement(True, None, False)),
]


@pytest.mark.parametrize(("given", "expected"), AGREED)
def test_all_ranks_know_the_same_after_agreeing(given: Any, expected: Agreement) -> None:
    ranks = together(3, _agree, [(g,) for g, _ in AGREED], (given,))
    assert [agreement for agreement, _ in ranks] == [expected] * 3


def test_agreeing_takes_32_bytes_of_flags() -> None:
    assert [sent for _, sent in run_ranks(2, _agree, [(1, None, False)] * 2)] == [{"flag": 32}] * 2


def test_one_process_agrees_with_itself() -> None:
    meter = Meter()
    assert agree(1, 4, True, meter, CPU) == Agreement(True, (0, 4), True)
    assert meter.bytes_sent == 0
