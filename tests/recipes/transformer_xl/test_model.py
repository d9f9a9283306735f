"""Sizes, starts and ties of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recipes.transformer_xl import Context, TransformerXL
from tests.recipes.transformer_xl.models import small

CONFIGS = Path(__file__).parents[3] / "recipes" / "transformer_xl"
PARAMETERS = {
    "enwik8": 41_055_436,
    "text8": 40_964_635,
    "wt103": 151_107_538,
    "enwik8_large": 277_231_820,
    "wt103_large": 285_170_506,  # by the formula below; the specification has no figure
    "shakespeare": 5_142_849,
}


def configured(name: str, **changes: Any) -> TransformerXL:
    """Return the model of a configuration, without memory for its weights."""
    arguments = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    plain = {key: value for key, value in arguments.items() if key not in ("optimizer", "scheduler", "sampling")}
    for key in ("context", "eval_context"):
        plain[key] = Context(**plain[key])
    with torch.device("meta"):
        return TransformerXL(**{**plain, **changes})


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_configurations(name: str) -> None:
    assert size(configured(name)) == PARAMETERS[name]


def test_parameters_in_millions_are_the_papers() -> None:
    assert [round(PARAMETERS[name] / 1e6, 2) for name in ("enwik8", "text8", "wt103")] == [41.06, 40.96, 151.11]
    assert round(PARAMETERS["enwik8_large"] / 1e6) == 277
    assert 4e6 < PARAMETERS["shakespeare"] < 6e6


def test_parameters_by_the_formula() -> None:
    # layer: q, k, v, output and positions; two linear maps with biases; two norms
    def layer(d: int, heads: int, inner: int) -> int:
        return 5 * d * heads + 2 * d * inner + inner + d + 4 * d

    assert layer(512, 8 * 64, 2048) == 3_412_480
    assert layer(410, 10 * 41, 2100) == 2_566_650
    wt103_large = 18 * layer(1024, 16 * 64, 4096) + 2 * 1024  # one pair of position biases
    sizes, widths = (20_000, 20_000, 160_000, 67_735), (1024, 256, 64, 16)
    wt103_large += sum(n * w for n, w in zip(sizes, widths, strict=True)) + 267_735  # tables and biases
    wt103_large += 1024 * sum(widths) + 1024 * 1024 + 3 * 1024 + 3  # projections, the untied one, clusters
    assert wt103_large == PARAMETERS["wt103_large"]


def test_untied_options_say_how_many_parameters_they_cost() -> None:
    base = PARAMETERS["enwik8"]
    assert size(configured("enwik8", bias_groups=3)) == base + 2 * 1024
    assert size(configured("enwik8", bias_groups=None)) == base + 11 * 1024
    assert size(configured("enwik8", tie_weight=False)) == base + 204 * 512


def test_groups_of_layers_share_their_biases() -> None:
    model = small(n_layer=6, bias_groups=2)
    pairs = [(id(layer.content_bias), id(layer.position_bias)) for layer in list(model.layers)[1:-1]]
    assert pairs[0] == pairs[1] == pairs[2] != pairs[3] == pairs[4] == pairs[5]
    assert len({id(layer.content_bias) for layer in list(small(n_layer=4).layers)[1:-1]}) == 4


def test_weights_start_as_in_the_authors_code() -> None:
    model = small(d_model=64, d_head=32, d_inner=256, vocabulary=500)
    layer, head = model.layers[1], model.loss
    for weight in (layer.qkv.weight, layer.positions.weight, layer.inner.weight, model.layers[0].tables[0]):
        assert abs(float(weight.detach().std()) - 0.02) < 0.002
        assert abs(float(weight.detach().mean())) < 0.002
    assert abs(float(layer.inner_norm.weight.detach().mean()) - 1) < 0.01
    for bias in (layer.inner.bias, layer.outer.bias, layer.inner_norm.bias, head.biases[0]):
        assert float(bias.detach().abs().max()) == 0
    projected = small(d_model=64, d_embed=32, vocabulary=500, tie_projs=[False])
    assert abs(float(projected.loss.projections[0].detach().std()) - 0.01) < 0.001


def test_a_tied_table_is_one_parameter_and_saved_under_both_names() -> None:
    model = small()
    assert model.layers[0].tables[0] is model.loss.weights[0]
    names = [name for name, _ in model.named_parameters()]
    assert "layers.0.tables.0" in names
    assert "loss.weights.0" not in names
    assert {"layers.0.tables.0", "loss.weights.0"} <= set(model.state_dict())
    assert small(tie_weight=False).layers[0].tables[0] is not small(tie_weight=False).loss.weights[0]


def test_the_embedding_is_scaled_and_everything_is_dropped_out() -> None:
    model = small(d_model=16).eval()
    tokens = torch.tensor([[3]])
    assert torch.equal(model.layers[0](tokens)[0, 0], 4 * model.layers[0].tables[0][3])
    model = small(dropout=0.5, dropatt=0.5)
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 7}, "`d_model` must be even, half sines and half cosines: got 7"),
        ({"n_layer": 0}, "`n_layer` must be an integer >= 1: got 0"),
        ({"bias_groups": 3}, "`bias_groups` must be from 1 to the number of layers: got 3 for 2 layers"),
        ({"dropout": 1.5}, r"`dropout` must be in \[0, 1\]: got 1.5"),
        ({"cutoffs": [3, 2]}, r"`cutoffs` must rise and lie between 1 and 11, the last token: got \[3, 2\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
