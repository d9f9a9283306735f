"""Talking to clients through Flower's grid: wait for them, learn their names, take their replies one at a time.

    asked:    a  b  c  d              in the order of their names, whoever is faster
    pulled:   a, then b, then c ...   what is not pulled yet waits in the SuperLink, not here

So the server's memory holds one reply, and sums do not depend on who was faster. At the deadline what has arrived is taken
and the rest is dropped, if enough have answered; else it waits on for the minimum.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

__all__ = ["Deadline", "ask_names", "replies_of", "sorted_by_name", "wait_for_nodes"]

_log = getLogger(__name__)
NAME_RECORD, NAME_KEY = "client", "name"
_QUERY_SECONDS = 180.0  # a client's process may have to start first


@dataclass(frozen=True)
class Deadline:
    """How long a round waits for its clients.

    Args:
        seconds: after which the round is closed if ``min_replies`` can be used, above 0; ``None``: wait for all.
        min_replies: usable replies without which a round changes nothing, at least 1.
        timeout: seconds after which the round is closed in any case, at least ``seconds``.

    Raises:
        ValueError: if a number is out of range.
    """

    seconds: float | None = None
    min_replies: int = 1
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.min_replies < 1:
            raise ValueError(f"`min_replies` must be at least 1: got {self.min_replies}.")
        if not self.timeout > 0 or (self.seconds is not None and not 0 < self.seconds <= self.timeout):
            raise ValueError(
                f"`seconds` must be above 0 and at most `timeout`: got {self.seconds} and {self.timeout}. Raise `timeout`."
            )


def replies_of(
    grid: Grid, messages: Iterable[Message], deadline: Deadline, usable: Callable[[], int], pause: float = 0.02
) -> Iterator[Message]:
    """Send messages and yield the replies, in the order of the messages until the deadline.

    Args:
        grid: Flower's.
        messages: to send, in the order in which replies are wanted.
        deadline: when to stop waiting.
        usable: replies that could be used so far.
        pause: seconds between two questions at first; doubled while nothing comes, up to half a second.
    """
    waiting = list(grid.push_messages(messages))
    begun, nap = time.monotonic(), pause
    while waiting:
        passed = time.monotonic() - begun
        over = passed >= deadline.timeout
        late = over or (deadline.seconds is not None and passed >= deadline.seconds)
        before = len(waiting)
        for sent in list(waiting) if late else waiting[:1]:
            for reply in grid.pull_messages([sent]):
                waiting.remove(sent)
                yield reply
        if late and (over or usable() >= deadline.min_replies):
            return
        if len(waiting) < before:
            nap = pause
        else:
            time.sleep(nap)
            nap = min(2 * nap, 0.5)


def wait_for_nodes(grid: Grid, needed: int) -> list[int]:
    """Return the ids of the connected clients, once ``needed`` are there."""
    told = 0.0
    while len(nodes := list(grid.get_node_ids())) < needed:
        if time.monotonic() - told > 10:
            told = time.monotonic()
            _log.warning("Waiting for clients: %d are connected, %d are needed.", len(nodes), needed)
        time.sleep(0.1)
    return nodes


def ask_names(grid: Grid, nodes: Sequence[int]) -> dict[int, str]:
    """Return what clients call themselves, which is the same after a restart where Flower's ids are not.

    A client that has no name, or one that another has, is left out; so its id stands for it.
    """
    messages = [
        Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node, group_id="names")
        for node in nodes
    ]
    names: dict[int, str] = {}
    for reply in replies_of(grid, messages, Deadline(_QUERY_SECONDS, len(nodes), _QUERY_SECONDS), lambda: len(names)):
        if not reply.has_error():
            record = reply.content.config_records.get(NAME_RECORD)
            name = None if record is None else record.get(NAME_KEY)
            if isinstance(name, str) and len(name) <= 200:
                names[reply.metadata.src_node_id] = name
    counts = list(names.values())
    return {node: name for node, name in names.items() if counts.count(name) == 1}


def sorted_by_name(nodes: Iterable[int], names: dict[int, str]) -> list[int]:
    """Return nodes in the order of their names, numbers in them by value; those without a name last, by id."""

    def place(node: int) -> tuple[bool, list[tuple[int, int, str]], int]:
        pieces = re.split(r"(\d+)", names.get(node, ""))
        return node not in names, [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in pieces], node

    return sorted(nodes, key=place)
