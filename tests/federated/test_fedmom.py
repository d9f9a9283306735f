from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("flwr")

from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Krum
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.federated import Deadline, FedMom, InProcessGrid, Privacy, Screening, Service
from lightning_distopt.federated.records import tensors_of, to_record
from lightning_distopt.federated.sampling import fixed_cohort, poisson_cohort
from tests.federated.toy import equal, start, towards, toy_app

FLOATS = ("norm.running_mean", "norm.running_var")


def fit(strategy, rounds: int = 3, clients: int = 4, turn=None, arrays=None, examples=None):
    app = toy_app(turn) if examples is None else toy_app(turn, examples)
    result = strategy.start(InProcessGrid(app, clients), to_record(arrays or start()), rounds)
    return tensors_of(result.arrays), result


def averages(arrays, weights):
    """One plain round of the toy clients, in float64."""
    replies = [towards(client, arrays) for client in range(len(weights))]
    return {
        name: sum(w * reply[name].double() for w, reply in zip(weights, replies, strict=True)) / sum(weights)
        for name in arrays
        if arrays[name].is_floating_point()
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_torchs_nesterov_on_the_displacement_and_a_plain_mean_on_buffers(momentum: float) -> None:
    arrays, _ = fit(FedMom(lr=0.7, momentum=momentum), rounds=11)
    w = start(torch.float64)
    param = torch.nn.Parameter(start()["layer.weight"].double())
    optimizer = torch.optim.SGD([param], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for _ in range(11):
        mean = averages({**w, "layer.weight": param.detach()}, [10, 20, 30, 40])
        param.grad = param.detach() - mean["layer.weight"]
        optimizer.step()
        w |= {name: mean[name] for name in FLOATS}
    torch.testing.assert_close(arrays["layer.weight"].double(), param.detach(), rtol=0, atol=1e-6)
    for name in FLOATS:
        torch.testing.assert_close(arrays[name].double(), w[name], rtol=0, atol=1e-6)
    assert int(arrays["norm.num_batches_tracked"]) == 3 + 11 * 3  # the largest of each round


def test_without_momentum_it_is_flowers_fedavg() -> None:
    ours, _ = fit(FedMom(momentum=0.0))
    theirs = tensors_of(FedAvg().start(InProcessGrid(toy_app(), 4), to_record(start()), 3).arrays)
    for name in ("layer.weight", *FLOATS):
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=0, atol=1e-6)


def test_with_momentum_it_is_not_flowers_fedavgm() -> None:
    ours, _ = fit(FedMom(lr=0.5, momentum=0.9))
    heavy = FedAvgM(server_learning_rate=0.5, server_momentum=0.9).start(
        InProcessGrid(toy_app(), 4), to_record(start()), 3
    )
    assert (ours["layer.weight"] - tensors_of(heavy.arrays)["layer.weight"].float()).abs().max() > 0.1


@settings(max_examples=10, deadline=None)
@given(clients=st.integers(2, 6), momentum=st.floats(0, 0.95), seed=st.integers(0, 100))
def test_paper_weights_with_k_over_m_are_normalized_ones_for_equal_sizes(
    clients: int, momentum: float, seed: int
) -> None:
    everybody, cohort = 2 * clients, clients
    options = {"momentum": momentum, "seed": seed, "fraction_train": 0.5, "fraction_evaluate": 0.0}
    one, _ = fit(FedMom(1.0, **options), clients=everybody, examples=lambda _: 7.0)
    other, _ = fit(
        FedMom(everybody / cohort, weighting="paper", total_examples=7.0 * everybody, **options),
        clients=everybody, examples=lambda _: 7.0,
    )  # fmt: skip
    torch.testing.assert_close(one["layer.weight"], other["layer.weight"], rtol=1e-5, atol=1e-5)


def test_a_scheduled_rate_reaches_the_step() -> None:
    scheduled, _ = fit(FedMom(lambda server_round: 0.5 if server_round == 1 else 0.25), rounds=2)
    constant, _ = fit(FedMom(0.5), rounds=2)
    assert not torch.equal(scheduled["layer.weight"], constant["layer.weight"])


def test_half_precision_is_averaged_in_single_precision() -> None:
    w = {"layer.weight": torch.full((4,), 2.0, dtype=torch.float16)}
    turn = lambda client, _, arrays: {n: t - 0.5 for n, t in arrays.items()}  # noqa: E731
    strategy = FedMom(momentum=0.0)
    arrays, _ = fit(strategy, 1, 3, turn, w, lambda _: 60_000.0)  # 0.5 * 180,000 is beyond float16
    assert arrays["layer.weight"].dtype is torch.float16
    assert torch.equal(arrays["layer.weight"], torch.full((4,), 1.5, dtype=torch.float16))
    assert strategy.v["layer.weight"].dtype is torch.float32


def test_a_round_without_replies_leaves_model_and_momentum_alone() -> None:
    def turn(client, server_round, arrays):
        if server_round == 2:
            raise RuntimeError("gone")

    with_gap, result = fit(FedMom(fraction_evaluate=0.0), rounds=3, turn=turn)
    without, _ = fit(FedMom(fraction_evaluate=0.0), rounds=2)
    assert equal(with_gap, without)
    assert list(result.train_metrics_clientapp) == [1, 3]


def test_a_client_that_leaves_does_not_stop_the_others() -> None:
    grid = InProcessGrid(toy_app(lambda client, r, w: grid.contexts.pop(4, None) and None), 4)
    result = FedMom(min_available_nodes=4, fraction_evaluate=0.0).start(grid, to_record(start()), 3)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]


