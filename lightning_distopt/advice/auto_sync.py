"""The choice at the start of a fit: real steps in 16 bit are timed, then the winner takes over.

    step     0  1  2 │ 3  4  5  6 │                             │ 7 ...
             warm up │ timed, in  │ link and codecs, the ranks  │ the winner, to the end
                     │ DDP's hook │ agree: between two steps    │

No forward of the model is added, so nothing that it counts, draws or logs is disturbed.
"""

from __future__ import annotations

import time
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lightning_distopt.advice.candidates import BASELINES, CANDIDATES, Candidate
from lightning_distopt.advice.choice import MARGIN, Decision, decide
from lightning_distopt.advice.cost_model import CodecSpeed, Link, Workload
from lightning_distopt.advice.measure import alone, measure_codec, measure_link
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.data_parallel import GradientSync
from lightning_distopt.data_parallel.exchanges import ExchangeName
from lightning_distopt.exchange import network_failures

__all__ = ["TIMED_FROM", "TIMED_TO", "AutoSync", "Figures", "sixteen_bit"]

TIMED_FROM = 3  # DDP cuts its buckets anew after the first step, and kernels are compiled in it
TIMED_TO = 7
_SECONDS = 2.0  # for the large messages of the link's measurement
_NUMEL = 1 << 22  # for the codecs'


def sixteen_bit(device: torch.device) -> str:
    """Return the 16-bit format that the process group can sum, "bf16" or "fp16"; "fp32" if it sums neither.

    A collective: all ranks have the same backend, and learn the same.
    """
    for text, dtype in zip(BASELINES, (torch.bfloat16, torch.float16), strict=False):
        try:
            dist.all_reduce(torch.zeros(1, dtype=dtype, device=device))
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("type", "scalar", "supported")):
                raise  # not that the backend does not know the type
            continue
        return text
    return BASELINES[-1]


class _Round(NamedTuple):
    """One backward that was averaged.

    Args:
        cuts: (elements, seconds from its start until ready) of each bucket.
        inside: seconds spent in the hook.
        period: seconds since the end of the round before.
        backward: seconds from its start to the last bucket, without what was spent in the hook.
    """

    cuts: tuple[tuple[int, float], ...]
    inside: float
    period: float
    backward: float


class Figures(NamedTuple):
    """What was measured, the slowest rank's, the same on all ranks.

    Args:
        work: the model's part of a step.
        measured: seconds of a step in 16 bit.
        link: the network.
        codecs: by the candidate's name.
    """

    work: Workload
    measured: float
    link: Link
    codecs: dict[str, CodecSpeed]


