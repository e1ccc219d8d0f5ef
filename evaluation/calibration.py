"""Confidence that means something: temperature scaling, and how far confidence is from accuracy.

Guo et al. 2017 (arXiv 1706.04599): logits are divided by a temperature that is fitted to labels
that the network has not learned from. The most probable class never changes.

Shapes: N pixels, D dimensions of a representation, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from backbones import decode_classes
from evaluation.classifiers import find_label_folds
from evaluation.networks import BATCHNORM_EPS, fit_linear_start
from utils import new_figure, save_figure

BINS = 15  # of equal width, as in Guo et al.
RANGE = (0.1, 10)  # of temperatures: of nine networks the best one was 3.2 to 12.5
SOURCES = {
    "validation": "the validation split",
    "folds": "folds of the training labels",
    "none": "nothing: too few labels",
}


def fit_temperature(logits, labels):
    """The temperature with the lowest cross-entropy of logits (N, C) and class numbers (N,).

    The square of its logarithm is added to the sum over labels: few labels that are all right
    would make confidence infinite.
    """
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels).long()

    def loss(log):
        scaled = logits / np.exp(log)
        return float(F.cross_entropy(scaled, labels, reduction="sum")) + log**2

    return float(np.exp(minimize_scalar(loss, bounds=np.log(RANGE), method="bounded").x))


def predict_folds(y, labels, num_classes, groups, seed=0):
    """Logits (n, C) and class numbers (n,) of labels that discriminant analysis has not seen.

    Out of the folds of `find_label_folds`, which may hold a label several times or not at all.
    y: (N, D) representations; labels: (N,) class numbers; groups: (N,) blocks.
    """
    folds, _ = find_label_folds(labels, seed, groups)
    logits, rows = [np.empty((0, num_classes))], [test for _, test in folds]
    for train, test in folds:
        start = fit_linear_start(y[train], labels[train], num_classes, seed)
        mean, var, weight, bias = (part.numpy() for part in start)
        logits.append((y[test] - mean) / np.sqrt(var + BATCHNORM_EPS) @ weight.T + bias)
    return np.concatenate(logits), labels[np.concatenate([*rows, []]).astype(int)]


def measure_calibration(logits, labels, temperature):
    """{"expected_calibration_error", "bins"} of logits (N, C) and class numbers (N,), for JSON.

    The error is the mean over pixels of |accuracy - mean confidence| of their bin. bins: BINS of
    confidence, each {"pixels", "confidence", "accuracy"}, the means None where it is empty.
    """
    confidence, best = decode_classes(torch.as_tensor(logits).double(), temperature).max(1)
    confidence, is_right = confidence.numpy(), best.numpy() == np.asarray(labels)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count, sure, right = (
        np.bincount(place, weights, BINS) for weights in (None, confidence, is_right)
    )
    bins = [
        {"pixels": int(n), "confidence": s / n if n else None, "accuracy": r / n if n else None}
        for n, s, r in zip(count, sure.tolist(), right.tolist(), strict=True)
    ]
    return {
        "expected_calibration_error": float(np.abs(sure - right).sum() / len(labels)),
        "bins": bins,
    }


def score_calibration(logits, labels, temperature, source):
    """What metrics.json says of confidence. source: of the temperature, a key of SOURCES."""
    before, after = (measure_calibration(logits, labels, t) for t in (1.0, temperature))
    name = "expected_calibration_error"
    about = {"temperature": temperature, "fitted_to": SOURCES[source]}
    return {
        name: after[name],
        f"{name}_before": before[name],
        "calibration": about | {"bins": after["bins"], "bins_before": before["bins"]},
    }


def print_calibration(scores):
    """Print what `score_calibration` gives."""
    about, name = scores["calibration"], "expected_calibration_error"
    print(
        f"confidence: expected calibration error {scores[name]:.3f} with temperature "
        f"{about['temperature']:.2f}, fitted to {about['fitted_to']}; "
        f"{scores[f'{name}_before']:.3f} without"
    )


def plot_reliability(calibration, path, title=""):
    """Plot accuracy against confidence, before and after, to a PNG, and how many pixels each has.

    calibration: of `score_calibration`.
    """
    figure = new_figure(figsize=(5, 6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    edges = np.linspace(0, 1, BINS + 1)
    for name, label, color in (
        ("bins_before", "before", "#d55e00"),
        ("bins", f"temperature {calibration['temperature']:.2f}", "#0072b2"),
    ):
        bins = calibration[name]
        known = [one for one in bins if one["pixels"]]
        points = [[one[key] for one in known] for key in ("confidence", "accuracy")]
        above.plot(*points, marker="o", color=color, label=label)
        below.stairs([one["pixels"] for one in bins], edges, color=color)
    above.set(ylabel="accuracy", title=title, xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left")
    below.set(xlabel="confidence", ylabel="pixels")
    save_figure(figure, path)
