"""Ouroboros in the Trainer, on real processes: equal to back-propagation and to the simulator, checkpoints, bad input."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_distopt import LayeredModule, OuroborosStrategy, ResumableLoader
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.simulate import Simulation
from tests.model_parallel.language import TOKENS, layers, texts
from tests.strategies.fits import At, trainer
from tests.strategies.pipelines import MOMENTUM, equal, fit_pipeline

ADAM = partial(torch.optim.Adam, lr=0.01)
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=16)
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Language(LayeredModule):
    """An embedding, stateful layers, and a head whose weight is the embedding's."""

    def __init__(
        self, count: int = 3, batches: int = 6, make: Any = MOMENTUM, schedule: Any = None, dropout: float = 0.3
    ) -> None:
        super().__init__()
        made, head = layers(count, dropout)
        self.layers, self.loss = nn.ModuleList(made), head
        self.data, self.make, self.schedule = list(texts(batches)), make, schedule
        self.seen: list[float] = []

    def log_figures(self, stage: str, figures: dict[str, Any], size: int) -> None:
        self.seen.append(float(figures["loss"].detach()))
        super().log_figures(stage, figures, size)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }

    def train_dataloader(self) -> Any:
        return ResumableLoader(self.data, batch_size=None)


def ouroboros(**options: Any) -> OuroborosStrategy:
    return OuroborosStrategy(**{"start_method": "fork", "timeout": 20, "balance": "layers", **options})


def simulated(module: Language, plan: StalenessPlan, cuts: list[int], epochs: int = 1, **options: Any) -> Any:
    edges = [0, *cuts, len(module.layers)]
    blocks = [nn.Sequential(*module.layers[a:b]) for a, b in itertools.pairwise(edges)]
    simulation = Simulation(blocks, module.loss, plan, module.make, **options)
    for _ in range(epochs):
        simulation.forget()
        module.seen += simulation.run(module.data)
    return module


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "make", "options"),
    [
        (2, MOMENTUM, {}),
        (3, ADAM, {"timetable": "barrier"}),
        (2, ADAM, {"recompute_with": "stashed", "keep": "graph", "tied_grad": "mean"}),
        (1, partial(torch.optim.SGD, lr=0.1), {"recompute_with": "stashed", "repeatable_dropout": False}),
    ],
    ids=["defaults", "4 modules", "graph", "2 modules"],
)
def test_a_fit_is_the_simulation_bit_for_bit(devices: int, make: Any, options: dict[str, Any]) -> None:
    """Ties, memories, dropout, clipping by device, warm-up and cosine, two drained epochs."""
    named = {"recompute_with": "backward_weights"}
    plan = StalenessPlan.preset("ouroboros", devices + 1, **{named.get(k, k): v for k, v in options.items()})
    cuts = [2, 3, 4][:devices]
    module = partial(Language, 5, batches=6, make=make, schedule=schedule)
    expected = simulated(module(), plan, cuts, epochs=2, clip=0.25, scheduler=schedule)

    def check(trainer: Trainer, module: Any) -> None:
        assert (
            trainer.lr_scheduler_configs[0].scheduler.last_epoch == 12
        )  # on each device, whatever it has of both ends
        assert trainer.strategy.updates == 12
        assert module.seen == expected.seen  # each loss once, in order, on all ranks

    found = fit_pipeline(
        module(), ouroboros(cuts=cuts, **options), devices, max_epochs=2, gradient_clip_val=0.25,
        callbacks=[At(train_end=check)],
    )  # fmt: skip
    assert equal(found, dict(expected.state_dict()))


def schedule(optimizer: Any) -> Any:
    """Two steps of warm-up, then a cosine."""
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], milestones=[2])


