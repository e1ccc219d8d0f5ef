"""Where a map can be trusted: the area of applicability of Meyer and Pebesma (2021).

doi 10.1111/2041-210X.13650. The dissimilarity of a pixel is the distance of its representation to
that of the nearest training label, divided by the mean distance between training labels. The area
of applicability is where it is at most a threshold: the largest dissimilarity of a training label
to those of other blocks, outliers left out, as R's CAST has it. Dimensions are standardised and
weigh alike.

Shapes: N pixels, D dimensions of a representation, M training labels.
"""

import numpy as np
import torch

from maps.reader import row_blocks

MAX_LABELS = 2000  # that a checkpoint keeps: half a megabyte of 128 dimensions
BATCH = 4096  # pixels whose distances to all labels are in memory


def describe_labels(y, blocks):
    """What a checkpoint keeps of its labels, from representations y (M, D) and blocks (M,).

    Returns {"mean", "std" (D,) float32; "labels" (M, D) float16, standardised; "distance", their
    mean distance; "threshold"}. Where all labels are of one block, the threshold is of distances
    within it.
    """
    mean, std = y.mean(0), y.std(0)
    std = np.where(std > 1e-6 * np.abs(mean).max(), std, 1)  # of a constant dimension
    labels = torch.from_numpy((y - mean) / std).half()
    distances = torch.cdist(labels.double(), labels.double())
    distance = float(distances.sum() / (len(y) * (len(y) - 1))) or 1.0
    own = np.equal.outer(blocks, blocks) if len(np.unique(blocks)) > 1 else np.eye(len(y)) > 0
    nearest = distances.masked_fill(torch.from_numpy(own), np.inf).min(1).values / distance
    mean, std = (torch.from_numpy(np.float32(part)) for part in (mean, std))
    about = {"mean": mean, "std": std, "labels": labels}
    return about | {"distance": distance, "threshold": upper_whisker(nearest.numpy())}


def upper_whisker(values):
    """The largest of values (M,) that is at most 1.5 interquartile ranges above the upper one."""
    low, high = np.percentile(values, (25, 75))
    return float(values[values <= high + 1.5 * (high - low)].max())


def measure_dissimilarity(y, known, runtime):
    """Dissimilarity (N,) float32 of representations (N, D) float32, tensors on the CPU.

    known: of `describe_labels`.
    """
    parts = (y, known["mean"], known["std"], known["labels"])
    y, mean, std, labels = runtime.to_device(*parts)
    y, labels = (y - mean) / std, labels.float()
    lengths, found = labels.square().sum(1), []
    for part in y.split(BATCH):
        # |part - label|^2 less |part|^2, so that one product does most of it
        nearest = torch.addmm(lengths, part, labels.T, alpha=-2).min(1).values
        found.append((nearest + part.square().sum(1)).clamp(min=0).sqrt() / known["distance"])
    return torch.cat(found).cpu()


def share_outside(dissimilarity, threshold):
    """Share of the pixels with data, of a map (H, W) with NaN, that lie outside; 0 for none."""
    outside = known = 0
    for _, rows in row_blocks(dissimilarity):
        outside += np.count_nonzero(rows > threshold)
        known += np.count_nonzero(np.isfinite(rows))
    return outside / max(1, known)
