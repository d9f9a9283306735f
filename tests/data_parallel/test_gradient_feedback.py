"""Residuals in units of gradients: equal to the reference, alike on all ranks, untouched by a step that failed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel import GradientSync
from lightning_distopt.data_parallel.gradient_memory import GradientMemory
from lightning_distopt.data_parallel.merge import merge_states
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter
from tests.data_parallel.gradients import (
    ONE_EACH,
    Case,
    Counts,
    Net,
    alike,
    attach,
    loss,
    momentum_sgd,
    set_rates,
    spy_on_buckets,
    train,
)
from tests.data_parallel.test_memory import LiveTensors
from tests.data_parallel.together import together
from tests.ranks import run_ranks

# ---- equal to the reference ------------------------------------------------------------------------------------------

CASES = [
    Case(feedback=True),
    Case("topk:0.1", feedback=True),
    Case("topk:0.1", feedback=True, bucket_cap_mb=ONE_EACH, view=True),
    Case(exchange="sharded_server", feedback=True),
    Case("random_block:0.2", "all_reduce", feedback=True),
    Case("fp32", "all_reduce", feedback=True),
    Case("topk:0.1", feedback=True, dense_steps=3),
    Case("topk:0.1", feedback=True, accumulate=3),
    Case(feedback=True, find_unused=True, steps=12),
    Case("topk:0.1", "sharded_server", feedback=True, find_unused=True, accumulate=2),
    Case("topk:0.1", feedback=True, static=True),
    Case("powersgd:1", feedback=True),
    Case("powersgd:2", feedback=True, bucket_cap_mb=ONE_EACH),
    Case("powersgd:1", feedback=True, dense_steps=2, accumulate=2),
    Case("powersgd:1", feedback=True, find_unused=True, steps=12),
    Case("powersgd:1", feedback=True, static=True),
    Case("powersgd:1"),
]


def _train(rank: int, world: int, case: Case) -> tuple[float, bool, Counts]:
    return train(rank, world, case)


def tolerance(case: Case) -> float:
    # float32 travels in "fp32" and in dense steps, and its rounding is kept in the residual; sums in another order
    return 1e-6 if case.dense_steps or case.compressor == "fp32" else 1e-11


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_training_equals_the_slow_reference_and_all_ranks_agree(case: Case) -> None:
    for worst, equal, _ in together(2, _train, [(other,) for other in CASES], (case,)):
        assert equal, "bit for bit, after every step"
        assert worst < tolerance(case)


ON_FOUR = [Case("topk:0.1", feedback=True, bucket_cap_mb=ONE_EACH), Case("powersgd:1", feedback=True)]


@pytest.mark.parametrize("case", ON_FOUR, ids=[case.name for case in ON_FOUR])
def test_four_ranks_equal_the_slow_reference_too(case: Case) -> None:
    for worst, equal, _ in together(4, _train, [(other,) for other in ON_FOUR], (case,)):
        assert equal
        assert worst < tolerance(case)


def test_residuals_survive_the_rebuild_of_buckets() -> None:
    case = CASES[1]
    worst, equal, counts = together(2, _train, [(other,) for other in CASES], (case,))[0]
    first, second, *others = counts.layouts[:-1]
    assert first != second
    assert all(other == second for other in others)
    assert equal
    assert worst < tolerance(case)


# ---- failures --------------------------------------------------------------------------------------------------------


def _fail(rank: int, world: int, case: Case, value: float) -> tuple[str, bool, bool]:
    """Let rank 1 fail once; tell the message, whether all is as before, and whether training goes on as if it had not."""
    net = Net(case.layers).to(case.dtype)
    optimizer = momentum_sgd(net)
    wrapped, sync = attach(net, case, optimizer)
    message, kept, twin = "no error", False, None
    for step in range(6):
        set_rates(optimizer, case, step)
        broken = net.layers[2].weight.register_hook(lambda g, s=step: g * value if rank == 1 and s == 3 else g)  # type: ignore[union-attr,operator,misc]
        before = copy.deepcopy(sync.state_dict())
        loss(wrapped, case, rank, step, 0).backward()
        broken.remove()
        try:
            sync.raise_if_non_finite()
        except NonFiniteError as error:
            message = str(error)
            kept = same(before, sync.state_dict(), but=("rounds",))
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
    twin = Net(case.layers).to(case.dtype)
    optimizer = momentum_sgd(twin)
    wrapped, again = attach(twin, case, optimizer)
    for step in (0, 1, 2, 4, 5):
        set_rates(optimizer, case, step)
        loss(wrapped, case, rank, step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    equal = all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    return message, kept, equal and same(again.state_dict(), sync.state_dict(), but=("rounds",))


def same(a: Any, b: Any, but: tuple[str, ...] = ()) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in but)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


NAN, INF = float("nan"), float("inf")
FAILING = [
    (Case(feedback=True), NAN),
    (Case(feedback=True, bucket_cap_mb=ONE_EACH), INF),
    (Case("topk:0.1", "sharded_server", feedback=True), NAN),
    (Case("bf16", "all_reduce", feedback=True), INF),
    (Case("powersgd:1", feedback=True, bucket_cap_mb=ONE_EACH), NAN),
    (Case("powersgd:1", feedback=True), INF),
    (Case("powersgd:1"), NAN),
]


@pytest.mark.parametrize("failing", FAILING, ids=[f"{value} {case.name}" for case, value in FAILING])
def test_a_step_that_fails_on_one_rank_has_not_been_on_any(failing: tuple[Case, float]) -> None:
    messages = together(3, _fail, FAILING, failing)
    for message, kept, equal in messages:
        assert message.startswith("In step 3 the gradient of `layers.2.weight` holds a NaN or an infinity on rank 1")
        assert message == messages[0][0]
        assert kept, "residuals, rates and warm starts are those of before, bit for bit"
        assert equal, "training goes on as if there had been no such step"


# ---- many buckets, many steps ----------------------------------------------------------------------------------------

MANY = [
    Case(layers=26, steps=50, feedback=True),
    Case("powersgd:1", layers=26, steps=50, feedback=True),
    Case("signsgd", layers=26, steps=50),
]


@pytest.mark.parametrize(
    ("world", "case"),
    [(2, MANY[1]), (4, MANY[0]._replace(steps=40))]
    + [pytest.param(w, case._replace(steps=1000), marks=pytest.mark.slow) for w in (2, 4) for case in MANY],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_many_buckets_and_many_steps_neither_hang_nor_drift(world: int, case: Case) -> None:
    for equal, buckets, ordered in run_ranks(world, _many, case, timeout=900 if case.steps > 50 else 50):
        assert buckets >= 50
        assert equal
        assert ordered, "every rank has seen the same buckets in the same order"


def _many(rank: int, world: int, case: Case) -> tuple[bool, int, bool]:
    case = case._replace(bucket_cap_mb=ONE_EACH)
    net = Net(case.layers).to(case.dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    wrapped, sync = attach(net, case, optimizer)
    layouts = spy_on_buckets(sync)
    for step in range(case.steps):
        loss(wrapped, case, rank, step, 0).backward()
        sync.raise_if_non_finite()
        optimizer.step()
        optimizer.zero_grad()
    everyones: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyones, layouts)
    return alike(net), min(len(layout) for layout in layouts[1:-1]), everyones == [layouts] * world


# ---- memory ----------------------------------------------------------------------------------------------------------


class FakeBucket:
    """What a hook sees of one of DDP's buckets."""

    def __init__(self, params: list[nn.Parameter], last: bool) -> None:
        self.params, self.last = params, last
        self.flat = torch.randn(sum(p.numel() for p in params), dtype=params[0].dtype)

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        return self.params

    def is_last(self) -> bool:
        return self.last


