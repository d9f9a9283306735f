"""Every private name that we touch is in the table of `compat.py`, does what we need, and has a test here."""

from __future__ import annotations

import ast
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import lightning_distopt
from lightning_distopt import CompressedDDPStrategy
from lightning_distopt.exchange.notes import shared_store
from lightning_distopt.strategies import compat
from lightning_distopt.strategies.launchers import PatientProcesses, PatientScripts
from tests.ranks import run_ranks
from tests.strategies.fits import At, compressed, fit, trainer
from tests.strategies.models import Net

PACKAGE = Path(lightning_distopt.__file__).parent
LISTED = set(re.findall(r"^``([\w.]+)``", compat.__doc__, re.MULTILINE))


# --- the table ------------------------------------------------------------------------------------------------------


def private_accesses() -> dict[str, str]:
    """Return ``name -> file`` of private attributes that the package reads on objects that are not its own."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    defined: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    theirs = set(dir(DDPStrategy())) | set(vars(DDPStrategy()))
    found = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            name = getattr(node, "attr", getattr(node, "name", ""))
            if (
                not isinstance(name, str)
                or not name.startswith("_")
                or name.startswith("__")
                or name in ("_asdict", "_replace", "_exit")
            ):
                continue  # public names; a named tuple's methods and os._exit are among them
            of_a_strategy = path.name in ("compressed_ddp.py", "process_group.py", "watched_ddp.py") and name in theirs
            if of_a_strategy or (isinstance(node, ast.Attribute) and name not in defined):
                found[name] = path.name
    return found


def test_the_table_is_complete_and_has_no_more_than_that() -> None:
    touched = private_accesses()
    listed = {part for name in LISTED for part in name.split(".") if part.startswith("_") and not part[1].isupper()}
    tests_only = {"_get_ddp_logging_data", "_ddp_kwargs"}
    assert {name for name in touched if not name[1].isupper()} == listed - tests_only, touched


def test_every_name_of_the_table_has_a_test() -> None:
    mine = Path(__file__).read_text()
    for name in LISTED:
        assert f"``{name}``" in mine, name


# --- its rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["bf16", "topk:0.1"])
def test_the_hook_is_attached_on_a_cpu_too(compressor: str) -> None:
    """``DDPStrategy._register_ddp_hooks`` and ``DistributedDataParallel._get_ddp_logging_data``."""
    assert callable(DDPStrategy._register_ddp_hooks)

    def check(trainer: Trainer, module: Net) -> None:
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        assert trainer.strategy.model._get_ddp_logging_data()["comm_hook"] == "_hook"
        assert trainer.strategy.gradient_sync.rounds == trainer.global_step == 4

    fit(Net(), compressed(compressor=compressor, error_feedback="none"), 4, callbacks=[At(train_end=check)])


def test_with_error_feedback_there_is_no_wrapper() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.model is module
        assert trainer.strategy.gradient_sync is None

    fit(Net(), compressed(), 2, callbacks=[At(train_end=check)])


def test_the_precision_goes_through_our_setter() -> None:
    """``Strategy._precision_plugin``."""
    strategy = trainer("compressed_ddp_fork", precision="bf16-mixed").strategy
    assert isinstance(strategy.precision_plugin, MixedPrecision)
    assert strategy._precision_plugin is strategy.precision_plugin
    other = Precision()
    strategy.precision_plugin = other
    assert strategy.precision_plugin is other


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loggers_write_every_so_many_batches_that_stepped(accumulate: int) -> None:
    """``Trainer._logger_connector.should_update_logs``."""
    written: list[bool] = []

    def see(trainer: Trainer, module: Net) -> None:
        written.append(compat.loggers_write_now(trainer))

    def check(trainer: Trainer, module: Net) -> None:
        assert written == ([False, False, True] if accumulate == 1 else [False, False, False, False, True, True]) * 2

    hooks = At(train_batch_end=see, train_end=check)
    fit(Net(batches=12), "ddp_fork", 6, accumulate_grad_batches=accumulate, log_every_n_steps=3, callbacks=[hooks])


def test_the_averaged_model_of_a_callback_is_known() -> None:
    """``WeightAveraging._average_model``."""
    callback = EMAWeightAveraging(decay=0.5)
    module = Net()
    callback.setup(trainer("auto", devices=1), module, "fit")
    average = compat.average_of(callback)
    assert [name for name, _ in average.module.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert int(average.n_averaged) == 0


def test_a_stage_does_not_greet_itself() -> None:
    """``PipelineStage._get_init_p2p_neighbors_ops``."""

    def one(rank: int, world: int) -> int:
        stage = PipelineStage(torch.nn.Linear(1, 1), 0, 2, torch.device("cpu"))
        stage.stage_index_to_group_rank = {0: 0, 1: 0}
        stage = compat.without_greetings_to_itself(stage)
        greet = getattr(stage, "_get_init_p2p_neighbors_ops", list)  # torch 2.15 does otherwise
        return len(greet())

    assert run_ranks(1, one) == [0]


def test_the_pass_of_swa_is_known() -> None:
    """``Trainer.fit_loop._skip_backward``."""
    skipped: list[bool] = []

    def see(trainer: Trainer, module: Net) -> None:
        skipped.append(compat.backward_is_skipped(trainer))

    def check(trainer: Trainer, module: Net) -> None:
        assert skipped == [False] * 2 + [True]

    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    fit(Net(batches=1), "ddp_fork", steps=-1, max_epochs=2, callbacks=[swa, At(train_batch_end=see, fit_end=check)])


def test_norms_of_all_parameters_in_one_call() -> None:
    """``torch._foreach_norm``."""
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[float("nan")]]), torch.tensor(2.0, dtype=torch.bfloat16)]
    assert [float(norm) for norm in torch._foreach_norm(tensors)[::2]] == [5.0, 2.0]
    norms = torch._foreach_norm(tensors, float("inf"))
    assert [float(norm) for norm in norms[::2]] == [4.0, 2.0]
    assert norms[1].isnan()


@pytest.mark.parametrize(
    ("start", "theirs"), [("popen", _SubprocessScriptLauncher), ("fork", _MultiProcessingLauncher)]
)
def test_pipelines_start_processes_as_replicas_do(start: str, theirs: Any) -> None:
    """``Strategy._configure_launcher``, ``Strategy._launcher``, ``launchers._MultiProcessingLauncher`` and
    ``launchers._SubprocessScriptLauncher``."""
    strategy = trainer(lightning_distopt.DSPStrategy(start_method=start)).strategy
    assert type(strategy.launcher) is type(trainer(CompressedDDPStrategy(start_method=start)).strategy.launcher)
    assert isinstance(strategy.launcher, theirs)


def test_the_process_group_is_made_as_lightning_does() -> None:
    """``distributed._init_dist_connection`` and ``distributed._get_default_process_group_backend_for_device``; and
    ``ParallelStrategy._layer_sync``, ``fit_loop.epoch_loop._broadcast_sigterm_tensor``."""
    from lightning.fabric.utilities import distributed

    assert distributed._get_default_process_group_backend_for_device(torch.device("cpu")) == "gloo"
    assert callable(distributed._init_dist_connection)
    made = trainer("dsp_fork", sync_batchnorm=True)
    assert made.strategy._layer_sync is not None
    compat.silence_sigterm_broadcast(made)
    if hasattr(type(made.fit_loop.epoch_loop), "_broadcast_sigterm_tensor"):  # not in 2.6.0
        assert made.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_what_our_tests_look_at() -> None:
    """``DDPStrategy._ddp_kwargs``."""
    strategy = compressed(find_unused_parameters=True)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}


def test_our_launchers_stand_in_for_lightnings() -> None:
    """``DDPStrategy._configure_launcher``, ``DDPStrategy._launcher``, ``DDPStrategy._start_method`` and
    ``_SubprocessScriptLauncher._call_children_scripts``.
    """
    for start_method, ours, theirs in (
        ("fork", PatientProcesses, _MultiProcessingLauncher),
        ("spawn", PatientProcesses, _MultiProcessingLauncher),
        ("popen", PatientScripts, _SubprocessScriptLauncher),
    ):
        strategy = trainer(CompressedDDPStrategy(start_method=start_method)).strategy
        assert type(strategy.launcher) is ours
        assert type(trainer(DDPStrategy(start_method=start_method)).strategy.launcher) is theirs
        assert (strategy._start_method, strategy._launcher) == (start_method, strategy.launcher)
        assert getattr(strategy.launcher, "_start_method", start_method) == start_method
    assert callable(_SubprocessScriptLauncher._call_children_scripts)


def test_sigterm_is_noted() -> None:
    """``Trainer._signal_connector.received_sigterm``."""
    fitting = trainer("compressed_ddp_fork")
    compat.note_sigterm(fitting)
    assert fitting.received_sigterm


def test_how_long_a_rank_is_waited_for() -> None:
    """``DDPStrategy._timeout``."""
    assert compressed(timeout=timedelta(seconds=7)).patience == 7.0
    assert compressed().patience == DDPStrategy()._timeout.total_seconds()


def test_the_store_of_the_process_group_takes_notes() -> None:
    """``distributed_c10d._get_default_store``."""

    def note(rank: int, world: int) -> bytes:
        store = shared_store(compat.default_store(), "test")
        if rank == 0:
            store.set("key", "value")
        dist.barrier()
        return store.get("key")

    assert run_ranks(2, note) == [b"value"] * 2


def test_batches_are_skipped_without_being_read() -> None:
    """``_BaseDataLoaderIter._next_index``."""
    iterator = iter(DataLoader(TensorDataset(torch.arange(6)), batch_size=2))
    compat.skip_batches(iterator, 2)
    assert [batch.tolist() for (batch,) in iterator] == [[4, 5]]
