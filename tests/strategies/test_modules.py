"""Modules of every kind: frozen, unused, shared and recomputed parameters, odd buffers, compiled and converted layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.strategies.fits import Agree, At, assert_same_on_all_ranks, compressed, distance, fit, flat, trainer
from tests.strategies.models import BATCH, FEATURES, Net, data

PATHS = ("step_ahead", "none")


def plain(params: Any) -> Optimizer:
    return SGD(params, lr=0.05)


class Smooth(Net):
    """Without BatchNorm, so that one process with the batches of both ranks is a reference, too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = nn.Sequential(self.net[0], nn.Tanh(), self.net[3])


class Both(Smooth):
    """One process with the batches of both ranks."""

    def train_dataloader(self) -> DataLoader[Any]:
        sets = [data(rank, self.batches) for rank in (0, 1)]
        tensors = [torch.stack(pair, 1) for pair in zip(*(s.tensors for s in sets), strict=True)]
        return DataLoader(TensorDataset(*(t.flatten(0, 1) for t in tensors)), batch_size=2 * BATCH)


# --- parameters that do not take part -------------------------------------------------------------------------------


class Frozen(Net):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net[0].requires_grad_(False)


@pytest.mark.parametrize("error_feedback", PATHS)
def test_frozen_parameters_equal_ddp(error_feedback: str) -> None:
    ours = fit(Frozen(), compressed(compressor="fp32", error_feedback=error_feedback), callbacks=[Agree()])
    assert distance(ours, fit(Frozen(), "ddp_fork")) < 1e-6
    assert torch.equal(ours["net.0.weight"], Net().net[0].weight)


def test_frozen_parameters_have_no_memory_and_send_nothing() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        tracked = {name for bucket in trainer.strategy.update_sync.buckets for name in bucket.names}
        assert tracked == {name for name, p in module.named_parameters() if p.requires_grad}
        assert len(tracked) == 4

    fit(Frozen(), compressed(), 3, callbacks=[At(train_batch_end=check)])


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_parameters_unfrozen_in_the_middle_are_synchronized_from_then_on(accumulate: int) -> None:
    # not compared with ddp, whose reducer knows only the parameters that were trainable at the start
    arguments = {"steps": -1, "max_epochs": 4, "accumulate_grad_batches": accumulate}
    ours = fit(Smooth(), compressed(compressor="fp32"), callbacks=[Unfreeze(), Agree()], **arguments)
    one = fit(Both(), "auto", devices=1, callbacks=[Unfreeze()], **arguments)
    assert distance(ours, one) < 1e-6
    fit(Smooth(), compressed(), callbacks=[Unfreeze(), Agree()], **arguments)


class Unused(Net):
    """The extra layer is used by the ranks ``users``."""

    users: tuple[int, ...] = ()

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.extra = nn.Linear(FEATURES, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) + (self.extra(inputs) if self.uses_extra else 0)

    @property
    def uses_extra(self) -> bool:
        return self.global_rank in self.users


class UsedByOne(Unused):
    users = (1,)


class UsedInTurn(Unused):
    @property
    def uses_extra(self) -> bool:
        return self.trainer.global_step % 2 == self.global_rank


@pytest.mark.parametrize("module", [Unused, UsedByOne, UsedInTurn])
def test_unused_parameters_need_no_flag_and_equal_ddp(module: type[Unused]) -> None:
    ours = fit(module(optimizer=plain), compressed(compressor="fp32"), callbacks=[Agree()])
    assert distance(ours, fit(module(optimizer=plain), "ddp_fork_find_unused_parameters_true")) < 1e-6


@pytest.mark.parametrize("module", [Unused, UsedByOne])
def test_unused_parameters_with_the_flag_of_ddp_without_error_feedback(module: type[Unused]) -> None:
    strategy = compressed(compressor="fp32", error_feedback="none", find_unused_parameters=True)
    ours = fit(module(), strategy, callbacks=[Agree()])
    assert distance(ours, fit(module(), "ddp_fork_find_unused_parameters_true")) < 1e-6


def test_parameters_of_no_optimizer_stay() -> None:
    class Partial(Net):
        def configure_optimizers(self) -> Optimizer:
            return plain(self.net[3].parameters())

    ours = fit(Partial(), compressed(), callbacks=[Agree()])
    assert torch.equal(ours["net.0.weight"], Net().net[0].weight)
    assert not torch.equal(ours["net.3.weight"], Net().net[3].weight)


# --- parameters used twice ------------------------------------------------------------------------------------------


