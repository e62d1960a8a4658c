"""Interval bounds of examples/certified: sound, exact for an affine layer, and the paper's losses by plain loops."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "certified"))
from bounds import Box, bounds, box_around, margins, through
from losses import figures, relu_balance, robust_loss, tightness
from network import cnn7, ibp_initialize

EPSILON, IMAGES = 0.05, 20


@pytest.fixture(scope="module", params=["norms", "no norms"])
def trained(request):
    """A CNN-7 in float64 after some steps on random images, so that its weights and statistics are no special ones."""
    torch.manual_seed(0)
    network = cnn7((1, 12, 12), (4, 4, 6, 6, 6), 16, pool=2, norms=request.param == "norms").double()
    images, labels = torch.rand(IMAGES, 1, 12, 12, dtype=torch.float64), torch.arange(IMAGES) % 10
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        robust_loss(bounds(network, box_around(images, 0.01), labels), labels).backward()
        optimizer.step()
    if request.param == "norms":  # gains below 0 turn bounds around
        with torch.no_grad():
            network.norm3.weight[:3] *= -1
    return network.eval().requires_grad_(False), images, labels


def margins_of(logits, labels):
    return logits.gather(1, labels[:, None]) - logits


def test_no_random_point_beats_a_bound(trained):
    """10,000 points: inside of each image's box, and its corners; at the margins and before every ReLU."""
    network, images, labels = trained
    box = box_around(images, EPSILON)
    found = bounds(network, box, labels)
    generator = torch.Generator().manual_seed(1)
    for draw in range(500):
        where = torch.rand(images.shape, generator=generator, dtype=torch.float64) * 2 - 1
        points = box.center + box.radius * (where if draw % 2 else where.sign())
        x, hidden = points, iter(found.hidden)
        for layer in network:
            if isinstance(layer, nn.ReLU):
                before = next(hidden)
                assert (before.lower - 1e-9 <= x).all() and (x <= before.upper + 1e-9).all()
            x = layer(x)
        assert (margins_of(x, labels) >= found.margins - 1e-9).all()


def test_no_attack_beats_a_bound(trained):
    """Projected gradient descent on each margin, from several starts, ends nearer to the bounds and not below."""
    network, images, labels = trained
    box = box_around(images, EPSILON)
    bound = bounds(network, box, labels).margins
    random = margins_of(network(box.center), labels)
    for target, start in itertools.product(range(10), range(3)):
        generator = torch.Generator().manual_seed(start)
        where = torch.rand(images.shape, generator=generator, dtype=torch.float64) * 2 - 1
        for _ in range(15):
            points = (box.center + box.radius * where).requires_grad_()
            reached = margins_of(network(points), labels)[:, target]
            assert (reached >= bound[:, target] - 1e-9).all()
            random[:, target] = torch.minimum(random[:, target], reached.detach())
            (gradient,) = torch.autograd.grad(reached.sum(), points)
            where = (where - 0.25 * gradient.sign()).clamp(-1, 1)
    others = F.one_hot(labels, 10) == 0
    assert (random < margins_of(network(box.center), labels))[others].float().mean() > 0.9  # the attack does something
    assert (random >= bound - 1e-9).all()


