"""A staleness plan says which worker forwards and back-propagates which batch in which tick, and with which weights.

Letters, for stages ``k = 0..K-1``, batches ``b`` and ticks ``t``:

    p_k   ticks that an activation takes from stage k to k+1          P_k = p_0 + ... + p_{k-1}
    q_k   ticks that an error gradient takes from stage k+1 to k      Q_k = q_k + ... + q_{K-2}
    m_k   staleness: batch forwarded minus batch back-propagated in one tick,  m_k = m_{k+1} + p_k + q_k,  m_{K-1} = 0

    stage k in tick t:   F of batch t - P_k,   B of batch t - P_k - m_k,   U (one update, if there was a B)

    DSP, K = 3                       tick | w0      w1      w2
    p = (1, 1), q = (1, 1)             0  | F0 --   -- --   -- --
    m = (4, 2, 0)                      2  | F2 --   F1 --   F0 B0
                                       4  | F4 B0   F3 B1   F2 B2

Whatever the delays, the speed or the latency, ``m`` and the backward weights alone decide what is learned: the forward of batch b
reads ``w_k`` after ``max(0, b - m_k)`` updates (see :mod:`lightning_distopt.model_parallel.simulate`).

Sources: arXiv:1804.10574 (DDG), arXiv:1807.04511 (Features Replay), arXiv:1806.03377 (PipeDream), arXiv:2006.09503
(PipeDream-2BW), arXiv:1909.02625 (DSP), arXiv:1909.06695 (Ouroboros).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

from lightning_distopt.model_parallel.delays import checked_delays, delays_back, hops_told

__all__ = ["PRESETS", "BackwardWeights", "Cell", "Keep", "StalenessPlan", "TiedGrad", "Timetable", "Versions", "Work"]

Timetable = Literal["free", "barrier"]
BackwardWeights = Literal["current", "stashed"]
Keep = Literal["input", "graph"]
Versions = Literal["newest", "vertical", "double_buffered"]
TiedGrad = Literal["sum", "mean"]

PRESETS: dict[str, dict[str, Any]] = {
    # hop: delay of an activation, delay of a gradient
    "naive": {"hop": (0, 0), "timetable": "barrier", "backward_weights": "stashed", "keep": "graph"},
    "ddg": {"hop": (0, 1), "backward_weights": "stashed", "keep": "graph"},
    "features_replay": {"hop": (0, 1), "backward_weights": "current", "keep": "input"},
    "pipedream": {"hop": (0, 1), "backward_weights": "stashed", "keep": "graph"},
    "pipedream_2bw": {"hop": (0, 1), "backward_weights": "stashed", "keep": "graph", "versions": "double_buffered"},
    "dsp": {"hop": (1, 1), "backward_weights": "current", "keep": "input"},
    "ouroboros": {"hop": (0, 1), "backward_weights": "current", "keep": "input", "ends_together": True},
}
"""What distinguishes one method from another; everything else is shared."""

_DSP = re.compile(r"dsp\(([\d, ]+);([\d, ]+)\)", re.IGNORECASE)


class Cell(NamedTuple):
    """What one stage does in one tick: a batch, or ``None``, to forward and to back-propagate."""

    tick: int
    stage: int
    forward: int | None
    backward: int | None


class Work(NamedTuple):
    """A piece of a worker's tick: "F" or "B" of a stage."""

    kind: Literal["F", "B"]
    stage: int


