"""Who has stopped? Every rank says now and then that it lives and where it is; whoever sees a failure calls the roll.

A collective fails on a rank that is well, and names a neighbour in a ring or nobody. So a thread of every rank writes a
note into the store of the process group, a few times in a second:

    beat/2   "17;3;0;training_step"    the 17th beat; in step 3, not in a collective
    end/1    "MemoryError: ..."        last words of a rank that failed
    alarm    "1;MemoryError: ..."      the first of them, which every thread looks for: it is known also where the store
                                       is gone a moment later, with the rank that kept it

A rank whose beats do not go on is silent (killed, stopped, cut off); one that lives, but is in an earlier step or not in a
collective, is late. A thread does that, so that a store which is itself out of reach costs no one more than the patience.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_distopt.exchange.notes import Store, shared_store

__all__ = ["Roll", "RollCall", "called", "during", "is_calling", "leave_last_words", "now_at", "use", "waits"]

_PERIOD = 0.3  # seconds between beats
_LISTEN = 1.2  # seconds in which a rank that lives is heard, also on a busy machine
_ECHO = "ExchangeError"  # last words of a rank that failed because of another


@dataclass(frozen=True)
class Roll:
    """What a roll-call found.

    Args:
        culprits: ranks that caused the failure, as far as it can tell.
        text: a sentence about them.
    """

    culprits: tuple[int, ...] = ()
    text: str = ""


class RollCall:
    """The beats of this rank, and the roll of all.

    Args:
        store: of the process group.
        rank: of this process.
        world: number of ranks.
        keeper: rank whose process keeps the store; ``None`` if it is none of them (an agent of ``torchrun``).
    """

    def __init__(self, store: Store, rank: int, world: int, keeper: int | None = 0) -> None:
        self._store = shared_store(store, "lightning_distopt/roll")
        self._rank = rank
        self._world = world
        self._keeper = keeper
        self._place = (0, "setup", False)
        self._words = ""
        self._alarm = ""
        self._requests: queue.SimpleQueue[queue.SimpleQueue[Roll] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="distopt-roll-call", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; waits for the thread if the store answers."""
        self._requests.put(None)
        self._thread.join(timeout=1.0)

    def at(self, step: int, doing: str, waiting: bool) -> None:
        """Say where this rank is from now on, and whether that is a collective, where it waits for the others."""
        self._place = (step, doing, waiting)

    @property
    def place(self) -> tuple[int, str, bool]:
        """What :meth:`at` was told last."""
        return self._place

    def last_words(self, text: str) -> None:
        """Leave a note of why this rank ends; the first one counts."""
        if not self._words:
            self._words = " ".join(text.split())[:300]
            self._ask(0.3)  # the thread writes before it answers
            time.sleep(_PERIOD + 0.1)  # so that the others have heard it when this rank, and maybe the store, is gone

    def call(self) -> Roll:
        """Return who is silent, late, or has ended."""
        heard = self._alarmed()
        if heard is not None:
            return heard
        unreachable = "This rank cannot reach the store of the process group: its own link, or "
        unreachable += "the machine that keeps it" if self._keeper is None else f"rank {self._keeper}, which keeps it"
        roll = self._ask(_LISTEN + 0.3) or Roll(text=f"{unreachable}, is gone.")
        return roll if roll.culprits else self._alarmed() or roll

    def waits(self) -> bool:
        """Whether this rank is in a collective."""
        return self._place[2]

    def _ask(self, patience: float) -> Roll | None:
        answer: queue.SimpleQueue[Roll] = queue.SimpleQueue()
        self._requests.put(answer)
        try:
            return answer.get(timeout=patience) if self._thread.is_alive() else None
        except queue.Empty:
            return None

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beats = 0
        while True:
            answer: queue.SimpleQueue[Roll] | None = None
            try:
                answer = self._requests.get(timeout=_PERIOD)
                if answer is None:
                    return
            except queue.Empty:
                pass
            beats += 1
            try:
                self._beat(beats)
                if answer is not None:
                    answer.put(Roll() if self._words else self._listen(beats))
            except Exception as error:  # the store's client raises what it will
                if answer is not None:
                    answer.put(self._without_store(error))
                self._answer_from_now_on(error)
                return

    def _answer_from_now_on(self, error: Exception) -> None:
        while (answer := self._requests.get()) is not None:
            answer.put(self._without_store(error))

    def _without_store(self, error: Exception) -> Roll:
        if self._keeper is None or self._keeper == self._rank:
            return Roll(text=f"The store of the process group does not answer ({type(error).__name__}).")
        return Roll((self._keeper,), f"Rank {self._keeper}, which keeps the store of the process group, is gone.")

    def _beat(self, number: int) -> None:
        step, doing, waiting = self._place
        self._store.set(f"beat/{self._rank}", f"{number};{step};{int(waiting)};{doing}")
        if self._words:
            self._store.set(f"end/{self._rank}", self._words)
        if not self._alarm and self._store.check(["alarm"]):
            self._alarm = self._store.get("alarm").decode()
        if self._words and not self._alarm:
            self._alarm = f"{self._rank};{self._words}"
            self._store.set("alarm", self._alarm)

    def _alarmed(self) -> Roll | None:
        """What the first rank that failed had to say, if it was heard."""
        if not self._alarm:
            return None
        rank, text = self._alarm.split(";", 1)
        if not text.startswith(_ECHO):
            return Roll((int(rank),), f"Rank {rank} ended with {text}.")
        named = tuple(int(n) for n in text.partition("[culprits ")[2].partition("]")[0].split() if n.isdecimal())
        if named:
            return Roll(named, f"Rank {rank}, which noticed it first, said of {_ranks(list(named))}: {_why(text)}")
        return Roll(text=f"Rank {rank}, which noticed it first, did not know why.")

    def _listen(self, beats: int) -> Roll:
        others = [rank for rank in range(self._world) if rank != self._rank]
        first = {rank: self._heard(rank) for rank in others}
        alive: dict[int, str] = {}
        words: dict[int, str] = {}
        deadline = time.monotonic() + _LISTEN
        while time.monotonic() < deadline:
            time.sleep(0.1)
            beats += 1
            self._beat(beats)
            for rank in others:
                heard = self._heard(rank)
                if heard is not None and heard != first[rank]:
                    alive[rank] = heard
                if rank not in words and self._store.check([f"end/{rank}"]):
                    words[rank] = self._store.get(f"end/{rank}").decode()
            heard_of = self._alarmed()
            if heard_of is not None:
                return heard_of
            own = {rank: text for rank, text in words.items() if not text.startswith(_ECHO)}
            if own or len(alive.keys() | words.keys()) == len(others):
                break
        else:
            own = {}
        return self._verdict(others, alive, words, own)

    def _heard(self, rank: int) -> str | None:
        key = f"beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _verdict(self, others: list[int], alive: dict[int, str], words: dict[int, str], own: dict[int, str]) -> Roll:
        if own:
            return Roll(tuple(sorted(own)), " ".join(f"Rank {r} ended with {t}." for r, t in sorted(own.items())))
        silent = [rank for rank in others if rank not in alive and rank not in words]
        if silent:
            names = _ranks(silent)
            return Roll(tuple(silent), f"The roll-call found {names} silent: killed, stopped, or cut off.")
        mine = self._place[0]
        busy: dict[int, str] = {}
        behind: dict[int, str] = {}
        for rank, beat in alive.items():
            _, step, waiting, doing = beat.split(";", 3)
            if rank in words or int(step) > mine:
                continue
            if waiting == "0":
                busy[rank] = f"it is in `{doing}` of step {step}"
            elif int(step) < mine:
                behind[rank] = f"it is in step {step}"
        late = busy or behind  # who waits, in a pipeline, is held up by who does not
        if late:
            where = "; ".join(f"rank {rank} late, {place}" for rank, place in sorted(late.items()))
            return Roll(
                tuple(sorted(late)),
                f"The roll-call found all ranks alive, and {where}. If that is only slow, pass a longer `timeout` to the "
                "strategy.",
            )
        for text in words.values():  # what another found before us
            if "[culprits " in text:
                named = tuple(int(n) for n in text.split("[culprits ")[1].split("]")[0].split() if n.isdecimal())
                if named:
                    return Roll(
                        named, f"Another rank, which noticed it first, found that {_ranks(list(named))} failed."
                    )
        return Roll(text="The roll-call found all ranks alive: the network between them is broken, or too slow.")


