from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_distopt.federated import FedMom, InProcessGrid, lightning_client_app, lightning_server_app
from lightning_distopt.federated.client import shared_state
from lightning_distopt.federated.records import tensors_of, to_record
from lightning_distopt.federated.server import trainable_entries
from tests.federated.lightning_toy import CPU, Line, Points
from tests.federated.toy import equal


def federation(strategy=None, module=Line, rounds: int = 1, clients: int = 2, config=None, local_keys=(), **app):
    app = {"local_epochs": 1, "trainer": CPU, **app}
    grid = InProcessGrid(lightning_client_app(module, Points, local_keys=local_keys, **app), clients)
    strategy = strategy or FedMom(momentum=0.0, fraction_evaluate=0.0)
    result = strategy.start(
        grid, to_record(shared_state(module(), local_keys)), rounds, train_config=ConfigRecord(config or {})
    )
    return tensors_of(result.arrays), grid, result


def by_hand(steps: int, client: int, prox: float = 0.0) -> dict[str, torch.Tensor]:
    """Full-batch gradient steps of client 0, whose data are one batch."""
    module = Line()
    anchor = [param.detach().clone() for param in module.parameters()]
    batch = Points(client, 2).data.tensors
    for _ in range(steps):
        gradients = torch.autograd.grad(module.loss(batch), list(module.parameters()))
        with torch.no_grad():
            for param, gradient, w in zip(module.parameters(), gradients, anchor, strict=True):
                param -= 0.1 * (gradient + prox * (param - w))
    return module.state_dict()


@pytest.mark.parametrize("prox", [0.0, 0.5])
def test_local_steps_are_plain_gradient_steps_with_the_proximal_term(prox: float) -> None:
    arrays, _, _ = federation(clients=1, strategy=single(), local_epochs=None, local_steps=3, prox=prox)
    expected = by_hand(3, 0, prox)
    for name, tensor in expected.items():
        torch.testing.assert_close(arrays[name], tensor)


def single(**options) -> FedMom:
    return FedMom(momentum=0.0, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, **options)


def test_the_servers_proximal_weight_comes_before_the_clients() -> None:
    ours, _, _ = federation(clients=1, strategy=single(), local_epochs=None, local_steps=3, config={"proximal-mu": 0.5})
    torch.testing.assert_close(ours["body.weight"], by_hand(3, 0, 0.5)["body.weight"])


def test_epochs_and_steps_count_the_same_work() -> None:
    epochs, _, _ = federation(local_epochs=2, clients=1, strategy=single())
    steps, _, _ = federation(local_epochs=None, local_steps=2, clients=1, strategy=single())
    assert equal(epochs, steps)


def test_the_same_seed_gives_the_same_model_and_another_does_not() -> None:
    first, again, other = (federation(FedMom(seed=seed, fraction_evaluate=0.0), clients=3)[0] for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


def test_clients_weigh_their_examples_and_leave_the_generators_alone() -> None:
    state = torch.get_rng_state()
    strategy = FedMom(momentum=0.0, fraction_evaluate=0.0)
    federation(strategy, clients=3)
    assert strategy.collected is not None
    assert list(strategy.collected.weights.values()) == [8.0, 16.0, 24.0]
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_optimizers_go_on_and_fresh_ones_begin_anew() -> None:
    module = partial(Line, momentum=0.9)
    options = {"module": module, "local_epochs": None, "clients": 1}
    one, _, _ = federation(strategy=single(), local_steps=4, **options)
    kept, _, _ = federation(strategy=single(), rounds=2, local_steps=2, optimizer_state="kept", **options)
    fresh, _, _ = federation(strategy=single(), rounds=2, local_steps=2, **options)
    for name, tensor in one.items():
        torch.testing.assert_close(kept[name], tensor)
    assert (fresh["body.weight"] - one["body.weight"]).abs().max() > 1e-3


def test_local_keys_stay_where_they_are() -> None:
    arrays, grid, _ = federation(rounds=2, clients=2, local_keys=["head.*"])
    assert set(arrays) == {"body.weight", "body.bias"}
    heads = [tensors_of(context.state["local-arrays"]) for context in grid.contexts.values()]
    assert set(heads[0]) == {"head.weight", "head.bias"}
    assert not equal(heads[0], heads[1])


def test_other_arrays_than_the_modules_are_an_error_that_the_server_hears() -> None:
    grid = InProcessGrid(lightning_client_app(Line, Points, local_epochs=1, trainer=CPU), 2)
    strategy = FedMom(fraction_evaluate=0.0)
    strategy.start(grid, to_record({"other": torch.zeros(2)}), 1)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {"error": 2}


def test_batch_norm_never_gets_momentum() -> None:
    module = partial(Line, norm=True)
    first, _, _ = federation(FedMom(momentum=0.9, fraction_evaluate=0.0), module=module)
    plain, _, _ = federation(FedMom(momentum=0.0, fraction_evaluate=0.0), module=module)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(first[name], plain[name])
    assert not torch.equal(first["norm.weight"], plain["norm.weight"])
    assert "norm.running_mean" not in trainable_entries(module())


class Tied(Line):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = torch.nn.Linear(4, 3)
        self.twin.weight = self.body.weight
        torch.nn.init.zeros_(self.twin.bias)

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.head(self.body(batch[0]) + self.twin(batch[0])), batch[1])


