"""One method for a fit: the fastest that keeps the accuracy, or 16 bit where nothing gains enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from lightning_distopt.advice.candidates import CANDIDATES, Candidate
from lightning_distopt.advice.cost_model import CodecSpeed, Link, Prediction, Workload, rank_methods
from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel.exchanges import ExchangeName

__all__ = ["MARGIN", "Decision", "choose", "decide"]

MARGIN = 0.1
"""What a method must gain over 16 bit, so that a prediction that errs a little does not cost time."""


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why; it goes into checkpoints.

    Args:
        name: of the candidate.
        compressor: text form.
        error_feedback: "gradient" or "none".
        exchange: how its payloads are averaged.
        world: ranks that it was made for.
        seconds: predicted, of a step.
        baseline_seconds: of a step in 16 bit: predicted or measured, the smaller one.
        report: what was said about it, some lines.
    """

    name: str
    compressor: str
    error_feedback: str
    exchange: str
    world: int
    seconds: float
    baseline_seconds: float
    report: str

    @property
    def residual(self) -> bool:
        """Whether gradients are compressed with error feedback."""
        return self.error_feedback == "gradient"

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and strings."""
        return asdict(self)

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> Decision:
        """Return the decision whose :meth:`state_dict` this is.

        Raises:
            ValueError: if it is that of no decision, as a file may hold.
        """
        kinds = {"world": int, "seconds": float, "baseline_seconds": float}
        names = [field.name for field in fields(cls)]
        if set(values) != set(names) or any(type(values[n]) is not kinds.get(n, str) for n in names):
            raise ValueError(f"it is no decision of `compressed_ddp_auto`: {str(dict(values))[:100]}")
        choice = cls(**values)
        if choice.error_feedback not in ("gradient", "none") or choice.exchange not in get_args(ExchangeName):
            raise ValueError(f"no gradients travel by {choice.error_feedback[:60]!r} and {choice.exchange[:60]!r}")
        parse(choice.compressor)
        return choice


def choose(
    predictions: Sequence[Prediction],
    baseline: Prediction,
    margin: float = MARGIN,
    measured: float | None = None,
    *,
    on: Sequence[str] = ("gradients", "updates"),
    residuals: bool = True,
) -> Prediction:
    """Return the fastest safe method, or ``baseline`` unless another is faster by ``margin``.

    Args:
        predictions: of all methods.
        baseline: what a choice is measured by.
        margin: share of the baseline's time.
        measured: seconds of a step with the baseline; where the model thinks worse of it, this counts.
        on: the paths that can be taken.
        residuals: whether gradients may be compressed with error feedback.
    """
    allowed = [p for p in predictions if p.candidate.safe and p.candidate.path in on]
    allowed = [p for p in allowed if residuals or not p.candidate.residual]
    fastest = min(allowed, key=lambda p: p.seconds, default=baseline)
    limit = min(baseline.seconds, measured or baseline.seconds)
    return fastest if fastest.seconds < (1 - margin) * limit else baseline


def decide(
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
    *,
    baseline: str = "bf16",
    measured: float | None = None,
    margin: float = MARGIN,
    residuals: bool = True,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> Decision:
    """Choose what gradients are compressed with; the same answer for the same figures.

    Args:
        work: the model's part.
        link: the network.
        codecs: by the candidate's name; candidates without are left out.
        world: number of ranks.
        baseline: the text of the 16-bit method, see :data:`~lightning_distopt.advice.candidates.BASELINES`.
        measured: seconds of a step with it.
        margin: what another method must gain.
        residuals: whether error feedback fits the training loop.
        candidates: to choose from.
    """
    known = [candidate for candidate in candidates if candidate.name in codecs]
    ranked = rank_methods(work, link, codecs, world, known)
    base = next(p for p in ranked if p.candidate.text == baseline and p.candidate.path == "gradients")
    chosen = choose(ranked, base, margin, measured, on=("gradients",), residuals=residuals)
    limit = min(base.seconds, measured or base.seconds)
    return Decision(
        chosen.candidate.name,
        chosen.candidate.text,
        chosen.candidate.error_feedback,
        chosen.exchange,
        world,
        chosen.seconds,
        limit,
        _report(ranked, base, chosen, work, link, world, measured, margin, residuals),
    )


def _report(
    ranked: Sequence[Prediction],
    base: Prediction,
    chosen: Prediction,
    work: Workload,
    link: Link,
    world: int,
    measured: float | None,
    margin: float,
    residuals: bool,
) -> str:
    """Say what was measured, what the fastest methods would take, and what decided."""
    limit = min(base.seconds, measured or base.seconds)
    lines = [
        f"{world} ranks, {8e-6 * link.bandwidth:.4g} Mbit/s, {1e3 * link.latency:.3g} ms latency, {work.numel / 1e6:.3g} M "
        f"parameters, {1e3 * work.compute:.4g} ms a step without communication; ms a step:"
    ]
    inside = [p for p in ranked if p.candidate.path == "gradients"]
    for p in dict.fromkeys([*inside[:3], chosen, base]):
        note = "" if p.candidate.safe else f"; not chosen by itself: {p.candidate.evidence}"
        if p is base and measured is not None:
            note += f"; measured {1e3 * measured:.1f}"
        lines.append(f"  {p.candidate.name:<20} {1e3 * p.seconds:8.1f}  ({1e-6 * p.nbytes:.3g} MB sent{note})")
    if chosen is base:
        lines.append(
            f"{base.candidate.name} stays: no method that keeps the accuracy is predicted to be faster by {100 * margin:.0f} %."
        )
    else:
        gain = 100 * (1 - chosen.seconds / limit)
        lines.append(
            f"{chosen.candidate.name} from the next step on: {gain:.0f} % faster than {base.candidate.name}; "
            f"{chosen.candidate.evidence}."
        )
    if not residuals:
        lines.append("Error feedback was left out: several optimizers may zero gradients that were averaged.")
    others = [p for p in ranked if p.candidate.safe and p.candidate.path == "updates"]
    if others and others[0].seconds < chosen.seconds:
        p = others[0]
        lines.append(
            f"{p.candidate.name} (updates instead of gradients) would take {1e3 * p.seconds:.1f} ms, "
            f"{100 * (1 - p.seconds / chosen.seconds):.0f} % less still; a fit cannot change to it, so start one with "
            f"`{p.candidate.arguments_with(p.exchange, world)}`."
        )
    return "\n".join(lines)
