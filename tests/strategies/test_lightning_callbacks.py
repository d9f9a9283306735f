"""Lightning's own callbacks see the common model: averages, stopping, and checkpoints with what belongs to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt import CompressedDDPStrategy
from tests.ranks import run_ranks
from tests.strategies.fits import (
    Agree,
    At,
    assert_same_on_all_ranks,
    compressed,
    distance,
    fit,
    flat,
    gathered,
    sidecar,
)
from tests.strategies.models import Net

PATHS = ("step_ahead", "none")

# A fit may resume without the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


# --- averages of the weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", [EMAWeightAveraging, WeightAveraging])
@pytest.mark.parametrize("error_feedback", PATHS)
def test_weight_averaging_equals_ddp(callback: type[WeightAveraging], error_feedback: str) -> None:
    strategy = compressed(compressor="fp32", error_feedback=error_feedback)
    arguments = {"limit_val_batches": 1}
    ours = fit(Net(), strategy, callbacks=[callback(), Agree()], **arguments)
    assert distance(ours, fit(Net(), "ddp_fork", callbacks=[callback()], **arguments)) < 1e-6


def test_the_average_is_of_common_models() -> None:
    seen: list[Tensor] = []

    def see(trainer: Trainer, module: Net) -> None:
        seen.append(flat(module))

    def check(trainer: Trainer, module: Net) -> None:
        average = seen[0]
        for model in seen[1:]:
            average = average.lerp(model, 0.1)
        torch.testing.assert_close(flat(module), average, rtol=0, atol=1e-6)
        assert_same_on_all_ranks(flat(module))

    ema = EMAWeightAveraging(decay=0.9, use_buffers=False)
    fit(Net(), compressed(), callbacks=[ema, At(train_batch_end=see, fit_end=check)])


def test_weight_averaging_resumes_bit_for_bit(tmp_path: Path) -> None:
    def ema() -> Callback:
        return EMAWeightAveraging(decay=0.9, use_buffers=False)

    whole = fit(Net(), compressed(), -1, max_epochs=2, callbacks=[ema()])
    first = ModelCheckpoint(tmp_path, "first", enable_version_counter=False)
    fit(Net(), compressed(), -1, max_epochs=1, enable_checkpointing=True, callbacks=[ema(), first])
    resumed = fit(Net(), compressed(), -1, tmp_path / "first.ckpt", max_epochs=2, callbacks=[ema()])
    assert distance(whole, resumed) == 0


@pytest.mark.parametrize("error_feedback", PATHS)
def test_swa_equals_ddp_with_its_pass_for_batchnorm(error_feedback: str) -> None:
    def arguments() -> dict[str, Any]:
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
        return {"steps": -1, "max_epochs": 4, "callbacks": [swa]}

    strategy = compressed(compressor="fp32", error_feedback=error_feedback)
    assert distance(fit(Net(), strategy, **arguments()), fit(Net(), "ddp_fork", **arguments())) < 1e-6


def test_the_pass_of_swa_for_batchnorm_looks_at_the_averaged_model() -> None:
    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 4:
                assert_same_on_all_ranks(flat(self))
            return super().training_step(batch, batch_idx)

    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    fit(Watched(), compressed(), steps=-1, max_epochs=4, callbacks=[swa, Agree()])


@pytest.mark.parametrize("callback", [EMAWeightAveraging(), StochasticWeightAveraging(0.01)], ids=["ema", "swa"])
def test_averages_of_local_parameters_are_refused(callback: Callback) -> None:
    with pytest.raises(Exception, match=rf"`sync_every=2` does not go with {type(callback).__name__}.*`sync_every=1`"):
        fit(Net(), compressed(sync_every=2), callbacks=[callback])


# --- stopping -------------------------------------------------------------------------------------------------------


def test_early_stopping_stops_all_ranks_in_the_same_epoch() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.should_stop
        epochs = gathered(torch.tensor(trainer.current_epoch))
        assert int(epochs[0]) == int(epochs[1]) < 20

    stopping = EarlyStopping("val_loss", patience=1, min_delta=0.5)
    arguments = {"max_epochs": 20, "limit_val_batches": 1, "callbacks": [stopping, Agree(), At(fit_end=check)]}
    fit(Net(), compressed(), steps=-1, **arguments)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def saving(folder: Path, **arguments: Any) -> dict[str, Any]:
    callback = ModelCheckpoint(folder, "{epoch}-{step}", enable_version_counter=False, **arguments)
    return {"enable_checkpointing": True, "limit_val_batches": 1, "callbacks": [callback]}


def listing(folder: Path) -> set[str]:
    """Return all files; the ids of saves, of which a checkpoint has one, are left out."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]
    names = {re.sub(r"\.ranks/[^/]+/", ".ranks/", name) for name in found}
    assert len(names) == len(found)
    return names


def with_sidecars(*names: str) -> set[str]:
    return {name + end for name in names for end in ("", ".ranks/0.pt", ".ranks/1.pt")}


def test_old_sidecars_go_with_their_checkpoint(tmp_path: Path) -> None:
    fit(Net(), compressed(), 20, **saving(tmp_path, monitor="step", mode="max", save_top_k=2))
    assert listing(tmp_path) == with_sidecars("epoch=2-step=15.ckpt", "epoch=3-step=20.ckpt")
    assert not any(path.is_dir() and not any(path.iterdir()) for path in tmp_path.iterdir())


