"""A federation inside one process: Flower's grid without a network, for tests and for studies on few cores.

The client app is called with the same messages as in a simulation, one client after the other, in the order in which they
are asked. Replies are taken through the same serialisation of arrays; contexts are kept from message to message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lightning_distopt.federated.compat import identify_process, label

__all__ = ["InProcessGrid"]

_RAISED = 2  # Flower's code for a client app that has raised


class InProcessGrid(Grid):
    """Clients of one app, in this process.

    Args:
        app: of all clients.
        clients: how many.
        run_config: seen by all of them.

    Attributes:
        contexts: of each client, by node id (from 1).
    """

    def __init__(self, app: ClientApp, clients: int, run_config: dict[str, Any] | None = None) -> None:
        if clients < 1:
            raise ValueError(f"`clients` must be at least 1: got {clients}.")
        identify_process()
        self.app = app
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in range(1, clients + 1)
        }
        self._pending: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> NoReturn:
        """There is no record of it."""
        raise AttributeError("A federation in one process has no record of its run.")

    def create_message(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Messages are made by their class."""
        raise TypeError("Use `flwr.app.Message(...)`.")

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            self._sent += 1
            label(message, str(self._sent))
            self._pending[str(self._sent)] = message
            pushed.append(str(self._sent))
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the clients answer; one whose app raises answers with the error."""
        return [self.answer(self._pending.pop(at)) for at in message_ids if at in self._pending]

    def answer(self, message: Message) -> Message:
        """Return one client's answer."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # what a client does is its own affair
            return Message(Error(_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))
