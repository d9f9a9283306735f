"""What a rank tells the others of itself while it trains, and how it ends when they cannot go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_distopt.errors import DistoptError, ExchangeError, PipelineError
from lightning_distopt.exchange import network_failures, roll_call
from lightning_distopt.strategies.compat import default_store, note_sigterm

__all__ = ["Watch", "Watched", "watched"]


class Watched(Protocol):
    """What is asked of a strategy."""

    @property
    def global_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_ending(self) -> bool: ...
    @property
    def lightning_module(self) -> pl.LightningModule | None: ...
    @property
    def launcher(self) -> Any: ...


class Watch:
    """Keeps the roll-call of one strategy object, and knows when a step was torn.

    Attributes:
        torn: an exchange failed in the middle of a step, so ranks may hold different models: nothing is saved any more.
    """

    def __init__(self, strategy: Watched) -> None:
        self._strategy = strategy
        self._roll_call: roll_call.RollCall | None = None
        self._theirs: Any = None
        self.torn = False

    def begin(self) -> None:
        """Begin to beat, in a fit of several ranks."""
        self.end()
        self.torn = False
        strategy = self._strategy
        if strategy.world_size > 1 and dist.is_initialized():
            # Under torchrun an agent keeps the store, which outlives the ranks; else rank 0 does.
            keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
            self._roll_call = roll_call.RollCall(default_store(), strategy.global_rank, strategy.world_size, keeper)
            self._roll_call.start()
            roll_call.use(self._roll_call)

    def end(self) -> None:
        """Beat no more."""
        if self._roll_call is not None:
            roll_call.use(None)
            self._roll_call.stop()
            self._roll_call = None
        if self._theirs is not None and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                signal.signal(signal.SIGTERM, self._theirs)
            self._theirs = None

    @contextmanager
    def step(self, number: int, doing: str) -> Iterator[None]:
        """Say where this rank is, remember that an exchange failed, and leave last words for an error of the user's."""
        roll_call.now_at(number, doing)
        try:
            yield
        except (ExchangeError, PipelineError):
            self.torn = True
            raise
        except DistoptError:
            raise
        except Exception as error:
            roll_call.leave_last_words(_words(error))
            raise

    def guard_signals(self) -> None:
        """Let SIGTERM not disturb a rank that is finding out why a collective failed.

        A launcher that sees a rank fail sends SIGTERM to the others, and Lightning's handler, which is there when training
        starts, broadcasts: over the network that has just failed, or in the middle of another collective, where Gloo aborts.
        """
        if self._roll_call is None or threading.current_thread() is not threading.main_thread():
            return
        theirs = signal.getsignal(signal.SIGTERM)
        if callable(theirs):
            self._theirs = theirs
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        strategy = self._strategy
        if self.torn or strategy.is_ending or roll_call.is_calling():
            return  # it ends anyway, and has something to say before
        assert strategy.lightning_module is not None
        trainer = strategy.lightning_module.trainer
        if not trainer.received_sigterm and strategy.launcher is not None:
            strategy.launcher.kill(number)
        note_sigterm(trainer)
        for handler in getattr(self._theirs, "signal_handlers", [])[1:]:  # those of the user; the first is Lightning's
            if callable(handler):
                handler(number, frame)


def watched(method: Callable[..., Any], waiting: bool = False) -> Callable[..., Any]:
    """Wrap what Lightning calls of a :class:`ProcessGroupStrategy`, so that a failure inside says who caused it.

    What the backend raises becomes an ``ExchangeError``; others hear of an error of the user's.

    Args:
        method: of the strategy.
        waiting: it does nothing but talk to the other ranks.
    """
    name = method.__name__

    @wraps(method)
    def run(strategy: Any, *args: Any, **kwargs: Any) -> Any:
        step = strategy.round
        with (
            strategy.watch.step(step, name),
            network_failures(strategy.global_rank, step, doing=f"end `{name}`", only=False),
            roll_call.during(name, waiting),
        ):
            return method(strategy, *args, **kwargs)

    return run


def _words(error: BaseException) -> str:
    """Name what was raised first: torch's schedules of pipelines raise an error of their own from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