@pytest.mark.parametrize(("devices", "stages"), [(1, 1), (2, 3)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_without_delays_it_is_plain_training_bit_for_bit(devices: int, stages: int) -> None:
    alone, piped = (Language(3, dropout=0.0, schedule=schedule) for _ in range(2))
    fit_pipeline(alone, "auto", 1)
    strategy = ouroboros(stages=stages, cuts=list(range(1, stages)))
    if stages > 1:
        strategy._options["gradient_delays"] = [0] * (stages - 1)
    assert equal(fit_pipeline(piped, strategy, devices), dict(alone.state_dict()))


def test_replicas_that_read_the_same_learn_what_one_pipeline_learns() -> None:
    """Twice two devices; the mean of equal gradients is that gradient, also where only a part of V's is there."""
    one, two = Language(dropout=0.0), Language(dropout=0.0)
    expected = fit_pipeline(one, ouroboros(), 2)
    assert equal(fit_pipeline(two, ouroboros(stages=3), 4), expected)


def test_names_and_ties_are_those_of_the_unsplit_model() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert module.layers[0].weight is module.loss.weight
        if trainer.global_rank == 0:
            (group,) = trainer.optimizers[0].param_groups
            assert sum(p is module.loss.weight for p in group["params"]) == 1
            assert sorted(trainer.strategy.blocks) == [0, 2]

    module = Language()
    names = list(module.state_dict())
    found = fit_pipeline(module, "ouroboros_fork", 2, callbacks=[At(train_end=check)])
    assert list(found) == names
    assert torch.equal(found["layers.0.weight"], found["loss.weight"])


# --- checkpoints ----------------------------------------------------------------------------------------------------


def saved(folder: Path, every: int, **options: Any) -> Path:
    """Fit one epoch and save in the middle and at its end."""
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    fit_pipeline(Language(**options), ouroboros(), 2, callbacks=[saver], enable_checkpointing=True)
    return folder


def test_a_run_resumed_in_the_middle_of_an_epoch_continues_bit_for_bit(tmp_path: Path) -> None:
    """Its memories go on, too."""
    options: dict[str, Any] = {"make": ADAM, "schedule": COSINE}
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    whole = fit_pipeline(Language(**options), ouroboros(), 2, callbacks=[saver], enable_checkpointing=True)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert sorted(content["lightning_distopt_pipeline"]["replicas"][0]["states"]) == ["1", "2", "3"]
    resumed = Language(**options)
    trainer(ouroboros(), -1, 2, max_epochs=1).fit(resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert equal(dict(resumed.state_dict()), whole)


def test_a_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    """It goes on on one device and with other stages, and the tied parameter has one optimizer state."""
    path = saved(tmp_path, 6) / "step=6.ckpt"
    content = torch.load(path, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    names = [name for name, _ in Language().named_parameters()]
    assert optimizer["param_groups"][0]["param_names"] == names
    assert names.count("layers.0.weight") + names.count("loss.weight") == 1
    assert list(optimizer["state"]) == list(range(len(names)))

    def check(trainer: Trainer, module: Any) -> None:
        assert equal(dict(module.state_dict()), content["state_dict"])
        for group in trainer.optimizers[0].param_groups:
            for p in group["params"]:
                name = next(n for n, q in module.named_parameters() if q is p)
                held = optimizer["state"][names.index(name)]["momentum_buffer"]
                assert torch.equal(trainer.optimizers[0].state[p]["momentum_buffer"], held)

    for strategy, devices in (("auto", 1), (ouroboros(), 3)):
        made = trainer(strategy, -1, devices, max_epochs=2, callbacks=[At(train_start=check)])
        made.fit(Language(), ckpt_path=path)


# --- which layers where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ({"split": "authors"}, (2, 4)),
        ({"balance": "layers"}, (1, 3)),
        ({"balance": "parameters", "split": "balanced"}, (2, 4)),
    ],
)
def test_the_shared_device_counts_both_of_its_modules(options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.partition.cuts == cuts

    fit_pipeline(Language(4, batches=1), ouroboros(**options), 2, callbacks=[At(train_start=check)])


def test_the_loss_is_measured_with_its_target_or_guessed_by_its_parameters() -> None:
    module = Language(6)
    module.example_input_array, target = module.data[0]
    strategy = ouroboros(balance="time", parallel_devices=[torch.device("cpu")] * 2)
    named = dict(module.layers.named_children())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for module.example_target_array in (None, target):  # type: ignore[misc]
        costs, head = strategy._costs(module, named)
        assert [cost.name for cost in costs] == list(named)
        assert head.cost > 0
        assert head.memory == TOKENS * 8 / 2**20  # its bias; the weight is the embedding's
    assert equal(before, dict(module.state_dict()))
    assert all(p.grad is None for p in module.parameters())
    found, costs = strategy._balanced(module, named)
    assert len(found) == 2
    assert all(cost.milliseconds > 0 for cost in costs)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (partial(Language, 1), {}, "every stage a layer: got 3 stages on 2 devices for 2 layers.*at most 1"),
        (partial(Language, 1), {"split": "authors"}, "got 3 stages on 2 devices for 2 layers"),
        (partial(Language, 3), {"cuts": [2]}, "cuts.*3 stages"),
        (partial(Language, 3), {"cuts": [2, 9]}, "cuts.*4"),
        (partial(Language, 3), {"accumulate": 2}, "accumulate=1"),
        (partial(Language, 3), {"stages": 4}, "multiple.*2 for 3"),
    ],
)
def test_what_cannot_work_is_refused_before_training(module: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        fit_pipeline(module(), ouroboros(**options), 2)


def test_other_ties_are_refused() -> None:
    module = Language(3)
    module.layers[2].new.weight = module.layers[1].new.weight
    with pytest.raises(Exception, match=r"different processes.*layers\.1\.new\.weight.*layers\.2\.new\.weight"):
        fit_pipeline(module, ouroboros(cuts=[2, 3]), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "graph"}, "recompute_with='stashed'"),
        ({"tied_grad": "max"}, "tied_grad.*'sum', 'mean'"),
        ({"recompute_with": "old"}, "recompute_with"),
        ({"split": "paper"}, "split"),
        ({"timetable": "loose"}, "timetable"),
        ({"stages": 0}, "stages"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OuroborosStrategy(**options)
    with pytest.raises(TypeError, match="repeatable_dropout"):
        OuroborosStrategy(repeatable_dropout="yes")  # type: ignore[arg-type]


def test_the_tokens_are_as_many_as_the_text_has() -> None:
    assert max(int(t.max()) for pair in texts(5) for t in pair) < TOKENS
    assert isinstance(next(texts(1))[0], Tensor)