def test_too_few_replies_are_no_replies() -> None:
    def turn(client, server_round, arrays):
        if client:
            raise RuntimeError("gone")

    arrays, _ = fit(FedMom(service=Service(deadline=Deadline(min_replies=2))), turn=turn)
    assert equal(arrays, start())


def test_cohorts_depend_on_seed_and_round_only() -> None:
    asked = []
    for seed in (1, 1, 2):
        seen: list[tuple[int, int]] = []
        fit(FedMom(seed=seed, fraction_train=0.3), 5, 10, lambda c, r, a, seen=seen: seen.append((r, c)))
        asked.append(seen)
    assert asked[0] == asked[1] != asked[2]
    assert [sum(r == number for r, _ in asked[0]) for number in range(1, 6)] == [3] * 5


def test_cohorts_are_uniform() -> None:
    counts = torch.zeros(10)
    for server_round in range(2000):
        for client in fixed_cohort(range(10), 3, 0, server_round):
            counts[client] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.05  # five standard errors
    sizes = torch.tensor([len(poisson_cohort(range(100), 0.1, 0, r)) for r in range(500)], dtype=torch.float)
    assert float(sizes.mean()) == pytest.approx(10, abs=0.7)
    assert float(sizes.var()) == pytest.approx(9, rel=0.3)


# Robust rules.


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [(Krum(num_malicious_nodes=1), 1.0), (FedMedian(), 2.5), (FedTrimmedAvg(beta=0.2), 8 / 3)],
)
def test_robust_rules_combine_displacements_before_the_momentum(aggregator, expected: float) -> None:
    points = (0.0, 1.0, 2.5, 4.5, 100.0)
    turn = lambda client, _, arrays: {n: t - points[client] for n, t in arrays.items()}  # noqa: E731
    w = {"w": torch.tensor([10.0])}
    strategy = FedMom(aggregator=aggregator, momentum=0.9, screening=Screening(norm_factor=None))
    first, _ = fit(strategy, 1, 5, turn, w)
    assert float(first["w"]) == pytest.approx(10 - expected * 1.9, abs=1e-5)  # v' = w - g, w' = v' + 0.9 (v' - w)


def test_krum_does_nothing_with_too_few_replies() -> None:
    arrays, _ = fit(FedMom(aggregator=Krum(num_malicious_nodes=1)), clients=4)
    assert equal(arrays, start())


def test_identical_updates_come_back_from_every_rule() -> None:
    turn = lambda client, _, arrays: {n: t - 1 for n, t in arrays.items()}  # noqa: E731
    for aggregator in (FedMedian(), FedTrimmedAvg(), Krum(num_malicious_nodes=1), None):
        arrays, _ = fit(FedMom(momentum=0.0, aggregator=aggregator), 1, 5, turn)
        torch.testing.assert_close(arrays["layer.weight"], start()["layer.weight"] - 1)
        assert int(arrays["norm.num_batches_tracked"]) == 2


# Privacy.


def test_without_noise_and_bound_private_fedmom_is_fedmom() -> None:
    privacy = Privacy(clip=float("inf"), noise_multiplier=0.0, delta=1e-5, population=4, sampling="fixed")
    private, _ = fit(FedMom(privacy=privacy))
    plain, _ = fit(FedMom(weighting="uniform"))
    for name in ("layer.weight", *FLOATS):
        torch.testing.assert_close(private[name], plain[name], rtol=0, atol=1e-5)
    assert int(private["norm.num_batches_tracked"]) == 3  # a count would leak