def test_tied_weights_get_momentum_under_all_their_names() -> None:
    assert {"body.weight", "twin.weight"} <= trainable_entries(Tied())
    strategy = FedMom(fraction_evaluate=0.0, trainable=trainable_entries(Tied()))
    arrays, _, _ = federation(strategy, module=Tied, rounds=3, local_epochs=None, local_steps=1)
    assert torch.equal(arrays["body.weight"], arrays["twin.weight"])


def test_one_callback_is_enough() -> None:
    strategy = single()
    federation(strategy, clients=1, trainer={**CPU, "callbacks": Callback()})
    assert strategy.collected is not None
    assert not strategy.collected.refused


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_client_whose_loader_gives_no_batch_has_learnt_nothing() -> None:
    class Few(Points):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.data, 9, drop_last=True)  # client 0 holds 8

    strategy = FedMom(fraction_evaluate=0.0)
    grid = InProcessGrid(lightning_client_app(Line, Few, local_steps=2, trainer=CPU), 2)
    strategy.start(grid, to_record(Line().state_dict()), 1)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {"no_examples": 1}


def test_local_keys_are_several_and_states_are_tensors() -> None:
    with pytest.raises(TypeError, match=r"local_keys.*head\.\*"):
        lightning_client_app(Line, Points, local_steps=1, local_keys="head.*")
    with pytest.raises(TypeError, match=r"local_keys.*head\.\*"):
        shared_state(Line(), "head.*")
    more = type("More", (Line,), {"get_extra_state": lambda self: {"a": 1}})
    with pytest.raises(TypeError, match="_extra_state"):
        shared_state(more())


def test_flowers_own_fedavg_takes_the_same_clients() -> None:
    grid = InProcessGrid(lightning_client_app(Line, Points, local_epochs=1, trainer=CPU), 2)
    theirs = tensors_of(FedAvg(fraction_evaluate=0.0).start(grid, to_record(Line().state_dict()), 2).arrays)
    ours, _, _ = federation(rounds=2)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].float(), tensor)


def test_flowers_local_privacy_goes_around_training() -> None:
    from flwr.clientapp.mod import LocalDpMod

    strategy = FedMom(momentum=0.0, fraction_evaluate=0.0)
    noised, _, _ = federation(strategy, mods=[LocalDpMod(0.1, 0.1, 10.0, 1e-5)])
    assert strategy.collected is not None
    assert not strategy.collected.refused
    assert not equal(noised, federation()[0])


def test_the_server_app_runs_the_federation_and_validates() -> None:
    from flwr.app import Context, RecordDict

    results = []
    app = lightning_server_app(
        Line, lambda context: FedMom(momentum=0.5), 3, datamodule_factory=lambda: Points(0, 1), on_end=results.append,
        trainer=CPU,
    )  # fmt: skip
    grid = InProcessGrid(lightning_client_app(Line, Points, local_epochs=1, trainer=CPU), 2)
    app(grid, Context(1, 0, {}, RecordDict(), {"num-server-rounds": 2}))
    (result,) = results
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2]
    losses = [record["server/val/loss"] for record in result.evaluate_metrics_serverapp.values()]
    assert losses[2] < losses[0]
    assert "val/loss/worst_10" in result.evaluate_metrics_clientapp[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "local_steps.*local_epochs"),
        ({"local_steps": 1, "local_epochs": 1}, "local_steps.*local_epochs"),
        ({"local_steps": 0}, "at least 1.*0"),
        ({"local_steps": 1.5}, "whole.*1.5"),
        ({"local_epochs": "1"}, "whole.*'1'"),
        ({"local_epochs": 1, "prox": -1.0}, "prox.*-1"),
        ({"local_epochs": 1, "optimizer_state": "some"}, "optimizer_state.*some"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lightning_client_app(Line, Points, **options)
