"""The recipe's federation with clients that misbehave as their node config says.

``fault="liar"`` sends garbage in round 1, NaN in round 2, a thousand-fold update in round 3. ``fault="hangs"`` says in ``marker``
that it has begun, and never ends; where there is no marker it fails.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from lightning_distopt.federated.records import tensors_of, to_record
from recipes.federated.app import digits_federation as digits

client_app = ClientApp()
server_app = digits.server_app


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Answer as the recipe does."""
    return digits.client_app(message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Answer as the recipe does, and spoil it."""
    fault = context.node_config.get("fault")
    if fault == "hangs":
        if "marker" not in context.node_config:
            raise RuntimeError("This client was killed.")
        Path(str(context.node_config["marker"])).touch()
        time.sleep(3600)
    reply = digits.client_app(message, context)
    if fault == "liar":
        server_round = int(message.content["config"]["server-round"])
        sent, arrays = tensors_of(message.content["arrays"]), reply.content["arrays"]
        name = next(iter(sent))
        if server_round == 1:
            arrays[name] = Array("float32", tuple(sent[name].shape), "numpy.ndarray", b"\x00garbage" * 2000)
        elif server_round == 2:
            arrays[name] = to_record({name: torch.full_like(sent[name], float("nan"))})[name]
        elif server_round == 3:
            for key, tensor in tensors_of(arrays).items():
                arrays[key] = to_record({key: sent[key] + 1000 * (tensor - sent[key])})[key]
    return reply
