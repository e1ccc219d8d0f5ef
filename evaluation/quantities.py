"""Scores of a predicted quantity, with intervals from blocks; picture and warning.

Shapes: N pixels, G blocks of neighbouring pixels.
"""

from running.tile_json import describe_target

import numpy as np

from utils import new_figure, save_figure

SCORES = ("rmse", "mae", "r2", "bias")
RESAMPLES, CONFIDENCE = 2000, 0.95  # of blocks, and of the intervals
MAX_POINTS = 20_000  # of a picture


def score_quantity(actual, predicted, blocks=None, seed=0):
    """The report of a predicted quantity, as plain numbers for JSON.

    actual, predicted: (N,) in the unit of the quantity; blocks: (N,) the block of each pixel, None
    for no intervals. Returns rmse, mae and bias (mean of predicted - actual) in that unit, r2 (1 -
    squared errors / squared deviations from the mean of the actual ones; None where all are equal),
    pixels, and "intervals": {score: [low, high]}, the middle 95 % over resampled blocks: pixels of
    one block resemble each other, so that an interval over pixels would be too narrow.
    """
    sums = sum_errors(actual, predicted)
    scores = summarise(sums.sum(0))
    if blocks is None:
        return scores
    names, place = np.unique(blocks, return_inverse=True)
    by_block = np.zeros((len(names), sums.shape[1]))
    np.add.at(by_block, place, sums)
    scores |= {"blocks": len(names), "intervals": None}
    if len(names) > 1:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
        edges = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        scores["intervals"] = {
            key: [_plain(value) for value in np.nanquantile(values, edges)]
            for key, values in _scores(counts @ by_block).items()
        }
    return scores


def sum_errors(actual, predicted):
    """What each pixel adds to the sums that `summarise` takes, (N, 6) float64."""
    actual, predicted = np.asarray(actual, float), np.asarray(predicted, float)
    error = predicted - actual
    return np.stack([np.ones_like(error), error, abs(error), error**2, actual, actual**2], 1)


def summarise(sums):
    """The scores of `score_quantity` without intervals; sums: (6,) of `sum_errors`."""
    scores = {key: _plain(value) for key, value in _scores(sums).items()}
    return {"pixels": int(sums[0]), **scores}


def _scores(sums):
    """{score: value} of sums (.., 6)."""
    count, error, absolute, squared, actual, actual_squared = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # of no pixels, and of equal targets
        deviations = actual_squared - actual**2 / count
        r2 = np.where(deviations > 1e-12 * actual_squared, 1 - squared / deviations, np.nan)
        rmse = np.sqrt(squared / count)
        return {"rmse": rmse, "mae": absolute / count, "r2": r2, "bias": error / count}


def resample_rmse(actual, predicted, blocks, times):
    """RMSE of K predictions in R resamples of G blocks, (R, K).

    actual: (N,); predicted: (K, N); blocks: (N,) 0 .. G - 1; times: (R, G) float, how often a
    resample has each block.
    """
    squared = np.stack([np.bincount(blocks, (row - actual) ** 2) for row in predicted], 1)
    return np.sqrt(times @ squared / (times @ np.bincount(blocks))[:, None])


def _plain(value):
    return float(value) if np.isfinite(value) else None


def count_outside(predicted, low, high):
    """How many predictions leave the range of the training targets, for JSON."""
    outside = int(((predicted < low) | (predicted > high)).sum())
    return {"pixels": outside, "low": float(low), "high": float(high)}


def print_quantity_scores(scores, target):
    """Print a report of `score_quantity`; target: {"name", "unit"}."""
    intervals = scores.get("intervals") or {}
    for key in SCORES:
        unit = "" if key == "r2" else f" {target['unit']}"
        value = "none" if scores[key] is None else f"{scores[key]:.4g}"
        low, high = intervals.get(key, (None, None))
        between = "" if low is None or high is None else f"  (95 %: {low:.4g} to {high:.4g})"
        print(f"{key.upper():>5} {value}{unit}{between}")
    if scores.get("blocks") and not intervals:
        print("no intervals: all pixels are of one block")


def plot_predicted(actual, predicted, scores, target, path, title=""):
    """Plot predicted against actual values (N,) with the 1:1 line to a PNG; some of very many."""
    chosen = slice(None, None, max(1, len(actual) // MAX_POINTS))
    actual, predicted = actual[chosen], predicted[chosen]
    figure = new_figure(figsize=(5.5, 5.5))
    axes = figure.subplots()
    axes.scatter(actual, predicted, s=8, alpha=0.3, linewidths=0, color="#0072b2", rasterized=True)
    ends = [min(actual.min(), predicted.min()), max(actual.max(), predicted.max())]
    axes.plot(ends, ends, color="black", linewidth=1, label="predicted = actual")
    what = describe_target(target)
    r2 = "none" if scores["r2"] is None else f"{scores['r2']:.2f}"
    numbers = f"RMSE {scores['rmse']:.3g}, R2 {r2}, bias {scores['bias']:.2g} {target['unit']}"
    axes.set(xlabel=f"actual {what}", ylabel=f"predicted {what}", title=f"{title}\n{numbers}")
    axes.set_aspect("equal")
    axes.legend(loc="upper left", frameon=False)
    save_figure(figure, path)
