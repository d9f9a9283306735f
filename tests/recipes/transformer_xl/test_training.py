"""The same module trains, validates and tests under every kind of strategy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing import ProcessRaisedException

from lightning_distopt import OuroborosStrategy, PipelineStrategy
from recipes.transformer_xl import Context, TransformerXL
from tests.recipes.transformer_xl.models import Letters, small
from tests.strategies.fits import compressed, distance, trainer

BATCHES = {"max_epochs": 2, "limit_val_batches": 1.0, "val_check_interval": 7}


def fitted(
    strategy: Any, devices: int, rows: int = 4, gradient_clip_val: float | None = 0.25, **options: Any
) -> tuple[TransformerXL, float]:
    """Fit on rows of ``devices * rows``; return the module and the last bits a character in validation."""
    torch.manual_seed(3)
    module, data = small(**options), Letters(batch_size=rows)
    fitting = trainer(
        strategy, -1, devices, gradient_clip_val=gradient_clip_val, use_distributed_sampler=True, **BATCHES
    )
    fitting.fit(module, datamodule=data)
    return module, float(fitting.callback_metrics["val/bpc"])


def test_it_learns_and_logs_bits_a_character() -> None:
    torch.manual_seed(3)
    module, data = small(), Letters()
    fitting = trainer("auto", -1, 1, max_epochs=4, limit_val_batches=1.0)
    fitting.fit(module, datamodule=data)
    figures = fitting.callback_metrics
    assert float(figures["val/bpc"]) < 2.5  # log2 12 is 3.6
    assert float(figures["val/bpc"]) == pytest.approx(float(figures["val/loss"]) / 0.6931472, rel=1e-5)
    (tested,) = fitting.test(module, datamodule=data, verbose=False)
    assert tested["test/bpc"] < 2.5


def test_validation_is_the_mean_over_all_tokens_of_the_rows() -> None:
    module, data = small(), Letters(size=333)
    fitting = trainer("auto", -1, 1, limit_val_batches=1.0)
    (found,) = fitting.validate(module, datamodule=data, verbose=False)
    rows = data.streams["val"][: 4 * (166 // 4)].view(4, -1).long()
    module.eval(), module.forget()
    parts = [module(x) for x in rows[:, :-1].split(6, dim=1)]
    loss = module.loss(torch.cat(parts, dim=1), rows[:, 1:].contiguous())
    assert rows.shape[1] % 6 != 1  # the last segment is short
    assert found["val/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("clusters", [{}, {"cutoffs": [4, 8], "div_val": 2}])
def test_it_trains_in_sixteen_bits(precision: Any, clusters: Any) -> None:
    fitting = trainer("auto", 3, 1, precision=precision, limit_val_batches=2)
    module = small(dropout=0.1, dropatt=0.1, **clusters)
    fitting.fit(module, datamodule=Letters())
    assert float(fitting.callback_metrics["train/loss"]) < 3


class Stops(Callback):
    """Saves and ends the fit after some batches."""

    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(("after", "exact"), [(16, True), (5, False)])
def test_a_resumed_run_goes_on_at_its_place_in_the_text(tmp_path: Path, after: int, exact: bool) -> None:
    """Bit for bit from the end of an epoch; inside of one the memories begin anew."""
    batches: list[list[Any]] = [[], []]

    class Seen(Callback):
        def __init__(self, into: list[Any]) -> None:
            self.into = into

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.into.append(batch[0])

    torch.manual_seed(3)
    whole = small()
    trainer("auto", -1, 1, max_epochs=2, callbacks=[Seen(batches[0])]).fit(whole, datamodule=Letters())
    torch.manual_seed(3)
    stop = [Stops(after, tmp_path / "x.ckpt"), Seen(batches[1])]
    trainer("auto", -1, 1, max_epochs=2, callbacks=stop).fit(small(), datamodule=Letters())
    resumed = small()
    going_on = trainer("auto", -1, 1, max_epochs=2, callbacks=[Seen(batches[1])])
    going_on.fit(resumed, datamodule=Letters(), ckpt_path=tmp_path / "x.ckpt")
    assert [torch.equal(a, b) for a, b in zip(*batches, strict=True)] == [True] * 32
    assert (distance(whole.state_dict(), resumed.state_dict()) == 0) == exact


def test_ddp_with_half_of_the_rows_each_is_one_process_with_all() -> None:
    alone, bits = fitted("auto", 1)
    both, same_bits = fitted("ddp_fork", 2, rows=2)
    assert distance(alone.state_dict(), both.state_dict()) < 1e-5
    assert bits == pytest.approx(same_bits, rel=1e-4)


def test_ddp_with_clusters_that_only_some_ranks_see() -> None:
    clusters = {"cutoffs": [4, 8], "div_val": 2, "tie_projs": [False, True, True]}
    alone, _ = fitted("auto", 1, **clusters)
    both, _ = fitted("ddp_fork", 2, rows=2, **clusters)
    assert distance(alone.state_dict(), both.state_dict()) < 1e-3  # gradients are means of two means


def test_compressed_ddp_trains_it() -> None:
    _, bits = fitted(compressed(compressor="topk:0.1"), 2, rows=2)
    assert bits < 3.6


STAGES = {"tie_weight": False, "context": Context(6, clamp_len=5), "eval_context": Context(9, same_length=True)}


def test_a_pipeline_without_staleness_learns_what_one_process_learns_memories_and_all() -> None:
    # Clipping is by device in these pipelines, so there is none here.
    alone, bits = fitted("auto", 1, gradient_clip_val=None, **STAGES)
    piped, same_bits = fitted("naive_model_parallel_fork", 2, gradient_clip_val=None, **STAGES)
    assert distance(alone.state_dict(), piped.state_dict()) < 1e-6
    assert bits == pytest.approx(same_bits, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"schedule": "interleaved", "microbatches": 4}])
def test_a_synchronous_pipeline_learns_what_one_process_learns_ties_memories_and_all(options: Any) -> None:
    alone, bits = fitted("auto", 1, n_layer=3)
    strategy = PipelineStrategy(**{"microbatches": 2, **options}, start_method="fork")
    piped, same_bits = fitted(strategy, 2, n_layer=3)
    assert distance(alone.state_dict(), piped.state_dict()) < 1e-4
    assert bits == pytest.approx(same_bits, rel=1e-4)


def test_dsp_trains_it() -> None:
    _, bits = fitted("dsp_fork", 2, **STAGES)
    assert bits < 3.6


RING = {"n_layer": 3, "cutoffs": [4, 8], "div_val": 2, "bias_groups": None}
GENTLE = partial(torch.optim.SGD, lr=0.02)  # so that rounding stays rounding


def test_ouroboros_without_delays_learns_what_one_process_learns_ties_memories_and_all() -> None:
    alone, bits = fitted("auto", 1, gradient_clip_val=None, optimizer=GENTLE, **RING)
    strategy = OuroborosStrategy(start_method="fork", timeout=60)
    strategy._options["gradient_delays"] = [0, 0]
    ring, same_bits = fitted(strategy, 2, gradient_clip_val=None, optimizer=GENTLE, **RING)
    assert distance(alone.state_dict(), ring.state_dict()) < 1e-5
    assert bits == pytest.approx(same_bits, rel=1e-5)


def test_ouroboros_trains_it() -> None:
    _, bits = fitted("ouroboros_fork", 2, **RING)
    assert bits < 3.6


def test_a_tie_over_devices_is_refused_with_the_cure() -> None:
    wanted = r"DSPStrategy has them on different devices, 0 and 1. Set `tie_weight: false`"
    with pytest.raises(ProcessRaisedException, match=wanted):
        trainer("dsp_fork", 2, 2).fit(small(), datamodule=Letters())


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"vocabulary": 13}, {}, "`vocabulary` must be the number of different tokens: got 13 for 12 characters"),
        ({"context": Context(100)}, {}, r"`mem_len` must be below .*: got 100 for rows of 100 tokens \(train\)"),
        ({"eval_context": Context(50)}, {}, r"`mem_len` must be below .*: got 50 for rows of 50 tokens \(val\)"),
        (
            {},
            {"tgt_len": 100},
            "The training text must have at least 404 tokens for 4 rows of segments of 100: got 400",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer("auto", 2, 1).fit(small(**options), datamodule=Letters(**data))
