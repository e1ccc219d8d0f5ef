"""Is a difference between two models more than chance?

Shapes: N test pixels, S label draws (seeds), G blocks of pixels, C classes.
"""

import numpy as np
from scipy.stats import ttest_rel

BOOTSTRAPS = 1000


def paired_p(ours, theirs):
    """Two-sided p of a paired t-test over the label draws; None where it is not defined.

    ours, theirs: (S,) scores of two models, each pair from the same labels. It asks whether other
    labels would give the same sign, in this region and on these test pixels. Draws from few labels
    overlap, which makes p too small where label_count is a large part of the training split.
    """
    difference = np.subtract(ours, theirs)
    if len(difference) < 2 or np.ptp(difference) < 1e-12:
        return None
    return float(ttest_rel(ours, theirs).pvalue)


def block_bootstrap(labels, groups, ours, theirs, seed=0, scored=None):
    """95 % interval of the difference in macro-F1, from test blocks resampled with replacement.

    Whole blocks, since neighbours are alike: McNemar's test, or a bootstrap of pixels, takes them
    for independent and finds too much (Ploton et al. 2020, 10.1038/s41467-020-18321-y).
    labels, groups: (N,) class code and block of each test pixel; ours, theirs: (S, N) predicted
    codes, whose differences are averaged over S; scored: as `macro_f1` takes codes.
    Returns (low, high), or None for a single block.
    """
    blocks = np.unique(groups, return_inverse=True)[1]
    num_blocks = blocks.max() + 1
    if num_blocks < 2:
        return None
    predicted = np.concatenate([ours, theirs])  # (2 S, N)
    codes = np.union1d(labels, predicted)
    is_scored = np.isin(codes, labels if scored is None else scored)
    cells = [blocks * len(codes) + np.searchsorted(codes, row) for row in (labels, *predicted)]
    size = num_blocks * len(codes)
    labelled = np.bincount(cells[0], minlength=size)
    counts = []  # of each block and class: pixels that are right; labelled plus predicted as such
    for row, cell in zip(predicted, cells[1:], strict=True):
        right = np.bincount(cells[0][row == labels], minlength=size)
        counts.append([right, labelled + np.bincount(cell, minlength=size)])
    counts = np.array(counts, np.float32).reshape(-1, num_blocks, len(codes))  # (4 S, G, C)
    rng, differences = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAPS):
        times = np.bincount(rng.integers(num_blocks, size=num_blocks), minlength=num_blocks)
        counted = np.matmul(times.astype(np.float32), counts)  # (4 S, C)
        right, both = np.moveaxis(counted.reshape(-1, 2, len(codes)), 1, 0)
        present = (times @ labelled.reshape(num_blocks, -1) > 0) & is_scored  # for both models
        if not present.any():
            continue
        f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
        ours, theirs = f1[:, present].mean(1).reshape(2, -1)
        differences.append((ours - theirs).mean())
    return tuple(float(value) for value in np.percentile(differences, [2.5, 97.5]))


def independent_f1(rows, all_labels):
    """Macro-F1 of a model in each label draw of one count; of all labels, in each checkpoint.

    Draws of all labels are the same labels, so those of one checkpoint count once, by their mean.
    all_labels: how many the training split has.
    """
    if rows[0]["label_count"] < all_labels:
        return [row["macro_f1"] for row in rows]
    by_checkpoint = {}
    for row in rows:
        by_checkpoint.setdefault(row["checkpoint"], []).append(row["macro_f1"])
    return [float(np.mean(f1)) for f1 in by_checkpoint.values()]


def run_tests(draws, test, all_labels, ours, scored):
    """Test each of our models against the best baseline at one count of labels: a list of dicts.

    draws: what `score_draw` gave for each seed; all_labels: as `independent_f1` takes it; ours:
    names of our models, all others are baselines; scored: as `macro_f1` takes codes. The best
    baseline is the one with the best mean on the test split, which favours the baseline.
    """
    rows = {name: [draw[name][0] for draw in draws] for name in draws[0]}
    f1 = {name: independent_f1(rows[name], all_labels) for name in rows}
    predicted = {name: np.array([draw[name][1] for draw in draws]) for name in f1}
    baselines = [name for name in f1 if name not in ours]
    if not baselines:
        return []
    best = max(baselines, key=lambda name: np.mean(f1[name]))
    return [
        {
            "label_count": draws[0][best][0]["label_count"],
            "model": name,
            "baseline": best,
            "difference": float(np.mean(f1[name]) - np.mean(f1[best])),
            "p_seeds": paired_p(f1[name], f1[best]),
            "interval_blocks": block_bootstrap(
                *test[1:], predicted[name], predicted[best], scored=scored
            ),
            "blocks": len(np.unique(test[2])),
        }
        for name in f1
        if name in ours
    ]
