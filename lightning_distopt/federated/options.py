"""What may go together in a :class:`FedMom`: checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    MultiKrum,
    QFedAvg,
)
from torch import Tensor

from lightning_distopt.compressors import Compressor, parse
from lightning_distopt.data_parallel.outer_optimizer import is_number
from lightning_distopt.federated.privacy import Privacy

__all__ = [
    "Weighting",
    "check_aggregator",
    "check_arrays",
    "check_fractions",
    "check_step",
    "replies_needed",
    "share",
    "upload_compressor",
    "weighting_of",
]

Weighting = Literal["normalized", "paper", "uniform"]


def check_step(lr: float | Callable[[int], float], momentum: float, seed: int) -> None:
    """Raise a ``ValueError`` unless the server step is one, and the seed fits into Flower's messages."""
    if not callable(lr) and not (is_number(lr) and 0 < lr < math.inf):
        raise ValueError(f"`lr` must be a finite number above 0, or a function of the round: got {lr!r}. Use 1.0.")
    if not (is_number(momentum) and 0 <= momentum < 1):
        raise ValueError(f"`momentum` must be in [0, 1): got {momentum!r}. 0.9 is common, 0 is FedAvg.")
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"`seed` must be a whole number of 64 bits with sign: got {seed!r}. Use for example 0.")


def check_arrays(arrays: Mapping[str, Tensor]) -> None:
    """Raise a ``TypeError`` for a model that cannot be averaged."""
    odd = sorted(name for name, tensor in arrays.items() if tensor.is_complex())
    if odd:
        raise TypeError(
            f"Arrays must be real numbers, integers or booleans: {len(odd)} are complex, such as {odd[:3]}. Keep real and "
            "imaginary parts (`torch.view_as_real`)."
        )


def check_fractions(train: float, evaluate: float, privacy: Privacy | None) -> None:
    """Raise a ``ValueError`` unless the shares of clients are shares, and somebody trains under privacy."""
    if not (0 <= train <= 1 and 0 <= evaluate <= 1):
        raise ValueError(f"`fraction_train` and `fraction_evaluate` must be in [0, 1]: got {train} and {evaluate}.")
    if privacy is not None and train == 0:
        raise ValueError(
            f"`fraction_train` must be above 0 with `privacy`: got {train}. It is the rate that is counted."
        )


def weighting_of(
    weighting: Weighting | None, total_examples: float | None, privacy: Privacy | None, aggregator: FedAvg | None
) -> Weighting:
    """Return the weighting to use.

    Raises:
        ValueError: if it does not go with the other options.
    """
    if weighting not in (None, "normalized", "paper", "uniform"):
        raise ValueError(f"`weighting` must be 'normalized', 'paper' or 'uniform': got {weighting!r}.")
    if privacy is not None and aggregator is not None:
        raise ValueError(
            f"`privacy` and `aggregator={type(aggregator).__name__}` exclude each other: how far one client can move the "
            "result of a robust rule is not known, so no noise covers it. Leave one out."
        )
    if (weighting == "paper") != (total_examples is not None):
        raise ValueError(
            f"`total_examples` belongs to `weighting='paper'`: got {total_examples} and {weighting!r}. Give both or none."
        )
    if total_examples is not None and not total_examples > 0:
        raise ValueError(f"`total_examples` must be above 0: got {total_examples}.")
    if privacy is None and aggregator is None:
        return weighting or "normalized"
    if weighting not in (None, "uniform"):
        why = (
            "with others one client moves the mean further than the noise of `privacy` covers"
            if privacy is not None
            else "a client that lies about its examples would buy influence over `aggregator`"
        )
        raise ValueError(f"`weighting` must be 'uniform' here: {why}. Got {weighting!r}; leave it out.")
    return "uniform"


def check_aggregator(aggregator: object) -> None:
    """Raise a ``TypeError`` unless it only combines updates."""
    if aggregator is None:
        return
    if not isinstance(aggregator, FedAvg):
        raise TypeError(
            f"`aggregator` must be a strategy of Flower, such as `FedMedian()`: got {type(aggregator).__name__}."
        )
    own = type(aggregator).__module__.startswith("lightning_distopt.")
    if own or isinstance(aggregator, (FedAvgM, FedAdagrad, FedAdam, FedYogi, QFedAvg)):
        raise TypeError(
            f"`aggregator` must only combine: {type(aggregator).__name__} takes a server step of its own, and momentum would "
            "come twice. Use `FedMedian()`, `FedTrimmedAvg(...)`, `Krum(...)`, `MultiKrum(...)` or `Bulyan(...)`."
        )


def upload_compressor(text: str | None) -> Compressor | None:
    """Return the compressor that a text names.

    Raises:
        ValueError: if it names none, or one that needs several rounds between ranks.
    """
    if text is None:
        return None
    compressor = parse(text)
    if not isinstance(compressor, Compressor):
        raise ValueError(
            f"`compressor` must turn a tensor into bytes by itself: got {text!r}. Use for example 'topk:0.01'."
        )
    return compressor


def replies_needed(aggregator: FedAvg | None) -> int:
    """Return the replies that a robust rule needs for its promise: Krum 2f + 3, Bulyan 4f + 3."""
    bad = int(getattr(aggregator, "num_malicious_nodes", 0))
    if isinstance(aggregator, Bulyan):
        return 4 * bad + 3
    return 2 * bad + 3 if isinstance(aggregator, MultiKrum) else 1


def share(fraction: float, clients: int) -> int:
    """Return ``ceil(fraction * clients)``, at least 1; 0.1 * 30 is 3."""
    return max(1, math.ceil(round(fraction * clients, 9)))
