"""Schedulers count a device's own updates, and epochs whose last batch it has learned from."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau

from lightning_distopt.strategies.schedule_clock import ScheduleClock


def config(**options: object) -> LRSchedulerConfig:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return LRSchedulerConfig(ConstantLR(optimizer), **options)  # type: ignore[arg-type]


def test_steps_by_frequency_and_only_by_updates_that_count() -> None:
    every, second = config(interval="step"), config(interval="step", frequency=2)
    clock, stepped = ScheduleClock([every, second]), []
    for counts in (True, True, False, True, True):
        clock.updated(-1, stepped.append, counts=counts)
    assert clock.updates == 4
    assert stepped.count(every.scheduler) == 4
    assert stepped.count(second.scheduler) == 2
    assert every.frequency == second.frequency > 10**9  # Lightning steps neither


def test_an_epoch_ends_when_its_last_batch_is_learned_from_also_several_at_once() -> None:
    each, third = config(interval="epoch"), config(interval="epoch", frequency=3)
    clock, stepped = ScheduleClock([each, third]), []
    for last in (3, 7, 11):
        clock.epoch_ends_with(last)
    clock.updated(2, stepped.append)
    assert (clock.epochs, stepped) == (0, [])
    clock.updated(3, stepped.append)
    assert (clock.epochs, stepped) == (1, [each.scheduler])
    clock.updated(11, stepped.append)
    assert clock.epochs == 3
    assert stepped == [each.scheduler] * 3 + [third.scheduler]


def test_what_looks_at_a_metric_is_left_to_lightning() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = LRSchedulerConfig(ReduceLROnPlateau(optimizer), interval="epoch", reduce_on_plateau=True)
    clock, stepped = ScheduleClock([plateau]), []
    clock.epoch_ends_with(0)
    clock.updated(0, stepped.append)
    assert stepped == []
    assert plateau.frequency == 1
