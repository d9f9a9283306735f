"""Networks have the published sizes, and shortcuts without parameters."""

import doctest
from typing import get_args

import pytest
import torch
from torch import nn

from recipes.resnet import models
from recipes.resnet.models import CIFAR_BLOCKS, TORCHVISION_MODELS, BasicBlock, ModelName, build_model


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet20", 10, 269_722),  # published: 0.27 M
        ("resnet32", 10, 464_154),  # 0.46 M
        ("resnet44", 10, 658_586),  # 0.66 M
        ("resnet56", 10, 853_018),  # 0.85 M
        ("resnet110", 10, 1_727_962),  # 1.7 M
        ("resnet56", 100, 858_868),
    ],
)
def test_cifar_networks_have_the_published_parameter_counts(name: ModelName, classes: int, parameters: int) -> None:
    model = build_model(name, classes)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())

    assert _parameters(model) == parameters
    assert layers == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50", 25_557_032), ("densenet121", 7_978_856), ("mobilenet_v2", 3_504_872)]
)
def test_torchvision_networks_have_the_published_parameter_counts(name: ModelName, parameters: int) -> None:
    pytest.importorskip("torchvision")
    assert _parameters(build_model(name, 1000)) == parameters


def test_every_name_that_the_help_offers_can_be_built() -> None:
    assert set(get_args(ModelName)) == {*CIFAR_BLOCKS, *TORCHVISION_MODELS}


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8)])
def test_logits_have_one_column_a_class(channels: int, side: int) -> None:
    model = build_model("resnet20", num_classes=7, in_channels=channels, width=4)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)


def test_half_the_width_needs_a_quarter_of_the_parameters() -> None:
    assert _parameters(build_model("resnet20", 10, width=8)) / _parameters(build_model("resnet20", 10)) < 0.26


def test_shortcut_takes_every_second_position_and_pads_new_maps_with_zeros() -> None:
    block = BasicBlock(2, 4, stride=2)
    nn.init.zeros_(block.norm2.weight)  # silence the convolutions: only the shortcut remains
    x = torch.rand(1, 2, 4, 4)

    out = block(x)

    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert out[:, [0, 3]].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet21", "num_classes": 10}, ["resnet21", "resnet20", "mobilenet_v2"]),
        ({"name": "resnet20", "num_classes": 0}, ["num_classes", "0"]),
        ({"name": "resnet20", "num_classes": 10, "width": 0}, ["width", "0"]),
        ({"name": "resnet50", "num_classes": 10, "in_channels": 1}, ["in_channels=3", "got 1"]),
    ],
)
def test_wrong_arguments_are_refused_with_the_numbers(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build_model(**arguments)
    assert all(word in str(error.value) for word in words)


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(models).failed == 0