class AutoSync:
    """Stands between DDP and a :class:`GradientSync`: times its rounds, then chooses once, the same on all ranks.

    Args:
        sync: sends 16 bit until then.
        baseline: text of what it sends.
        device: of the parameters.
        margin: what a method must gain over 16 bit, as a share of the step.
        residuals: whether error feedback fits the training loop.
        candidates: what is compared.
        link: assume this link instead of measuring it.
    """

    def __init__(
        self,
        sync: GradientSync,
        baseline: str,
        device: torch.device,
        *,
        margin: float = MARGIN,
        residuals: bool = True,
        candidates: tuple[Candidate, ...] = CANDIDATES,
        link: Link | None = None,
    ) -> None:
        self.sync, self.baseline, self.device = sync, baseline, device
        self.margin, self.residuals, self.link = margin, residuals, link
        self.candidates = [c for c in candidates if c.safe or c.text in BASELINES]
        self.decision: Decision | None = None
        self._rounds: list[_Round] = []
        self._cuts: list[tuple[int, float]] = []
        self._count = 0
        self._inside = self._backward_began = 0.0
        self._ended: float | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to choose."""
        return self.decision is not None or self.sync.world == 1

    def begin_backward(self) -> None:
        """Note that a backward starts; the last one before the hook counts."""
        if not self.done:
            self._backward_began = self._now()
            self._inside, self._cuts = 0.0, []

    def hook(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Take one bucket of DDP's reducer, see :meth:`GradientSync.hook`."""
        if self.done:
            return self.sync.hook(bucket)
        came = self._now()
        self._cuts.append((bucket.buffer().numel(), came - self._backward_began - self._inside))
        future = self.sync.hook(bucket)
        now = self._now()
        self._inside += now - came
        if bucket.is_last():
            self._count += 1
            if self._ended is not None and self._count > TIMED_FROM:
                backward = max(ready for _, ready in self._cuts)
                self._rounds.append(_Round(tuple(self._cuts), self._inside, now - self._ended, backward))
            self._ended, self._inside, self._cuts = now, 0.0, []
        return future

    def between_steps(self) -> Decision | None:
        """Choose, if enough rounds were timed; a collective then. Return the decision in the call that makes it.

        Raises:
            ExchangeError: if a collective failed or timed out.
        """
        if self.done or self._count < TIMED_TO:
            return None
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            network_failures(self.sync.rank, self.sync.rounds, doing="measure the link and choose a compressor"),
            torch.random.fork_rng(devices=devices),  # the user's random numbers stay what they were
        ):
            decision = self._decide()
        self.take(decision)
        return decision

    def take(self, decision: Decision) -> None:
        """Go on with a decision, this one's or an earlier one's; residuals start from zero."""
        self.decision = decision
        self._rounds = []
        exchange: ExchangeName = decision.exchange  # type: ignore[assignment]
        answers = exchange == "sharded_server" and not decision.residual
        self.sync.use(as_compressor(decision.compressor), exchange, answers, residuals=decision.residual)

    # ---- figures, the slowest rank's -------------------------------------------------------------------------------

    def measure(self) -> Figures:
        """Return all that the cost model needs, after the timed rounds. A collective."""
        work, measured = self._workload()
        link = self.link or measure_link(self.device, seconds=_SECONDS)
        with alone() as group:
            speeds = [self._codec(candidate, work, group) for candidate in self.candidates]
        table = torch.tensor([[s.encode, s.decode, s.fixed] for s in speeds], device=self.device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        codecs = {c.name: CodecSpeed(*row) for c, row in zip(self.candidates, table.tolist(), strict=True)}
        return Figures(work, measured, link, codecs)

    def _decide(self) -> Decision:
        work, measured, link, codecs = self.measure()
        decision = decide(
            work,
            link,
            codecs,
            self.sync.world,
            baseline=self.baseline,
            measured=None if self.link else measured,
            margin=self.margin,
            residuals=self.residuals,
            candidates=self.candidates,
        )
        # The figures are the same on all ranks; their machines' arithmetic may not be.
        said: list[Decision] = [decision]
        dist.broadcast_object_list(said, src=0, device=self.device if self.device.type != "cpu" else None)
        return said[0]

    def _codec(self, candidate: Candidate, work: Workload, group: dist.ProcessGroup | None) -> CodecSpeed:
        return measure_codec(candidate, self.device, min(_NUMEL, work.numel), work.shapes, group, repeats=3)

    def _workload(self) -> tuple[Workload, float]:
        """Return the model's part, and the seconds of a step in 16 bit.

        The split of a step is that of the rank that computes longest, for which the others wait.
        """
        last = self._rounds[-1].cuts
        own = [
            median(r.period for r in self._rounds),
            median(max(0.0, r.period - r.inside - r.backward) for r in self._rounds),
            median(r.backward for r in self._rounds),
            *(median(r.cuts[i][1] for r in self._rounds if len(r.cuts) == len(last)) for i in range(len(last))),
        ]
        figures = torch.zeros(self.sync.world, len(own), device=self.device)
        figures[self.sync.rank] = torch.tensor(own)
        dist.all_reduce(figures)
        period, outside, backward, *ready = max(figures.tolist(), key=lambda row: row[1] + row[2])
        cuts = tuple((numel, seconds) for (numel, _), seconds in zip(last, ready, strict=True))
        shapes = tuple(tuple(p.shape) for p in self.sync.names if p.requires_grad)
        return Workload(sum(numel for numel, _ in cuts), outside, backward, 1, cuts, shapes), period

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