@dataclass(frozen=True)
class StalenessPlan:
    """Delays and weights of a pipeline with stale gradients, as data.

    Args:
        forward_delays: ``p``, ticks an activation takes over each hop, K - 1 integers >= 0; 0 means within the tick.
        gradient_delays: ``q``, ticks an error gradient takes over each hop, K - 1 integers >= 0.
        timetable: "free" (only data dependencies order the workers) or "barrier" (no forward of a tick before every worker
            has ended the last one: the locking of the papers DDG and Features Replay). Weights are the same.
        backward_weights: "current" (those that the worker has when it back-propagates) or "stashed" (those of the
            forward of the same batch, kept until then).
        keep: "input" (store the input, run the forward again in the backward) or "graph" (keep autograd's graph: no second
            forward, more memory; the weights of the forward, hence only with "stashed").
        versions: weights that a forward reads: "newest", "vertical" (all stages the version that stage 0 had: PipeDream's
            vertical sync) or "double_buffered" (the version before the newest group of ``accumulate`` batches:
            PipeDream-2BW).
        accumulate: batches whose mean gradient makes one update, >= 1.
        placement: worker of each stage; default one worker a stage. Ouroboros: first and last stage on worker 0.
        tied_grad: gradient of a parameter that several stages of a worker share: the "sum" of the parts that the stages bring
            in a tick (without staleness the true gradient), or their "mean". A part that is not there (fill, drain) does not
            count.
        repeatable_dropout: a second forward draws the random numbers of the first; ``False`` draws others, as an ablation.
        name: for messages and figures.

    Raises:
        ValueError: for delays or combinations that cannot work.

    Example:
        >>> plan = StalenessPlan.preset("dsp", stages=3)
        >>> plan.staleness
        (4, 2, 0)
        >>> print(plan.table(3))
        tick | w0      w1      w2
          0  | F0 --   -- --   -- --
          1  | F1 --   F0 --   -- --
          2  | F2 --   F1 --   F0 B0
    """

    forward_delays: tuple[int, ...]
    gradient_delays: tuple[int, ...]
    timetable: Timetable = "free"
    backward_weights: BackwardWeights = "current"
    keep: Keep = "input"
    versions: Versions = "newest"
    accumulate: int = 1
    placement: tuple[int, ...] = field(default=())
    tied_grad: TiedGrad = "sum"
    repeatable_dropout: bool = True
    name: str = "custom"

    def __post_init__(self) -> None:
        p, q = (
            checked_delays("forward_delays", self.forward_delays),
            checked_delays("gradient_delays", self.gradient_delays),
        )
        if len(p) != len(q):
            raise ValueError(
                "`forward_delays` and `gradient_delays` must have one entry a hop (stages - 1): got "
                f"{len(p)} and {len(q)}. Give both for the same stages, for example [1, 1] and [1, 1] for 3."
            )
        for name, value, literal in (
            ("timetable", self.timetable, Timetable),
            ("backward_weights", self.backward_weights, BackwardWeights),
            ("keep", self.keep, Keep),
            ("versions", self.versions, Versions),
            ("tied_grad", self.tied_grad, TiedGrad),
        ):
            if value not in get_args(literal):
                raise ValueError(f"`{name}` must be one of {get_args(literal)}: got {value!r}. Choose one of these.")
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(
                f"`accumulate` must be an integer >= 1: got {self.accumulate!r}. Use 1 for an update a batch."
            )
        object.__setattr__(self, "forward_delays", p)
        object.__setattr__(self, "gradient_delays", q)
        placement = tuple(self.placement) or tuple(range(self.stages))
        if len(placement) != self.stages or set(placement) != set(range(max(placement) + 1)):
            raise ValueError(
                f"`placement` must give each of {self.stages} stages a worker, and leave no worker without: got {placement}. "
                f"Use for example {tuple(range(self.stages))}."
            )
        object.__setattr__(self, "placement", placement)
        self._check_combinations()

    def _check_combinations(self) -> None:
        stale = max(self.staleness) > 0
        if self.keep == "graph" and self.backward_weights == "current" and stale:
            raise ValueError(
                "`keep='graph'` must go with `backward_weights='stashed'`: got 'current' with staleness "
                f"{self.staleness}, and a graph holds the weights of its forward. Use `keep='input'`."
            )
        if self.versions != "newest" and self.backward_weights != "stashed":
            raise ValueError(
                f"`versions={self.versions!r}` must go with `backward_weights='stashed'`: got 'current', which never reads an "
                "old version again. Use `versions='newest'`."
            )
        if self.versions == "double_buffered" and self.accumulate < self.staleness[0]:
            raise ValueError(
                f"`accumulate` must be at least the staleness of stage 0 for double-buffered weights: got {self.accumulate} "
                f"with {self.staleness[0]}, so the version before the newest would not be there in time. Use "
                f"`accumulate={self.staleness[0]}`."
            )

    # ---- how a plan is made -----------------------------------------------------------------------------------------

    @classmethod
    def preset(
        cls,
        name: str,
        stages: int | None = None,
        *,
        forward_delays: Sequence[int] | None = None,
        gradient_delays: Sequence[int] | None = None,
        staleness: Sequence[int] | None = None,
        **options: Any,
    ) -> StalenessPlan:
        """Return the plan of a method.

        Args:
            name: one of "naive", "ddg", "features_replay", "pipedream", "pipedream_2bw", "dsp", "ouroboros", or
                "dsp(p;m)" as in "dsp(1,1,0;4,2,0)".
            stages: ``K >= 1``; may be left out where delays or staleness tell it.
            forward_delays: ``p``, instead of the method's.
            gradient_delays: ``q``, instead of the method's.
            staleness: ``m``, K integers, falling to 0; the gradients' delays become ``q_k = m_k - m_{k+1} - p_k``.
            **options: further fields of the plan, instead of the method's.

        Raises:
            ValueError: for an unknown name, or numbers that contradict each other.
        """
        given = _DSP.fullmatch(name.strip())
        if given:
            numbers = [[int(n) for n in part.replace(" ", "").strip(",").split(",")] for part in given.groups()]
            if numbers[0][-1:] != [0] or len(numbers[0]) != len(numbers[1]):
                raise ValueError(
                    "`dsp(p;m)` must give as many forward delays as stages, the last of them 0, then the staleness of each "
                    f"stage: got {name!r}. Write for example 'dsp(1,1,0;4,2,0)'."
                )
            return cls.preset("dsp", stages, forward_delays=numbers[0][:-1], staleness=numbers[1], **options)
        if name not in PRESETS:
            raise ValueError(
                f"`name` must be one of {', '.join(PRESETS)}, dsp(p;m): got {name!r}. Choose one of these."
            )
        row = {**PRESETS[name]}
        forward, gradient = row.pop("hop")
        hops = hops_told(stages, forward_delays, gradient_delays, staleness)
        p = [forward] * hops if forward_delays is None else list(forward_delays)
        if staleness is not None:
            q = delays_back(p if forward_delays is not None else None, staleness, gradient_delays, forward)
            p = (
                p
                if forward_delays is not None
                else [m - n - g for m, n, g in zip(staleness, staleness[1:], q, strict=False)]
            )
        else:
            q = [gradient] * hops if gradient_delays is None else list(gradient_delays)
        row["name"] = name
        if row.get("versions") == "double_buffered":
            row["accumulate"] = max(1, sum(p) + sum(q))
        if row.pop("ends_together", False):  # first and last stage on worker 0
            row["placement"] = (*range(hops), 0)
        return cls(tuple(p), tuple(q), **{**row, **options})

    @staticmethod
    def stages_on(name: str, workers: int) -> int:
        """Return how many stages the method with this name puts on so many workers."""
        return workers + 1 if PRESETS.get(name, {}).get("ends_together") else workers

    # ---- index algebra ----------------------------------------------------------------------------------------------

    @property
    def stages(self) -> int:
        """Number of stages ``K``."""
        return len(self.forward_delays) + 1

    @property
    def workers(self) -> int:
        """Number of workers (processes, devices)."""
        return max(self.placement) + 1

    @property
    def staleness(self) -> tuple[int, ...]:
        """``m``: how many batches lie between what each stage forwards and what it back-propagates."""
        hops = [p + q for p, q in zip(self.forward_delays, self.gradient_delays, strict=True)]
        return (*reversed(list(accumulate(reversed(hops)))), 0)

    @property
    def arrivals(self) -> tuple[int, ...]:
        """``P``: the tick in which each stage sees the first batch."""
        return (0, *accumulate(self.forward_delays))

    def forward_batch(self, stage: int, tick: int) -> int:
        """Batch that a stage forwards in a tick; negative while nothing has arrived."""
        return tick - self.arrivals[stage]

    def backward_batch(self, stage: int, tick: int) -> int:
        """Batch that a stage back-propagates in a tick; negative during the fill."""
        return tick - self.arrivals[stage] - self.staleness[stage]

    def first_update(self, stage: int) -> int:
        """Tick of a stage's first backward: ``P_k + m_k``."""
        return self.arrivals[stage] + self.staleness[stage]

    def ticks(self, batches: int) -> int:
        """Ticks for this many batches, drained: ``N + P_{K-1} + Q_0``; 0 for none."""
        return batches + self.arrivals[-1] + sum(self.gradient_delays) if batches else 0

    def forward_version(self, stage: int, batch: int) -> int:
        """Updates that the weights have had with which a stage forwards a batch (counted from a drained state)."""
        if self.versions == "double_buffered":
            return max(0, batch // self.accumulate - 1)
        late = self.staleness[0 if self.versions == "vertical" else stage]
        return max(0, batch - late) // self.accumulate

    def backward_version(self, stage: int, batch: int) -> int:
        """Updates that the weights have had with which a stage back-propagates a batch."""
        if self.backward_weights == "stashed":
            return self.forward_version(stage, batch)
        return batch // self.accumulate

    def stored_inputs(self, stage: int) -> int:
        """Most inputs (or graphs) that a stage holds at once: ``m_k + 1``; ``m_k`` of them between ticks."""
        return self.staleness[stage] + 1

    def weight_versions(self, stage: int) -> int:
        """Most versions of its weights that a stage holds at once, the live one among them."""
        if self.backward_weights == "current" or self.staleness[0] == 0:
            return 1
        late, a = self.staleness[0 if self.versions == "vertical" else stage], self.accumulate
        horizon = 4 * (a + self.staleness[0] + 1)
        most = 1
        for batch in range(horizon):  # between F of a batch and the update that its own tick brings
            first = max(0, batch - self.staleness[stage])
            read = {self.forward_version(stage, b) for b in range(first, batch + 1)}
            ahead = range(min(read), first // a + 1) if self.versions != "newest" and late else ()
            most = max(most, len(read | {first // a} | set(ahead)))
        return most

    # ---- what happens when ------------------------------------------------------------------------------------------

    def work(self, worker: int) -> tuple[Work, ...]:
        """Return a worker's pieces of a tick in order; none of them reads what another one of the same tick has updated.

        Forwards rise, then backwards fall. With ``timetable="free"`` a worker of several stages does not sit and wait for the
        activation of a later one: before it comes the backward of an earlier one, whose error gradient was sent in an earlier
        tick. (It is always there first: who sends the activation in this tick has waited for work that came after it.)

            Ouroboros, worker 0 of K = 3      free:  F0 B0 F2 B2      barrier:  F0 F2 B2 B0
        """
        mine = [stage for stage in range(self.stages) if self.placement[stage] == worker]
        rest = [Work("B", stage) for stage in reversed(mine)]
        order: list[Work] = []
        for stage in mine:
            if self.timetable == "free" and stage > 0 and self.forward_delays[stage - 1] == 0:
                early = [w for w in rest if w.stage < stage and self.gradient_delays[w.stage] > 0]
                order += early
                rest = [w for w in rest if w not in early]
            order.append(Work("F", stage))
        return (*order, *rest)

    def cells(self, ticks: int, batches: int | None = None) -> Iterable[Cell]:
        """Yield what every stage does, tick by tick; with ``batches``, nothing enters after the last of them."""
        for tick in range(ticks):
            for stage in range(self.stages):
                both = self.forward_batch(stage, tick), self.backward_batch(stage, tick)
                forward, backward = (b if b >= 0 and (batches is None or b < batches) else None for b in both)
                yield Cell(tick, stage, forward, backward)

    def table(self, ticks: int, batches: int | None = None) -> str:
        """Draw the first ticks: ``F<batch> B<batch>`` for every stage, ``--`` for nothing."""
        cells = list(self.cells(ticks, batches))
        texts = [
            " ".join("--" if b is None else f"{s}{b}" for s, b in (("F", c.forward), ("B", c.backward))) for c in cells
        ]
        width = max([6, *map(len, texts)]) + 2
        own = self.placement == tuple(range(self.stages))
        heads = [f"w{worker}" if own else f"w{worker}.{stage}" for stage, worker in enumerate(self.placement)]
        rows = ["tick | " + "".join(head.ljust(width) for head in heads).rstrip()]
        for tick in range(ticks):
            row = texts[tick * self.stages : (tick + 1) * self.stages]
            rows.append(f"{tick:>3}  | " + "".join(text.ljust(width) for text in row).rstrip())
        return "\n".join(rows)

    def __str__(self) -> str:
        p, m = (",".join(map(str, numbers)) for numbers in ((*self.forward_delays, 0), self.staleness))
        return f"{self.name}({p};{m})"
