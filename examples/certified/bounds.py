"""Interval bounds (IBP) of a network of convolutions, linear layers, batch norms, poolings, ReLUs and a flattening.

A box goes through a layer as its center and its radius: an affine layer maps the center as it maps points, and the radius by
the absolute values of its weights, so that each bound is reached in a corner of the box. A batch norm takes the statistics
of the clean images, which go along (arXiv 2103.17268, section 3.3.2). The last layer's bounds are those of the margins
between the label's logit and the others, in one affine layer with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Box:
    """Bounds of a batch's activations, of any shape, beside the activations of the images themselves.

    Attributes:
        clean: of the unperturbed images.
        center: middle of the bounds.
        radius: half of their distance, 0 or above.
    """

    clean: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor

    @property
    def lower(self) -> torch.Tensor:
        return self.center - self.radius

    @property
    def upper(self) -> torch.Tensor:
        return self.center + self.radius


def box_around(images: torch.Tensor, epsilon: float) -> Box:
    """All images from 0 to 1 that differ by at most ``epsilon`` at each pixel."""
    lower, upper = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
    return Box(images, (upper + lower) / 2, (upper - lower) / 2)


def through(layer: nn.Module, box: Box) -> Box:
    """The box behind a layer.

    Raises:
        TypeError: a layer of another kind.
    """
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        both = layer(torch.cat([box.clean, box.center]))
        return Box(*both.chunk(2), _absolute(layer, box.radius))
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _normed(layer, box)
    if isinstance(layer, nn.ReLU):
        lower, upper = F.relu(box.lower), F.relu(box.upper)
        return Box(F.relu(box.clean), (upper + lower) / 2, (upper - lower) / 2)
    if isinstance(layer, (nn.AvgPool2d, nn.Flatten)):  # the former is affine with weights above 0
        return Box(layer(box.clean), layer(box.center), layer(box.radius))
    raise TypeError(f"no bounds are known of {type(layer).__name__}")


def _absolute(layer: nn.Conv2d | nn.Linear, radius: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(radius, layer.weight.abs())
    return F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _normed(norm: nn.BatchNorm1d | nn.BatchNorm2d, box: Box) -> Box:
    if norm.training:
        axes = [axis for axis in range(box.clean.dim()) if axis != 1]
        variance, mean = torch.var_mean(box.clean, axes, correction=0)
    else:
        variance, mean = norm.running_var, norm.running_mean
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    shape = (1, -1) + (1,) * (box.clean.dim() - 2)
    scale, shift = scale.view(shape), shift.view(shape)
    # the module itself, on the clean images, so that its running statistics are theirs
    return Box(norm(box.clean), box.center * scale + shift, box.radius * scale.abs())


def margins(last: nn.Linear, box: Box, labels: torch.Tensor) -> torch.Tensor:
    """(batch, classes): lower bounds of the label's logit minus each other one; 0 at the label."""
    weight = last.weight[labels][:, None] - last.weight
    bias = last.bias[labels][:, None] - last.bias
    return torch.einsum("bcf,bf->bc", weight, box.center) + bias - torch.einsum("bcf,bf->bc", weight.abs(), box.radius)


@dataclass(frozen=True)
class Bounds:
    """What is bounded of a network.

    Attributes:
        logits: (batch, classes), of the unperturbed images.
        hidden: the boxes before each ReLU.
        margins: see :func:`margins`.
    """

    logits: torch.Tensor
    hidden: list[Box]
    margins: torch.Tensor


def bounds(network: nn.Sequential, box: Box, labels: torch.Tensor) -> Bounds:
    """Sends a box through a network whose last layer is linear."""
    *layers, last = network
    hidden: list[Box] = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            hidden.append(box)
        box = through(layer, box)
    return Bounds(last(box.clean), hidden, margins(last, box, labels))
