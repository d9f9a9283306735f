"""The layered classifier is the network that it is made of."""

import torch

from recipes.resnet import LayeredClassifier
from recipes.resnet.models import build_model


def test_the_layers_are_the_whole_network() -> None:
    torch.manual_seed(0)
    whole = build_model("resnet20", 10, 1, 4).eval()
    torch.manual_seed(0)
    layered = LayeredClassifier("resnet20", 10, 1, 4, image_size=8).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(layered(x), whole(x))
    assert len(layered.layers) == 11
    assert sum(p.numel() for p in layered.parameters()) == sum(p.numel() for p in whole.parameters())
    assert set(layered.metrics(whole(x), torch.tensor([0, 1, 2]))) == {"accuracy"}