def test_save_last_has_sidecars_of_its_own(tmp_path: Path) -> None:
    fit(Net(), compressed(), 10, **saving(tmp_path, save_top_k=1, save_last=True))
    assert listing(tmp_path) == with_sidecars("epoch=1-step=10.ckpt", "last.ckpt")
    fit(Net(), compressed(), 15, tmp_path / "last.ckpt")


def test_save_last_as_a_link_uses_the_sidecars_of_its_target(tmp_path: Path) -> None:
    fit(Net(), compressed(), -1, max_epochs=2, **saving(tmp_path, save_top_k=1, save_last="link"))
    assert listing(tmp_path) == with_sidecars("epoch=1-step=10.ckpt") | {"last.ckpt"}
    assert (tmp_path / "last.ckpt").is_symlink()
    whole = fit(Net(), compressed(), -1, max_epochs=3)
    resumed = fit(Net(), compressed(strict_sidecars=True), -1, tmp_path / "last.ckpt", max_epochs=3)
    assert distance(whole, resumed) == 0


def test_a_link_that_moves_on_leaves_the_sidecars_of_kept_checkpoints(tmp_path: Path) -> None:
    fit(Net(), compressed(), 15, **saving(tmp_path, save_top_k=-1, save_last="link"))
    every = with_sidecars("epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt", "epoch=2-step=15.ckpt")
    assert listing(tmp_path) == every | {"last.ckpt"}


def test_a_checkpoint_inside_of_an_accumulation_window_holds_x(tmp_path: Path) -> None:
    class Watched(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            if self.trainer.is_global_zero:
                state = {name: p.detach().clone() for name, p in self.named_parameters()}
                torch.save(state, tmp_path / f"{self.trainer.global_step}.common")

    arguments = saving(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    fit(Watched(batches=7), compressed(), 4, accumulate_grad_batches=3, **arguments)
    names = {path.name for path in (tmp_path / "saved").glob("*.ckpt")}
    assert names >= {"epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"}
    for step in (1, 2, 3):
        (file,) = (tmp_path / "saved").glob(f"*step={step}.ckpt")
        saved = torch.load(file, weights_only=True)["state_dict"]
        common = torch.load(tmp_path / f"{step}.common", weights_only=True)
        assert all(torch.equal(saved[name], common[name]) for name in common)


def test_a_checkpoint_inside_of_training_step_holds_x(tmp_path: Path) -> None:
    class Saving(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            self.common = {name: p.detach().clone() for name, p in self.named_parameters()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
                assert all(torch.equal(saved[name], value) for name, value in self.common.items())
                assert not torch.equal(self.net[0].weight, self.common["net.0.weight"])
            return super().training_step(batch, batch_idx)

    ours = fit(Saving(), compressed(), 5)
    assert distance(ours, fit(Net(), compressed(), 5)) == 0


@pytest.mark.filterwarnings("ignore:.*was called without a model")  # Lightning looks for its
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")  # file in every `fit` with this callback
def test_a_checkpoint_of_an_exception_inside_of_a_step_holds_x(tmp_path: Path) -> None:
    class Failing(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            self.common = {name: p.detach().clone() for name, p in self.named_parameters()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3:
                assert not torch.equal(self.net[0].weight, self.common["net.0.weight"])
                raise KeyError("a mistake in training_step")
            return super().training_step(batch, batch_idx)

    def one_process(rank: int, world: int) -> None:
        module = Failing()
        callback = OnExceptionCheckpoint(tmp_path, "exception")
        strategy = CompressedDDPStrategy("topk:0.1")
        with pytest.raises(KeyError, match="a mistake"):
            fit(module, strategy, devices=1, enable_checkpointing=True, callbacks=[callback])
        saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)["state_dict"]
        for name, parameter in module.named_parameters():
            assert torch.equal(saved[name], module.common[name])
            assert torch.equal(parameter, module.common[name])
        assert sidecar(tmp_path / "exception.ckpt", 0).exists()

    run_ranks(1, one_process)


def test_the_best_checkpoint_scores_what_was_validated(tmp_path: Path) -> None:
    arguments = saving(tmp_path, monitor="val_loss")
    module = Net()
    fit(module, compressed(), 10, **arguments)
    (best,) = tmp_path.glob("*.ckpt")
    scored = torch.load(best, weights_only=True)["callbacks"]
    (score,) = [state["best_model_score"] for name, state in scored.items() if name.startswith("ModelCheckpoint")]
    loaded = Net.load_from_checkpoint(best)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", use_distributed_sampler=False, **quiet)
    (result,) = trainer.validate(loaded, verbose=False)
    assert result["val_loss"] == pytest.approx(float(score), abs=1e-7)


def test_zero_redundancy_is_refused_with_error_feedback() -> None:
    class Sharded(torch.optim.SGD):
        def consolidate_state_dict(self) -> None: ...

    def sharded(params: Any) -> torch.optim.Optimizer:
        return Sharded(params, lr=0.1)

    with pytest.raises(Exception, match=r"does not go with Sharded.*`error_feedback='none'`") as caught:
        fit(Net(optimizer=sharded), compressed())
    assert MisconfigurationException.__name__ in str(caught.value)
    fit(Net(optimizer=sharded), compressed(error_feedback="none"))