def test_no_client_moves_the_model_further_than_the_bound() -> None:
    privacy = Privacy(clip=0.1, noise_multiplier=0.0, delta=1e-5, population=4, sampling="fixed")
    turn = lambda client, _, arrays: {n: t - 1e6 if client == 1 else t for n, t in arrays.items()}  # noqa: E731
    arrays, _ = fit(FedMom(momentum=0.0, privacy=privacy), 1, 4, turn)
    before = start()
    moved = sum(float((arrays[n] - before[n]).square().sum()) for n in arrays if before[n].is_floating_point()) ** 0.5
    assert moved <= 0.1 / 4 + 1e-6


def test_noise_is_added_even_if_nobody_answers_and_epsilon_grows() -> None:
    def turn(client, server_round, arrays):
        raise RuntimeError("gone")

    strategy = FedMom(privacy=Privacy(0.1, 1.0, 1e-5, 4), fraction_train=0.5, fraction_evaluate=0.0)
    arrays, _ = fit(strategy, 2, 4, turn)
    assert not torch.equal(arrays["layer.weight"], start()["layer.weight"])
    assert strategy.accountant is not None
    assert strategy.accountant.releases == [(0.5, 1.0, 2)]


def test_momentum_comes_after_the_noise() -> None:
    strategy = FedMom(momentum=0.9, privacy=Privacy(0.1, 1.0, 1e-5, 4), fraction_train=0.5, fraction_evaluate=0.0)
    arrays, _ = fit(strategy, 1, 4, lambda client, _, w: w)  # nobody has learnt anything: all is noise
    w, v = start()["layer.weight"], strategy.v["layer.weight"]
    torch.testing.assert_close(arrays["layer.weight"] - w, 1.9 * (v - w))


def test_the_budget_ends_the_federation() -> None:
    strategy = FedMom(privacy=Privacy(0.1, 1.0, 1e-5, 4, max_epsilon=5.0), fraction_train=0.5, fraction_evaluate=0.0)
    fit(strategy, rounds=50)
    assert strategy.accountant is not None
    assert 0 < strategy.accountant.epsilon() <= 5.0
    assert strategy.exhausted() is not None


# What is refused when it is made.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr.*0.0"),
        ({"momentum": 1.0}, "momentum.*1.0"),
        ({"weighting": "paper"}, "total_examples.*None"),
        ({"total_examples": 5.0}, "total_examples.*5.0"),
        ({"weighting": "some"}, "weighting.*some"),
        ({"privacy": Privacy(1.0, 1.0, 1e-5, 4), "aggregator": FedMedian()}, "privacy.*FedMedian"),
        ({"privacy": Privacy(1.0, 1.0, 1e-5, 4), "weighting": "normalized"}, "uniform.*normalized"),
        ({"aggregator": FedMedian(), "weighting": "normalized"}, "uniform.*normalized"),
        ({"compressor": "powersgd:2"}, "powersgd:2"),
        ({"fraction_train": 1.5}, "fraction_train.*1.5"),
        ({"privacy": Privacy(1.0, 1.0, 1e-5, 4), "fraction_train": 0.0}, "fraction_train.*0.0"),
        ({"privacy": Privacy(1.0, 1.0, 1e-5, 4), "service": Service(deadline=Deadline(5.0))}, "poisson.*5.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FedMom(**options)


def test_names_that_are_not_there_are_told() -> None:
    with pytest.raises(ValueError, match=r"layer\.weigth"):
        fit(FedMom(trainable=["layer.weigth"]))


@pytest.mark.parametrize("aggregator", [FedAvgM(), "median"])
def test_an_aggregator_only_combines(aggregator) -> None:
    with pytest.raises(TypeError, match="FedMedian"):
        FedMom(aggregator=aggregator)


def test_a_step_that_diverges_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from lightning_distopt.errors import NonFiniteError

    turn = lambda client, _, arrays: {n: t - 60_000 for n, t in arrays.items()}  # noqa: E731
    with caplog.at_level(logging.ERROR), pytest.raises(NonFiniteError, match="momentum"):
        fit(FedMom(), 3, 2, turn, {"w": torch.zeros(2, dtype=torch.float16)})


@pytest.mark.parametrize("changes", [{"lr": "1.0"}, {"lr": True}, {"momentum": None}, {"seed": "a"}, {"seed": 2**63}])
def test_arguments_of_odd_types_are_named(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`.*{next(iter(changes.values()))}"):
        FedMom(**changes)