class Tied(Net):
    """The last layer's weights are the first one's."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).cos().view_as(parameter))
        self.net[2].weight = self.net[0].weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        saved = self.trainer.strategy.lightning_module_state_dict()
        assert torch.equal(saved["net.0.weight"], saved["net.2.weight"])
        if self.trainer.global_step and hasattr(self.trainer.strategy, "compressor"):
            assert torch.equal(saved["net.0.weight"], self.common)
        return (self(batch[0])[:, :3] - batch[1]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.common = self.net[0].weight.detach().clone()


def test_tied_weights_equal_ddp_and_are_sent_once() -> None:
    def check(trainer: Trainer, module: Tied) -> None:
        sizes = [p.numel() for bucket in trainer.strategy.update_sync.buckets for p in bucket.params]
        assert sum(sizes) == FEATURES * (FEATURES + 2)

    ours = fit(Tied(), compressed(compressor="fp32"), callbacks=[Agree(), At(train_batch_end=check)])
    assert distance(ours, fit(Tied(), "ddp_fork")) < 1e-6
    fit(Tied(), compressed(), callbacks=[Agree()])


class Recomputed(Smooth):
    """Activations are thrown away and computed again in backward, where the parameters must still be at ``y``."""

    reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.net, inputs.clone().requires_grad_(), use_reentrant=self.reentrant)


class Reentrant(Recomputed):
    reentrant = True


@pytest.mark.parametrize("module", [Recomputed, Reentrant])
@pytest.mark.parametrize("error_feedback", PATHS)
def test_gradient_checkpointing_changes_nothing(module: type[Recomputed], error_feedback: str) -> None:
    arguments = {"error_feedback": error_feedback, "compressor": "topk:0.2"}
    ours = fit(module(), compressed(**arguments), accumulate_grad_batches=2, callbacks=[Agree()])
    assert distance(ours, fit(Smooth(), compressed(**arguments), accumulate_grad_batches=2)) == 0


# --- layers that change ---------------------------------------------------------------------------------------------


class Sum(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)


class OverRanks(nn.BatchNorm1d):
    """BatchNorm over all ranks, on the CPU, where torch's SyncBatchNorm does not run."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        world = dist.get_world_size()
        mean = Sum.apply(inputs.mean(0)) / world
        variance = Sum.apply((inputs - mean).square().mean(0)) / world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return (inputs - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class OverRanksPlugin(LayerSync):
    """Replaces layers as Lightning's SyncBatchNorm plugin does."""

    def apply(self, model: Any) -> Any:
        model.net[1] = OverRanks(8)
        return model

    def revert(self, model: Any) -> Any:
        model.net[1] = nn.BatchNorm1d(8)
        return model


@pytest.mark.parametrize("error_feedback", PATHS)
def test_batchnorm_over_the_ranks_equals_ddp(error_feedback: str) -> None:
    def converted(trainer: Trainer, module: Net) -> None:
        assert isinstance(module.net[1], OverRanks)

    arguments = {"plugins": [OverRanksPlugin()], "callbacks": [At(train_batch_end=converted)]}
    ours = fit(Net(), compressed(compressor="fp32", error_feedback=error_feedback), **arguments)
    theirs = fit(Net(), "ddp_fork", **arguments)
    learned = {name for name, _ in Net().named_parameters()}
    assert distance({n: v for n, v in ours.items() if n in learned}, {n: theirs[n] for n in learned}) < 1e-6


def test_sync_batchnorm_is_in_place_before_the_optimizers_are_made() -> None:
    def converted(trainer: Trainer, module: Net) -> None:
        assert isinstance(module.net[1], nn.SyncBatchNorm)
        assert any(module.net[1].weight is p for p in trainer.optimizers[0].param_groups[0]["params"])

    # torch's SyncBatchNorm steps on GPUs only
    fit(Net(), compressed(), steps=0, sync_batchnorm=True, callbacks=[At(fit_start=converted)])


def test_a_compiled_module_trains_alike() -> None:
    module = Smooth()
    trainer(compressed(), callbacks=[Agree()]).fit(torch.compile(module, backend="eager"))
    assert distance(module.state_dict(), fit(Smooth(), compressed())) < 1e-6


# --- odd tensors ----------------------------------------------------------------------------------------------------


class OddBuffers(Smooth):
    """Buffers of other dtypes than the parameters', changed by rank 0 in every step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("even", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("phase", torch.zeros(2, 2, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("unset", None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert int(self.calls) == self.trainer.global_step
        assert bool(self.even[0]) is bool(self.trainer.global_step % 2)
        assert self.phase[1, 1].imag == self.trainer.global_step
        if self.trainer.is_global_zero:
            self.calls += 1
            self.even.logical_not_()
            self.phase += 1j
        return super().training_step(batch, batch_idx)


def test_buffers_of_every_dtype_are_broadcast() -> None:
    fit(OddBuffers(), compressed(), 4, callbacks=[Agree()])


class Embedding(Smooth):
    """A table of which each batch uses a part."""

    sparse = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.table = nn.Embedding(5, 3, sparse=self.sparse)
        nn.init.constant_(self.table.weight, 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) + self.table((inputs[:, 0] > 0).long())


class Sparse(Embedding):
    sparse = True


def test_sparse_gradients_train_as_dense_ones() -> None:
    # ddp over Gloo does not: it adds them up without dividing by the number of ranks
    ours = fit(Sparse(optimizer=plain), compressed(compressor="fp32"), callbacks=[Agree()])
    assert distance(ours, fit(Embedding(optimizer=plain), "ddp_fork")) < 1e-6


class Scalars(Net):
    """Parameters without dimensions, with one element, and with none."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.zeros(1))
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.net(inputs) + self.shift + self.nothing.sum()


@pytest.mark.parametrize("compressor", ["sign", "topk:0.01", "random_block:0.01"])
def test_tiny_parameters_train(compressor: str) -> None:
    ours = fit(Scalars(), compressed(compressor=compressor), callbacks=[Agree()])
    assert ours["scale"] != 1
    assert ours["shift"] != 0


def test_a_model_built_in_configure_model_trains() -> None:
    class Built(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Net().net

    def agree(trainer: Trainer, module: Net) -> None:
        assert_same_on_all_ranks(flat(module))

    fit(Built(), compressed(), callbacks=[Agree(), At(fit_start=agree)])
