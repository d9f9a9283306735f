"""Linear scaling, gradual warm-up and the polynomial schedule, alone and together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import IterableDataset

from lightning_distopt.callbacks import GradualWarmup, LayerwiseRateScaling, LinearScaling, PolynomialSchedule
from lightning_distopt.callbacks.gradual_warmup import ramp
from lightning_distopt.callbacks.polynomial_schedule import polynomial
from tests.strategies.fits import At, fit, messages_to
from tests.strategies.models import BATCH, Net

unit = partial(SGD, lr=1.0)


class Rates(Callback):
    """Notes the rate of each optimizer step, and what is there after each batch."""

    def __init__(self) -> None:
        self.stepped: list[float] = []
        self.after: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.stepped.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        self.after.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(*callbacks: Callback, steps: int = 12, batches: int = 4, **arguments: Any) -> Rates:
    module = arguments.pop("module", None) or Net(batches=batches, optimizer=unit)
    noted = Rates()
    fit(module, "auto", steps, devices=1, callbacks=[*callbacks, noted], **arguments)
    return noted


# --- warm-up and polynomial ------------------------------------------------------------------------------------------


def test_the_oracle_of_the_specification() -> None:
    """lr = 1, 4 steps of warm-up of 12, end 0: s = 0, 2, 4, 8, 12 gives 0, 0.5, 1, 0.25, 0."""
    found = [ramp(s, 4) * polynomial(s, 4, 12, 2.0, 1.0, 0.0) for s in (0, 2, 4, 8, 12)]
    assert found == pytest.approx([0, 0.5, 1, 0.25, 0])


def test_both_callbacks_together_give_the_oracles_rates_in_a_fit() -> None:
    noted = rates(PolynomialSchedule(end=0.0), GradualWarmup(epochs=1))
    expected = [ramp(s, 4) * polynomial(s, 4, 12, 2.0, 1.0, 0.0) for s in range(12)]
    assert noted.stepped == pytest.approx(expected)
    assert noted.stepped[2] == pytest.approx(0.5)
    assert noted.stepped[8] == pytest.approx(0.25)


def test_the_end_rate_and_the_power() -> None:
    noted = rates(PolynomialSchedule(power=1.0, end=0.4))
    assert noted.stepped == pytest.approx([1.0 - 0.6 * s / 12 for s in range(12)])


def test_the_ramp_lies_over_any_schedule_which_does_not_see_it() -> None:
    noted = rates(GradualWarmup(epochs=1), module=Net(batches=4, optimizer=unit, step_size=3), steps=8)
    scheduled = [0.5 ** (s // 3) for s in range(9)]
    assert noted.stepped == pytest.approx([ramp(s, 4) * scheduled[s] for s in range(8)])
    assert noted.after == pytest.approx(scheduled[1:])


def test_the_ramp_counts_optimizer_steps_not_micro_batches() -> None:
    noted = rates(GradualWarmup(epochs=1), accumulate_grad_batches=2, steps=3)
    assert noted.stepped == pytest.approx([0.0, 0.5, 1.0])
    assert noted.after == [1.0] * 6


def test_start_factor_and_start_at_one() -> None:
    assert rates(GradualWarmup(1, start_factor=0.2), steps=4).stepped == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates(GradualWarmup(1, start_at_one=True), steps=4).stepped == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(GradualWarmup(0), steps=2).stepped == [1.0, 1.0]


def test_the_monitor_sees_the_ramp_and_per_tensor_rates_multiply_it(tmp_path: Path) -> None:
    callbacks = [GradualWarmup(1), LearningRateMonitor(), LayerwiseRateScaling("lars", heat_map=False)]
    module = Net(batches=4, optimizer=unit)
    fit(module, "auto", 4, devices=1, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1, callbacks=callbacks)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    of = {name: [float(r[rows[0].index(name)]) for r in rows[1:] if r[rows[0].index(name)]] for name in rows[0]}
    assert of["lr-SGD"][-4:] == pytest.approx([0, 0.25, 0.5, 0.75])  # before the first batch it logs the rate alone
    assert of["layer_rates/net.0.bias"] == pytest.approx([0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("callbacks", [[GradualWarmup], [PolynomialSchedule], [PolynomialSchedule, GradualWarmup]])
def test_a_resumed_fit_goes_on_at_the_same_rates(tmp_path: Path, callbacks: list[Any]) -> None:
    def made() -> list[Callback]:
        return [
            LinearScaling(BATCH // 2),
            *(kind(epochs=2) if kind is GradualWarmup else kind(end=0.0, steps=12) for kind in callbacks),
        ]

    whole = rates(*made())
    save = At(train_epoch_end=lambda t, m: t.save_checkpoint(tmp_path / f"{t.current_epoch}.ckpt"))
    rates(*made(), save, steps=4)
    resumed = rates(*made(), ckpt_path=tmp_path / "0.ckpt")
    assert resumed.stepped == pytest.approx(whole.stepped[4:])


def test_a_module_with_a_scheduler_of_its_own_is_refused_a_second() -> None:
    with pytest.raises(MisconfigurationException, match="so does the module's StepLR"):
        rates(PolynomialSchedule(), module=Net(optimizer=unit, step_size=3))


def test_a_fit_without_an_end_needs_its_steps() -> None:
    with pytest.raises(ValueError, match="`steps` must be given for a Trainer without an end"):
        rates(PolynomialSchedule(), steps=-1, max_epochs=-1)


# --- linear scaling --------------------------------------------------------------------------------------------------


def test_the_batch_is_micro_batch_times_ranks_times_accumulation(tmp_path: Path) -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(BATCH * 2 * 3 / 8)

    with messages_to(tmp_path / "said"):
        fit(
            Net(batches=6, optimizer=unit), "ddp_fork", 2, accumulate_grad_batches=3,
            callbacks=[LinearScaling(8), At(train_batch_end=check)],
        )  # fmt: skip
    assert (
        f"multiplied the learning rates by 12: the batch is 96 = {BATCH} samples x 2 ranks x 3"
        in (tmp_path / "said").read_text()
    )


def test_the_square_root_and_a_given_batch_size() -> None:
    assert rates(LinearScaling(4, rule="square_root"), steps=1).stepped == [2.0]
    assert rates(LinearScaling(4, batch_size=12), steps=1).stepped == [3.0]


def test_it_is_never_applied_twice(tmp_path: Path) -> None:
    optimizer: list[Any] = []

    def keep(params: Any) -> Any:  # one optimizer for two fits
        optimizer.append(optimizer[0] if optimizer else SGD(params, lr=1.0))
        return optimizer[-1]

    module = Net(batches=2, optimizer=keep)
    assert rates(LinearScaling(4), LinearScaling(4), module=module, steps=2).stepped == [4.0, 4.0]
    assert rates(LinearScaling(4), module=module, steps=2).stepped == [4.0, 4.0]

    save = At(train_end=lambda t, m: t.save_checkpoint(tmp_path / "end.ckpt"))
    rates(LinearScaling(4), save, steps=4)
    resumed = partial(rates, ckpt_path=tmp_path / "end.ckpt", steps=6)
    assert resumed(LinearScaling(4)).stepped == [4.0, 4.0]
    assert resumed(LinearScaling(4), accumulate_grad_batches=2).stepped == [8.0, 8.0]  # another batch: the ratio


def test_schedulers_start_from_the_scaled_rate() -> None:
    noted = rates(LinearScaling(4), module=Net(batches=4, optimizer=unit, step_size=2), steps=6)
    assert noted.stepped == [4.0, 4.0, 2.0, 2.0, 1.0, 1.0]

    class Absolute(Net):
        def configure_optimizers(self) -> Any:
            optimizer = unit(self.parameters())
            scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    assert rates(LinearScaling(4), module=Absolute(batches=4), steps=4).stepped == pytest.approx([4, 2, 4 / 3, 1])


def test_schedulers_that_keep_their_own_rates_are_refused() -> None:
    class Cycle(Net):
        def configure_optimizers(self) -> Any:
            optimizer = unit(self.parameters())
            return [optimizer], [{"scheduler": OneCycleLR(optimizer, 1.0, 10), "interval": "step"}]

    with pytest.raises(MisconfigurationException, match="cannot scale OneCycleLR"):
        rates(LinearScaling(4), module=Cycle(), steps=2)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(6), torch.zeros(3))] * 8)


def test_a_loader_that_does_not_tell_its_batch_size_needs_it() -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter([(torch.zeros(4, 6), torch.zeros(4, 3))] * 3)

        def __len__(self) -> int:
            return 3

    class Streamed(Net):
        def train_dataloader(self) -> Any:
            return Batches()

    with pytest.raises(ValueError, match=r"`batch_size` must be given .*: got a Batches"):
        rates(LinearScaling(4), module=Streamed(optimizer=unit), steps=1)
    assert rates(LinearScaling(4, batch_size=4), module=Streamed(optimizer=unit), steps=1).stepped == [1.0]


def test_epochs_of_a_loader_without_a_length_cannot_be_counted() -> None:
    class Streamed(Net):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Stream(), batch_size=4)

    with pytest.raises(ValueError, match="`GradualWarmup\\(epochs\\)` counts in epochs"):
        rates(GradualWarmup(1), module=Streamed(optimizer=unit), steps=1)
    rates(GradualWarmup(1), module=Streamed(optimizer=unit), steps=1, limit_train_batches=2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (partial(LinearScaling, 0), ValueError, "`base_batch_size` must be an integer >= 1: got 0"),
        (
            partial(LinearScaling, rule="cubic"),
            ValueError,
            "`rule` must be one of 'linear', 'square_root': got 'cubic'",
        ),
        (partial(LinearScaling, batch_size=0.5), TypeError, "`batch_size` must be an integer >= 1: got 0.5"),
        (partial(GradualWarmup, -1), ValueError, "`epochs` must be a number of at least 0: got -1"),
        (partial(GradualWarmup, start_factor=1.0), ValueError, r"`start_factor` must be in \[0, 1\): got 1.0"),
        (partial(PolynomialSchedule, 0), ValueError, "`power` must be above 0: got 0"),
        (partial(PolynomialSchedule, end=-1), ValueError, "`end` must be a rate of at least 0: got -1"),
        (partial(PolynomialSchedule, steps=0), ValueError, "`steps` must be an integer >= 1: got 0"),
    ],
)
def test_wrong_values_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
