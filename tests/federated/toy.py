"""Clients of one line each: what they return is a function of what they got, so that every round can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from lightning_distopt.federated.records import tensors_of, to_record

Turn = Callable[[int, int, dict[str, Tensor]], "Mapping[str, Tensor] | RecordDict | None"]


def start(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype),
        "norm.running_mean": torch.randn(4, generator=generator, dtype=torch.float64).to(dtype),
        "norm.running_var": torch.rand(4, generator=generator, dtype=torch.float64).to(dtype),
        "norm.num_batches_tracked": torch.tensor(3),
    }


def towards(client: int, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half of the way to the client's own point; one more batch seen for each client number."""
    return {
        name: (tensor + (client - tensor) / 2).to(tensor.dtype) if tensor.is_floating_point() else tensor + client
        for name, tensor in arrays.items()
    }


def content(arrays: ArrayRecord, examples: float, server_round: int, **metrics: float) -> RecordDict:
    told = MetricRecord({"num-examples": examples, "base-round": server_round, **metrics})
    return RecordDict({"arrays": arrays, "metrics": told})


def toy_app(
    turn: Turn | None = None, examples: Callable[[int], float] = lambda client: 10.0 * (client + 1)
) -> ClientApp:
    """Clients 0, 1, ... with ``10 (client + 1)`` examples; ``turn(client, round, arrays)`` says what one returns."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        arrays = tensors_of(message.content["arrays"])
        answer = towards(client, arrays) if turn is None else turn(client, server_round, arrays)
        if answer is None:
            answer = towards(client, arrays)
        if not isinstance(answer, RecordDict):
            answer = content(to_record(answer), examples(client), server_round, loss=float(client))
        return Message(answer, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        told = MetricRecord(
            {"num-examples": 5, "base-round": server_round, "val/accuracy": client / 10 + server_round / 100}
        )
        return Message(RecordDict({"metrics": told}), reply_to=message)

    return app


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
