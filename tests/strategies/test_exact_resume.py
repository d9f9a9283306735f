"""A run that is interrupted anywhere and goes on from its checkpoint equals the one that was not, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_distopt import CompressedDDPStrategy, ResumableLoader
from tests.ranks import run_ranks
from tests.strategies.everything import Everything, assert_all_same
from tests.strategies.fits import At, distance, fit, warnings_to
from tests.strategies.models import BATCH, Layered, Net, data
from tests.strategies.rows import PIPELINES, REPLICAS, STAGED, build, crossed, kind, rows_and

# A fit may resume without the callback that saved.
pytestmark = [pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"), pytest.mark.timeout(100)]

EPOCHS, BATCHES = 2, 5


class Case(NamedTuple):
    """When a run is saved, and how it goes on.

    Args:
        saves: of ``ModelCheckpoint``; a ``{n}`` is a random step.
        loop: of the ``Trainer``.
        last: resume by ``ckpt_path="last"`` instead of by a file's name.
        workers: processes of the loader.
    """

    saves: dict[str, Any]
    loop: dict[str, Any] = {}  # noqa: RUF012
    last: bool = False
    workers: int = 0


EVERY = {"filename": "{step}", "save_top_k": -1}
CASES = {
    "at a random step": Case({**EVERY, "every_n_train_steps": 1}),
    "at the end of an epoch": Case(EVERY, {"limit_train_batches": 4}),
    "in validation": Case(
        {**EVERY, "save_on_train_epoch_end": False}, {"limit_val_batches": 1, "val_check_interval": 2}
    ),
    "accumulating": Case({**EVERY, "every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "from the last": Case({"every_n_train_steps": 3, "save_last": True}, last=True),
    "from the best": Case({"every_n_train_steps": 3, "save_top_k": 1, "monitor": "step", "mode": "max"}),
    "with a sampler of Lightning's": Case({**EVERY, "every_n_train_steps": 1}, {"use_distributed_sampler": True}),
    "with loader processes": Case({**EVERY, "every_n_train_steps": 3}, workers=1),
}


class Drawing:
    """Everything that can be restored wrongly: dropout, a random order, noise in the data, a schedule by steps.

    Args:
        workers: processes of the loader.
    """

    size = BATCH

    def __init__(self, workers: int = 0) -> None:
        super().__init__(batches=BATCHES, dropout=0.5, step_size=3)
        self.workers = workers

    def on_fit_start(self) -> None:  # Lightning draws numbers of its own before, now and then
        random.seed(7)
        numpy.random.seed(7)

    def train_dataloader(self) -> Any:
        examples = Noisy(data(self.global_rank, self.batches, size=self.size))
        return ResumableLoader(examples, batch_size=self.size, shuffle=True, num_workers=self.workers)


class Random(Drawing, Net):
    """In each rank of its own."""


class RandomLayered(Drawing, Layered):
    """In the first process of a pipeline."""

    size = 24


class Noisy(torch.utils.data.Dataset[Any]):
    """Examples with noise that is drawn when they are read."""

    def __init__(self, clean: Any) -> None:
        self.clean = clean

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.clean[index]
        return inputs + 0.1 * torch.randn_like(inputs), targets


class Interrupted(Callback):
    """Ends the process's fit after some batches, as a signal would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.after:
            trainer.strategy.barrier()
            trainer.should_stop = True


def train(row: str, case: Case, folder: Path, ckpt_path: Any = None, *more: Callback) -> Any:
    torch.manual_seed(7)
    saving = ModelCheckpoint(folder / "saved", enable_version_counter=False, **case.saves)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True, "callbacks": [*more, saving], **case.loop}
    arguments: dict[str, Any] = {"strict_sidecars": True}
    if kind(row) == "stale" and "accumulate_grad_batches" in settings:
        arguments["accumulate"] = settings.pop("accumulate_grad_batches")  # it counts by its own
    module = (Random if kind(row) == "replicas" else RandomLayered)(case.workers)
    return fit(module, build(row, **arguments), -1, ckpt_path, **settings)


ALL = (*REPLICAS, *PIPELINES)


