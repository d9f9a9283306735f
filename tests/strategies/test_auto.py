"""The strategy that chooses: the same on all ranks, by the network it is told, once, and kept in checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt import AutoCompressedDDPStrategy
from lightning_distopt.advice import CANDIDATES, Candidate, Link
from lightning_distopt.advice.auto_sync import TIMED_TO
from lightning_distopt.callbacks import CommunicationMonitor
from tests.strategies.fits import Agree, At, distance, fit, gathered, messages_to, trainer, warnings_to
from tests.strategies.models import Net
from tests.strategies.test_manual_optimization import Gan

SLOW, ENDLESS = Link(1e3, 1e-6), Link(1e15, 0.0)
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Wide(Net):
    """Enough parameters that bytes, not messages, are what a slow network is slow with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3))


@pytest.fixture
def assume(monkeypatch: pytest.MonkeyPatch) -> Any:
    def link(which: Link) -> None:
        monkeypatch.setattr(AutoCompressedDDPStrategy, "_assumed_link", which)

    return link


@pytest.fixture
def with_a_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one safe method, which has a residual, beside 16 bit."""
    table = (
        next(c for c in CANDIDATES if c.text == "bf16"),
        Candidate("sign, feedback", "sign", "gradients", residual=True, safe=True, evidence="a test"),
    )
    monkeypatch.setattr("lightning_distopt.strategies.auto.CANDIDATES", table)


def decided(name: str, compressor: str) -> At:
    """Check on every rank, after every step, what has been chosen."""

    def check(trainer: Trainer, module: Any) -> None:
        strategy = trainer.strategy
        if trainer.global_step <= TIMED_TO:
            assert strategy.decision is None
            return
        assert strategy.decision["name"] == name
        assert strategy.decision["compressor"] == compressor
        mine = torch.tensor([strategy.decision["seconds"], strategy.decision["baseline_seconds"]])
        assert all(torch.equal(mine, other) for other in gathered(mine))

    return At(train_batch_end=check)


def test_on_a_slow_network_compression_wins_and_all_ranks_agree(assume: Any, tmp_path: Path) -> None:
    assume(SLOW)
    logger = CSVLogger(tmp_path, version="one")
    with messages_to(tmp_path / "said"):
        fit(
            Wide(batches=12),
            "compressed_ddp_auto_fork",
            12,
            callbacks=[Agree(), decided("QSGD-9", "qsgd:9")],
            logger=logger,
        )
    said = (tmp_path / "said").read_text()
    assert "QSGD-9 from the next step on" in said
    assert "a fit cannot change to it, so start one with" in said
    assert "QSGD-9 (qsgd:9)" in Path(logger.log_dir, "hparams.yaml").read_text()
    assert "comm/auto_predicted_seconds" in Path(logger.log_dir, "metrics.csv").read_text()


def test_on_an_endless_network_sixteen_bit_stays(assume: Any, tmp_path: Path) -> None:
    assume(ENDLESS)
    auto, bf16 = (Net(batches=12) for _ in range(2))
    with messages_to(tmp_path / "said"):
        one = fit(auto, "compressed_ddp_auto_fork", 12, callbacks=[Agree(), decided("bf16", "bf16")])
    assert "bf16 stays" in (tmp_path / "said").read_text()
    assert distance(one, fit(bf16, "compressed_ddp_bf16_fork", 12)) == 0  # nothing was drawn, counted or run in between


def test_it_measures_the_network_that_is_there() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.decision["seconds"] > 0
        assert trainer.strategy.meter.steps == 10

    fit(Net(batches=10, dropout=0.5), "compressed_ddp_auto_fork", 10, callbacks=[Agree(), At(train_end=check)])


@pytest.mark.usefixtures("with_a_residual")
def test_residuals_start_at_the_switch(assume: Any) -> None:
    assume(SLOW)

    def check(trainer: Trainer, module: Any) -> None:
        sync = trainer.strategy.gradient_sync
        assert (sync.residual_norm() > 0) is (trainer.global_step > TIMED_TO)

    fit(Wide(batches=10), "compressed_ddp_auto_fork", 10, callbacks=[Agree(), At(train_batch_end=check)])


@pytest.mark.usefixtures("with_a_residual")
def test_a_resumed_fit_keeps_it_without_measuring_and_goes_on_bit_for_bit(
    assume: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assume(SLOW)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    settings = {"enable_checkpointing": True, "callbacks": [saving, CommunicationMonitor()]}
    whole = fit(Wide(batches=8), "compressed_ddp_auto_fork", -1, max_epochs=3, **settings)
    assert "chosen at the start: sign, feedback" in capfd.readouterr().out

    assume(ENDLESS)  # which would choose otherwise

    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.decision["name"] == "sign, feedback"
        assert trainer.strategy.gradient_sync.residual_norm() > 0

    resumed = {"max_epochs": 3, "callbacks": [At(train_batch_start=check), Agree()]}
    with messages_to(tmp_path / "said"):
        again = fit(Wide(batches=8), "compressed_ddp_auto_fork", -1, str(tmp_path / "epoch=1.ckpt"), **resumed)
    assert distance(whole, again) == 0
    assert "keeps sign, feedback, which the checkpoint's fit chose on 2 ranks" in (tmp_path / "said").read_text()

    with warnings_to(tmp_path / "warned"):
        more = {"max_epochs": 3, "devices": 3, "callbacks": [At(train_batch_start=check), Agree()]}
        fit(Wide(batches=8), "compressed_ddp_auto_fork", -1, str(tmp_path / "epoch=1.ckpt"), **more)
    assert "chose sign, feedback on 2 ranks, and this run has 3" in (tmp_path / "warned").read_text()


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (Net, {"static_graph": True}),
        (Net, {"gradient_as_bucket_view": True}),
        (Net, {"find_unused_parameters": True}),
        (Gan, {"find_unused_parameters": True}),
    ],
)
def test_it_goes_with_what_the_gradient_path_goes_with(module: Any, settings: Any, assume: Any, tmp_path: Path) -> None:
    assume(SLOW)
    strategy = AutoCompressedDDPStrategy(start_method="fork", **settings)
    with messages_to(tmp_path / "said"), warnings_to(tmp_path / "warned"):
        fit(module(batches=12), strategy, 24 if module is Gan else 12, callbacks=[Agree()])
    said = (tmp_path / "said").read_text()
    assert "ms a step without communication" in said
    assert ("Error feedback was left out" in said) is (module is Gan)


def test_one_rank_has_nothing_to_choose(tmp_path: Path) -> None:
    with messages_to(tmp_path / "said"):
        fit(Net(), "compressed_ddp_auto_fork", 10, devices=1)
    assert "runs on one device" in (tmp_path / "said").read_text()


def test_accumulation_counts_steps(assume: Any) -> None:
    assume(ENDLESS)

    def check(trainer: Trainer, module: Any) -> None:
        assert (trainer.strategy.decision is None) is (trainer.global_step < TIMED_TO)

    callbacks = [At(train_batch_start=lambda *_: None, before_backward=check)]
    fit(Net(batches=18), "compressed_ddp_auto_fork", 9, accumulate_grad_batches=2, callbacks=callbacks)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`margin` must be in \[0, 1\]: got 2"):
        AutoCompressedDDPStrategy(margin=2)
    with pytest.raises(TypeError, match="unknown arguments"):
        AutoCompressedDDPStrategy(compressor="sign")
    with pytest.raises(MisconfigurationException, match="16-mixed"):
        AutoCompressedDDPStrategy().precision_plugin = SimpleNamespace(precision="16-mixed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_choice_of_a_slow_network_learns_digits_as_ddp_does(assume: Any) -> None:
    from recipes.resnet import DigitsData, ImageClassifier

    assume(SLOW)

    def accuracy(strategy: str) -> float:
        torch.manual_seed(0)
        module = ImageClassifier(
            "resnet20", in_channels=1, width=16, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        )
        settings = {"max_epochs": 8, "limit_val_batches": 1.0, "use_distributed_sampler": True}
        watched = trainer(strategy, -1, **settings)
        watched.fit(module, DigitsData(batch_size=32))
        return float(watched.callback_metrics["val/accuracy"])

    ddp, auto = accuracy("ddp_fork"), accuracy("compressed_ddp_auto_fork")
    assert ddp > 0.95
    assert auto > ddp - 0.02
