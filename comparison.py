"""Classifiers whose setting is cross-validated on the training labels, and tests of a difference.

Shapes: N pixels, F features, S draws of labels (seeds), G blocks of pixels, C classes.
"""

import warnings

import numpy as np
from scipy.stats import ttest_rel
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RepeatedStratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

FOLDS = 5
REPEATS = 4  # of the folds where labels are few, since one partition of 50 chooses by chance
SEARCH_LABELS = 2000  # of more labels so many, drawn at random, choose the setting
SEARCH_TREES = 100  # of a forest while its leaf size is chosen
BOOTSTRAPS = 1000


def classifiers(seed):
    """Name -> (classifier, its setting, the values to choose from; of equal ones the first).

    Discriminant analysis has nothing to choose: the shrinkage of its covariances is Ledoit and
    Wolf's (2004, 10.1016/S0047-259X(03)00096-4). The scale of a feature does not matter to it.
    """
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(1))
    forest = RandomForestClassifier(500, n_jobs=-1, random_state=seed)
    return {
        "logistic regression": (logistic, "logisticregression__C", list(10.0 ** np.arange(-3, 4))),
        "discriminant analysis": (discriminant, None, []),
        "k nearest neighbours": (
            neighbours,
            "kneighborsclassifier__n_neighbors",
            [1, 3, 5, 9, 15, 25, 45],
        ),
        "random forest": (forest, "min_samples_leaf", [1, 3, 9]),
    }


def fit_classifier(name, x, labels, seed=0):
    """Fit one of `classifiers`; its setting is chosen on these labels alone.

    The setting with the best macro-F1 over the folds is fitted to all labels: the score that is
    reported. Log loss was tried: with 50 labels it chose a C that was too small on real tiles, and
    it refuses votes of neighbours and forests that give a class no chance.
    x: (N, F); labels: (N,) class codes.
    Returns the classifier and the chosen value, None where there was nothing to choose by.
    """
    if len(np.unique(labels)) == 1:  # then that class is all that can be predicted
        return DummyClassifier().fit(x, labels), None
    model, setting, values = classifiers(seed)[name]
    if name == "discriminant analysis" and len(np.unique(labels)) == len(labels):
        model = LogisticRegression()  # of one label each there is no spread within a class
    with threadpool_limits(1), warnings.catch_warnings():  # more threads: small products wait
        # a weak penalty on separable classes, whose weights grow for ever, predicts well enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "Only one sample")  # of a class: it has no spread
        value = _choose(model, setting, values, x, labels, seed) if setting else None
        if value is not None:
            model.set_params(**{setting: value})
        return model.fit(x, labels), value


def _choose(model, setting, values, x, labels, seed):
    """The value with the best cross-validated macro-F1; None where there are no folds."""
    folds = find_label_folds(labels, seed)
    if not folds:
        return None
    if setting.endswith("n_neighbors"):
        fewest = min(len(train) for train, _ in folds)
        values = [value for value in values if value <= fewest]
    trees = model.get_params().get("n_estimators")
    if trees:
        model.set_params(n_estimators=SEARCH_TREES)
    search = GridSearchCV(model, {setting: values}, scoring="f1_macro", cv=folds, refit=False)
    value = search.fit(x, labels).best_params_[setting]
    if trees:
        model.set_params(n_estimators=trees)
    return value


def find_label_folds(labels, seed=0):
    """Stratified folds of at most SEARCH_LABELS of the labels: (training, test) indices of each.

    As many folds as the smallest class has labels, at most FOLDS, so that every class is in every
    part. A class with a single label cannot be, and is left out. [] for fewer than two classes.
    Of few labels several partitions are made, up to 200 labels in all or REPEATS.
    """
    rows = np.random.default_rng(seed).permutation(len(labels))[:SEARCH_LABELS]
    codes, counts = np.unique(labels[rows], return_counts=True)
    several = counts > 1
    if several.sum() < 2:
        return []
    rows = rows[np.isin(labels[rows], codes[several])]
    number, repeats = min(FOLDS, counts[several].min()), max(1, min(REPEATS, 200 // len(rows)))
    splitter = RepeatedStratifiedKFold(n_splits=number, n_repeats=repeats, random_state=seed)
    return [(rows[train], rows[test]) for train, test in splitter.split(rows, labels[rows])]


# ---- differences ---------------------------------------------------------------------------------


def paired_p(ours, theirs):
    """Two-sided p of a paired t-test over the draws of labels; None where it is not defined.

    ours, theirs: (S,) scores of two models, each pair from the same labels. It asks whether other
    labels would give the same sign, in this region and on these test pixels. Draws from few labels
    overlap, which makes p too small where label_count is a large part of the training split.
    """
    difference = np.subtract(ours, theirs)
    if len(difference) < 2 or np.ptp(difference) < 1e-12:
        return None
    return float(ttest_rel(ours, theirs).pvalue)


def block_bootstrap(labels, groups, ours, theirs, seed=0):
    """95 % interval of the difference in macro-F1, from test blocks drawn with replacement.

    Whole blocks are drawn since neighbours are alike: McNemar's test, or a bootstrap of pixels,
    takes them for independent and finds too much (Ploton et al. 2020, 10.1038/s41467-020-18321-y).
    labels, groups: (N,) class code and block of each test pixel; ours, theirs: (S, N) predicted
    codes, whose differences are averaged over S. Returns (low, high), or None for a single block.
    """
    blocks = np.unique(groups, return_inverse=True)[1]
    num_blocks = blocks.max() + 1
    if num_blocks < 2:
        return None
    predicted = np.concatenate([ours, theirs])  # (2 S, N)
    codes = np.union1d(labels, predicted)
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
        drawn = times @ labelled.reshape(num_blocks, -1) > 0  # both over the classes labelled here
        f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
        ours, theirs = f1[:, drawn].mean(1).reshape(2, -1)
        differences.append((ours - theirs).mean())
    return tuple(float(value) for value in np.percentile(differences, [2.5, 97.5]))
