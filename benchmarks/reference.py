"""What the benchmark compares with: the per-pixel way of public code of this kind.

A Python loop takes one pixel, counts its clear observations, draws with `numpy.random.choice`,
builds tensors and collects them into batches; the encoder is an eager, sequence-first
`nn.TransformerEncoder`, called once for each view. Slow on purpose, not by accident.
"""

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from transforms import encode_days


class PixelLoop:
    """Views of one tile, pixel by pixel; its arrays are read into memory once, beforehand."""

    def __init__(self, tile, sample_size, num_views):
        self.bands, self.masks = np.array(tile.bands), np.array(tile.masks)
        self.doys, self.mean, self.std = tile.doys, tile.band_mean, tile.band_std
        self.sample_size, self.num_views = sample_size, num_views

    def pixel(self, row, column):
        """x (V, S, B) float32, standardised, and doys (V, S); None for too few observations."""
        mask = self.masks[:, row, column]
        if mask.sum() < self.sample_size:
            return None
        valid = np.nonzero(mask)[0]
        series = (self.bands[:, row, column].astype(np.float32) - self.mean) / self.std
        x = torch.zeros(self.num_views, self.sample_size, series.shape[1])
        doys = torch.zeros(self.num_views, self.sample_size, dtype=torch.long)
        for view in range(self.num_views):
            index = np.sort(np.random.choice(valid, self.sample_size, replace=False))
            x[view] = torch.tensor(series[index])
            doys[view] = torch.tensor(self.doys[index])
        return x, doys

    def batches(self, pixels, batch_size):
        """Yield the views of pixels (N, 2), row and column, in batches."""
        buffer = []
        for row, column in pixels:
            if (views := self.pixel(row, column)) is not None:
                buffer.append(views)
            if len(buffer) == batch_size:
                yield default_collate(buffer)
                buffer = []
        if buffer:
            yield default_collate(buffer)


class SequenceFirstEncoder(nn.Module):
    """`nn.TransformerEncoder` of the size of `backbones.TransformerEncoder`, sequence first.

    dropout: 0.1 is the default of the class and what public code trains with.
    """

    def __init__(self, *, num_bands, latent_dim, width, depth, dropout=0.1):
        super().__init__()
        self.latent_dim = latent_dim
        self.embed = nn.Sequential(nn.Linear(num_bands, width), nn.GELU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout, activation="gelu", norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, latent_dim)

    def forward(self, x, doys):
        x = self.embed(x) + encode_days(doys, self.head.in_features)
        return self.head(self.layers(x.transpose(0, 1)).mean(0))
