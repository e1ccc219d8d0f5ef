"""Is a difference between two models more than chance?

Shapes: N test pixels, S label draws (seeds).
"""

import numpy as np
from scipy.stats import ttest_rel

from evaluation.rows import OWN

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


def block_bootstrap(resample, answers, groups, ours, theirs, seed=0):
    """95 % interval of the difference in a score, from test blocks resampled with replacement.

    Whole blocks, since neighbours are alike: McNemar's test, or a bootstrap of pixels, takes them
    for independent and finds too much (Ploton et al. 2020, 10.1038/s41467-020-18321-y).
    resample: gives the score, as `resample_f1` and `resample_rmse` do; answers, groups: (N,) class
    code or value, and block of each test pixel; ours, theirs: (S, N) predictions, whose differences
    are averaged over S.
    Returns (low, high), or None for a single block.
    """
    blocks = np.unique(groups, return_inverse=True)[1].ravel()
    num_blocks = blocks.max() + 1
    if num_blocks < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(num_blocks, size=num_blocks) for _ in range(BOOTSTRAPS)]
    times = np.stack([np.bincount(one, minlength=num_blocks) for one in drawn])
    scores = resample(answers, np.concatenate([ours, theirs]), blocks, times.astype(float))
    ours, theirs = np.split(scores, 2, axis=1)
    edges = np.nanpercentile((ours - theirs).mean(1), [2.5, 97.5])
    return tuple(float(value) for value in edges)


def independent_scores(rows, all_labels, key):
    """A score of a model in each label draw of one count; of all labels, in each checkpoint.

    Draws of all labels are the same labels, so those of one checkpoint count once, by their mean.
    all_labels: how many the training split has. Returns an array; NaN where a score is None.
    """
    if rows[0]["label_count"] < all_labels:
        return np.array([row[key] for row in rows], float)
    by_checkpoint = {}
    for row in rows:
        by_checkpoint.setdefault(row["checkpoint"], []).append(np.array(row[key], float))
    return np.array([np.mean(scores) for scores in by_checkpoint.values()], float)


def run_tests(draws, test, all_labels, task):
    """Test each of our models against the best baseline at one count of labels: a list of dicts.

    draws: what `score_draw` gave for each seed; test: of `read_split`; all_labels: as
    `independent_scores` takes it. Our models are those of OWN, all others are baselines. The best
    baseline is the one with the best mean on the test split, which favours the baseline.
    """
    rows = {name: [draw[name][0] for draw in draws] for name in draws[0]}
    key = next(iter(task.scores))
    scores = {name: independent_scores(rows[name], all_labels, key) for name in rows}
    predicted = {name: np.array([draw[name][1] for draw in draws]) for name in scores}
    baselines = [name for name in scores if name not in OWN]
    if not baselines:
        return []
    best = max(baselines, key=lambda name: task.sign * np.mean(scores[name]))
    return [
        {
            "label_count": rows[best][0]["label_count"],
            "until": rows[best][0]["until"],
            "model": name,
            "baseline": best,
            "difference": float(np.mean(scores[name]) - np.mean(scores[best])),
            "p_seeds": paired_p(scores[name], scores[best]),
            "interval_blocks": block_bootstrap(
                task.resample, *test[1:], predicted[name], predicted[best]
            ),
            "blocks": len(np.unique(test[2])),
        }
        for name in scores
        if name in OWN
    ]
