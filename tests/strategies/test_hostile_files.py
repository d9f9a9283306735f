"""Files that mean harm, or are broken, are refused with a typed error: nothing of them runs, and nothing of the run changes."""

from __future__ import annotations

import ast
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distopt import CompressedDDPStrategy, newest_whole_checkpoint
from lightning_distopt.errors import CheckpointError, SidecarError
from lightning_distopt.strategies.replica_state import check_added
from tests.ranks import run_ranks
from tests.strategies.everything import assert_same
from tests.strategies.fits import At, fit, sidecar, trainer
from tests.strategies.models import Net
from tests.strategies.rows import build, net

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Touch:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Imported:
    """Pickled, it imports a module when it is loaded."""

    def __reduce__(self) -> Any:
        return __import__, ("this",)


Change = Callable[[Path, dict[str, Any]], Any]


def _put(*keys: Any) -> Callable[[Any], Change]:
    """A change that puts a value at a place in a file's content."""

    def of(value: Any) -> Change:
        def change(file: Path, content: dict[str, Any]) -> Any:
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value(file) if callable(value) else value
            return content

        return change

    return of


def _cut(kept: float) -> Change:
    def change(file: Path, content: Any) -> bytes:
        data = file.read_bytes()
        return data[: int(kept * len(data))]

    return change


def _touch(file: Path) -> Touch:
    return Touch(file.parent / "executed")


def _header(name: str, value: Any) -> Change:
    return _put("lightning_distopt", name)(value)


MAIN: dict[str, Change] = {
    "code in the weights": _put("state_dict", "net.0.bias")(_touch),
    "code in the optimizer": _put("optimizer_states")(_touch),
    "code in the header": _header("algorithm", _touch),
    "an import in the loops": _put("loops")(lambda file: Imported()),
    "a class of this package": _put("strategy")(lambda file: CompressedDDPStrategy("topk:0.1")),
    "cut at the end": _cut(0.99),
    "cut in the middle": _cut(0.5),
    "empty": _cut(0.0),
    "text": lambda file, content: b"not a checkpoint",
    "a list": lambda file, content: [1, 2],
    "a header that is a list": _put("lightning_distopt")([1]),
    "a later format": _header("format", 99),
    "no ranks": _header("world_size", 0),
    "absurdly many ranks": _header("world_size", 10**12),
    "a truth for a number of ranks": _header("world_size", True),
    "a path for a save id": _header("save_id", "../../../etc"),
    "an unknown error feedback": _header("error_feedback", "os.system"),
    "a word for engine state": _header("shared", "words"),
    "a word for a counter": _header("shared", {"rounds": "many"}),
}
SIDECAR: dict[str, Change] = {
    "code": _put("state")(_touch),
    "another save's id": _put("save_id")("1-0-5-5-1"),
    "another rank's": _put("rank")(7),
    "cut": _cut(0.7),
    "no bytes": _cut(0.0),
    "a list": lambda file, content: [1],
    "a word for a residual": _put("state", "residuals", "net.0.bias")("words"),
    "a NaN in a residual": _put("state", "residuals", "net.0.bias")(torch.full((8,), float("nan"))),
    "whole numbers in a residual": _put("state", "residuals", "net.0.bias")(torch.ones(8, dtype=torch.int64)),
    "a list of residuals": _put("state", "residuals")([1]),
    "a shard that starts nowhere": _put("state", "shards")({"net.0.bias": [{"start": -5, "values": torch.ones(2)}]}),
    "a counter below zero": _put("state", "groups", "0", "rounds")(-1),
    "no random states": _put("random")({}),
    "a random state of another length": _put("random", "torch")(torch.zeros(3, dtype=torch.uint8)),
    "an optimizer that is none": _put("optimizers")([1]),
    "a word for the loaders": _put("loaders")("words"),
}


def _all(rank: int, world: int, root: Path) -> dict[str, Any]:
    """Save once; for each change, change a copy and try to go on from it."""
    found: dict[str, Any] = {}
    good = root / "good"
    saving = ModelCheckpoint(good, "model", every_n_train_steps=3)
    settings = {"devices": 1, "enable_checkpointing": True, "callbacks": [saving]}
    fit(Net(), CompressedDDPStrategy("topk:0.1"), 3, **settings)
    for where, table in (("main", MAIN), ("sidecar", SIDECAR)):
        for name, change in table.items():
            folder = root / f"{where} {name}"
            shutil.copytree(good, folder)
            file = folder / "model.ckpt" if where == "main" else sidecar(folder / "model.ckpt", 0)
            changed = change(file, torch.load(file, weights_only=True))
            if isinstance(changed, bytes):
                file.write_bytes(changed)
            else:
                torch.save(changed, file)
            found[f"{where}: {name}"] = _refused(folder)
    return found


