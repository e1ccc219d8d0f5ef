"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230) and the prediction of observations.

Shapes: N pixels of the whole batch, V views, S sampled dates, B bands, D dimensions of a
representation, P of a projection.
"""

from running.distributed import BatchGenerator, BatchNorm, gather, share

import torch
import torch.nn.functional as F
from torch import nn

from backbones import BACKBONES, backbone_arguments, build_backbone, load_backbone
from transforms import AUGMENTATIONS, add_mixed_view, blend_pixels, encode_days, thin_dates

EPSILON = 1e-5  # of the variances, as in the reference's BatchNorm


class Projector(nn.Sequential):
    """Linear, BatchNorm, ReLU twice, then Linear; no biases, as in the reference."""

    def __init__(self, *, latent_dim, width, projection_dim):
        super().__init__(
            nn.Linear(latent_dim, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, projection_dim, bias=False),
        )


class HarmonicDecoder(nn.Module):
    """Bands at any day, from harmonics of the year whose coefficients a representation holds.

    The coefficients are linear in the representation. So a linear model on the embedding can use
    what a harmonic regression of the whole year knows of a pixel.
    """

    def __init__(self, *, latent_dim, num_bands, harmonics):
        super().__init__()
        self.shape = (1 + 2 * harmonics, num_bands)
        self.coefficients = nn.Linear(latent_dim, self.shape[0] * num_bands)

    def forward(self, y, doys):
        """Standardised bands (N, S, B) of representations y (N, D) at days doys (N, S)."""
        waves = F.pad(encode_days(doys, self.shape[0] - 1), (1, 0), value=1.0)  # 1, sines, cosines
        return waves @ self.coefficients(y).unflatten(-1, self.shape)


class BarlowTwins(nn.Module):
    """Backbone, projector and, where observations are predicted, a decoder.

    forward(x, doys, days): x (N, V, S, B), doys (N, V, S); days (N, 2, S'): where bands are
    predicted. All views go through the backbone in one call, and through the projector one by one,
    since BatchNorm standardises each view by itself.
    Returns representations (N, V, D) of this process's pixels; a list of V projections, each (N, P)
    float32, gathered over the processes; and the bands (N, 2, S', B) that views a and b predict of
    each other, or None without a decoder.
    """

    def __init__(self, backbone, projector, decoder=None):
        super().__init__()
        self.backbone, self.projector, self.decoder = backbone, projector, decoder

    def forward(self, x, doys, days):
        y = self.backbone(x.flatten(0, 1), doys.flatten(0, 1)).unflatten(0, x.shape[:2])
        z = [gather(self.projector(view).float()) for view in y.unbind(1)]
        if not self.decoder:
            return y, z, None
        # the observations of view a are predicted from view b, and those of b from a
        predicted = [self.decoder(y[:, 1 - view], days[:, view]) for view in (0, 1)]
        return y, z, torch.stack(predicted, 1)


def normalise(z):
    """z (N, P) to mean 0 and population variance 1 in each dimension, in float32."""
    z = z.float()
    z = z - z.mean(0)
    return z * (z.square().mean(0) + EPSILON).rsqrt()


def cross_correlation(z_a, z_b):
    """C = A'B / N of two normalised batches (N, P): (P, P)."""
    return z_a.T @ z_b / len(z_a)


def barlow_twins_loss(z, config, mixture=None):
    """Equation 1 of the paper: sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2.

    z: projections of views a and b and, with a mixture, of the mixed view. mixture: the weights
    (N,) of view a and the partners (N,), indices into view b; adds `mix_up_loss`.
    """
    z_a, z_b, *z_m = map(normalise, z)
    c = cross_correlation(z_a, z_b)
    on_diag = (c.diagonal() - 1).square().sum()
    off_diag = c.square().sum() - c.diagonal().square().sum()
    loss, parts = on_diag + config["barlow_lambda"] * off_diag, {}
    if mixture:
        weight, order = mixture
        parts["mix_up_loss"] = mix_up_loss(z_m[0], z_a, z_b[order], z_b, weight)
        times = config["mix_up"] * config["mix_up_every"]  # the steps between have none
        loss = loss + times * config["barlow_lambda"] * parts["mix_up_loss"]
    return loss, {"on_diag": on_diag, "off_diag": off_diag, **parts}


def mix_up_loss(z_m, z_a, z_b_shuffled, z_b, weight):
    """Mixed Barlow Twins (arXiv 2312.02151): the mixed view's correlations against the mixture's.

    All (N, P), normalised; weight: (N,) share of a in each mixed sample.
    Returns |C_ma - C_ma'|^2 + |C_mb - C_mb'|^2, where C' has the mixture of embeddings in place of
    z_m.
    """
    mixture = weight[:, None] * z_a + (1 - weight[:, None]) * z_b_shuffled
    difference = z_m - mixture
    return sum(cross_correlation(difference, z).square().sum() for z in (z_a, z_b))


# A loss takes the raw projections z, a list of (N, P) tensors: view a, view b and, in training with
# mix_up > 0, the mixed view; the config, from which it reads its own keys; and the mixture of the
# mixed view or None. It returns the loss and a dict of its parts for the log. Training and
# validation both call it. Register it here.
LOSSES = {"barlow_twins": barlow_twins_loss}


def pretraining_loss(z, predicted, observed, config, mixture=None):
    """The loss of config["loss"] plus, where observations are predicted, the error of that.

    z, mixture: as a loss takes them; predicted: (N, 2, S, B) as `BarlowTwins` gives it, or None;
    observed: (N, 2, S, B), the standardised bands of both views, of this process's pixels.
    Smooth L1 limits the weight of clouds that the mask missed. Returns the loss and its parts.
    """
    loss, parts = LOSSES[config["loss"]](z, config, mixture)
    if predicted is not None:
        error = F.smooth_l1_loss(predicted.float(), observed, reduction="none")
        parts["prediction_error"] = gather(error.flatten(1).mean(1)).mean()
        loss = loss + config["prediction"] * parts["prediction_error"]
    return loss, parts


def build_model(config, num_bands, checkpoint=None):
    """Backbone, projector and decoder from a config: the same weights for the same seed.

    The backbone is the checkpoint's, where there is one to start from.
    """
    torch.manual_seed(config["seed"])
    size = config["projector_dim"]
    # projector first: the order of construction decides their random weights
    projector = Projector(latent_dim=config["latent_dim"], width=size, projection_dim=size)
    backbone, decoder = build_backbone(**backbone_arguments(config, num_bands)), None
    if checkpoint:
        backbone = load_backbone(checkpoint).train()
    if config["prediction"]:
        decoder = HarmonicDecoder(
            latent_dim=config["latent_dim"], num_bands=num_bands, harmonics=config["harmonics"]
        )
    return BarlowTwins(backbone, projector, decoder)


def training_loss(model, x, doys, config, runtime, step):
    """The loss of a step on views x (N, 2, S, B), doys (N, 2, S).

    Returns the loss, a dict of its parts, and the projections (V of (N, P)): tensors.
    """
    seed = config["seed"] * 1_000_003 + step  # the same numbers on any machine
    rows, total = share(len(x))
    # generators use 32 bits of a seed: offsets of 2^30 and 2^31 keep the three streams apart
    generator = BatchGenerator(rows, total, seed + (1 << 31), x.device)
    if config["blend"]:
        x = blend_pixels(x, doys, config["blend"], seed, rows, total)
    observed, days_observed, mixture = x, doys, None
    if BACKBONES[config["backbone"]].any_length:
        x, doys = thin_dates(x, doys, config["min_sample_size"], seed)
    x, doys = AUGMENTATIONS[config["augment"]](x, doys, generator)
    if config["mix_up"] and step % config["mix_up_every"] == 0:
        x, doys, mixture = add_mixed_view(x, doys, seed + (1 << 30), rows, total)
    runtime.mark_dynamic(x, doys, days_observed)
    with runtime.autocast(training=True):
        _, z, predicted = model(x, doys, days_observed)
    loss, parts = pretraining_loss(z, predicted, observed, config, mixture)
    return loss, {"loss": loss, "loss_per_dim": loss / z[0].shape[1], **parts}, z
