"""Gradients compressed inside backward: equal to the reference, alike on all ranks, and stopped by a NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel import GradientSync
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter
from tests.data_parallel.gradients import ONE_EACH, Case, Net, alike, attach, loss, spy_on_buckets, train
from tests.data_parallel.together import together
from tests.ranks import run_ranks

# ---- equal to the reference ------------------------------------------------------------------------------------------

CASES = [
    Case("fp32", "all_reduce", dtype=torch.float32),
    Case("fp32", "sharded_server", dtype=torch.float32),
    Case(),
    Case(exchange="sharded_server"),
    Case(exchange="sharded_server", server=True, bucket_cap_mb=ONE_EACH),
    Case(server=True),
    Case("topk:0.1"),
    Case("topk:0.1", "sharded_server"),
    Case("topk:0.1", "sharded_server", True, bucket_cap_mb=ONE_EACH),
    Case("random_block:0.2", "all_reduce"),
    Case("random_block:0.2", "all_gather", bucket_cap_mb=1.0),
    Case(dense_steps=3),
    Case("topk:0.1", accumulate=3),
    Case("random_block:0.2", "all_reduce", accumulate=2),
    Case(find_unused=True),
    Case("topk:0.1", "sharded_server", find_unused=True, accumulate=2),
    Case("random_block:0.2", "all_reduce", static=True),
    Case("topk:0.1", "sharded_server", static=True),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_training_equals_the_slow_reference_and_all_ranks_agree(case: Case) -> None:
    for worst, equal, _ in together(2, train, [(other,) for other in CASES], (case,)):
        assert equal, "bit for bit, after every step"
        # Sums in another order; Dense("float32") sends float32. Steps below 1 are added to weights below 1.
        assert worst < (1e-12 if case.dtype is torch.float64 and not case.dense_steps else 1e-6)


ON_FOUR = [
    Case("topk:0.1", bucket_cap_mb=ONE_EACH),
    Case(exchange="sharded_server", server=True, bucket_cap_mb=ONE_EACH),
]


@pytest.mark.parametrize("case", ON_FOUR, ids=[case.name for case in ON_FOUR])
def test_four_ranks_equal_the_slow_reference_too(case: Case) -> None:
    for worst, equal, _ in together(4, train, [(other,) for other in ON_FOUR], (case,)):
        assert equal
        assert worst < 1e-12


def test_float32_on_two_ranks_is_plain_ddp_bit_for_bit() -> None:
    """A sum of two has one order, and halves are exact."""
    assert run_ranks(2, _beside_plain_ddp) == [0.0, 0.0]


def _beside_plain_ddp(rank: int, world: int) -> float:
    case = Case("fp32", "all_reduce", dtype=torch.float32)
    net, plain = Net(), Net()
    wrapped, _ = attach(net, case)
    ddp = DistributedDataParallel(plain)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (net, plain)]
    for step in range(20):
        for model, optimizer in zip((wrapped, ddp), optimizers, strict=True):
            loss(model, case, rank, step, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    return max(float((p - q).detach().abs().max()) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_results_survive_the_rebuild_of_buckets() -> None:
    """DDP sorts its buckets anew after the first backward; keys of randomness go by parameter, not by bucket."""
    case = Case("random_block:0.2", "all_reduce")
    worst, equal, counts = together(2, train, [(other,) for other in CASES], (case,))[0]
    first, second, *others = counts.layouts[:-1]
    assert first != second
    assert all(other == second for other in others)
    assert equal
    assert worst < 1e-12


def test_nothing_is_exchanged_while_gradients_accumulate() -> None:
    case = Case("topk:0.1", accumulate=3)
    _, _, counts = together(2, train, [(other,) for other in CASES], (case,))[0]
    assert counts.rounds == 8
    assert counts.meter.steps == 8


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case(layers=26, steps=40, bucket_cap_mb=ONE_EACH)),
        (2, Case("topk:0.1", "sharded_server", layers=26, steps=12, bucket_cap_mb=ONE_EACH)),
        pytest.param(4, Case(layers=26, steps=300, bucket_cap_mb=ONE_EACH), marks=pytest.mark.slow),
        pytest.param(
            4,
            Case("topk:0.1", "sharded_server", True, layers=26, steps=300, bucket_cap_mb=ONE_EACH),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            Case("random_block:0.2", "all_reduce", layers=26, steps=300, bucket_cap_mb=ONE_EACH),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_many_buckets_and_many_steps_neither_hang_nor_drift(world: int, case: Case) -> None:
    slow = case.steps > 200
    for equal, buckets in run_ranks(world, _many, case, timeout=900 if slow else 50):
        assert buckets >= 50
        assert equal


def _many(rank: int, world: int, case: Case) -> tuple[bool, int]:
    """The same without the reference, which would take most of the time."""
    net = Net(case.layers).to(case.dtype)
    wrapped, sync = attach(net, case)
    layouts = spy_on_buckets(sync)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for step in range(case.steps):
        loss(wrapped, case, rank, step, 0).backward()
        sync.raise_if_non_finite()
        optimizer.step()
        optimizer.zero_grad()
    return alike(net), min(len(layout) for layout in layouts[1:-1])  # DDP begins with a single one


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_payloads() -> None:
    """Bits and a float64 scale for each parameter, once a step; one counter at the start."""
    for _, _, counts in run_ranks(3, train, Case(steps=4)):
        numels = [p.numel() for p in Net().parameters()]
        payload = sum((n + 7) // 8 + 8 for n in numels)
        assert dict(counts.meter.sent) == {"setup": 2 * 8 * 2 // 3, "exchange": 4 * 2 * payload}
        assert counts.meter.sent == counts.meter.received


def test_ddp_would_have_sent_all_gradients_on_a_ring() -> None:
    for _, _, counts in together(2, train, [(other,) for other in CASES], (Case(),)):
        assert counts.meter.dense_bytes == 8 * 8 * sum(p.numel() for p in Net().parameters())
        assert counts.meter.steps == 8


# ---- failures --------------------------------------------------------------------------------------------------------


def _fail(rank: int, world: int, case: Case, value: float) -> tuple[str, bool]:
    net = Net(case.layers).to(case.dtype)
    wrapped, sync = attach(net, case)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(5):
        if rank == 1 and step == 3:
            net.layers[2].weight.register_hook(lambda gradient: gradient * value)  # type: ignore[union-attr,operator]
        loss(wrapped, case, rank, step, 0).backward()
        before = [p.detach().clone() for p in net.parameters()]
        try:
            sync.raise_if_non_finite()
        except NonFiniteError as error:
            kept = all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
            return str(error), kept
        optimizer.step()
        optimizer.zero_grad()
    return "no error", False


FAILING = [
    (case, value)
    for value in (float("nan"), float("inf"))
    for case in (
        Case(),
        Case(exchange="sharded_server", server=True),
        Case("topk:0.1"),
        Case("random_block:0.2", "all_reduce"),
        Case("bf16", "all_reduce"),
        Case(dense_steps=9),
        Case(bucket_cap_mb=ONE_EACH),
    )
]


@pytest.mark.parametrize("failing", FAILING, ids=[f"{value} {case.name}" for case, value in FAILING])
def test_all_ranks_raise_the_same_error_that_names_rank_step_and_parameter(failing: tuple[Case, float]) -> None:
    messages = together(3, _fail, FAILING, failing)
    assert messages == messages[:1] * 3
    assert messages[0][0].startswith("In step 3 the gradient of `layers.2.weight` holds a NaN or an infinity on rank 1")
    assert messages[0][1], "the parameters are those before the step"


def _overflow(rank: int, world: int) -> str:
    net = nn.Linear(3, 1, bias=False)
    wrapped, sync = attach(net, Case("fp32", "all_reduce"))
    (wrapped(torch.full((1, 3), 3e38))).sum().backward()
    try:
        sync.raise_if_non_finite()
    except NonFiniteError as error:
        return str(error)
    return "no error"


def test_a_sum_that_overflows_is_blamed_on_no_rank() -> None:
    messages = run_ranks(2, _overflow)
    assert messages[0] == messages[1]
    assert "In step 0 the sum over ranks overflowed, and all 2 ranks stopped" in messages[0]


def test_a_finite_step_raises_nothing_and_sends_nothing() -> None:
    net = nn.Linear(2, 2)
    sync = GradientSync({p: n for n, p in net.named_parameters()}, parse("sign"), "all_gather", False, 0, Meter())
    sync.raise_if_non_finite()
    assert sync.meter.bytes_sent == 0


# ---- state -----------------------------------------------------------------------------------------------------------


def _resume(rank: int, world: int, lost: Callable[[int], bool]) -> tuple[bool, bool]:
    """Four steps, save, four more; tell whether ranks agree, and whether an interrupted run does the same."""
    case = Case("random_block:0.2", "all_reduce", dense_steps=2)
    net = Net().double()
    wrapped, sync = attach(net, case)
    net2 = Net().double()
    for step in range(8):
        if step == 4:
            net2.load_state_dict(net.state_dict())
            wrapped2, sync2 = attach(net2, case)
            sync2.load_state_dict({} if lost(rank) else sync.state_dict())
        for model, engine in [(wrapped, sync)] + ([(wrapped2, sync2)] if step >= 4 else []):
            loss(model, case, rank, step, 0).backward()
            engine.raise_if_non_finite()
            for p in model.parameters():
                p.data.sub_(0.05 * p.grad)
                p.grad = None
    same = all(torch.equal(p, q) for p, q in zip(net.parameters(), net2.parameters(), strict=True))
    return alike(net2), same


def test_a_resumed_run_continues_bit_for_bit() -> None:
    assert run_ranks(2, _resume, lambda rank: False) == [(True, True)] * 2


def test_a_rank_that_lost_its_counter_takes_it_from_the_others() -> None:
    """It decides about randomness and dense steps: with another one, ranks would sum different blocks."""
    assert run_ranks(2, _resume, lambda rank: rank == 1) == [(True, True)] * 2