def fake_step(sync: GradientSync, params: list[nn.Parameter]) -> list[FakeBucket]:
    buckets = [FakeBucket([p], p is params[-1]) for p in params]
    for bucket in buckets:
        sync.hook(bucket)  # type: ignore[arg-type]
    return buckets


BUCKETS = 4


def _use(rank: int, world: int, compressor: str, exchange: str) -> tuple[float, float]:
    params = [nn.Parameter(torch.zeros(1024, 1024)) for _ in range(BUCKETS)]
    names = {p: str(i) for i, p in enumerate(params)}
    sync = GradientSync(names, parse(compressor), exchange, False, 0, Meter(), residuals=True)  # type: ignore[arg-type]
    copy_of_all = BUCKETS * 4 * 2**20
    with LiveTensors() as live:
        buckets = fake_step(sync, params)
        own = sum(bucket.flat.nbytes for bucket in buckets)
        assert live.now() >= own
        del buckets
        persistent = live.settled(1.01 * copy_of_all)
    fake = [FakeBucket([p], p is params[-1]) for p in params]
    with LiveTensors() as step:
        for bucket in fake:
            sync.hook(bucket)  # type: ignore[arg-type]
    return persistent / copy_of_all, step.peak / copy_of_all


@pytest.mark.parametrize(
    ("compressor", "exchange"), [("sign", "all_gather"), ("topk:0.01", "all_gather"), ("powersgd:2", "all_reduce")]
)
def test_residuals_take_one_copy_of_the_gradients_and_a_step_less_than_two_buckets(
    compressor: str, exchange: str
) -> None:
    for persistent, peak in run_ranks(2, _use, compressor, exchange):
        assert persistent == pytest.approx(1.0, abs=0.01)
        assert peak * BUCKETS < 2.0  # means wait for each other as they arrived, compressed


