"""The methods that are compared, as data: what travels, on which path, and what is known of its accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_distopt.compressors import Compressor, Specification, parse
from lightning_distopt.data_parallel.exchanges import choose_exchange

__all__ = ["BASELINES", "CANDIDATES", "Candidate", "Path"]

Path = Literal["gradients", "updates"]


@dataclass(frozen=True)
class Candidate:
    """One method.

    Args:
        name: shown in tables, unlike any other.
        text: the compressor, as :func:`lightning_distopt.compressors.parse` reads it.
        path: "gradients" are exchanged inside backward and overlap with it; "updates" after the optimizer's step, with
            error feedback.
        residual: gradients are compressed with error feedback; updates always are.
        safe: keeps the accuracy of ``ddp`` about within noise in this project's own studies, so that it may be chosen
            without asking. The others are shown only.
        evidence: why it is safe, or why not: a study of ``benchmarks/results/convergence.csv``, or what is missing.
    """

    name: str
    text: str
    path: Path
    residual: bool = False
    safe: bool = False
    evidence: str = ""

    @property
    def compressor(self) -> Compressor | Specification:
        """What travels."""
        return parse(self.text)

    @property
    def error_feedback(self) -> Literal["step_ahead", "gradient", "none"]:
        """The strategy's argument."""
        if self.path == "updates":
            return "step_ahead"
        return "gradient" if self.residual else "none"

    @property
    def arguments(self) -> str:
        """The strategy's arguments that use it."""
        feedback = "" if self.path == "updates" else f', error_feedback="{self.error_feedback}"'
        return f'CompressedDDPStrategy("{self.text}"{feedback})'

    def arguments_with(self, exchange: str, world: int) -> str:
        """Return the same, with the exchange if ``"auto"`` would take another one on so many ranks."""
        scheme = self.compressor
        if not isinstance(scheme, Compressor) or self.residual or exchange == choose_exchange(scheme, world):
            return self.arguments
        return f'{self.arguments[:-1]}, exchange="{exchange}")'


CANDIDATES = (
    Candidate("fp32 (ddp)", "fp32", "gradients", safe=True, evidence="nothing is left out"),
    Candidate("bf16", "bf16", "gradients", safe=True, evidence="defaults-cifar10: 1.4 points below ddp, within 1.5"),
    Candidate("fp16", "fp16", "gradients", evidence="11 bits of precision, but gradients beyond 65,504 are cut"),
    Candidate("PowerSGD-2", "powersgd:2", "gradients", residual=True, evidence="gradients-cifar10: 3 points below ddp"),
    Candidate("sign, feedback", "sign", "gradients", residual=True, evidence="gradients-cifar10: 9 points below ddp"),
    Candidate(
        "BinGrad-b, feedback",
        "bingrad_b",
        "gradients",
        residual=True,
        evidence="gradients-cifar10: 21 points below ddp",
    ),
    Candidate(
        "top-k 1 %, feedback",
        "topk:0.01",
        "gradients",
        residual=True,
        evidence="defaults-cifar10: top-k without the step ahead lost 13 points",
    ),
    Candidate("QSGD-9", "qsgd:9", "gradients", safe=True, evidence="gradients-cifar10: not below ddp in two seeds"),
    Candidate("ORQ-9", "orq:9", "gradients", safe=True, evidence="gradients-cifar10: half a point below ddp, one seed"),
    Candidate("QSGD-5", "qsgd:5", "gradients", evidence="unbiased, but its noise is half of the gradient; not studied"),
    Candidate(
        "ORQ-5", "orq:5", "gradients", evidence="unbiased, but its noise is a third of the gradient; not studied"
    ),
    Candidate("TernGrad", "terngrad", "gradients", evidence="unbiased, but its noise is as large as the gradient"),
    Candidate("SignSGD", "signsgd", "gradients", evidence="needs learning rates of its own"),
    Candidate("sign, ahead", "sign", "updates", safe=True, evidence="defaults-cifar10: within a point of ddp"),
    Candidate("top-k 1 %, ahead", "topk:0.01", "updates", evidence="defaults-cifar10: 4 points below ddp at 1.56 %"),
    Candidate(
        "block 1 %, ahead", "random_block:0.01", "updates", evidence="defaults-cifar10: 5 points below ddp at 1/32"
    ),
    Candidate("BinGrad-b, ahead", "bingrad_b", "updates", evidence="not studied"),
)

BASELINES = ("bf16", "fp16", "fp32")
"""Texts of the methods that a choice is measured by, the first that the devices can sum."""
