"""A fit that stops after an epoch and goes on from its checkpoint ends where it would have ended, bit for bit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_distopt import CompressedDDPStrategy
from tests.ranks import run_ranks
from tests.strategies.everything import Everything, assert_all_same
from tests.strategies.fits import (
    Agree,
    At,
    State,
    compressed,
    distance,
    fit,
    gathered,
    sidecar,
    trainer,
    warnings_to,
)
from tests.strategies.models import BATCH, Net, data
from tests.strategies.test_manual_optimization import Gan

# A fit may resume without the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def saving(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Return arguments that save ``folder/epoch=N.ckpt`` at the end of every epoch."""
    callback = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False, **arguments)
    return {"enable_checkpointing": True, "callbacks": [callback]}


def epochs(module: Any, strategy: Any, number: int, ckpt_path: Any = None, **arguments: Any) -> State:
    # to the end of an epoch: after `max_steps`, Lightning repeats a batch of the epoch that was cut
    return fit(module, strategy, -1, ckpt_path, max_epochs=number, **arguments)


# --- the same number of ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "net", "loop"),
    [
        ({"compressor": "sign"}, {"dropout": 0.5, "shuffle": True}, {"limit_val_batches": 1}),
        ({"compressor": "topk:0.1", "averaging_period": 4}, {"step_size": 3}, {}),
        ({"compressor": "sign", "exchange": "sharded_server"}, {"dropout": 0.5}, {}),
        ({"compressor": "sign", "server_compression": True}, {}, {}),
        ({"compressor": "topk:0.2", "sync_every": 3}, {}, {}),  # 5 steps: saved inside of a round
        ({"compressor": "topk:0.2", "sync_every": 3}, {}, {"limit_val_batches": 1}),
        ({"compressor": "random_block:0.2", "error_feedback": "local"}, {}, {"accumulate_grad_batches": 2}),
        ({"compressor": "random_block:0.2", "error_feedback": "none"}, {"dropout": 0.5}, {}),
        ({"compressor": "sign", "dense_steps": 7}, {}, {}),
        ({"compressor": "topk:0.1", "error_feedback": "gradient"}, {"step_size": 3, "dropout": 0.5}, {}),
        ({"compressor": "powersgd:1", "error_feedback": "gradient"}, {}, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_resuming_is_exact(tmp_path: Path, arguments: Any, net: Any, loop: Any) -> None:
    whole = epochs(Net(**net), compressed(**arguments), 2, callbacks=[Everything(tmp_path / "whole")], **loop)
    epochs(Net(**net), compressed(**arguments), 1, **saving(tmp_path), **loop)
    strategy = compressed(**arguments, strict_sidecars=True)
    resumed = epochs(
        Net(**net), strategy, 2, tmp_path / "epoch=0.ckpt", callbacks=[Everything(tmp_path / "resumed")], **loop
    )
    assert distance(whole, resumed) == 0
    assert_all_same(tmp_path / "whole", tmp_path / "resumed", 2)


def test_resuming_several_optimizers_is_exact(tmp_path: Path) -> None:
    whole = epochs(Gan(), compressed(), 2)
    epochs(Gan(), compressed(), 1, **saving(tmp_path))
    assert distance(epochs(Gan(), compressed(), 2, tmp_path / "epoch=0.ckpt"), whole) == 0


class Resumable:
    """A loader that knows how far it got, as Lightning asks for an exact continuation inside of an epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.position = self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for position in range(start, len(self)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self)


def test_resuming_inside_of_an_epoch_is_exact_with_a_loader_that_resumes(tmp_path: Path) -> None:
    class InOrder(Net):
        def train_dataloader(self) -> Any:
            tensors = data(self.global_rank, self.batches).tensors
            return Resumable(list(zip(*(tensor.split(BATCH) for tensor in tensors), strict=True)))

    whole = epochs(InOrder(dropout=0.5), compressed(compressor="topk:0.1"), 2)
    arguments = saving(tmp_path, every_n_train_steps=3)
    arguments["callbacks"][0].filename = "{step}"
    epochs(InOrder(dropout=0.5), compressed(compressor="topk:0.1"), 1, **arguments)
    strategy = compressed(compressor="topk:0.1", strict_sidecars=True)
    assert distance(epochs(InOrder(dropout=0.5), strategy, 2, tmp_path / "step=3.ckpt"), whole) == 0


def test_ckpt_path_last(tmp_path: Path) -> None:
    whole = epochs(Net(), compressed(), 3)
    epochs(Net(), compressed(), 2, **saving(tmp_path, save_last=True))
    resumed = epochs(Net(), compressed(strict_sidecars=True), 3, "last", **saving(tmp_path, save_last=True))
    assert distance(whole, resumed) == 0


def test_a_checkpoint_saved_after_the_fit_keeps_the_residuals(tmp_path: Path) -> None:
    def one_process(rank: int, world: int) -> tuple[State, State]:
        strategy = CompressedDDPStrategy("topk:0.1")
        whole = epochs(Net(), CompressedDDPStrategy("topk:0.1"), 2, devices=1)
        first = trainer(strategy, -1, devices=1, max_epochs=1)
        first.fit(Net())
        first.save_checkpoint(tmp_path / "after.ckpt")
        strict = CompressedDDPStrategy("topk:0.1", strict_sidecars=True)
        return whole, epochs(Net(), strict, 2, tmp_path / "after.ckpt", devices=1)

    ((whole, resumed),) = run_ranks(1, one_process)
    assert distance(whole, resumed) == 0


def test_a_second_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    def one_process(rank: int, world: int) -> None:
        norms: list[float] = []
        note = At(before_backward=lambda trainer, module: norms.append(trainer.strategy.update_sync.residual_norm()))
        again = trainer("compressed_ddp", -1, devices=1, max_epochs=1, callbacks=[note])
        module = Net()
        again.fit(module)
        first = {name: value.clone() for name, value in module.state_dict().items()}
        again.fit_loop.max_epochs = 2
        ended = At(train_end=lambda t, m: norms.append(t.strategy.update_sync.state_dict()["groups"]["0"]["rounds"]))
        again.callbacks.append(ended)
        again.fit(module)
        assert distance(first, module.state_dict()) > 0
        assert again.global_step == 10
        assert norms[0] == 0
        assert norms[5] > norms[1] > 0, "the second fit starts with the residuals of the first"
        assert norms[-1] == 10, "and counts on"

    run_ranks(1, one_process)


def test_a_checkpoint_inside_a_round_holds_the_common_model_whatever_the_module_calls_it(tmp_path: Path) -> None:
    class Renaming(Net):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"my.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def save(trainer: Any, module: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")
            with trainer.strategy.update_sync.common_model():
                x = module.net[0].weight.detach().clone()
            torch.save((x, module.net[0].weight.detach().clone()), tmp_path / f"{trainer.global_rank}.pt")

    fit(Renaming(), compressed(sync_every=3), 6, callbacks=[At(train_batch_end=save)])
    weights = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]["my.net.0.weight"]
    (x, z), (other, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(weights, x)
    assert torch.equal(x, other)
    assert not torch.equal(x, z)


# --- another number of ranks, another strategy ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "arguments"),
    [
        (1, {"exchange": "all_gather"}),
        (3, {"exchange": "all_gather"}),
        (1, {"exchange": "sharded_server"}),
        (3, {"exchange": "sharded_server"}),
        (3, {"compressor": "powersgd:1", "error_feedback": "gradient"}),
    ],
)
def test_on_another_number_of_ranks_the_mean_of_the_residuals_is_kept(
    tmp_path: Path, devices: int, arguments: Any
) -> None:
    epochs(Net(), compressed(**arguments), 1, **saving(tmp_path))
    saved = [torch.load(sidecar(tmp_path / "epoch=0.ckpt", rank), weights_only=True) for rank in (0, 1)]
    residuals = [content["state"]["residuals"] for content in saved]
    mean = {name: (residuals[0][name] + residuals[1][name]) / 2 for name in residuals[0]}

    def check(trainer: Trainer, module: Net) -> None:
        sync = trainer.strategy.update_sync or trainer.strategy.gradient_sync
        restored = sync.state_dict()["residuals"]
        assert restored.keys() == mean.keys()
        for name, value in restored.items():
            torch.testing.assert_close(sum(gathered(value)) / devices, mean[name], rtol=0, atol=1e-7)

    class Checked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            check(self.trainer, self)
            self.training_step = super().training_step
            return super().training_step(batch, batch_idx)

    with warnings_to(tmp_path / "warnings"):
        settings = {"devices": devices, "callbacks": [Agree()]}
        epochs(Checked(), compressed(**arguments), 2, tmp_path / "epoch=0.ckpt", **settings)
    said = (tmp_path / "warnings").read_text()
    assert said.count("was written by 2 processes and this run has") == 1
    assert f"this run has {devices}: residuals were merged so that their mean over ranks is kept" in said
    assert "Resume with 2 devices for an exact continuation" in said


def test_without_error_feedback_another_number_of_ranks_counts_on(tmp_path: Path) -> None:
    arguments = {"compressor": "random_block:0.5", "error_feedback": "none"}

    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.gradient_sync.rounds == 5

    epochs(Net(), compressed(**arguments), 1, **saving(tmp_path))
    hooks = [At(train_start=check), Agree()]
    with warnings_to(tmp_path / "warnings"):
        epochs(Net(), compressed(**arguments), 2, tmp_path / "epoch=0.ckpt", devices=3, callbacks=hooks)
    assert "residuals" not in (tmp_path / "warnings").read_text()


def test_a_checkpoint_with_residuals_goes_on_without_them_on_request(tmp_path: Path) -> None:
    def momentum_agrees(trainer: Trainer, module: Net) -> None:
        for state in trainer.optimizers[0].state.values():
            mine, theirs = gathered(state["momentum_buffer"])
            assert torch.equal(mine, theirs)

    epochs(Net(), compressed(), 1, **saving(tmp_path))
    hooks = [Agree(), At(train_start=momentum_agrees)]
    with warnings_to(tmp_path / "warnings"):
        epochs(Net(), compressed(error_feedback="none"), 2, tmp_path / "epoch=0.ckpt", callbacks=hooks)
    said = (tmp_path / "warnings").read_text()
    assert said.count("was written with `error_feedback='step_ahead'` and this run has 'none'") == 1


@pytest.mark.parametrize(("before", "after"), [("step_ahead", "gradient"), ("gradient", "local"), ("gradient", "none")])
def test_residuals_in_other_units_are_left_out_with_one_warning(tmp_path: Path, before: str, after: str) -> None:
    def no_residuals(trainer: Trainer, module: Net) -> None:
        sync = trainer.strategy.update_sync or trainer.strategy.gradient_sync
        assert not any(bool(e.any()) for e in sync.state_dict().get("residuals", {}).values())

    epochs(Net(), compressed(error_feedback=before), 1, **saving(tmp_path))
    hooks = [Agree(), At(train_start=no_residuals)]
    with warnings_to(tmp_path / "warnings"):
        epochs(Net(), compressed(error_feedback=after), 2, tmp_path / "epoch=0.ckpt", callbacks=hooks)
    said = (tmp_path / "warnings").read_text()
    assert said.count(f"was written with `error_feedback='{before}'` and this run has '{after}'") == 1


def test_a_rank_that_lost_its_residuals_goes_on_with_the_others(tmp_path: Path) -> None:
    """Counters, learning rates and PowerSGD's warm starts are in the checkpoint itself."""
    arguments = {"compressor": "powersgd:1", "error_feedback": "gradient"}
    epochs(Net(), compressed(**arguments), 1, **saving(tmp_path))
    sidecar(tmp_path / "epoch=0.ckpt", 1).unlink()
    with warnings_to(tmp_path / "warnings"):
        epochs(Net(), compressed(**arguments), 2, tmp_path / "epoch=0.ckpt", callbacks=[Agree()])
    assert "(rank 1: it does not exist)" in (tmp_path / "warnings").read_text()


def test_a_checkpoint_without_residuals_starts_them_from_zero(tmp_path: Path) -> None:
    epochs(Net(), compressed(error_feedback="none"), 1, **saving(tmp_path))
    with warnings_to(tmp_path / "warnings"):
        epochs(Net(), compressed(strict_sidecars=True), 2, tmp_path / "epoch=0.ckpt", callbacks=[Agree()])
    assert "residual" not in (tmp_path / "warnings").read_text()


def test_a_checkpoint_of_ddp_goes_on_here(tmp_path: Path) -> None:
    whole = epochs(Net(), "ddp_fork", 2)
    epochs(Net(), "ddp_fork", 1, **saving(tmp_path))
    ours = epochs(Net(), compressed(compressor="fp32"), 2, tmp_path / "epoch=0.ckpt", callbacks=[Agree()])
    assert distance(ours, whole) < 1e-6


@pytest.mark.parametrize(("strategy", "devices"), [("ddp_fork", 2), ("auto", 1)])
def test_a_checkpoint_of_ours_goes_on_elsewhere(tmp_path: Path, strategy: str, devices: int) -> None:
    # without momentum, rank 0's optimizer holds nothing of its own
    def plain(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    whole = epochs(Net(optimizer=plain), "ddp_fork", 2)
    epochs(Net(optimizer=plain), compressed(compressor="fp32"), 1, **saving(tmp_path))
    theirs = epochs(Net(optimizer=plain), strategy, 2, tmp_path / "epoch=0.ckpt", devices=devices)
    if devices == 2:
        assert distance(theirs, whole) < 1e-6


def test_a_checkpoint_of_ours_loads_without_a_trainer(tmp_path: Path) -> None:
    ours = epochs(Net(), compressed(), 1, **saving(tmp_path))
    assert distance(Net.load_from_checkpoint(tmp_path / "epoch=0.ckpt").state_dict(), ours) == 0


def test_a_remote_path_works_as_far_as_lightning_does() -> None:
    def one_process(rank: int, world: int) -> tuple[State, State]:
        arguments = {"devices": 1, **saving("memory://folder")}  # type: ignore[arg-type]
        whole = epochs(Net(), CompressedDDPStrategy("topk:0.1"), 2, devices=1)
        epochs(Net(), CompressedDDPStrategy("topk:0.1"), 1, **arguments)
        strict = CompressedDDPStrategy("topk:0.1", strict_sidecars=True)
        return whole, epochs(Net(), strict, 2, "memory://folder/epoch=0.ckpt", devices=1)

    ((whole, resumed),) = run_ranks(1, one_process)
    assert distance(whole, resumed) == 0


# --- files that are not what they should be -------------------------------------------------------------------------


class Touch:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def another_ranks(file: Path) -> None:
    shutil.copy(file.with_name("0.pt"), file)


def a_list(file: Path) -> None:
    torch.save([1, 2], file)


def malicious(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    torch.save({**content, "state": Touch(file.with_name("executed"))}, file)


DAMAGES = {
    missing: "it does not exist",
    truncated: "Error",
    empty: "EOFError",
    another_ranks: "it is that of rank 0",
    a_list: "must hold a dictionary: got list",
    malicious: "UnpicklingError",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    epochs(Net(), compressed(compressor="topk:0.1"), 1, **saving(folder))
    return folder


@pytest.mark.parametrize(
    ("damage", "strict"),
    [*((damage, False) for damage in DAMAGES), (missing, True), (malicious, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_sidecar_that_cannot_be_used(saved: Path, tmp_path: Path, damage: Any, strict: bool) -> None:
    shutil.copytree(saved, tmp_path / "saved")
    file = sidecar(tmp_path / "saved" / "epoch=0.ckpt", 1)
    damage(file)
    started = tmp_path / "started"

    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.sidecars_lost == 1  # known to all ranks
        started.touch()

    class Failing(Callback):
        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            (tmp_path / f"raised {type(exception).__name__} {trainer.global_rank}").touch()

    def resume() -> None:
        strategy = compressed(compressor="topk:0.1", strict_sidecars=strict)
        hooks = [Agree(), At(train_start=check), Failing()]
        epochs(Net(), strategy, 2, tmp_path / "saved" / "epoch=0.ckpt", callbacks=hooks)

    with warnings_to(tmp_path / "warnings"):
        if strict:
            with pytest.raises(Exception, match=r"SidecarError.*rank 1: .*Restore the files") as caught:
                resume()
            assert DAMAGES[damage] in str(caught.value)
        else:
            resume()
    said = (tmp_path / "warnings").read_text()
    assert started.exists() is not strict
    assert said.count("1 sidecars in `epoch=0.ckpt.ranks` could not be used (rank 1: ") == (not strict)
    assert strict or DAMAGES[damage] in said
    assert not file.with_name("executed").exists()


def test_a_lost_sidecar_costs_its_own_residual_only(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "saved")
    sidecar(tmp_path / "saved" / "epoch=0.ckpt", 1).unlink()

    class Checked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 5:
                assert (self.trainer.strategy.update_sync.residual_norm() > 0) is self.trainer.is_global_zero
            return super().training_step(batch, batch_idx)

    with warnings_to(tmp_path / "warnings"):
        path = tmp_path / "saved" / "epoch=0.ckpt"
        epochs(Checked(), compressed(compressor="topk:0.1"), 2, path, callbacks=[Agree()])


def test_sidecars_load_with_weights_only_and_hold_what_differs(saved: Path) -> None:
    contents = [torch.load(sidecar(saved / "epoch=0.ckpt", rank), weights_only=True) for rank in (0, 1)]
    assert [content["rank"] for content in contents] == [0, 1]
    assert contents[0]["optimizers"] == []  # in the checkpoint itself
    assert contents[1]["optimizers"][0]["state"][0]["momentum_buffer"].shape == (8, 6)
    assert set(contents[0]["random"]) >= {"torch", "python"}
    names = {name for name, _ in Net().named_parameters()}
    for content in contents:
        assert content["state"]["residuals"].keys() == names
    header = torch.load(saved / "epoch=0.ckpt", weights_only=True)["lightning_distopt"]
    assert header["world_size"] == 2
    assert {content["save_id"] for content in contents} == {header["save_id"]}


def test_a_weights_only_checkpoint_has_no_sidecars(tmp_path: Path) -> None:
    epochs(Net(), compressed(), 1, **saving(tmp_path, save_weights_only=True))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_nothing_is_left_half_written(saved: Path) -> None:
    assert sorted(path.name for path in sidecar(saved / "epoch=0.ckpt", 0).parent.iterdir()) == ["0.pt", "1.pt"]


def test_the_random_states_of_python_and_numpy_are_restored(tmp_path: Path) -> None:
    def run(seed: int, number: int, name: str, ckpt_path: Any = None) -> list[str]:
        def draw(trainer: Trainer, module: Net) -> None:
            with (tmp_path / f"{name}-{trainer.global_rank}").open("a") as file:
                file.write(f"{random.random()} {numpy.random.rand()}\n")

        class Seeded(Net):
            def setup(self, stage: str) -> None:
                random.seed(seed)
                numpy.random.seed(seed)

        arguments = saving(tmp_path)
        arguments["callbacks"].append(At(train_epoch_start=draw))
        epochs(Seeded(), compressed(), number, ckpt_path, **arguments)
        return (tmp_path / f"{name}-1").read_text().splitlines()

    whole = run(1, 2, "whole")
    first = run(1, 1, "first")
    assert first + run(2, 2, "rest", tmp_path / "epoch=0.ckpt") == whole
