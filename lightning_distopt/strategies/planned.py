"""Pipelines that follow a staleness plan, given or made for as many stages as there are devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.ties import refuse_ties
from lightning_distopt.strategies.checks import count
from lightning_distopt.strategies.staged import StagedStrategy

__all__ = ["PlannedStrategy"]


class PlannedStrategy(StagedStrategy):
    """Base class of the stale pipelines; see ``StalePipelineStrategy`` for the arguments."""

    def __init__(
        self,
        plan: StalenessPlan | str,
        stages: int | None = None,
        accumulate: int | None = None,
        timetable: Literal["free", "barrier"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._stages_asked = None if stages is None else count("stages", stages, 1)
        if not isinstance(plan, (str, StalenessPlan)):
            raise TypeError(
                f"`plan` must be a StalenessPlan or its name: got {plan!r}. Write for example `plan='dsp'`."
            )
        self._plan_or_name = plan
        asked = {"accumulate": accumulate, "timetable": timetable}
        self._options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if isinstance(plan, str) and "(" not in plan:
            StalenessPlan.preset(plan, 4, **{**self._options, **({"accumulate": 64} if accumulate else {})})
        else:
            self._plan_for(None)
        self._plan: StalenessPlan | None = None

    def _plan_for(self, devices: int | None) -> StalenessPlan:
        if isinstance(self._plan_or_name, StalenessPlan):
            return replace(self._plan_or_name, **self._options)
        stages = None if "(" in self._plan_or_name else devices
        return StalenessPlan.preset(self._plan_or_name, stages, **self._options)

    @property
    def plan(self) -> StalenessPlan:
        """The plan, for as many stages as there are devices where only its name was given."""
        if self._plan is None:
            devices = self.num_nodes * self.num_processes
            name = self._plan_or_name if isinstance(self._plan_or_name, str) else ""
            plan = self._plan_for(self._stages_asked or StalenessPlan.stages_on(name, devices))
            if devices % plan.workers:
                raise ValueError(
                    f"`devices` must be a multiple of the workers of the plan {plan}: got {devices} for {plan.workers}. Use "
                    f"`devices={plan.workers}`, or a plan for {devices} stages."
                )
            self._plan = plan
        return self._plan

    @property
    def placement(self) -> tuple[int, ...]:
        return self.plan.placement

    def _check_shared(self, blocks: Sequence[Block]) -> None:
        try:
            refuse_ties(self.plan, [dict(block.named_parameters()) for block in blocks])
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    def setup_environment(self) -> None:
        self._plan = None  # devices are known now
        assert self.plan
        super().setup_environment()