def _why(words: str) -> str:
    return words.rpartition("] ")[2] or "no more."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


_current: RollCall | None = None
_calling = False


def use(roll_call: RollCall | None) -> None:
    """Let failures of this process's collectives be answered by this roll-call."""
    global _current, _calling
    _current, _calling = roll_call, False


def now_at(step: int, doing: str, waiting: bool = False) -> None:
    """Tell the roll-call, if there is one, where this rank is."""
    if _current is not None:
        _current.at(step, doing, waiting)


@contextmanager
def during(doing: str, waiting: bool) -> Iterator[None]:
    """Tell the roll-call what this rank does inside of its step: wait for another rank, or compute."""
    if _current is None:
        yield
        return
    step, before, waited = _current.place
    _current.at(step, doing, waiting)
    yield  # after an error it stays as it was: this is where the rank has failed
    _current.at(step, before, waited)


def called() -> Roll:
    """Call the roll; nothing is found without one."""
    global _calling
    if _current is None:
        return Roll()
    _calling = True  # and stays so: this rank is about to end
    return _current.call()


def is_calling() -> bool:
    """Whether this process is finding out, or has found out, why a collective failed."""
    return _calling


def waits() -> bool:
    """Whether this process is in a collective, as far as the roll-call knows."""
    return _current is not None and _current.waits()


def leave_last_words(text: str) -> None:
    """Tell the others why this rank ends."""
    if _current is not None:
        _current.last_words(text)
