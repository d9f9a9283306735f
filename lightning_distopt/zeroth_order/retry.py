"""What happens when a query fails: how often it is asked again, and after which pause."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_distopt.errors import QueryError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True)
class RetryPolicy:
    """Ask again after a failure (an ``OSError``, as connection errors and time-outs are), then give up with a ``QueryError``.

    Only an answered query counts. A query that was given up leaves parameters and state as they were before the step,
    which may then be repeated.

    Args:
        attempts: how often a query is asked at most, at least 1.
        wait: seconds before the second attempt, at least 0.
        factor: by which the pause grows from attempt to attempt, at least 1.
        errors: exceptions that are failures of a query; all others pass through at once. Name those of your client here, for
            example ``(OSError, httpx.HTTPError)``.
    """

    attempts: int = 1
    wait: float = 1.0
    factor: float = 2.0
    errors: tuple[type[Exception], ...] = (OSError,)

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"`attempts` must be an integer >= 1: got {self.attempts!r}. Write `attempts=3`.")
        if not self.wait >= 0:
            raise ValueError(f"`wait` must be seconds >= 0: got {self.wait!r}. Write `wait=1.0`.")
        if not self.factor >= 1:
            raise ValueError(f"`factor` must be >= 1: got {self.factor!r}. Write `factor=2.0`.")

    def answer(self, query: Callable[[], Any], samples: int) -> Any:
        """Return what the query returns.

        Raises:
            QueryError: if the last attempt failed, too.
        """
        pause = self.wait
        for attempt in range(1, self.attempts + 1):
            try:
                return query()
            except self.errors as error:
                if attempt == self.attempts:
                    raise QueryError(
                        f"A query of {samples} samples failed {attempt} times, at last with {type(error).__name__}: {error}. "
                        "It was not counted, and parameters and state are those before the step: mend the connection and "
                        "call `step` again, or allow more attempts with `retry=RetryPolicy(attempts=...)`."
                    ) from error
                time.sleep(pause)
                pause *= self.factor
        raise AssertionError  # the loop returns or raises
