"""The paper's CNN-7: five convolutions and two linear layers, a batch norm behind all but the last, and its initialization."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

STRIDES = (1, 1, 2, 1, 1)


def cnn7(
    shape: tuple[int, int, int], channels: tuple[int, ...], width: int, *, pool: int = 1, norms: bool = True
) -> nn.Sequential:
    """A CNN-7 for ten classes.

    Args:
        shape: channels, height and width of an image.
        channels: of the five convolutions; (64, 64, 128, 128, 128) in the paper.
        width: of the hidden linear layer; 512 in the paper.
        pool: averages squares of so many pixels first, which makes a smaller network; 1 in the paper.
        norms: whether there are batch norms.
    """
    inputs, size = shape[0], (shape[1] // pool, shape[2] // pool)
    layers: OrderedDict[str, nn.Module] = OrderedDict({"pool": nn.AvgPool2d(pool)} if pool > 1 else {})
    for number, (outputs, stride) in enumerate(zip(channels, STRIDES), 1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, stride, 1)
        if norms:
            layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
        inputs, size = outputs, tuple((side - 1) // stride + 1 for side in size)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(inputs * size[0] * size[1], width)
    if norms:
        layers["norm6"] = nn.BatchNorm1d(width)
    layers["relu6"] = nn.ReLU()
    layers["linear2"] = nn.Linear(width, 10)
    return nn.Sequential(layers)


@torch.no_grad()
def ibp_initialize(network: nn.Sequential) -> None:
    """Weights from N(0, 2 pi / n^2) for n inputs, of all layers but the last: a layer and its ReLU leave the expected distance
    of the bounds as it is, where PyTorch's own initialization multiplies it by sqrt(n) / 4."""
    *layers, _ = (layer for layer in network if isinstance(layer, (nn.Conv2d, nn.Linear)))
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
