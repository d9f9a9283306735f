"""The three recipes learn something on made-up data, draw their pictures, and their configurations parse."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import TensorDataset

from lightning_distopt.cli import main
from lightning_distopt.zeroth_order import CoordinateEstimator, GaussianEstimator, StepLoader
from recipes.black_box import DigitClassifier, FineTuning, MnistData, SparseClassifier, TransformerLM, UniversalAttack
from recipes.black_box.attack import attacked
from recipes.black_box.data import AttackData
from tests.recipes.black_box.test_black_box_data import write_idx
from tests.strategies.fits import trainer

CONFIGS = Path(__file__).parents[3] / "recipes" / "black_box" / "configs"
OVERLAYS = {"wandb", "attack_blocks"}


def test_sparse_classification_learns_and_has_zeros() -> None:
    a = torch.randn(60, 5, dtype=torch.float64)
    data = TensorDataset(a, a[:, 0].sign())
    module = SparseClassifier(5, "saga", lam1=3e-2, evaluate_every=5)
    ran = trainer("auto", 40, devices=1)
    ran.fit(module, StepLoader(data, 20))
    assert ran.callback_metrics["best_objective"] < 0.4
    assert int((module.x == 0).sum()) >= 2
    assert module.x[0] > 0.5


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like MNIST's: blurred noise about one picture a digit."""
    root = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    pictures = (torch.rand(10, 7, 7, generator=generator) > 0.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for part, count in (("train", 200), ("t10k", 60)):
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 100, (count, 28, 28), generator=generator)
        images = (pictures[labels] * 150 + noise).to(torch.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", labels.to(torch.uint8))
    return root


@pytest.fixture(scope="module")
def victim(mnist: Path) -> Path:
    torch.manual_seed(0)
    ran = trainer("auto", 24, devices=1, max_epochs=2)
    module = DigitClassifier(lambda p: torch.optim.Adam(p, lr=2e-3))
    ran.fit(module, MnistData(str(mnist), batch_size=20))
    ran.save_checkpoint(mnist / "victim.ckpt", weights_only=True)
    return mnist / "victim.ckpt"


@pytest.mark.parametrize("blocks", [pytest.param(None, marks=pytest.mark.slow), 7])
def test_an_attack_makes_the_network_misread(mnist: Path, victim: Path, blocks: int | None, tmp_path: Path) -> None:
    data = AttackData(str(mnist), str(victim), label=1, count=4, steps=40)
    module = UniversalAttack(
        str(victim), "svrg", GaussianEstimator(20), lr=0.2, lam1=1e-5 if blocks is None else 0.02, blocks=blocks,
        distortion=0.01, picture=str(tmp_path / "new" / "attack.png"), evaluate_every=40,
    )  # fmt: skip
    ran = trainer("auto", 40, devices=1)
    ran.fit(module, data)
    rate, distortion = module.success()
    assert ran.callback_metrics["objective"] < 0.9 * float(_first_objective(module))
    assert 0 <= rate <= 1
    assert distortion > 0
    assert ran.callback_metrics["success_rate"] == rate
    assert (tmp_path / "new" / "attack.png").read_bytes().startswith(b"\x89PNG")
    assert all(not p.requires_grad for p in module.victim.parameters())


def test_pictures_go_to_wandb(mnist: Path, victim: Path, tmp_path: Path) -> None:
    logger = mock.create_autospec(WandbLogger, instance=True)
    module = UniversalAttack(str(victim), picture=str(tmp_path / "attack.png"))
    with mock.patch.object(UniversalAttack, "_everything", return_value=(torch.zeros(2, 1, 28, 28), torch.ones(2))):
        module._trainer = mock.Mock(loggers=[logger], is_global_zero=True)
        module.on_train_end()
    logger.log_image.assert_called_once_with("attack", [str(tmp_path / "attack.png")])


def _first_objective(module: UniversalAttack) -> torch.Tensor:
    with torch.no_grad():
        module.x.zero_()
        return module.query(module._everything()).mean()


def test_attacked_images_stay_images() -> None:
    images = torch.rand(3, 1, 28, 28) - 0.5
    moved = attacked(images, 5 * torch.randn(1, 28, 28))
    assert moved.abs().max() <= 0.5
    assert torch.allclose(attacked(images, torch.zeros(1, 28, 28)), images, atol=1e-5)


def test_a_transformer_is_fine_tuned_by_queries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    windows = torch.arange(97, 113).repeat(40, 1)
    start = TransformerLM(width=16, layers=1, heads=2)
    ran = trainer("auto", 1, devices=1, max_epochs=1)
    start.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    ran.fit(start, torch.utils.data.DataLoader(TensorDataset(windows), batch_size=8))
    ran.save_checkpoint(tmp_path / "start.ckpt")
    for train in ("all", "norms"):
        module = FineTuning(
            str(tmp_path / "start.ckpt"), train=train, lr=1.5e-2, batch_size=16, options={"schedule": "constant"}
        )
        with torch.no_grad():
            before = float(module.query((windows,)).mean())
        fit = trainer("auto", 60, devices=1)
        fit.fit(module, StepLoader(TensorDataset(windows), 60))
        assert module.best_objective < before - 0.05
        frozen = [name for name, p in module.model.named_parameters() if not p.requires_grad]
        assert (frozen == []) == (train == "all")


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OVERLAYS))
def test_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = _printed(capsys, "--config", str(CONFIGS / f"{name}.yaml"))
    assert config["seed_everything"] == 0
    assert config["model"]["class_path"].startswith("recipes.black_box.")
    assert config["data"]["class_path"].startswith("recipes.black_box.")


def test_overlays_change_what_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--config", str(CONFIGS / "attack.yaml"))
    logger = _printed(capsys, *base, "--config", str(CONFIGS / "wandb.yaml"))["trainer"]["logger"]
    assert logger["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    model = _printed(capsys, *base, "--config", str(CONFIGS / "attack_blocks.yaml"))["model"]["init_args"]
    assert model["blocks"] == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about LightningCLI
def test_a_recipe_runs_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{1 if i % 3 else -1} 1:{i % 3} 2:{i % 5}\n" for i in range(30)]
    (tmp_path / "data").write_text("".join(lines))
    arguments = ["--data.init_args.path", str(tmp_path / "data"), "--data.init_args.steps=3", "--trainer.logger=false"]
    arguments += ["--trainer.enable_progress_bar=false", "--model.init_args.estimator=CoordinateEstimator"]
    assert main(["fit", "--config", str(CONFIGS / "sparse.yaml"), *arguments]) == 0
    assert CoordinateEstimator().central


def test_blocks_must_divide_the_image() -> None:
    with pytest.raises(ValueError, match="`blocks`"):
        UniversalAttack("nowhere", blocks=5)


def test_fine_tuning_starts_by_its_config_from_what_pre_training_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question. " * 200)
    few = ["--data.init_args.path=text.txt", "--trainer.logger=false", "--trainer.max_steps=2"]
    assert main(["fit", f"--config={CONFIGS / 'pretrain.yaml'}", *few]) == 0
    assert main(["fit", f"--config={CONFIGS / 'finetune.yaml'}", *few]) == 0
