"""`zo_ddp`: ranks hold the same bits, take the path of one process, and send a few numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from lightning_distopt.errors import QueryError
from lightning_distopt.exchange import Meter, ScalarGather
from lightning_distopt.strategies.zo_ddp import ZeroOrderDDPStrategy
from lightning_distopt.zeroth_order import (
    CoordinateEstimator,
    Estimator,
    GaussianEstimator,
    SphereEstimator,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from tests.ranks import run_ranks
from tests.strategies.fits import Agree, At, distance, fit, trainer
from tests.strategies.models import Net
from tests.zeroth_order.models import Regression, loader

METHODS: dict[str, Any] = {"sgd": ZOProxSGD, "svrg": ZOProxSVRG, "saga": ZOProxSAGA}
ESTIMATORS: dict[str, Estimator] = {
    "coordinate": CoordinateEstimator(),
    "forward": CoordinateEstimator(central=False),
    "example": GaussianEstimator(2, "per_example"),
    "batch": GaussianEstimator(1, "per_batch"),
    "batch, central": GaussianEstimator(2, "per_batch", central=True),
    "sphere": SphereEstimator(3, "per_batch"),
}


def walk(rank: int, world: int, shared_by: int) -> dict[str, Any]:
    """Walk with every method and estimator; the losses of a sample depend on nothing but the sample."""
    found = {}
    a = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for method, cls in METHODS.items():
        for name, estimator in ESTIMATORS.items():
            x = nn.Parameter(torch.ones(6, dtype=torch.float64))
            meter = Meter()
            optimizer = cls([x], n_samples=20, lr=0.05, estimator=estimator, batch_size=7, inner_steps=2)
            optimizer.team = ScalarGather(meter) if shared_by > 1 else None

            def closure(indices: Tensor, x: Tensor = x) -> Tensor:
                return torch.stack([torch.tanh((a[i] * x).sum()) for i in indices])

            for _ in range(3):
                optimizer.step(closure)
            value = optimizer.evaluate(None, closure)
            found[f"{method} {name}"] = (x.detach().clone(), optimizer.queries, optimizer.queries_here, value)
    return found


def test_any_number_of_ranks_takes_the_path_of_one_process() -> None:
    alone = walk(0, 1, 1)
    for world in (2, 3):
        ranks = run_ranks(world, walk, world)
        for name, (x, queries, _, value) in alone.items():
            assert all(torch.equal(rank[name][0], x) for rank in ranks), name
            assert all(rank[name][1] == queries for rank in ranks), name
            assert sum(rank[name][2] for rank in ranks) == queries, name  # nothing is asked twice
            assert all(rank[name][3] == value for rank in ranks), name


def large(rank: int, world: int, numel: int) -> int:
    """Make two steps with one direction per batch; return the bytes that a step sent."""
    x = nn.Parameter(torch.ones(numel))
    meter = Meter()
    optimizer = ZOProxSGD([x], n_samples=64, lr=1e-9, batch_size=64, estimator=GaussianEstimator(1, "per_batch"))
    optimizer.team = ScalarGather(meter)
    optimizer.step(lambda i: x[: len(i)].square() + x.mean())
    return meter.bytes_sent


def test_a_step_of_ten_million_parameters_sends_less_than_a_kilobyte() -> None:
    sent = {numel: run_ranks(2, large, numel)[0] for numel in (1000, 10_000_000)}
    assert sent[10_000_000] == sent[1000] < 1000


def failing(rank: int, world: int, who: int) -> str:
    x = nn.Parameter(torch.ones(4))
    optimizer = ZOProxSGD([x], n_samples=16, lr=0.1, estimator=GaussianEstimator())
    optimizer.team = ScalarGather(Meter())
    calls = 0

    def closure(indices: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == who and calls > 2:
            raise ConnectionError("gone")
        return x.square().sum().expand(len(indices))

    try:
        optimizer.step(closure)
    except QueryError as error:
        assert torch.equal(x, torch.ones(4))
        return str(error)
    return ""


def test_a_query_that_fails_on_one_rank_ends_the_step_on_all() -> None:
    own, others = run_ranks(2, failing, 0)
    assert "gone" in own
    assert "ranks [0]" in others


@pytest.mark.parametrize("method", list(METHODS))
def test_a_fit_equals_the_fit_of_one_process(method: str) -> None:
    def check(t: Any, module: Any) -> None:
        strategy = t.strategy
        assert strategy.meter.sent["scalars"] > 0
        assert strategy.meter.compression_ratio > 0

    arguments = {"method": method, "estimator": GaussianEstimator(2, "per_example"), "lr": 0.05}
    alone, both = Regression(**arguments), Regression(**arguments)
    trainer("auto", 6, devices=1).fit(alone, loader())
    before = {k: v.clone() for k, v in Regression(**arguments).state_dict().items()}
    strategy = trainer(ZeroOrderDDPStrategy(start_method="fork"), 6, callbacks=[Agree(), At(train_end=check)])
    strategy.fit(both, loader())
    assert distance(alone.state_dict(), both.state_dict()) < 1e-9
    assert distance(alone.state_dict(), before) > 1e-3


def test_optimizers_with_gradients_are_refused() -> None:
    with pytest.raises(ProcessRaisedException, match=r"ask for values only: got SGD"):
        fit(Net(), ZeroOrderDDPStrategy(start_method="fork"), devices=1)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="compressor"):
        ZeroOrderDDPStrategy(compressor="sign")