# ---- arithmetic of one rank ------------------------------------------------------------------------------------------


def test_the_residual_keeps_its_size_in_units_of_parameters() -> None:
    memory = GradientMemory()
    memory.keep(["p"], [torch.tensor([2.0, -4.0])], {"p": 0.1})
    for rate, ratio in ((0.2, 0.5), (0.1, 1.0), (0.05, 2.0)):
        v = torch.ones(2)
        memory.compensate_(["p"], [v], {"p": rate})
        torch.testing.assert_close(v, 1.0 + ratio * torch.tensor([2.0, -4.0]))
    assert torch.equal(memory.residuals["p"], torch.tensor([2.0, -4.0]))


@pytest.mark.parametrize(("last", "now"), [(None, 0.1), (0.1, None), (0.1, 0.0), (0.0, 0.0), (None, None)])
def test_the_ratio_is_1_in_the_first_step_and_where_the_rate_is_0_or_not_known(
    last: float | None, now: float | None
) -> None:
    memory = GradientMemory()
    memory.keep(["p"], [torch.tensor([2.0])], {} if last is None else {"p": last})
    v = torch.ones(1)
    memory.compensate_(["p"], [v], {} if now is None else {"p": now})
    assert float(v) == 3.0


def test_small_residuals_of_half_precision_gradients_are_not_rounded_away() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sync = GradientSync({p: "p"}, parse("topk:0.5"), "all_gather", False, 0, Meter(), residuals=True)
    for _ in range(400):
        bucket = FakeBucket([p], True)
        bucket.flat.copy_(torch.tensor([1.0, 2.0**-9]))
        sync.hook(bucket)  # type: ignore[arg-type]
    assert sync.state_dict()["residuals"]["p"].tolist() == [0.0, 400 * 2.0**-9]  # bfloat16 would stop at 0.5
    assert sync.residual_norm() == 400 * 2.0**-9


# ---- state -----------------------------------------------------------------------------------------------------------


