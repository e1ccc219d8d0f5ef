"""Loss and gradients stay finite, whatever the pixels are."""

import pytest
import torch
from helpers import tiny

from backbones import BACKBONES, focal_loss
from running.device import Runtime
from train import build_model, training_loss

GENERATOR = torch.Generator().manual_seed(0)
CASES = {
    "constant input": torch.ones(16, 2, 6, 4),
    "zeros": torch.zeros(16, 2, 6, 4),
    "one band is dead": torch.randn(16, 2, 6, 4, generator=GENERATOR) * torch.tensor([1, 1, 0, 1]),
    "a batch of two": torch.randn(2, 2, 6, 4, generator=GENERATOR),
    "two equal pixels": torch.randn(1, 2, 6, 4, generator=GENERATOR).expand(2, -1, -1, -1),
    "equal views": torch.randn(16, 1, 6, 4, generator=GENERATOR).expand(-1, 2, -1, -1),
    "extreme values": 1e5 * torch.randn(16, 2, 6, 4, generator=GENERATOR),
    "an outlier": torch.randn(16, 2, 6, 4, generator=GENERATOR).index_fill(
        0, torch.tensor([3]), 6e4
    ),
    "tiny values": 1e-20 * torch.randn(16, 2, 6, 4, generator=GENERATOR),
}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_finite(case, backbone):
    """A dimension or a batch without variance divides by its deviation, which is 0."""
    config = tiny("", "", backbone=backbone, augment="jitter_bands")
    model, x = build_model(config, num_bands=4), CASES[case]
    doys = torch.arange(1, 367, 61).expand(len(x), 2, -1)
    cpu = Runtime(torch.device("cpu"), rank=0, world_size=1)
    loss, parts, _ = training_loss(model, x, doys, config, cpu, step=0)
    loss.backward()
    assert all(value.isfinite() for value in parts.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_the_focal_loss_of_a_certain_pixel_has_a_gradient(gamma):
    """Regression: with gamma below 1 a pixel that is right with p = 1 gave NaN."""
    logits = torch.tensor([[30.0, -30.0], [-30.0, 30.0], [1.0, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0, 1]), gamma)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1:, 0] * torch.tensor([1, -1]) < 0).all(), "towards the labels"


def test_the_focal_loss_is_what_it_is_called():
    logits, target = torch.randn(64, 5, generator=GENERATOR), torch.arange(64) % 5
    p = logits.double().softmax(1)[torch.arange(64), target]
    for gamma in (0.0, 0.5, 2.0):
        expected = float((-((1 - p) ** gamma) * p.log()).mean())
        assert float(focal_loss(logits, target, gamma)) == pytest.approx(expected, rel=1e-5)
