"""Parameters, optimizers and buckets of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.data_parallel.buckets import make_buckets
from lightning_distopt.data_parallel.exchanges import choose_exchange, make_exchange
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import SHAPES, SIZES, Replica, config, flat
from tests.data_parallel.together import together
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
METHODS = [
    {},
    {"compressor": "topk:0.1", "server_compression": True, "coefficient": 0.3},
    {"exchange": "sharded_server", "server_compression": True, "averaging_period": 2},
    {"compressor": "random_block:0.2", "exchange": "all_reduce"},
    {"compressor": "bf16", "exchange": "all_reduce"},
]
methods = pytest.mark.parametrize(
    "method", METHODS, ids=["sign", "topk two-way", "sign sharded", "random block", "bf16"]
)


def equal_on_all_ranks(params: list[Tensor]) -> bool:
    mine = torch.cat([p.detach().reshape(-1).double() for p in params])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(everyone[0], other) for other in everyone)


# ---- dtypes and shapes -----------------------------------------------------------------------------------------------


def _in_dtype(rank: int, world: int, dtype: torch.dtype, method: dict[str, Any]) -> tuple[bool, float, torch.dtype]:
    replica = Replica(config(**method), dtype, noise=0.1)
    before = replica.problem.loss(flat(replica.params).double())
    equal = True
    for _ in range(15):
        replica.step()
        equal = equal and equal_on_all_ranks(list(replica.params.values()))
    return equal, replica.problem.loss(flat(replica.params).double()) / before, replica.params["w"].dtype


@methods
@dtypes
def test_training_works_in_every_dtype(dtype: torch.dtype, method: dict[str, Any]) -> None:
    cases = [(d, m) for d in DTYPES for m in METHODS]
    for equal, progress, kept in together(2, _in_dtype, cases, (dtype, method)):
        assert equal, "the same bits on all ranks after every step"
        assert progress < 0.8, "of the loss is left after 15 steps"
        assert kept is dtype


def test_residuals_of_half_precision_parameters_hold_what_half_precision_cannot() -> None:
    """A step of 2**-10 does not move a bfloat16 parameter at 1, and is not forgotten either."""
    param = Parameter(torch.ones(8, dtype=torch.bfloat16))
    sync = UpdateSync(config("topk:0.1", coefficient=0.0), Meter())
    sync.track({"p": param}, {"p": (0,)})
    for bucket in sync.buckets:
        bucket.residual.flat.fill_(2.0**-10)
    sync.enter()
    sync.exchange()
    assert sync.buckets[0].residual.flat.sort().values.tolist() == [0.0] + [2.0**-10] * 7


class _Odd:
    """Parameters of several dtypes and of odd shapes together, two of them empty."""

    def __init__(self, method: dict[str, Any]) -> None:
        torch.manual_seed(0)
        shapes = {"empty": (0, 3), "scalar": (), "one": (1,), "half": (7,), "double": (2, 3), "w": (33,), "void": (0,)}
        kinds = {"half": torch.bfloat16, "double": torch.float64}
        self.params = {n: Parameter(torch.randn(s, dtype=kinds.get(n))) for n, s in shapes.items()}
        self.sync = UpdateSync(config(**method), Meter())

    def step(self, size: float) -> None:
        self.sync.track(self.params, dict.fromkeys(self.params, (0,)))
        self.sync.enter()
        for param in self.params.values():
            param.data.sub_(size)
        self.sync.exchange()


def _odd(rank: int, world: int, method: dict[str, Any]) -> tuple[bool, list[float], list[int]]:
    odd = _Odd(method)
    before = {name: p.detach().clone() for name, p in odd.params.items()}
    for _ in range(10):
        odd.step(0.1 * (rank + 1))
    moved = [float((before[n] - p).detach().double().mean()) for n, p in odd.params.items() if p.numel()]
    return equal_on_all_ranks(list(odd.params.values())), moved, [p.numel() for p in odd.params.values()]


@methods
def test_empty_and_0_d_parameters_of_several_dtypes_train_together(method: dict[str, Any]) -> None:
    for equal, moved, numels in together(2, _odd, [(m,) for m in METHODS], (method,)):
        assert equal
        # 10 steps of 0.15 in the mean; what is not there yet is in a residual
        assert all(0.5 < distance < 3.0 for distance in moved), moved
        assert numels == [0, 1, 1, 7, 6, 33, 0]


def test_a_model_without_trainable_parameters_does_nothing() -> None:
    sync = UpdateSync(config(averaging_period=1), Meter())
    sync.track({}, {})
    assert sync.enter() is False
    assert sync.exchange() is False
    sync.flush()
    sync.show_common()
    assert (sync.away, sync.residual_norm(), sync.mismatch()) == (False, 0.0, 0.0)


def test_parameters_that_are_not_contiguous_train() -> None:
    param = Parameter(torch.zeros(4, 6).t())
    sync = UpdateSync(config(), Meter())
    sync.track({"p": param}, {"p": (0,)})
    sync.enter()
    param.data.sub_(torch.arange(24.0).view(6, 4))
    sync.exchange()
    torch.testing.assert_close(param.detach() - sync.buckets[0].residual.views[0], -torch.arange(24.0).view(6, 4))


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _optimizer_run(rank: int, world: int, make: Callable[..., torch.optim.Optimizer]) -> tuple[bool, float, Tensor]:
    replica = Replica(config("topk:0.2", averaging_period=4), optimizer=make, lr=None, noise=0.1)
    before = replica.problem.loss(flat(replica.params))
    auxiliary = flat(replica.params)
    for _ in range(20):
        replica.track()
        replica.sync.enter()
        y = flat(replica.params)
        replica.take_gradients()
        replica.local_step()
        step = y - flat(replica.params)
        replica.sync.exchange()
        dist.all_reduce(step)
        auxiliary -= step / world
    e = replica.e.clone()
    dist.all_reduce(e)
    return (
        equal_on_all_ranks(list(replica.params.values())),
        replica.problem.loss(replica.x) / before,
        (replica.x - e / world - auxiliary).abs().max(),
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_and_keeps_the_auxiliary_point(name: str) -> None:
    cases = [(make,) for make in OPTIMIZERS.values()]
    for equal, progress, deviation in together(2, _optimizer_run, cases, (OPTIMIZERS[name],)):
        assert equal
        assert progress < 0.5
        assert float(deviation) < 1e-12


def _sparse(rank: int, world: int, sparse: bool) -> tuple[bool, Tensor]:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4, sparse=sparse)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    sync = UpdateSync(config("topk:0.2"), Meter())
    for step in range(8):
        sync.track({"weight": embedding.weight}, {"weight": (0,)})
        sync.enter()
        rows = torch.tensor([(step + rank) % 10, (2 * step) % 10])
        embedding(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.exchange()
    return equal_on_all_ranks([embedding.weight]), embedding.weight.detach()


def test_sparse_gradients_train_like_dense_ones() -> None:
    sparse, dense = run_ranks(2, _sparse, True), run_ranks(2, _sparse, False)
    assert all(equal for equal, _ in sparse)
    torch.testing.assert_close(sparse[0][1], dense[0][1])


# ---- buckets ---------------------------------------------------------------------------------------------------------


def _buckets(rank: int, world: int, bucket_bytes: float, method: dict[str, Any]) -> tuple[int, Tensor, Tensor]:
    replica = Replica(config(bucket_bytes=bucket_bytes, **method), torch.float32)
    replica.run(6)
    return len(replica.sync.buckets), flat(replica.params), replica.e


CUT: list[dict[str, Any]] = [
    {},
    {"compressor": "topk:0.1", "server_compression": True},
    {"compressor": "topk:0.1", "exchange": "sharded_server"},
    {"compressor": "random_block:0.1", "exchange": "all_reduce"},  # the sum of two is the same in any order
    {"compressor": "bf16", "exchange": "all_gather"},
]


@pytest.mark.parametrize("method", CUT, ids=str)
def test_the_size_of_buckets_does_not_change_a_bit(method: dict[str, Any]) -> None:
    cases = [(size, m) for size in (1, 400, 1e9) for m in CUT]
    runs = [together(2, _buckets, cases, (size, method)) for size in (1, 400, 1e9)]
    assert [run[0][0] for run in runs] == [4, 2, 1]
    for run in runs[1:]:
        for rank in range(2):
            assert torch.equal(run[rank][1], runs[0][rank][1])
            assert torch.equal(run[rank][2], runs[0][rank][2])


def test_buckets_are_filled_in_order_up_to_their_size() -> None:
    params = {name: Parameter(torch.zeros(n)) for name, n in zip("abcdef", [2, 2, 1, 9, 1, 3], strict=True)}
    assert [bucket.names for bucket in make_buckets(params, 16)] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_the_size_of_a_bucket_is_that_of_its_memory() -> None:
    for dtype, names in ((torch.float64, [["a"], ["b"]]), (torch.bfloat16, [["a", "b"]])):
        params = {name: Parameter(torch.zeros(4, dtype=dtype)) for name in "ab"}
        assert [bucket.names for bucket in make_buckets(params, 32)] == names, "bfloat16 has float32 memory"


def test_a_bucket_holds_one_dtype() -> None:
    params = {
        name: Parameter(torch.zeros(4, dtype=dtype))
        for name, dtype in zip("abc", [DTYPES[0], DTYPES[2], DTYPES[0]], strict=True)
    }
    assert [bucket.names for bucket in make_buckets(params, 1e9)] == [["a", "c"], ["b"]]


# ---- scope -----------------------------------------------------------------------------------------------------------


def test_scope_model_has_one_scale() -> None:
    replica = Replica(config(scope="model"), lr=None)
    before = flat(replica.params)
    replica.step()
    assert len((before - flat(replica.params)).abs().mul(1e12).round().unique()) == 1


def test_scope_tensor_has_a_scale_for_each_parameter() -> None:
    replica = Replica(config(scope="tensor"), lr=None)
    before = flat(replica.params)
    replica.step()
    assert len((before - flat(replica.params)).abs().mul(1e12).round().unique()) == len(SHAPES)


def test_scope_model_is_one_bucket_whatever_the_bucket_size() -> None:
    replica = Replica(config(scope="model", bucket_bytes=1))
    replica.track()
    assert [bucket.residual.flat.numel() for bucket in replica.sync.buckets] == [sum(SIZES)]


# ---- which exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compressor", "world", "expected"),
    [
        ("fp32", 2, "all_reduce"),
        ("random_block:0.1", 64, "all_reduce"),
        ("sign", 1, "all_gather"),
        ("sign", 8, "all_gather"),
        ("sign", 9, "sharded_server"),
        ("topk:0.01", 64, "sharded_server"),
    ],
)
def test_the_cheapest_exchange_that_fits_is_chosen(compressor: str, world: int, expected: str) -> None:
    assert choose_exchange(parse(compressor), world) == expected


def test_an_exchange_that_cannot_carry_the_compressor_is_refused() -> None:
    with pytest.raises(ValueError, match="not linear"):
        make_exchange("all_reduce", parse("sign"), Meter())
    with pytest.raises(ValueError, match="cannot"):
        make_exchange("sharded_server", parse("random_block:0.1"), Meter())