@crossed(CASES, first="at a random step", rows=ALL, also=[(row, "at a random step") for row in STAGED])
def test_resuming_is_exact(tmp_path: Path, row: str, case: Case) -> None:
    # what is saved in the middle of the whole run is what an interruption then would leave
    train(row, case, tmp_path, None, Everything(tmp_path / "a", generators=True))
    left = tmp_path / "saved"
    saved = sorted(left.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    chosen: Any = "last" if case.last else random.Random(f"{row}{case}").choice(saved[:-1] or saved)
    train(row, case, tmp_path, chosen, Everything(tmp_path / "b", generators=True))
    assert_all_same(tmp_path / "a", tmp_path / "b", 2)
    if kind(row) != "replicas":
        return
    # every checkpoint that is there has its sidecars, and no others lie about
    files = {path.name for path in left.glob("*.ckpt")}
    assert {path.name.removesuffix(".ranks") for path in left.glob("*.ranks")} == files
    assert all(len(list(folder.iterdir())) == 1 for folder in left.glob("*.ranks"))


@rows_and(normal=("compressed_ddp",), rows=ALL)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, row: str) -> None:
    case = Case({"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1})
    after = random.Random(row).randrange(1, BATCHES)
    train(row, case, tmp_path / "whole", None, Everything(tmp_path / "a", generators=True))
    train(row, case, tmp_path / "cut", None, Interrupted(after))
    last = tmp_path / "cut" / "saved" / f"step={after}.ckpt"
    train(row, case, tmp_path / "cut", last, Everything(tmp_path / "b", generators=True))
    assert_all_same(tmp_path / "a", tmp_path / "b", 2)


@rows_and(normal=("compressed_ddp",), rows=ALL)
def test_resuming_twice_over_the_end_of_an_epoch_is_exact(tmp_path: Path, row: str) -> None:
    """``begin_next_epoch``: from the last batch of an epoch, then from inside of the next; Lightning alone repeats a part."""
    case = Case({"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1})
    train(row, case, tmp_path, None, Everything(tmp_path / "a", generators=True))
    train(row, case, tmp_path, tmp_path / "saved" / f"step={BATCHES}.ckpt")
    train(row, case, tmp_path, tmp_path / "saved" / f"step={BATCHES + 2}.ckpt", Everything(tmp_path / "b", True))
    assert_all_same(tmp_path / "a", tmp_path / "b", 2)


def test_a_plain_loader_gets_a_clear_warning_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    fit(Net(), build("compressed_ddp"), -1, max_epochs=1, enable_checkpointing=True, callbacks=[saving])
    with warnings_to(tmp_path / "warnings"):
        fit(Net(), build("compressed_ddp"), -1, tmp_path / "step=3.ckpt", max_epochs=1)
    said = (tmp_path / "warnings").read_text()
    assert said.count("`step=3.ckpt` was saved inside of an epoch, by a run whose loader could not tell its place") == 1
    assert "Use `ResumableLoader`" in said


def test_the_weights_need_no_sidecar(tmp_path: Path) -> None:
    ours = fit(Net(), build("compressed_ddp"), 3, enable_checkpointing=True, callbacks=[
        ModelCheckpoint(tmp_path, "model", every_n_train_steps=3)
    ])  # fmt: skip
    for folder in (tmp_path / "model.ckpt.ranks").iterdir():
        for file in folder.iterdir():
            file.unlink()
    assert distance(Net.load_from_checkpoint(tmp_path / "model.ckpt").state_dict(), ours) == 0
    from tests.strategies.fits import trainer

    with warnings_to(tmp_path / "warnings"):
        testing = trainer(build("compressed_ddp", strict_sidecars=True), limit_test_batches=1)
        testing.test(Net(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert "sidecar" not in (tmp_path / "warnings").read_text()


def test_a_remote_folder_keeps_the_best_only_and_resumes(tmp_path: Path) -> None:
    """In one process: memory of fsspec's is not shared."""

    def one_process(rank: int, world: int) -> tuple[Any, ...]:
        def train(ckpt_path: Any = None) -> Any:
            torch.manual_seed(3)
            saving = ModelCheckpoint(
                "memory://best", "{step}", save_top_k=2, monitor="step", mode="max", every_n_train_steps=1
            )
            settings = {"devices": 1, "max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
            return fit(Random(), CompressedDDPStrategy("topk:0.1", strict_sidecars=True), -1, ckpt_path, **settings)

        from lightning.fabric.utilities.cloud_io import get_filesystem

        whole = train()
        files = sorted(str(f) for f in get_filesystem("memory://best").ls("/best", detail=False))
        return files, whole, train("memory://best/step=9.ckpt")

    ((files, whole, resumed),) = run_ranks(1, one_process)
    assert [name.rsplit("/", 1)[1] for name in files] == [
        "step=10.ckpt", "step=10.ckpt.ranks", "step=9.ckpt", "step=9.ckpt.ranks",
    ]  # fmt: skip
    assert distance(whole, resumed) == 0


def test_the_loaders_place_is_each_ranks_own(tmp_path: Path) -> None:
    """Ranks that shuffle by themselves have orders of their own, and the checkpoint holds rank 0's only."""
    case = CASES["at a random step"]

    def began(trainer: Trainer, module: Any) -> None:
        place = trainer.fit_loop._combined_loader.flattened[0].state_dict()
        torch.save(place, tmp_path / f"{trainer.global_rank}.pt")

    class OfItsOwn(Random):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            torch.manual_seed(self.global_rank)

    saving = ModelCheckpoint(tmp_path / "saved", enable_version_counter=False, **case.saves)
    settings = {"max_epochs": 1, "enable_checkpointing": True, "callbacks": [saving, At(train_end=began)]}
    fit(OfItsOwn(), build("compressed_ddp"), -1, None, **settings)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(zero["began"], one["began"])
    settings["callbacks"] = [At(train_end=began)]
    fit(OfItsOwn(), build("compressed_ddp"), -1, tmp_path / "saved" / "step=2.ckpt", **settings)
    assert torch.equal(torch.load(tmp_path / "1.pt")["began"], one["began"])
