"""The loss against references, and the properties that its users rely on."""

import pytest
import torch
from torch import nn

from barlow_twins import (
    BarlowTwins,
    HarmonicDecoder,
    Projector,
    barlow_twins_loss,
    cross_correlation,
    mix_up_loss,
    normalise,
    pretraining_loss,
)

LAMBDA = {"barlow_lambda": 0.0051}


def naive_loss(z_a, z_b, weight):
    """Two loops over the dimensions, as the paper writes it."""
    z_a, z_b = z_a.double(), z_b.double()
    z_a = (z_a - z_a.mean(0)) / (z_a.var(0, unbiased=False) + 1e-5).sqrt()
    z_b = (z_b - z_b.mean(0)) / (z_b.var(0, unbiased=False) + 1e-5).sqrt()
    total = 0.0
    for i in range(z_a.shape[1]):
        for j in range(z_a.shape[1]):
            c = float((z_a[:, i] * z_b[:, j]).sum()) / len(z_a)
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


@pytest.mark.parametrize("pixels", [2, 7, 64])
def test_equals_a_naive_double_loop(pixels):
    z_a, z_b = torch.randn(2, pixels, 6, generator=torch.Generator().manual_seed(pixels))
    loss, parts = barlow_twins_loss([z_a, z_b], LAMBDA)
    assert float(loss) == pytest.approx(naive_loss(z_a, z_b, 0.0051), rel=1e-5)
    weighted = parts["on_diag"] + 0.0051 * parts["off_diag"]
    assert float(loss) == pytest.approx(float(weighted), rel=1e-6)


def test_equals_the_reference_formula_and_its_gradient():
    """facebookresearch/barlowtwins: BatchNorm1d(affine=False), C / N, off-diagonal by mask."""
    z_a, z_b = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (z_a.clone().requires_grad_(), z_a.clone().requires_grad_())
    loss, _ = barlow_twins_loss([ours, z_b], LAMBDA)
    bn = nn.BatchNorm1d(16, affine=False)
    c = bn(theirs).T @ bn(z_b) / 128
    wanted = (c.diagonal() - 1).pow(2).sum() + 0.0051 * c[~torch.eye(16, dtype=bool)].pow(2).sum()
    loss.backward()
    wanted.backward()
    assert abs(float((loss - wanted).detach())) < 1e-5
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_diagonal_reaches_one():
    """With the unbiased deviation and a mean over N the diagonal would end at (N - 1) / N."""
    z = torch.randn(8, 5)
    c = cross_correlation(normalise(z), normalise(z))
    torch.testing.assert_close(c.diagonal(), torch.ones(5), atol=1e-4, rtol=0)


def test_a_dead_dimension_gives_finite_loss_and_gradient():
    """Without an epsilon under the root, a dimension that never varies gives NaN."""
    z = torch.randn(16, 4)
    z[:, 2] = 3.0
    z.requires_grad_()
    loss, _ = barlow_twins_loss([z, z], LAMBDA)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_float32_whatever_comes_in():
    z = torch.randn(32, 4).bfloat16()
    assert cross_correlation(normalise(z), normalise(z)).dtype == torch.float32


def test_mix_up_loss_is_zero_for_embeddings_that_mix_linearly():
    z_a, z_b = map(normalise, torch.randn(2, 64, 8))
    order, weight = torch.randperm(64), torch.rand(64)
    mixture = weight[:, None] * z_a + (1 - weight[:, None]) * z_b[order]
    assert float(mix_up_loss(mixture, z_a, z_b[order], z_b, weight)) < 1e-8
    assert float(mix_up_loss(z_a, z_a, z_b[order], z_b, weight)) > 1


def test_mix_up_loss_equals_the_paper_for_one_weight():
    """Mixed Barlow Twins writes each correlation out, with one alpha for the batch."""
    z_m, z_a, z_b = map(normalise, torch.randn(3, 32, 6))
    order, a = torch.randperm(32), 0.3
    wanted = 0
    for z in (z_a, z_b):
        target = a * z_a.T @ z / 32 + (1 - a) * z_b[order].T @ z / 32
        wanted += (z_m.T @ z / 32 - target).square().sum()
    loss = mix_up_loss(z_m, z_a, z_b[order], z_b, torch.full((32,), a))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)


class FlattenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x, doys):
        return self.linear(x.flatten(1))


def test_views_are_normalised_each_on_its_own():
    """Both views in one encoder call, but BatchNorm must not mix their statistics."""
    torch.manual_seed(0)
    model = BarlowTwins(FlattenBackbone(), Projector(latent_dim=3, width=16, projection_dim=4))
    x, doys = torch.randn(12, 2, 4, 2), torch.ones(12, 2, 4)
    _, (z_a, z_b), _ = model(x, doys, doys)
    alone = model.projector(model.backbone(x[:, 0], doys[:, 0]))
    torch.testing.assert_close(z_a, alone)
    assert z_a.shape == z_b.shape == (12, 4)


def test_batches_of_other_sizes_follow_each_other():
    """Guards against a batch size fixed in the loss: the last batch of an epoch may be shorter."""
    for pixels in (32, 5):
        z = torch.randn(pixels, 3)
        c = cross_correlation(normalise(z), normalise(z))
        assert float(c.diagonal().mean()) == pytest.approx(1, abs=1e-3)


# ---- prediction of observations ------------------------------------------------------------------


def two_views(decoder=None, pixels=12):
    torch.manual_seed(0)
    projector = Projector(latent_dim=3, width=16, projection_dim=4)
    model = BarlowTwins(FlattenBackbone(), projector, decoder)
    doys = torch.randint(1, 366, (pixels, 2, 4)).sort(2).values.float()
    return model, torch.randn(pixels, 2, 4, 2), doys


def test_a_decoder_gives_the_harmonic_series_of_its_coefficients():
    decoder = HarmonicDecoder(latent_dim=3, num_bands=2, harmonics=2)
    y, doys = torch.randn(5, 3), torch.randint(1, 366, (5, 7)).float()
    coefficients = decoder.coefficients(y).view(5, 5, 2)
    angle = 2 * torch.pi * doys / 365.25
    waves = [torch.ones_like(angle), angle.sin(), (2 * angle).sin(), angle.cos(), (2 * angle).cos()]
    wanted = sum(
        wave[..., None] * coefficients[:, i, None] for i, wave in enumerate(waves)
    )  # (5, 7, 2)
    torch.testing.assert_close(decoder(y, doys), wanted)


def test_each_view_is_predicted_from_the_other_alone():
    """A view that predicts what it has read learns to copy; days are those of what is predicted."""
    model, x, doys = two_views(HarmonicDecoder(latent_dim=3, num_bands=2, harmonics=2))
    y, _, predicted = model(x, doys, doys)
    assert predicted.shape == x.shape
    for view in (0, 1):
        wanted = model.decoder(y[:, 1 - view], doys[:, view])
        torch.testing.assert_close(predicted[:, view], wanted)
    x[:, 0] += 1.0
    _, _, after = model(x, doys, doys)
    torch.testing.assert_close(after[:, 0], predicted[:, 0])
    assert not torch.allclose(after[:, 1], predicted[:, 1])


def test_the_loss_of_prediction_is_added_with_its_weight():
    model, x, doys = two_views(HarmonicDecoder(latent_dim=3, num_bands=2, harmonics=2))
    config = LAMBDA | {"loss": "barlow_twins", "prediction": 10.0, "mix_up": 0.0}
    _, z, predicted = model(x, doys, doys)
    pure, _ = pretraining_loss(z, None, x, config)
    loss, parts = pretraining_loss(z, predicted, x, config)
    error = torch.nn.functional.smooth_l1_loss(predicted, x)
    torch.testing.assert_close(parts["prediction_error"], error)
    torch.testing.assert_close(loss, pure + 10 * error)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.parameters())


def test_no_decoder_is_pure_barlow_twins():
    model, x, doys = two_views()
    assert model(x, doys, doys)[2] is None
    assert set(dict(model.named_children())) == {"backbone", "projector"}
