"""A memory is a longer context, and nothing looks ahead."""

from __future__ import annotations

import pytest
import torch

from lightning_distopt.model_parallel.block import StatefulLayer
from recipes.transformer_xl import Context
from tests.recipes.transformer_xl.models import LETTERS, segments, small

TOKENS = torch.randint(len(LETTERS), (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("length", [12, 8, 5])
@pytest.mark.parametrize("training", [True, False])
def test_segments_with_memory_are_one_long_segment(layers: int, length: int, training: bool) -> None:
    model = small(n_layer=layers, context=Context(24)).double().train(training)
    torch.testing.assert_close(segments(TOKENS, length, model), segments(TOKENS, 24, model))


def test_a_layer_sees_as_far_as_its_memory_and_the_next_layer_as_far_again() -> None:
    for layers in (1, 2):
        model = small(n_layer=layers, context=Context(4, same_length=True)).double().eval()
        before = segments(TOKENS, 4, model)
        # With `same_length` each token sees 4 tokens, itself among them, in each layer.
        place, reach = 20, layers * 3
        for back, changes in ((reach, True), (reach + 1, False)):
            other = TOKENS.clone()
            other[:, place - back] = (other[:, place - back] + 1) % len(LETTERS)
            after = segments(other, 4, model)
            assert (not torch.equal(before[:, place], after[:, place])) == changes, (layers, back)


@pytest.mark.parametrize("same_length", [True, False])
def test_a_later_token_changes_no_earlier_output(same_length: bool) -> None:
    model = small(context=Context(5, same_length=same_length))
    before = segments(TOKENS, 8, model)
    for place in (0, 7, 8, 13, 23):
        other = TOKENS.clone()
        other[:, place] = (other[:, place] + 1) % len(LETTERS)
        after = segments(other, 8, model)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place], after[:, place])


def test_no_gradient_flows_into_a_memory() -> None:
    model = small()
    model(TOKENS[:, :6])
    assert all(not state.requires_grad and state.shape == (3, 6, 8) for state in model._states.values())
    assert list(model._states) == ["1", "2"]


def test_the_memory_of_a_layer_is_its_own_input() -> None:
    model = small(context=Context(4))
    seen = {}
    for name, layer in model.layers.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    model(TOKENS[:, :6])
    for name, state in model._states.items():
        assert torch.equal(state, seen[name][:, -4:])


def test_evaluation_has_its_own_lengths() -> None:
    model = small(n_layer=1, context=Context(4), eval_context=Context(20, clamp_len=3)).double()
    model(TOKENS[:, :6])
    assert model._states["1"].shape[1] == 4
    model.eval()
    long = segments(TOKENS, 6, model)
    assert model._states["1"].shape[1] == 20
    whole = small(n_layer=1, context=Context(20, clamp_len=3)).double().eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(long, segments(TOKENS, 6, whole))
    unclamped = small(n_layer=1, context=Context(20)).double().eval()
    unclamped.load_state_dict(model.state_dict())
    other = segments(TOKENS, 6, unclamped)
    torch.testing.assert_close(long[:, :4], other[:, :4])  # distances up to 3
    assert float((long - other)[:, 6:].detach().abs().max()) > 1e-6


def test_rows_do_not_see_each_other() -> None:
    model = small().eval()
    together = segments(TOKENS, 6, model)
    alone = segments(TOKENS[1:2], 6, model)
    torch.testing.assert_close(together[1:2], alone)


def test_without_a_memory_layers_are_plain() -> None:
    model = small(context=Context(0))
    assert not any(isinstance(layer, StatefulLayer) for layer in model.layers)
    assert torch.equal(model(TOKENS), model(TOKENS))
    remembering = small(context=Context(0), eval_context=Context(3))
    remembering.load_state_dict(model.state_dict())
    assert torch.equal(segments(TOKENS, 6, model), segments(TOKENS, 6, remembering))


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`mem_len` must be an integer >= 0: got -1"):
        Context(-1)
    with pytest.raises(ValueError, match="`clamp_len` must be an integer >= 1: got 0"):
        Context(3, clamp_len=0)
    with pytest.raises(ValueError, match="got `mem_len=0`, which leaves none"):
        Context(0, same_length=True)
