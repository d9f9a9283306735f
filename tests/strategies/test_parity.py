"""Uncompressed, every path is `ddp`; compressed, every rank holds the same common model between steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tests.strategies.fits import Agree, At, State, assert_same_on_all_ranks, compressed, distance, fit, flat, gathered
from tests.strategies.models import Net, sgd

PATHS = ("step_ahead", "local", "none")


@cache
def by_ddp(**arguments: Any) -> State:
    return fit(Net(step_size=7), "ddp_fork", 20, **arguments)


# --- nothing is compressed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_feedback", PATHS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_float32_equals_ddp_with_momentum_decay_schedule_and_buffers(error_feedback: str, accumulate: int) -> None:
    # 5 batches an epoch: the last window is short
    ours = fit(
        Net(step_size=7),
        compressed(compressor="fp32", error_feedback=error_feedback),
        20,
        accumulate_grad_batches=accumulate,
        callbacks=[Agree()],
    )
    # rounding of float32: updates are averaged instead of gradients
    assert distance(ours, by_ddp(accumulate_grad_batches=accumulate)) < 1e-6


def test_three_ranks_equal_ddp() -> None:
    ours = fit(Net(step_size=7), compressed(compressor="fp32"), 20, devices=3, callbacks=[Agree()])
    assert distance(ours, by_ddp(devices=3)) < 1e-6


def test_initial_weights_and_buffers_are_rank_0s() -> None:
    def differ(trainer: Trainer, module: Net) -> None:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(trainer.global_rank)

    def agree(trainer: Trainer, module: Net) -> None:
        assert_same_on_all_ranks(flat(module))
        for buffer in module.buffers():
            assert_same_on_all_ranks(buffer)

    class Differing(Net):
        def setup(self, stage: str) -> None:
            differ(self.trainer, self)

    ours = fit(Differing(), compressed(compressor="fp32"), callbacks=[At(fit_start=agree)])
    assert distance(ours, fit(Net(), compressed(compressor="fp32"))) == 0


def test_buffers_are_rank_0s_in_validation_and_at_the_end() -> None:
    def agree(trainer: Trainer, module: Net) -> None:
        for buffer in module.buffers():
            assert_same_on_all_ranks(buffer)

    hooks = At(validation_epoch_start=agree, validation_epoch_end=agree, fit_end=agree)
    fit(Net(), compressed(), limit_val_batches=1, callbacks=[hooks])


def test_buffers_stay_on_their_rank_without_broadcast_buffers() -> None:
    def differ(trainer: Trainer, module: Net) -> None:
        ours, theirs = gathered(module.net[1].running_mean)
        assert not torch.equal(ours, theirs)

    fit(Net(), compressed(broadcast_buffers=False), callbacks=[At(train_end=differ)])


# --- something is compressed ----------------------------------------------------------------------------------------


PAIRS = (
    ("sign", "all_gather"),
    ("sign", "sharded_server"),
    ("topk:0.1", "all_gather"),
    ("topk:0.1", "sharded_server"),
    ("random_block:0.1", "all_reduce"),
    ("random_block:0.1", "all_gather"),
    ("bf16", "all_reduce"),
    ("bf16", "all_gather"),
    ("bf16", "sharded_server"),
)


@pytest.mark.parametrize(
    ("compressor", "exchange", "error_feedback"),
    [(*pair, "step_ahead") for pair in PAIRS] + [(*pair, "none") for pair in PAIRS[1:-1:2]],
)
def test_the_common_model_is_bit_identical_on_all_ranks_after_every_step(
    compressor: str, exchange: str, error_feedback: str
) -> None:
    strategy = compressed(compressor=compressor, exchange=exchange, error_feedback=error_feedback)
    fit(Net(), strategy, 6, devices=3, callbacks=[Agree()])


@pytest.mark.parametrize(
    "arguments",
    [
        {"server_compression": True},
        {"scope": "model"},
        {"dense_steps": 3},
        {"compressor": "topk:0.1", "averaging_period": 2, "coefficient": 0.5},
        {"error_feedback": "local", "exchange": "sharded_server", "bucket_mb": 1e-4},
    ],
    ids=str,
)
def test_so_it_is_with_every_other_argument(arguments: dict[str, Any]) -> None:
    fit(Net(), compressed(**arguments), 6, callbacks=[Agree()])


def test_several_local_steps_agree_after_each_round_and_send_nothing_inside() -> None:
    sent: list[dict[str, int]] = []

    def check(trainer: Trainer, module: Net) -> None:
        sent.append(dict(trainer.strategy.meter.sent))
        ends = trainer.global_step % 3 == 0
        assert all(torch.equal(flat(module), other) for other in gathered(flat(module))) is ends
        if trainer.global_step % 3 == 2:  # buffers go out when a round begins, payloads when it ends
            assert sent[-1] == sent[-2]

    fit(Net(), compressed(sync_every=3), 9, callbacks=[At(train_batch_end=check)])


def test_float32_every_third_step_is_local_sgd() -> None:
    ours = fit(Net(), compressed(compressor="fp32", sync_every=3), 9)
    assert distance(ours, fit(Net(), compressed(compressor="fp32"), 9)) > 1e-4
    assert (
        distance(ours, fit(Net(), compressed(compressor="fp32", sync_every=3, coefficient=0.0), 9)) < 1e-6
    )  # no residual


# --- y exists only inside a step ------------------------------------------------------------------------------------


class Watched(Net):
    """Asserts in its hooks where the parameters are."""

    common: Tensor
    window: list[Tensor]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert_same_on_all_ranks(flat(self))
        self.common = flat(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        accumulated = batch_idx % self.trainer.accumulate_grad_batches
        if not accumulated:
            self.window = []
        self.window.append(flat(self))
        for earlier in self.window:
            assert torch.equal(earlier, self.window[-1])  # one y for all of the window
        if self.trainer.global_step:
            assert not torch.equal(flat(self), self.common)
            mine, theirs = gathered(flat(self))
            assert not torch.equal(mine, theirs)
        saved = self.trainer.strategy.lightning_module_state_dict()
        named = torch.cat([saved[name].double().reshape(-1) for name, _ in self.named_parameters()])
        assert torch.equal(named, self.common)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        assert torch.equal(flat(self), self.window[-1])

    def on_validation_start(self) -> None:
        assert_same_on_all_ranks(flat(self))

    def on_train_batch_end(self, *args: Any) -> None:
        assert_same_on_all_ranks(flat(self))
        assert not self.trainer.strategy.update_sync.away


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_taken_at_y_and_y_is_seen_nowhere_else(accumulate: int) -> None:
    fit(Watched(batches=6), compressed(), 6, accumulate_grad_batches=accumulate)


def test_validation_inside_of_an_accumulation_window_sees_x_and_changes_nothing() -> None:
    arguments = {"accumulate_grad_batches": 3, "callbacks": [Agree()]}
    validated = fit(Watched(batches=6), compressed(), 6, val_check_interval=1, limit_val_batches=1, **arguments)
    assert distance(validated, fit(Net(batches=6), compressed(), 6, **arguments)) == 0


def test_validation_inside_of_a_round_sees_the_last_common_model_and_changes_nothing() -> None:
    class Rounds(Net):
        def on_validation_epoch_start(self) -> None:
            assert_same_on_all_ranks(flat(self))

    validated = fit(Rounds(), compressed(sync_every=4), val_check_interval=1, limit_val_batches=1)
    assert distance(validated, fit(Net(), compressed(sync_every=4))) == 0


def test_adam_steps_on_local_gradients_with_error_feedback_and_on_averages_without() -> None:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)

    ddp = fit(Net(optimizer=adam), "ddp_fork")
    assert distance(fit(Net(optimizer=adam), compressed(compressor="fp32", error_feedback="none")), ddp) < 1e-6
    assert distance(fit(Net(optimizer=adam), compressed(compressor="fp32"), callbacks=[Agree()]), ddp) > 1e-4
    fit(Net(optimizer=adam), compressed(compressor="topk:0.1", error_feedback="none"), callbacks=[Agree()])


def test_one_rank_with_step_ahead_takes_its_gradients_where_plain_sgd_does() -> None:
    seen: list[Tensor] = []

    class Seeing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.strategy.strategy_name == "compressed_ddp":
                assert torch.allclose(flat(self), seen[self.trainer.global_step], atol=1e-5)
            else:
                seen.append(flat(self))
            return super().training_step(batch, batch_idx)

    def plain(params: Any) -> torch.optim.Optimizer:
        return sgd(params)

    fit(Seeing(optimizer=plain), "auto", 20, devices=1)
    assert len(seen) == 20
    fit(Seeing(optimizer=plain), compressed(compressor="topk:0.1", averaging_period=0), 20, devices=1)


@pytest.mark.parametrize("flag", ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"])
def test_flags_of_ddp_act_without_error_feedback(flag: str) -> None:
    strategy = compressed(compressor="fp32", error_feedback="none", **{flag: True})
    assert distance(fit(Net(), strategy, 20, callbacks=[Agree()]), fit(Net(), "ddp_fork", 20)) < 1e-6


def test_overlapping_exchanges_in_many_buckets_change_nothing() -> None:
    whole = fit(Net(), compressed(), 6)
    assert distance(fit(Net(), compressed(bucket_mb=1e-4), 6, callbacks=[Agree()]), whole) == 0
    gradients = {"compressor": "sign", "error_feedback": "none"}
    whole = fit(Net(), compressed(**gradients), 6)
    assert distance(fit(Net(), compressed(**gradients, bucket_cap_mb=1e-4), 6, callbacks=[Agree()]), whole) == 0
