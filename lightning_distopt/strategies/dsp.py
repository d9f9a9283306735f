"""DSP: a stale pipeline whose every hop is a queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.strategies.stale_pipeline import StalePipelineStrategy

__all__ = ["DSPStrategy"]


class DSPStrategy(StalePipelineStrategy):
    """Diversely stale parameters: a pipeline whose every hop is a queue, with one weight version a device.

    Each device forwards, recomputes and back-propagates with its own newest weights; the longer the way of a batch, the
    older what it brings. ``DSPStrategy()`` is DSP(1,1,..,0; ..,4,2,0): one tick a hop and direction.

    Args:
        forward_delays: ticks of each hop's activations, stages - 1 integers >= 0; ``None`` is 1 each.
        gradient_delays: ticks of each hop's gradients, stages - 1 integers >= 0; ``None`` is 1 each.
        staleness: of each stage, falling to 0, as in [4, 2, 0]; instead of the gradients' delays.
        **options: see :class:`StalePipelineStrategy`.

    Raises:
        ValueError: for delays that contradict each other.

    Source: arXiv:1909.02625.
    """

    strategy_name: ClassVar[str] = "dsp"

    def __init__(
        self,
        forward_delays: Sequence[int] | None = None,
        gradient_delays: Sequence[int] | None = None,
        staleness: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        plan: StalenessPlan | str = "dsp"
        if forward_delays is not None or gradient_delays is not None or staleness is not None:
            plan = StalenessPlan.preset(
                "dsp", forward_delays=forward_delays, gradient_delays=gradient_delays, staleness=staleness
            )
        super().__init__(plan, **options)