def _resume(rank: int, world: int, case: Case) -> tuple[bool, bool]:
    """Save after four steps; tell whether an interrupted run is the same after four more, and whether ranks agree."""
    net, net2 = Net().double(), Net().double()
    optimizer, optimizer2 = momentum_sgd(net), momentum_sgd(net2)
    runs = [(*attach(net, case, optimizer), optimizer)]
    for step in range(8):
        if step == 4:
            net2.load_state_dict(net.state_dict())
            optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            runs.append((*attach(net2, case, optimizer2), optimizer2))
            runs[1][1].load_state_dict(runs[0][1].state_dict())
        for wrapped, _, stepped in runs:
            set_rates(stepped, case, step)
            loss(wrapped, case, rank, step, 0).backward()
            stepped.step()
            stepped.zero_grad()
    equal = all(torch.equal(p, q) for p, q in zip(net.parameters(), net2.parameters(), strict=True))
    return equal and same(runs[0][1].state_dict(), runs[1][1].state_dict()), alike(net2)


RESUMED = [
    Case("topk:0.1", feedback=True),
    Case("random_block:0.2", "all_reduce", feedback=True, dense_steps=5),
    Case("powersgd:1", feedback=True),
    Case("powersgd:1"),
    Case("bingrad_b", feedback=True),
    Case("orq:5"),
    Case("qsgd:9,bucket_size=16"),
]


@pytest.mark.parametrize("case", RESUMED, ids=[case.name for case in RESUMED])
def test_a_resumed_run_continues_bit_for_bit(case: Case) -> None:
    assert together(2, _resume, [(other,) for other in RESUMED], (case,)) == [(True, True)] * 2


def test_other_numbers_of_ranks_start_from_the_mean_of_the_residuals() -> None:
    """One of the three was lost and counts as 0; the update engine's merge does for both."""
    states = [{"residuals": {"p": torch.tensor([3.0, 6.0])}}, None, {"residuals": {"p": torch.tensor([0.0, 3.0])}}]
    p = nn.Parameter(torch.zeros(2))
    sync = GradientSync({p: "p"}, parse("sign"), "all_gather", False, 0, Meter(), residuals=True)
    sync.load_state_dict({"rounds": 7, **merge_states(states)})
    assert sync.state_dict()["residuals"]["p"].tolist() == [1.0, 3.0]
    assert sync.rounds == 7


def test_a_state_that_was_taken_over_shares_no_memory_and_leaves_out_what_is_no_more() -> None:
    p = nn.Parameter(torch.zeros(2))
    source = torch.ones(2)
    sync = GradientSync({p: "p"}, parse("sign"), "all_gather", False, 0, Meter(), residuals=True)
    sync.load_state_dict({"residuals": {"p": source, "gone": torch.ones(3)}})
    source.zero_()
    assert {name: e.tolist() for name, e in sync.state_dict()["residuals"].items()} == {"p": [1.0, 1.0]}


# ---- uneven inputs ---------------------------------------------------------------------------------------------------


def _idle_rank(rank: int, world: int, case: Case) -> tuple[bool, float]:
    """In every second step rank 1 has nothing to say; its residuals still travel, and nothing is lost."""
    net = Net(case.layers).to(case.dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapped, sync = attach(net, case, optimizer)
    worst = 0.0
    for step in range(6):
        before = [p.detach().clone() for p in net.parameters()]
        old = copy.deepcopy(sync.state_dict()["residuals"])
        mine = Net(case.layers).to(case.dtype)
        mine.load_state_dict(net.state_dict())
        factor = 0.0 if rank == 1 and step % 2 else 1.0
        (loss(mine, case, rank, step, 0) * factor).backward()
        (loss(wrapped, case, rank, step, 0) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        for (name, p), x, q in zip(net.named_parameters(), before, mine.parameters(), strict=True):
            e = sync.state_dict()["residuals"][name].view_as(p)
            total = q.grad + old.get(name, torch.zeros(p.numel(), dtype=p.dtype)).view_as(p) - e  # what this rank sent
            torch.distributed.all_reduce(total)
            worst = max(worst, float((x - 0.1 * total / world - p.detach()).abs().max()))
    return alike(net), worst


@pytest.mark.parametrize("compressor", ["topk:0.1", "powersgd:1"])
def test_a_rank_without_gradients_takes_part_and_nothing_is_lost(compressor: str) -> None:
    for equal, worst in run_ranks(2, _idle_rank, Case(compressor, feedback=True)):
        assert equal
        assert worst < 1e-14