def _refused(folder: Path) -> tuple[str, str, bool]:
    """Return the error's type and text, and whether anything has changed."""
    module = Net()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate()
    modules = set(sys.modules)
    going_on = trainer(CompressedDDPStrategy("topk:0.1", strict_sidecars=True), 6, devices=1)
    error: BaseException = Exception("no error")
    try:
        going_on.fit(module, ckpt_path=folder / "model.ckpt")
    except Exception as caught:
        error = caught
    assert_same((torch.get_rng_state(), random.getstate()), generators)
    assert_same(dict(module.state_dict()), state)
    same = not list(folder.rglob("executed")) and "this" not in set(sys.modules) - modules and going_on.global_step == 0
    return type(error).__name__, str(error), same


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, bool]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = run_ranks(1, _all, tmp_path_factory.mktemp("corpus"), timeout=50)
    return found


@pytest.mark.parametrize("name", [*(f"main: {name}" for name in MAIN), *(f"sidecar: {name}" for name in SIDECAR)])
def test_it_is_refused_and_nothing_has_happened(outcomes: dict[str, tuple[str, str, bool]], name: str) -> None:
    kind, text, unchanged = outcomes[name]
    expected = CheckpointError if name.startswith("main") else SidecarError
    assert kind == expected.__name__, text
    assert "model.ckpt" in text
    assert len(text) < 1500
    assert unchanged


@pytest.mark.filterwarnings("ignore:.*was saved inside of an epoch")
def test_a_mixture_is_refused_with_the_name_of_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """Also without ``strict_sidecars``: whose residuals these are nobody knows."""
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(Net(), build("compressed_ddp"), 3, enable_checkpointing=True, callbacks=[saving])
    shutil.rmtree(tmp_path / "step=3.ckpt.ranks")
    shutil.copytree(tmp_path / "step=1.ckpt.ranks", tmp_path / "step=3.ckpt.ranks")
    newest = newest_whole_checkpoint(tmp_path)
    assert newest == str(tmp_path / "step=2.ckpt")
    with pytest.raises(Exception) as caught:
        fit(Net(), build("compressed_ddp"), 5, tmp_path / "step=3.ckpt")
    assert "SidecarError: 2 sidecars" in str(caught.value), str(caught.value)[-700:]
    said = str(caught.value).rpartition("SidecarError: ")[2]
    assert "(rank 0: it belongs to another save; rank 1: it belongs to another save)" in said
    assert f"Resume from `{newest}`, the newest whole checkpoint there" in said


def test_a_cut_checkpoint_names_the_newest_whole_one(tmp_path: Path) -> None:
    def one_process(rank: int, world: int) -> str:
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        settings = {"devices": 1, "enable_checkpointing": True, "callbacks": [saving]}
        fit(Net(), CompressedDDPStrategy("topk:0.1"), 2, **settings)
        file = tmp_path / "step=2.ckpt"
        file.write_bytes(file.read_bytes()[:-300])
        with pytest.raises(CheckpointError) as caught:
            fit(Net(), CompressedDDPStrategy("topk:0.1"), 4, file, devices=1)
        return str(caught.value)

    (said,) = run_ranks(1, one_process)
    assert f"`{tmp_path / 'step=2.ckpt'}` cannot be read safely" in said
    assert f"Resume from `{tmp_path / 'step=1.ckpt'}`, the newest whole checkpoint there" in said


def test_nothing_in_the_package_imports_what_a_file_names_or_unpickles() -> None:
    package = Path(__file__).parents[2] / "lightning_distopt"
    for path in package.rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found |= {node.func.id} & {"eval", "exec", "__import__"}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {alias.name for alias in node.names} & {"pickle", "import_module"}
            elif isinstance(node, ast.Attribute):
                found |= {node.attr} & {"import_module"}
            elif isinstance(node, ast.keyword) and node.arg == "weights_only" and isinstance(node.value, ast.Constant):
                found |= set() if node.value.value else {"weights_only=False"}
        assert not found or path.name in ("cli.py", "__init__.py"), f"{path}: {found}"  # by words of their own


# --- pipelines, whose checkpoints have no sidecars ------------------------------------------------------------------


@pytest.mark.parametrize(
    "added",
    [
        [1],
        {"batches": -1},
        {"updates": "7"},
        {"replicas": 3},
        {"replicas": [{"residuals": {"a": torch.tensor([float("nan")])}}]},
        {"replicas": [{"residuals": {"a": "b"}}]},
        {"replicas": [{"random": {"0": {"torch": torch.zeros(3)}}}]},
        {"replicas": [{"loaders": {}}]},
        {"replicas": [{"states": [1]}]},
    ],
    ids=str,
)
def test_what_no_pipeline_adds_is_refused(added: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"`model.ckpt` holds something of a pipeline that this version cannot use"
    ):
        check_added(added, "model.ckpt")


@pytest.mark.parametrize("row", ["dsp", "pipeline"])
def test_a_pipeline_runs_nothing_of_a_checkpoint(tmp_path: Path, row: str) -> None:
    path = tmp_path / "model.ckpt"
    fit(net(row), build(row), 2, devices=1, callbacks=[At(train_end=lambda t, m: t.save_checkpoint(path))])
    content = torch.load(path, weights_only=True)
    torch.save({**content, "state": Touch(tmp_path / "executed")}, path)
    with pytest.raises(Exception, match=r"CheckpointError: `.*` cannot be read safely .*Choose another checkpoint"):
        fit(net(row), build(row), 4, path, devices=1)
    assert not (tmp_path / "executed").exists()
