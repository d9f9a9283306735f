"""`LocalUpdateStrategy` in Lightning: its identities with `ddp`, what others see of a round, weights, files, bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt import LocalUpdateStrategy
from lightning_distopt.data_parallel import FedMom, Plain, TorchOuter
from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.header import Header, read_header
from tests.strategies.everything import Everything, assert_all_same
from tests.strategies.fits import At, State, assert_same_on_all_ranks, distance, fit, flat, gathered, warnings_to
from tests.strategies.models import BATCH, Net, data
from tests.strategies.rows import RECORDS
from tests.strategies.test_exact_resume import Random
from tests.strategies.test_manual_optimization import Gan
from tests.strategies.test_yaml import strategy_from


def local(**arguments: Any) -> LocalUpdateStrategy:
    """Return the strategy under test, on forked processes."""
    return LocalUpdateStrategy(start_method="fork", **arguments)


def weights(state: State) -> State:
    """Leave out the buffers, which `ddp` takes from rank 0 and this strategy averages."""
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


# ---- must hold -------------------------------------------------------------------------------------------------------


def test_one_step_a_round_with_a_plain_outer_step_is_ddp() -> None:
    ddp = fit(Net(step_size=4), "ddp_fork", 20)
    ours = fit(Net(step_size=4), local(sync_every=1), 20)
    assert distance(weights(ours), weights(ddp)) < 1e-6


def test_at_a_constant_rate_fedmom_is_torchs_nesterov_on_the_pseudo_gradient_and_without_momentum_fedavg() -> None:
    momentum = fit(Net(), local(sync_every=3, outer_optimizer=FedMom(0.7, 0.9)), 12)
    nesterov = TorchOuter("torch.optim.SGD", {"lr": 0.7, "momentum": 0.9, "nesterov": True})
    assert distance(momentum, fit(Net(), local(sync_every=3, outer_optimizer=nesterov), 12)) < 1e-6
    average = fit(Net(), local(sync_every=3), 12)
    assert distance(average, fit(Net(), local(sync_every=3, outer_optimizer=FedMom(1.0, 0.0)), 12)) < 1e-6
    assert distance(average, momentum) > 1e-3


@pytest.mark.slow  # the engine's own test of it is not
def test_papers_weights_with_ranks_over_participants_are_normalized_ones_with_one() -> None:
    settings = {"sync_every": 2, "participation": 0.5}
    paper = fit(Net(), local(weighting="paper", outer_optimizer=FedMom(2.0), **settings), 8)
    normalized = fit(Net(), local(weighting="normalized", outer_optimizer=FedMom(1.0), **settings), 8)
    assert distance(paper, normalized) < 1e-6
    assert distance(paper, fit(Net(), local(sync_every=2, outer_optimizer=FedMom()), 8)) > 1e-3


@pytest.mark.parametrize("every", [1, 4])
def test_a_step_sends_one_hth_of_the_bytes_of_ddp(every: int) -> None:
    def check(trainer: Trainer, module: Any) -> None:
        meter = trainer.strategy.meter
        gradients = 4 * sum(
            p.numel() for p in module.parameters()
        )  # a ring all-reduce of two ranks sends as much as there is
        assert meter.steps == 8
        assert meter.sent["exchange"] * every == 8 * gradients
        # flags and averaged buffers are the rest
        rest = meter.step_bytes_sent - meter.sent["exchange"]
        assert rest == 8 // every * (32 + sum(max(4, b.element_size()) * b.numel() for b in module.buffers()))

    fit(Net(), local(sync_every=every), 8, callbacks=[At(train_end=check)])


def test_a_warm_start_exchanges_every_step_and_then_rounds_begin() -> None:
    settings = {"sync_every": 3, "outer_optimizer": FedMom(0.7, 0.9), "warm_start_steps": 5}

    def look(trainer: Trainer, module: Any) -> None:
        alike = torch.equal(*gathered(flat(module)))
        assert alike is (trainer.global_step <= 5 or trainer.global_step % 3 == 2), trainer.global_step

    fit(Net(), local(**settings), 11, callbacks=[At(train_batch_end=look)])


def test_the_first_warm_steps_end_where_ddp_ends() -> None:
    ours = fit(Net(), local(sync_every=100, outer_optimizer=FedMom(0.1), warm_start_steps=5), 5)
    assert distance(weights(ours), weights(fit(Net(), "ddp_fork", 5))) < 1e-6


# ---- what others see of a round --------------------------------------------------------------------------------------


class Rounds(Net):
    """Asserts that validation sees one common model, buffers too, and remembers nothing of it."""

    def on_validation_epoch_start(self) -> None:
        assert_same_on_all_ranks(flat(self))
        for buffer in self.buffers():
            assert_same_on_all_ranks(buffer)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sync_every": 4, "outer_optimizer": FedMom(0.7)},
        {"sync_every": 4, "fragments": 2, "delay": 1, "mix": 0.5},
    ],
    ids=str,
)
def test_validation_sees_the_common_model_and_changes_nothing(arguments: Any) -> None:
    validated = fit(Rounds(), local(**arguments), val_check_interval=1, limit_val_batches=1)
    assert distance(validated, fit(Net(), local(**arguments))) == 0


def test_buffers_are_averaged_and_counters_are_the_largest() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
            self.register_buffer("flagged", torch.zeros(1, dtype=torch.bool))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1 + self.global_rank
            self.flagged |= bool(self.global_rank)
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.mine = self.net[1].running_var.clone()

        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step % 2 == 0:
                # ranks have 5 and 15 batches
                ours, theirs = gathered(self.mine)
                torch.testing.assert_close(self.net[1].running_var, 0.25 * ours + 0.75 * theirs)
                assert self.seen.tolist() == [2 * self.trainer.global_step] * 2
                assert bool(self.flagged)

        def train_dataloader(self) -> Any:
            return DataLoader(data(self.global_rank, 5 + 10 * self.global_rank), batch_size=BATCH)

    # the counters of rank 1 are those of both ranks after a round, and count on from there
    fit(Counting(), local(sync_every=2, outer_optimizer=FedMom(1.0, 0.9)), 4, limit_train_batches=4)


def test_ranks_count_by_their_samples() -> None:
    class Uneven(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=lambda params: SGD(params, lr=0.1))

        def train_dataloader(self) -> Any:
            return DataLoader(data(self.global_rank, 5 + 10 * self.global_rank), batch_size=BATCH)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = flat(self)

        def on_train_batch_end(self, *args: Any) -> None:
            steps = gathered(torch.cat([p.grad.double().reshape(-1) for p in self.parameters()]))
            moved = 0.25 * steps[0] + 0.75 * steps[1]
            torch.testing.assert_close(flat(self), self.before - 0.1 * moved, rtol=0, atol=1e-6)

    fit(Uneven(), local(sync_every=1), 4, limit_train_batches=4)


def test_a_loader_without_a_length_needs_uniform_weights() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([data(0, 1)[i] for i in range(BATCH)])

    class Streamed(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(Endless(), batch_size=BATCH)

    with pytest.raises(
        Exception, match=r"`weighting='normalized'` needs to know.*ranks \[0, 1\].*`weighting='uniform'`"
    ):
        fit(Streamed(), local(), 1)
    fit(Streamed(), local(weighting="uniform"), 1)


def test_the_inner_state_is_kept_or_reset() -> None:
    def look(trainer: Trainer, module: Any) -> None:
        empty = not trainer.optimizers[0].state
        resets = trainer.strategy.inner_state == "reset"
        assert empty is (resets and trainer.global_step % 2 == 0)

    for state in ("keep", "reset"):
        fit(Net(), local(sync_every=2, inner_state=state), 4, callbacks=[At(train_batch_end=look)])


def test_who_sits_a_round_out_takes_the_common_model_and_leaves_its_optimizer_alone() -> None:
    def look(trainer: Trainer, module: Any) -> None:
        stepped = torch.tensor([float(bool(trainer.optimizers[0].state))])
        if trainer.global_step == 1:
            assert sorted(float(s) for s in gathered(stepped)) == [0.0, 1.0]
        if trainer.global_step % 2 == 0:
            assert_same_on_all_ranks(flat(module))

    fit(Net(), local(sync_every=2, participation=0.5), 6, callbacks=[At(train_batch_end=look)])


def test_several_optimizers_in_manual_optimization_agree_after_each_round() -> None:
    def look(trainer: Trainer, module: Any) -> None:
        assert_same_on_all_ranks(flat(module))

    fit(Gan(), local(sync_every=2, outer_optimizer=FedMom(0.7)), -1, max_epochs=1, callbacks=[At(fit_end=look)])


# ---- files -----------------------------------------------------------------------------------------------------------

EXACT: dict[str, dict[str, Any]] = {
    "fedmom, one of two by samples": {"sync_every": 3, "outer_optimizer": FedMom(0.7), "participation": 0.5},
    "fragments on their way, mixed": {
        "sync_every": 4,
        "fragments": 2,
        "delay": 1,
        "mix": 0.5,
        "outer_optimizer": FedMom(),
    },
    "compressed, adam outside": {
        "sync_every": 3,
        "compressor": "topk:0.2",
        "outer_optimizer": TorchOuter("torch.optim.Adam", {"lr": 0.1}),
        "inner_state": "reset",
        "warm_start_steps": 2,
    },
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "adam" in name else ()) for name in EXACT]
)
def test_a_run_resumes_in_the_middle_of_a_round_bit_for_bit(tmp_path: Path, name: str) -> None:
    def train(ckpt_path: Any, folder: str) -> None:
        torch.manual_seed(7)
        saving = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
        calls = [Everything(tmp_path / folder), saving] if ckpt_path is None else [Everything(tmp_path / folder)]
        settings = {"max_epochs": 2, "enable_checkpointing": ckpt_path is None, "callbacks": calls}
        fit(Random(), local(strict_sidecars=True, **EXACT[name]), -1, ckpt_path, **settings)

    train(None, "whole")
    for step in (4, 7):
        train(tmp_path / "saved" / f"step={step}.ckpt", f"from {step}")
        assert_all_same(tmp_path / "whole", tmp_path / f"from {step}", 2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_holds_the_common_model_and_its_momentum_once(tmp_path: Path) -> None:
    def look(trainer: Trainer, module: Any) -> None:
        if trainer.global_step == 3:
            torch.save([v.clone() for v in module.state_dict().values()], tmp_path / f"common {trainer.global_rank}")

    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    arguments = {"sync_every": 3, "outer_optimizer": FedMom(0.7)}
    settings = {"callbacks": [At(train_batch_end=look), saving], "enable_checkpointing": True}
    fit(Net(), local(**arguments), 5, **settings)
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    for got, wanted in zip(saved["state_dict"].values(), torch.load(tmp_path / "common 0"), strict=True):
        assert torch.equal(got, wanted)
    assert set(saved["lightning_distopt"]["shared"]["outer"]) == {name for name, _ in Net().named_parameters()}
    (folder,) = (tmp_path / "step=5.ckpt.ranks").iterdir()
    sidecar = torch.load(folder / "1.pt", weights_only=True)
    assert "outer" not in sidecar["state"]
    assert sidecar["state"]["buffers"]
    # a rank that has lost its file goes on with the momentum of the others
    (folder / "1.pt").unlink()
    check = At(fit_end=lambda trainer, module: assert_same_on_all_ranks(flat(module)))
    with warnings_to(tmp_path / "warnings"):
        fit(Net(), local(**arguments), 9, tmp_path / "step=5.ckpt", callbacks=[check])
    assert "1 sidecars in `step=5.ckpt.ranks` could not be used" in (tmp_path / "warnings").read_text()


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ({"outer": [1]}, "`outer` is .*not a dictionary"),
        ({"outer": {"w": {"v": "text"}}}, "`outer` of 'w' is .*not tensors and numbers"),
        ({"outer": {"w": {"v": torch.tensor([float("nan")])}}}, "`outer` of 'w' holds a NaN"),
        ({"flight": {"w": torch.ones(2, dtype=torch.int64)}}, "`flight` of 'w' is .*not a dense tensor of floats"),
    ],
    ids=str,
)
def test_what_a_file_says_of_the_outer_memory_is_checked_before_it_is_used(shared: Any, words: str) -> None:
    header = Header(2, "local_sgd", "local", "0-1", False, shared)
    with pytest.raises(CheckpointError, match=words):
        read_header({"lightning_distopt": header.as_dict()}, "some.ckpt")


def test_a_single_device_trains_and_sends_nothing() -> None:
    def look(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.meter.bytes_sent == 0

    fit(Net(), local(fragments=4, mix=0.5), 9, devices=1, callbacks=[At(train_end=look)])


# ---- names, text, bad input ------------------------------------------------------------------------------------------


def registered(name: str) -> LocalUpdateStrategy:
    record = RECORDS[name]
    found = record.strategy(**record.arguments)
    assert isinstance(found, LocalUpdateStrategy)
    return found


def test_the_rows_are_the_methods() -> None:
    assert registered("local_sgd").outer_optimizer == Plain()
    assert registered("fedavg").inner_state == registered("fedmom").inner_state == "reset"
    assert registered("fedmom").outer_optimizer == FedMom(1.0, 0.9)
    diloco = registered("diloco")
    assert (diloco.outer_optimizer, diloco.sync_every, diloco.inner_state) == (FedMom(0.7, 0.9), 500, "keep")
    pef = registered("sa_pef")
    assert (pef.error_feedback, pef.coefficient, pef.sync_every) == ("step_ahead", 0.85, 5)


def test_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    outer = {"class_path": "lightning_distopt.data_parallel.FedMom", "init_args": {"lr": 0.7, "momentum": 0.8}}
    arguments = {
        "sync_every": 12,
        "outer_optimizer": outer,
        "compressor": "sign",
        "fragments": 3,
        "start_method": "fork",
    }
    settings = {"class_path": "lightning_distopt.LocalUpdateStrategy", "init_args": arguments}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"strategy": settings}}))
    strategy = strategy_from(f"--config={path}")
    assert strategy.outer_optimizer == FedMom(0.7, 0.8)
    assert (strategy.fragments, strategy.error_feedback) == (3, "local")
    outer = {
        "class_path": "lightning_distopt.data_parallel.TorchOuter",
        "init_args": {"optimizer": "torch.optim.Adam", "arguments": {"lr": 0.1}},
    }
    settings["init_args"] = {"outer_optimizer": outer}
    path.write_text(yaml.safe_dump({"trainer": {"strategy": settings}}))
    assert strategy_from(f"--config={path}").outer_optimizer == TorchOuter("torch.optim.Adam", {"lr": 0.1})
    named = strategy_from("--trainer.strategy=lightning_distopt.LocalUpdateStrategy",
                          "--trainer.strategy.outer_optimizer=fedmom")  # fmt: skip
    assert named.outer_optimizer == FedMom()


BAD: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"sync_every": 0}, ValueError, ["`sync_every` must be an integer >= 1", "got 0", "`sync_every=1`"]),
    ({"participation": 0}, ValueError, ["`participation` must be in (0, 1]", "got 0"]),
    ({"participation": 1.5}, ValueError, ["`participation` must be in [0, 1]", "got 1.5"]),
    (
        {"weighting": "samples"},
        ValueError,
        ["`weighting` must be one of 'normalized', 'paper', 'uniform'", "'samples'"],
    ),
    ({"inner_state": "fresh"}, ValueError, ["`inner_state` must be one of 'keep', 'reset'", "'fresh'"]),
    ({"warm_start_steps": -1}, ValueError, ["`warm_start_steps` must be an integer >= 0", "got -1"]),
    ({"outer_optimizer": "nesterov"}, ValueError, ["`outer_optimizer` must be 'plain', 'fedmom'", "'nesterov'"]),
    ({"outer_optimizer": 0.7}, TypeError, ["`outer_optimizer`", "0.7", "`FedMom(0.7, 0.9)`"]),
    (
        {"fragments": 3},
        ValueError,
        ["`fragments` must divide `sync_every`", "got 3", "`sync_every=8`", "`sync_every=9`"],
    ),
    ({"fragments": 0}, ValueError, ["`fragments` must be an integer >= 1", "got 0"]),
    ({"fragments": 4, "delay": 2}, ValueError, ["`delay` must be below `sync_every / fragments`", "got 2 with 8 / 4"]),
    ({"sync_every": 1, "delay": 1}, ValueError, ["`delay` must be below", "got 1 with 1 / 1"]),
    ({"mix": 2}, ValueError, ["`mix` must be in [0, 1]", "got 2"]),
    ({"fragments": 2, "participation": 0.5}, ValueError, ["`participation` must be 1.0 with `fragments=2`", "got 0.5"]),
    ({"delay": 1, "inner_state": "reset"}, ValueError, ["`inner_state` must be 'keep' with `delay=1`", "'reset'"]),
    (
        {"mix": 0.5, "compressor": "sign", "coefficient": 1.0},
        ValueError,
        ["`coefficient` must be 0 with `mix=0.5`", "got 1.0", "`error_feedback='local'`"],
    ),
    ({"error_feedback": "local"}, ValueError, ["`error_feedback` belongs to a compressor", "'local'", "topk:0.01"]),
    ({"coefficient": 0.5}, ValueError, ["`coefficient` belongs to a compressor", "got 0.5"]),
    ({"scope": "model"}, ValueError, ["`scope` belongs to a compressor", "'model'"]),
    (
        {"compressor": "sign", "error_feedback": "gradient"},
        ValueError,
        ["`error_feedback` must be one of", "'gradient'"],
    ),
    (
        {"compressor": "sign", "error_feedback": "none", "coefficient": 0.5},
        ValueError,
        ["`coefficient` must be 0", "0.5"],
    ),
    ({"compressor": "powersgd:2"}, ValueError, ["`compressor` must work on displacements", "PowerSGD(rank=2)"]),
    ({"compressor": "qsgd:5"}, ValueError, ["needs a contractive compressor", "`error_feedback='none'`"]),
    ({"speed": 3}, TypeError, ["`LocalUpdateStrategy` got unknown arguments ['speed']"]),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_input_is_named_at_once(arguments: dict[str, Any], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        LocalUpdateStrategy(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_fragments_than_parameters() -> None:
    with pytest.raises(Exception, match=r"`fragments` must be at most .* got 8 fragments for 6. Use `fragments=6`"):
        fit(Net(), local(sync_every=8, fragments=8), 8)