def corners(box):
    """(2^n, ...): every corner of the one box of a batch of 1."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=box.center.numel())), dtype=torch.float64)
    return box.center + box.radius * signs.reshape(-1, *box.center.shape[1:])


@pytest.mark.parametrize(
    "layer", [nn.Linear(9, 5), nn.Conv2d(1, 4, 3, 2, 1), nn.AvgPool2d(3)], ids=lambda layer: type(layer).__name__
)
def test_an_affine_layer_is_exact(layer):
    torch.manual_seed(2)
    layer = layer.double()
    shape = (1, 9) if isinstance(layer, nn.Linear) else (1, 1, 3, 3)
    center, radius = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    box = Box(center, center, radius)
    found, every = through(layer, box), layer(corners(box))
    torch.testing.assert_close(found.lower[0], every.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.upper[0], every.amax(0), rtol=0, atol=1e-12)


def test_margins_are_exact_and_tighter_than_those_of_logits():
    torch.manual_seed(3)
    last, label = nn.Linear(9, 4).double(), torch.tensor([2])
    center, radius = torch.randn(1, 9, dtype=torch.float64), torch.rand(1, 9, dtype=torch.float64)
    box = Box(center, center, radius)
    found, every = margins(last, box, label), last(corners(box))
    torch.testing.assert_close(found[0], margins_of(every, label.expand(len(every))).amin(0), rtol=0, atol=1e-12)
    logits = through(last, box)
    apart = logits.lower[0, 2] - logits.upper[0]
    assert (found[0] > apart + 1e-3).all()


def test_images_stay_between_0_and_1():
    box = box_around(torch.tensor([[0.0, 0.05, 0.5, 1.0]], dtype=torch.float64), 0.1)
    torch.testing.assert_close(box.lower, torch.tensor([[0, 0, 0.4, 0.9]], dtype=torch.float64))
    torch.testing.assert_close(box.upper, torch.tensor([[0.1, 0.15, 0.6, 1.0]], dtype=torch.float64))


def test_a_batch_norm_has_the_statistics_of_the_images_alone():
    torch.manual_seed(4)
    norm, same = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    x, radius = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.rand(8, 3, 5, 5, dtype=torch.float64)
    nn.init.uniform_(norm.weight, -2, 2)
    same.load_state_dict(norm.state_dict())
    box, clean = through(norm, Box(x, x + 1, radius)), same(x)
    torch.testing.assert_close(box.clean, clean)
    torch.testing.assert_close(norm.running_mean, same.running_mean)
    torch.testing.assert_close(norm.running_var, same.running_var)
    slope = norm.weight / (x.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(box.center, clean + slope[:, None, None])
    torch.testing.assert_close(box.radius, radius * slope.abs()[:, None, None])


def test_a_box_without_width_is_the_network(trained):
    network, images, labels = trained
    found = bounds(network, box_around(images, 0.0), labels)
    torch.testing.assert_close(found.margins, margins_of(network(images), labels))
    torch.testing.assert_close(found.logits, network(images))


def test_an_unknown_layer_is_refused():
    with pytest.raises(TypeError, match="no bounds are known of GELU"):
        through(nn.GELU(), box_around(torch.rand(1, 3), 0.1))


@pytest.mark.parametrize("initialized, gain", [(True, lambda n: 1.0), (False, lambda n: math.sqrt(n) / 4)])
def test_the_initialization_keeps_the_width_of_bounds(initialized, gain):
    torch.manual_seed(5)
    network = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64 * 6 * 6, 256), nn.Linear(256, 10))
    last = network[-1].weight.clone()
    if initialized:
        ibp_initialize(network)
    for layer, inputs, shape in ((network[0], 144, (4, 16, 8, 8)), (network[2], 2304, (64, 2304))):
        clean, center = torch.zeros(shape), torch.randn(shape)
        with torch.no_grad():
            behind = through(nn.ReLU(), through(layer, Box(clean, center, torch.full(shape, 0.5))))
        assert float(behind.radius.mean()) / 0.5 == pytest.approx(gain(inputs), rel=0.1)
    assert torch.equal(network[-1].weight, last)


def test_the_regularizers_are_the_papers_formulas():
    torch.manual_seed(6)
    image = Box(*(torch.full((3, 4), 0.2, dtype=torch.float64) for _ in range(3)))
    hidden = [
        Box(None, torch.randn(3, n, dtype=torch.float64) + s, torch.rand(3, n, dtype=torch.float64) * s)
        for n, s in ((8, 1), (6, 0.3))
    ]
    ones = torch.ones(3, 5, dtype=torch.float64)
    hidden.append(Box(None, 2 + ones, ones))  # all active
    tolerance, tight, balance = 0.5, 0.0, 0.0
    for box in hidden:
        lower, upper = box.lower.flatten().tolist(), box.upper.flatten().tolist()
        widths = [high - low for low, high in zip(lower, upper)]
        tight += max(0.0, tolerance - 0.4 / (sum(widths) / len(widths)))
        middle = [(low + high) / 2 for low, high in zip(lower, upper)]
        mean = sum(middle) / len(middle)
        above = [c for c, low in zip(middle, lower) if low > 0]
        below = [c for c, high in zip(middle, upper) if high < 0]
        if not above or not below:
            continue
        alpha = sum(above) / -sum(below)
        beta = sum((c - mean) ** 2 for c in above) / sum((c - mean) ** 2 for c in below)
        balance += sum(max(0.0, tolerance - min(ratio, 1 / ratio)) for ratio in (alpha, beta))
    assert tight > 0 and balance > 0
    assert float(tightness(image, hidden, tolerance)) == pytest.approx(tight / (tolerance * 3))
    assert float(relu_balance(hidden, tolerance)) == pytest.approx(balance / (tolerance * 3))
    assert figures(image, hidden)["active"][2] == 1.0


def test_the_regularizers_have_finite_gradients_without_inactive_neurons():
    center = (torch.rand(3, 5) + 2).requires_grad_()
    relu_balance([Box(center, center, torch.ones(3, 5)), Box(center, center * 1.0, torch.ones(3, 5))], 0.5)
    both = torch.cat([center, -center], 1)
    relu_balance([Box(both, both, torch.ones(3, 10)), Box(center, center, torch.ones(3, 5))], 0.5).backward()
    assert torch.isfinite(center.grad).all()
