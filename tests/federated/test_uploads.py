from __future__ import annotations

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.clientapp import ClientApp

from lightning_distopt.compressors import TopK
from lightning_distopt.federated import FedMom, InProcessGrid, lightning_client_app
from lightning_distopt.federated.client import shared_state
from lightning_distopt.federated.records import read_update, tensors_of, to_record
from tests.federated.lightning_toy import CPU, Line, Points


def federation(compressor: str | None, rounds: int, spy=None, **options):
    app = lightning_client_app(Line, Points, local_epochs=1, trainer=CPU)
    if spy is not None:
        app = spy(app)
    grid = InProcessGrid(app, 2)
    strategy = FedMom(compressor=compressor, fraction_evaluate=0.0, **options)
    result = strategy.start(grid, to_record(shared_state(Line())), rounds)
    return tensors_of(result.arrays), strategy, grid


class Spied(ClientApp):
    """Keeps what a client got, and what it sent."""

    def __init__(self, app: ClientApp) -> None:
        self.app, self.turns = app, []

    def __call__(self, message: Message, context) -> Message:
        reply = self.app(message, context)
        if message.metadata.message_type == "train":
            sent = tensors_of(message.content["arrays"])
            update = read_update(reply, sent, int(message.content["config"]["server-round"]), TopK(0.25), set(sent))
            self.turns.append((message.metadata.dst_node_id, sent, update.displacement))
        return reply


def test_all_that_was_sent_and_the_residual_are_all_that_was_learnt() -> None:
    spies: list[Spied] = []
    _, _, grid = federation("topk:0.25", 4, lambda app: spies.append(Spied(app)) or spies[0], momentum=0.0)
    for node in (1, 2):
        mine = [(sent, displacement) for who, sent, displacement in spies[0].turns if who == node]
        residual = tensors_of(grid.contexts[node].state["residual"])
        learnt = _trained_again(node - 1, [sent for sent, _ in mine])
        for name in residual:
            total = sum(displacement[name] for _, displacement in mine) + residual[name]
            torch.testing.assert_close(total, learnt[name], rtol=1e-4, atol=1e-5)


def _trained_again(client: int, models: list[dict]) -> dict[str, torch.Tensor]:
    """Sum of ``w - y`` of a client that gets the same models, round by round, and sends everything."""
    app = lightning_client_app(Line, Points, local_epochs=1, trainer=CPU)
    grid, total = InProcessGrid(app, 2), {}
    for server_round, model in enumerate(models, start=1):
        strategy = FedMom(momentum=0.0, fraction_evaluate=0.0)
        messages = list(strategy.configure_train(server_round, to_record(model), _config(), grid))
        reply = grid.answer(messages[client])
        update = read_update(reply, model, server_round)
        for name, displacement in update.displacement.items():
            total[name] = total.get(name, 0) + displacement
    return total


def _config():
    from flwr.app import ConfigRecord

    return ConfigRecord()


@pytest.mark.parametrize("compressor", ["fp32", "bf16"])
def test_dense_uploads_train_what_plain_ones_train(compressor: str) -> None:
    packed, _, _ = federation(compressor, 2)
    plain, _, _ = federation(None, 2)
    tolerance = 1e-5 if compressor == "fp32" else 0.05
    for name in plain:
        torch.testing.assert_close(packed[name], plain[name], rtol=0, atol=tolerance)


def test_quantised_uploads_are_taken_and_leave_no_residual() -> None:
    arrays, strategy, grid = federation("qsgd:9", 2)
    assert strategy.collected is not None
    assert not strategy.collected.refused
    assert "residual" not in grid.contexts[1].state
    assert not torch.equal(arrays["body.weight"], Line().state_dict()["body.weight"])


def test_a_flipped_bit_is_noticed() -> None:
    class Flipping(ClientApp):
        def __init__(self, app: ClientApp) -> None:
            self.app = app

        def __call__(self, message: Message, context) -> Message:
            reply = self.app(message, context)
            if message.metadata.message_type == "train" and context.node_id == 2:
                array = reply.content["arrays"]["body.weight"]
                data = bytearray(array.data)
                data[-1] ^= 1
                array.data = bytes(data)
            return reply

    _, strategy, _ = federation("topk:0.25", 1, Flipping)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {"malformed": 1}


def test_one_percent_of_a_large_layer_is_a_fiftieth_of_the_bytes() -> None:
    from lightning_distopt.federated.records import array_of_payload

    layer = torch.randn(400, 250)
    plain = len(to_record({"w": layer})["w"].data)
    packed = len(array_of_payload(TopK(0.01), layer.clone(), 0).data)
    assert packed < plain / 45
