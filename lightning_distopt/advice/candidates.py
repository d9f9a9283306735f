"""The methods that are compared, as data: what travels, on which path, and how it may be exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_distopt.compressors import Compressor, parse

__all__ = ["CANDIDATES", "Candidate", "Path"]

Path = Literal["gradients", "updates"]


@dataclass(frozen=True)
class Candidate:
    """One method.

    Args:
        name: shown in tables.
        text: the compressor, as :func:`lightning_distopt.compressors.parse` reads it.
        path: "gradients" are exchanged inside backward and overlap with it; "updates" after the optimizer's step, with
            error feedback.
        safe: keeps the accuracy of ``ddp`` within noise in this project's own studies, so that it may be chosen without
            asking. The others are shown only.
    """

    name: str
    text: str
    path: Path
    safe: bool = False

    @property
    def compressor(self) -> Compressor:
        """What travels."""
        compressor = parse(self.text)
        assert isinstance(compressor, Compressor)
        return compressor

    @property
    def arguments(self) -> str:
        """The strategy's arguments that use it."""
        feedback = "" if self.path == "updates" else ', error_feedback="none"'
        return f'CompressedDDPStrategy("{self.text}"{feedback})'


CANDIDATES = (
    Candidate("fp32 (ddp)", "fp32", "gradients", safe=True),
    Candidate("bf16", "bf16", "gradients", safe=True),
    Candidate("sign, ahead", "sign", "updates", safe=True),
    Candidate("top-k 1 %, ahead", "topk:0.01", "updates"),
    Candidate("block 1 %, ahead", "random_block:0.01", "updates"),
    Candidate("BinGrad-b, ahead", "bingrad_b", "updates"),
    Candidate("QSGD-5", "qsgd:5", "gradients"),
    Candidate("ORQ-5", "orq:5", "gradients"),
    Candidate("TernGrad", "terngrad", "gradients"),
)
