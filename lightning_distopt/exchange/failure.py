"""A backend's exception becomes one error that says which rank was doing what, with whom, in which step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from lightning_distopt.errors import DistoptError, ExchangeError
from lightning_distopt.exchange import roll_call

__all__ = ["ask_around", "network_failures"]

_PLACE = re.compile(r"^\[[^\]]*:\d+\] *")
# Gloo: "Connection closed by peer [127.0.0.1]:4242", "Read error [::1]:4242: Connection reset"; NCCL: a rank, or nobody.
_PEER = re.compile(r"(\[[\w.:%]+\]:\d+)|(?:rank|peer)[ =:]+(\d+)")


@contextmanager
def network_failures(
    rank: int, step: int, bucket: Sequence[str] = (), doing: str = "exchange", *, only: bool = True
) -> Iterator[None]:
    """Raise an ``ExchangeError`` for what a collective inside raises; errors of this package pass.

    Backends end a collective within the process group's time-out, so nothing waits for ever.

    Args:
        rank: of this process.
        step: number of the exchange.
        bucket: names of the parameters that travel.
        doing: a verb, for the message.
        only: nothing but collectives runs inside; else an error is theirs only if it says so.

    Raises:
        ExchangeError: see above.
    """
    roll_call.now_at(step, doing, waiting=only)
    try:
        yield
        roll_call.now_at(step, f"what follows `{doing}`")
    except DistoptError:
        raise
    except RuntimeError as error:  # Gloo's own; NCCL's DistBackendError is one, too
        if not only and not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        # Its first sentence, without the place in the backend's source; the whole is the error's cause.
        reason = _PLACE.sub("", " ".join(str(error).split())).split(". ")[0].rstrip(".") or type(error).__name__
        found = _PEER.search(reason)
        peer = next((part for part in found.groups() if part), None) if found else None
        what = doing
        if bucket:
            more = f" and {len(bucket) - 1} more" if len(bucket) > 1 else ""
            what = f"{doing} the bucket of `{bucket[0]}`{more}"
        culprits, advice = ask_around()
        message = (
            f"In step {step} rank {rank} could not {what} with {f'peer {peer}' if peer else 'the other ranks'}: {reason}. "
            f"{advice}"
        )
        raise ExchangeError(message, rank, step, tuple(bucket), peer, culprits) from error


def ask_around() -> tuple[tuple[int, ...], str]:
    """Call the roll when an exchange has failed, and let the others know what came of it.

    Returns:
        The ranks to blame, as far as it can tell, and a sentence of what was found and what to do.
    """
    roll = roll_call.called()
    advice = "Look for the rank that stopped first, or, if one is only slow, pass a longer `timeout` to the strategy."
    advice = f"{roll.text} {advice}" if roll.text and not roll.culprits else roll.text or advice
    named = f" [culprits {' '.join(map(str, roll.culprits))}]" if roll.culprits else ""
    roll_call.leave_last_words(f"ExchangeError{named} {roll.text}")
    return roll.culprits, advice
