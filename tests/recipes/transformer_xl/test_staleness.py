"""Delayed gradients of a model with memories, dropout and a tie are the right ones, later."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.in_process import InProcessPipeline
from tests.recipes.transformer_xl.models import Letters, small


def gradients(plan: str, tie: bool) -> dict[str, list[Tensor]]:
    """Return each parameter's gradients in the order of its updates; the weights stand still."""
    torch.manual_seed(4)
    model, data = small(n_layer=3, dropout=0.2, dropatt=0.2, tie_weight=tie).double(), Letters()
    data.setup("fit")
    batches = list(data.train_dataloader())[:6]
    embedding, *layers, _ = model.layers
    with torch.no_grad():
        model.loss.weights[0].copy_(embedding.tables[0])
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, list[Tensor]] = defaultdict(list)

    class Still(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        found[names[p]].append(p.grad.clone())

    stages = [embedding, *layers]
    InProcessPipeline(stages, model.loss, StalenessPlan.preset(plan, 4), lambda p: Still(p, lr=1.0)).run(batches)
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("plan", ["features_replay", "dsp", "ddg"])
def test_without_a_learning_rate_delayed_gradients_are_those_of_back_propagation(plan: str) -> None:
    now, later = gradients("naive", False), gradients(plan, False)
    for name, wanted in now.items():
        assert len(wanted) == 6
        assert all(torch.equal(a, b) for a, b in zip(wanted, later[name], strict=True)), name


def test_a_tied_table_gets_both_of_its_parts_each_at_its_own_time() -> None:
    parts, delayed = gradients("naive", False), gradients("ouroboros", True)
    inputs, outputs = parts.pop("layers.0.tables.0"), parts.pop("loss.weights.0")
    for name, wanted in parts.items():
        assert all(torch.equal(a, b) for a, b in zip(wanted, delayed[name], strict=True)), name
    none = torch.zeros_like(inputs[0])
    for tick, found in enumerate(delayed["layers.0.tables.0"]):
        head = outputs[tick] if tick < 6 else none
        torch.testing.assert_close(found, head + (inputs[tick - 3] if tick >= 3 else none))
    assert tick == 8
