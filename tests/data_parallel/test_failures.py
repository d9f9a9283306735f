"""A NaN or an infinity on one rank stops all ranks before it reaches a residual, and says where it came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.data_parallel.agreement import first_non_finite
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import Replica, config, flat
from tests.data_parallel.together import together
from tests.ranks import run_ranks

Found = tuple[str, bool, bool, bool, bool]


def _fail(rank: int, world: int, where: str, value: float, changes: dict[str, Any]) -> Found:
    """Train, let rank 1 fail in parameter "v", and tell: the message, and whether all is as before the step."""
    replica = Replica(config(averaging_period=2, **changes))
    replica.run(replica.sync.config.sync_every * 4)
    x, e, s = replica.x, replica.e, replica.s
    message = "no error"
    try:
        for _ in range(replica.sync.config.sync_every):
            replica.track()
            replica.sync.enter()
            replica.take_gradients()
            if rank == 1 and where == "gradient":
                gradient = replica.params["v"].grad
                assert gradient is not None
                gradient[7, 1] = value
            replica.optimizer.step()  # keeps the gradients, as Lightning does
            if rank == 1 and where == "parameter":
                replica.params["v"].data[7, 1] = value
            replica.steps += 1
            replica.sync.exchange()
    except NonFiniteError as error:
        message = str(error)
    same = torch.equal(flat(replica.params), x), torch.equal(replica.e, e), torch.equal(replica.s, s)
    return message, *same, replica.sync.away


VALUES = [float("nan"), float("inf"), -float("inf")]
BAD = [(where, value, {}) for where in ("parameter", "gradient") for value in VALUES]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[1]} in a {case[0]}")
def test_all_ranks_raise_the_same_error_that_names_rank_step_and_parameter(case: tuple[Any, ...]) -> None:
    messages = [message for message, *_ in together(3, _fail, BAD, case)]
    assert messages[0].startswith("Parameter `v` got a NaN or an infinity on rank 1 in step 4, and all 3 ranks stopped")
    assert messages == messages[:1] * 3


METHODS: list[dict[str, Any]] = [
    {},
    {"sync_every": 3},
    {"server_compression": True},
    {"exchange": "sharded_server", "server_compression": True},
    {"compressor": "bf16", "exchange": "all_reduce"},
    {"dense_steps": 99},
    {"scope": "model", "bucket_bytes": 1},
]


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_nothing_has_entered_a_residual_and_the_parameters_hold_the_common_model(changes: dict[str, Any]) -> None:
    cases = [("gradient", VALUES[0], other) for other in METHODS]
    for message, x, e, s, away in together(2, _fail, cases, ("gradient", VALUES[0], changes)):
        assert "`v` got a NaN" in message
        assert (x, e, s, away) == (True, True, True, False)


def test_one_rank_alone_finds_its_own_failure() -> None:
    replica = Replica(config())
    replica.track()
    replica.sync.enter()
    replica.params["bias"].data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"`bias`.*on rank 0 in step 0, and all 1 ranks"):
        replica.sync.exchange()


def _go_on(rank: int, world: int) -> Tensor:
    replica, twin = (Replica(config(averaging_period=2), lr=None) for _ in range(2))
    replica.run(3)
    twin.run(3)
    replica.sync.enter()
    replica.params["w"].data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        replica.sync.exchange()
    replica.run(4)
    twin.run(4)
    return (flat(replica.params) - flat(twin.params)).abs().max()


def test_training_can_go_on_after_the_error_as_if_the_step_had_not_been() -> None:
    """Averaging of the interrupted round is not done twice either."""
    assert [float(difference) for difference in run_ranks(2, _go_on)] == [0.0, 0.0]


def test_a_clipped_nan_is_blamed_on_a_parameter_with_a_bad_gradient() -> None:
    """Gradients tell where it began, parameters where it has spread to: an optimizer may mix them."""
    replica = Replica(config())
    replica.track()
    replica.sync.enter()
    replica.take_gradients()
    gradient = replica.params["v"].grad
    assert gradient is not None
    gradient[0] = float("inf")
    for param in replica.params.values():
        param.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="`v`"):
        replica.sync.exchange()


def _sparse_failure(rank: int, world: int) -> str:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    sync = UpdateSync(config(), Meter())
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    sync.track({"embedding.weight": embedding.weight}, {"embedding.weight": (0,)})
    sync.enter()
    embedding(torch.tensor([1, 4, 4])).sum().mul(float("nan") if rank else 1.0).backward()
    optimizer.step()
    try:
        sync.exchange()
    except NonFiniteError as error:
        return str(error)
    return "no error"


def test_a_nan_in_a_sparse_gradient_is_found() -> None:
    messages = run_ranks(2, _sparse_failure)
    assert messages[0] == messages[1]
    assert "`embedding.weight` got a NaN or an infinity on rank 1" in messages[0]


def test_values_whose_sum_overflows_are_not_a_failure() -> None:
    param = Parameter(torch.full((1000,), 3e38))
    sync = UpdateSync(config(), Meter())
    sync.track({"p": param}, {"p": (0,)})
    sync.enter()
    sync.exchange()
    assert bool(param.isfinite().all())


def test_the_first_bad_tensor_is_found_among_missing_and_sparse_ones() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, float("nan")], (3,), check_invariants=True)
    assert first_non_finite([None, torch.ones(2), sparse, torch.full((1,), float("inf"))]) == 2
    assert first_non_finite([None, torch.ones(2), torch.zeros(0)]) is None


def _fails_early(rank: int, world: int) -> str:
    """Rank 1 gets a NaN in the second of four local steps; the round ends two steps later."""
    replica = Replica(config(sync_every=4))
    replica.run(4)
    try:
        for step in range(4):
            replica.track()
            replica.sync.enter()
            replica.take_gradients()
            if (rank, step) == (1, 1):
                replica.params["v"].grad[7, 1] = float("nan")  # type: ignore[index]
            replica.local_step()
            replica.sync.exchange()
    except NonFiniteError as error:
        return str(error)
    return "no error"


def test_inside_a_round_the_first_bad_step_is_named() -> None:
    for message in run_ranks(2, _fails_early):
        assert message.startswith("Parameter `v` got a NaN or an infinity on rank 1 in step 5, and all 2 ranks")
