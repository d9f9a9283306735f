"""On another number of ranks the auxiliary point stays where it was, and training goes on with one warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.strategies.fits import Agree, At, fit, flat, gathered, sidecar, warnings_to
from tests.strategies.models import Layered, Net
from tests.strategies.rows import PIPELINES, REPLICAS, build

pytestmark = [pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"), pytest.mark.timeout(100)]

CHANGES = ((2, 4), (4, 2), (4, 3), (4, 1))
SERVED = {"exchange": "sharded_server"}
NORMAL = [("compressed_ddp", (4, 3), SERVED), ("compressed_ddp_powersgd", (2, 4), {})]
TABLE = [
    pytest.param(row, change, more, marks=() if (row, change, more) in NORMAL else pytest.mark.slow)
    for row, more in [*((row, {}) for row in REPLICAS), ("compressed_ddp", SERVED)]
    for change in CHANGES
]


def auxiliary(weights: dict[str, Tensor], residuals: list[dict[str, Tensor]], states: list[dict[str, Any]]) -> Any:
    """Return ``x - mean(e) - s`` of every parameter, in double precision, from the states of all ranks."""
    point = {}
    for name in residuals[0]:
        value = weights[name].double().clone()
        for theirs in residuals:
            value -= theirs[name].double().view(value.shape) / len(residuals)
        for state in states:
            for piece in state.get("shards", {}).get(name, []):
                start, part = piece["start"], piece["values"].double()
                value.view(-1)[start : start + part.numel()] -= part
        if name in states[0].get("server", {}):
            value -= states[0]["server"][name].double().view(value.shape)
        point[name] = value
    return point


@pytest.mark.parametrize(("row", "change", "more"), TABLE)
def test_the_auxiliary_point_does_not_move(tmp_path: Path, row: str, change: tuple[int, int], more: Any) -> None:
    before, after = change
    saving = ModelCheckpoint(tmp_path, "model", every_n_train_steps=5)
    settings = {"devices": before, "max_epochs": 1, "enable_checkpointing": True, "callbacks": [saving]}
    fit(Net(), build(row, **more), -1, **settings)
    files = [torch.load(sidecar(tmp_path / "model.ckpt", r), weights_only=True)["state"] for r in range(before)]
    main = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    has_residuals = bool(files[0].get("residuals"))
    point = auxiliary(main, [state["residuals"] for state in files], files) if has_residuals else {}

    class Checked(Net):
        checked = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.checked:
                Checked.checked = True
                self.check()
            return super().training_step(batch, batch_idx)

        def check(self) -> None:
            strategy = self.trainer.strategy
            state = (strategy.update_sync or strategy.gradient_sync).state_dict()
            for name, expected in point.items():
                value = expected.clone()
                parameter = dict(self.named_parameters())[name].detach()
                if strategy.update_sync is not None:
                    with strategy.update_sync.common_model():
                        parameter = dict(self.named_parameters())[name].detach().clone()
                value -= parameter.double()
                value += sum(gathered(state["residuals"][name].double())).view(value.shape) / after  # type: ignore[union-attr]
                served = torch.zeros_like(value)
                for piece in state.get("shards", {}).get(name, []):
                    start, part = piece["start"], piece["values"].double()
                    served.view(-1)[start : start + part.numel()] += part
                value += sum(gathered(served))  # every coordinate has one owner
                assert float(value.abs().max()) < 1e-6, name

    with warnings_to(tmp_path / "warnings"):
        fit(
            Checked(), build(row, **more), -1, tmp_path / "model.ckpt", devices=after, max_epochs=2, callbacks=[Agree()]
        )
    said = (tmp_path / "warnings").read_text()
    assert said.count(f"was written by {before} processes and this run has {after}") == 1
    assert ("residuals were merged so that their mean over ranks is kept" in said) is has_residuals


# --- pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "change"),
    [
        pytest.param(row, change, marks=() if (row, change) == ("dsp", (4, 3)) else pytest.mark.slow)
        for row in PIPELINES
        for change in CHANGES
    ],
)
def test_a_pipeline_goes_on_with_another_number_of_stages(tmp_path: Path, row: str, change: tuple[int, int]) -> None:
    """Weights, momentum and learning rate are taken up by name."""
    before, after = change
    path = tmp_path / "model.ckpt"
    saving = ModelCheckpoint(tmp_path, "model", every_n_train_steps=5)
    settings = {"devices": before, "max_epochs": 1, "enable_checkpointing": True, "callbacks": [saving]}
    fit(Layered(step_size=2), build(row), -1, **settings)
    saved = torch.load(path, weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    numbers = {name: number for number, name in enumerate(optimizer["param_groups"][0]["param_names"])}

    def check(trainer: Any, module: Any) -> None:
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, saved["state_dict"][name]), name
            if parameter in trainer.optimizers[0].state:
                found = trainer.optimizers[0].state[parameter]["momentum_buffer"]
                assert torch.equal(found, optimizer["state"][numbers[name]]["momentum_buffer"]), name
        assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer["param_groups"][0]["lr"] < 0.05

    def moved(trainer: Any, module: Any) -> None:
        trainer.strategy.share_weights()
        assert len({*map(float, torch.stack(gathered(flat(module).sum())))}) == 1
        assert all(bool(p.isfinite().all()) for p in module.parameters())
        assert trainer.global_step == 10

    fit(
        Layered(step_size=2),
        build(row),
        -1,
        path,
        devices=after,
        max_epochs=2,
        callbacks=[At(train_start=check, train_end=moved)],
    )


# --- another strategy -----------------------------------------------------------------------------------------------


BEFORE = (*REPLICAS, *PIPELINES, "ddp")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the checkpoint of a row, made when it is asked for."""
    folder = tmp_path_factory.mktemp("cross")

    def of(row: str) -> Path:
        path = folder / f"{row}.ckpt"
        if not path.exists():
            saving = ModelCheckpoint(folder, row, every_n_train_steps=5)
            strategy = "ddp_fork" if row == "ddp" else build(row)
            fit(Layered(), strategy, -1, max_epochs=1, enable_checkpointing=True, callbacks=[saving])
        return path

    return of


@pytest.mark.parametrize("after", [pytest.param(row, marks=pytest.mark.slow) for row in BEFORE])
@pytest.mark.timeout(900)
def test_a_checkpoint_of_one_strategy_loads_in_any_other(checkpoints: Any, tmp_path: Path, after: str) -> None:
    """One model under all of them: it starts with the weights of the file, and trains on."""
    for before in BEFORE:
        path = checkpoints(before)
        weights = torch.load(path, weights_only=True)["state_dict"]

        def check(trainer: Any, module: Any, weights: dict[str, Tensor] = weights) -> None:
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, weights[name]), name

        def finite(trainer: Any, module: Any) -> None:
            assert all(bool(p.isfinite().all()) for p in module.parameters())
            assert trainer.global_step > 5

        hooks = [At(train_start=check, train_end=finite), *([] if after in PIPELINES else [Agree()])]
        with warnings_to(tmp_path / "warnings"):
            strategy = "ddp_fork" if after == "ddp" else build(after)
            try:
                fit(Layered(), strategy, -1, path, max_epochs=2, limit_train_batches=2, callbacks=hooks)
            except Exception as error:
                raise AssertionError(f"a checkpoint of {before} in {after}") from error
