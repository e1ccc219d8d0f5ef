"""Scores of a classification: computed, printed, written, plotted."""

from running.files import write_json

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from utils import new_figure, save_figure

MIN_TEST_PIXELS = 20  # of a class, below which its F1 is chance: one pixel of two moves it by .5
MAX_NUMBERED = 40  # classes of a confusion matrix whose cells have room for a number


def measurable_classes(labels):
    """Codes of at least MIN_TEST_PIXELS of the labels (N,); where fewer than two have that, all."""
    codes, counts = np.unique(labels, return_counts=True)
    enough = counts >= MIN_TEST_PIXELS
    return codes[enough] if enough.sum() > 1 else codes


def count_classes(labels, scored, legend):
    """{code: {"name", "pixels", "scored"}} of labels (N,), for JSON. scored: (C,) codes."""
    return {
        str(code): {
            "name": entry["name"],
            "pixels": int((labels == code).sum()),
            "scored": code in scored,
        }
        for code, entry in legend.items()
    }


def macro_f1(labels, predicted, counts=None, codes=None):
    """Mean F1 of the classes that are labelled; a pixel called another counts against its own.

    labels, predicted, counts: as for `score_classes`; codes: the classes to take the mean over, or
    None for all. The pixels of the others count, too.
    """
    codes = np.unique(labels) if codes is None else codes
    keywords = {"labels": codes, "average": "macro", "zero_division": 0}
    return float(f1_score(labels, predicted, sample_weight=counts, **keywords))


def resample_f1(labels, predicted, blocks, times, codes=None):
    """Macro-F1 of K predictions in R resamples of G blocks, (R, K).

    labels: (N,) class codes; predicted: (K, N); blocks: (N,) 0 .. G - 1; times: (R, G) float, how
    often a resample has each block; codes: as `macro_f1` takes them. The mean is over the classes
    that a resample has; NaN where that is none.
    """
    all_codes, num_blocks = np.union1d(labels, predicted), times.shape[1]
    is_scored = np.isin(all_codes, labels if codes is None else codes)

    def count(codes, chosen=slice(None)):
        """How many pixels each resample has of each class, by codes (N,) of some or all: (R, C)."""
        cells = blocks * len(all_codes) + np.searchsorted(all_codes, codes)
        counts = np.bincount(cells[chosen], minlength=num_blocks * len(all_codes))
        return times @ counts.reshape(num_blocks, -1)

    labelled = count(labels)
    present = (labelled > 0) & is_scored
    scores = np.full((len(times), len(predicted)), np.nan)
    any_class = present.any(1)
    for place, row in enumerate(predicted):
        right, both = count(row, row == labels), labelled + count(row)
        f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
        scores[any_class, place] = np.mean(f1[any_class], 1, where=present[any_class])
    return scores


def score_classes(labels, predicted, legend, counts=None):
    """The full report of a classification, as plain numbers for JSON.

    labels, predicted: (N,) class codes; counts: (N,) int, for how many pixels each of these pairs
    stands, or None for one. Returns overall_accuracy, macro_f1 and weighted_f1 (over the classes
    that are labelled), per_class (precision, recall, f1, support by code) and the confusion matrix,
    whose rows and columns follow `classes`.
    """
    codes, weights = list(legend), {"sample_weight": counts}
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=codes, zero_division=0, **weights
    )
    weighted = f1_score(labels, predicted, average="weighted", zero_division=0, **weights)
    rows = zip(codes, precision, recall, f1, support, strict=True)
    return {
        "overall_accuracy": float(accuracy_score(labels, predicted, **weights)),
        "macro_f1": macro_f1(labels, predicted, counts),
        "weighted_f1": float(weighted),
        "per_class": {
            str(code): {
                "name": legend[code]["name"],
                "precision": float(p),
                "recall": float(r),
                "f1": float(f),
                "support": int(n),
            }
            for code, p, r, f, n in rows
        },
        "confusion_matrix": confusion_matrix(labels, predicted, labels=codes, **weights).tolist(),
        "classes": {str(code): entry for code, entry in legend.items()},
    }


def write_report(scores, legend, output_dir, title, log):
    """metrics.json and confusion_matrix.png of `score_classes`, to the folder, wandb and screen."""
    write_json(output_dir / "metrics.json", scores)
    picture = output_dir / "confusion_matrix.png"
    plot_confusion(np.array(scores["confusion_matrix"]), legend, picture, title)
    log.images({"confusion_matrix": picture})
    print(f"{title}:")
    print_scores(scores)
    print(f"{picture}: what was mapped as what")


def print_scores(scores):
    """Print a report of `score_classes`; a class without labels has no scores, shown as –."""
    print(
        f"overall accuracy {scores['overall_accuracy']:.3f}  macro-F1 {scores['macro_f1']:.3f}  "
        f"weighted F1 {scores['weighted_f1']:.3f}"
    )
    for code, row in scores["per_class"].items():
        precision, recall, f1 = (
            f"{row[key]:.3f}" if row["support"] else "  –  "
            for key in ("precision", "recall", "f1")
        )
        print(
            f"{code:>4} {row['name']:28.28s} precision {precision}  recall {recall}  F1 {f1}  "
            f"support {row['support']}"
        )
    mapped = dict(zip(scores["per_class"], np.sum(scores["confusion_matrix"], 0), strict=True))
    missed = [c for c, row in scores["per_class"].items() if row["support"] and not mapped[c]]
    if missed:
        names = ", ".join(f"{code} {scores['per_class'][code]['name']}" for code in missed)
        print(f"never mapped, though it has labels here: {names}")


def plot_confusion(matrix, legend, path, title=""):
    """Plot a confusion matrix (C, C) of counts to a PNG: rows labelled, columns predicted.

    A matrix of more than MAX_NUMBERED classes has small names and no numbers.
    """
    names = [entry["name"] for entry in legend.values()]
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 3 + 0.5 * min(len(names), MAX_NUMBERED)
    figure = new_figure(figsize=(size + 1, size))
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    is_numbered = len(names) <= MAX_NUMBERED
    for (row, column), count in np.ndenumerate(matrix) if is_numbered else ():
        color = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, int(count), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=10 if is_numbered else 10 * MAX_NUMBERED / len(names))
    axes.set(xlabel="predicted", ylabel="labelled", title=title)
    figure.colorbar(image, shrink=0.8, label="share of the labelled")
    save_figure(figure, path)
