"""Classifiers of features, whose settings are chosen by cross-validation.

Shapes: N pixels, F features.
"""

import warnings

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RepeatedStratifiedKFold, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from utils import keep_classes

FOLDS = 5
REPEATS = 4  # of the folds where labels are few: one partition of 50 labels chooses by chance
BLOCK_SHARE = 0.9  # of the labels, at least, that folds of blocks keep; else folds are of pixels
SEARCH_LABELS = 2000  # at most, chosen at random, that choose the setting
SEARCH_TREES = 100  # of a forest while its leaf size is chosen
NEIGHBOURS, LEAF_SIZES = [1, 3, 5, 9, 15, 25, 45], [1, 3, 9]  # to choose from


def classifiers(seed):
    """{name: (classifier, name of its setting, values to choose from)}; of equal scores the first.

    Discriminant analysis has nothing to choose: the shrinkage of its covariances is Ledoit and
    Wolf's (2004, 10.1016/S0047-259X(03)00096-4). The scale of a feature does not matter to it.
    The support vector machine (radial kernel) has C fixed, too: folds of pixels, which scattered
    labels have, choose one that is too large.
    """
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(1))
    vectors = make_pipeline(StandardScaler(), SVC(C=3))
    forest = RandomForestClassifier(500, n_jobs=-1, random_state=seed)
    return {
        "logistic regression": (logistic, "logisticregression__C", list(10.0 ** np.arange(-3, 4))),
        "discriminant analysis": (discriminant, None, []),
        "support vector machine": (vectors, None, []),
        "k nearest neighbours": (neighbours, "kneighborsclassifier__n_neighbors", NEIGHBOURS),
        "random forest": (forest, "min_samples_leaf", LEAF_SIZES),
    }


def fit_classifier(name, x, labels, seed=0, groups=None):
    """Fit one of `classifiers`; its setting is chosen on these labels alone.

    The setting with the best macro-F1 over the folds is fitted to all labels: the score that is
    reported. Log loss was tried: with 50 labels it chose a C that was too small on real tiles, and
    it refuses votes of neighbours and forests that give a class no chance.
    x: (N, F); labels: (N,) class codes; groups: (N,) blocks, see `find_label_folds`.
    Returns the classifier and the chosen value, None where there was nothing to choose by.
    """
    if len(np.unique(labels)) == 1:  # then that class is all that can be predicted
        return DummyClassifier().fit(x, labels), None
    model, setting, values = classifiers(seed)[name]
    if name == "discriminant analysis" and len(np.unique(labels)) == len(labels):
        model = LogisticRegression()  # of one label each there is no spread within a class
    with warnings.catch_warnings():
        # a weak penalty on separable classes, whose weights grow for ever, predicts well enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "Only one sample")  # of a class: it has no spread
        folds = find_label_folds(labels, seed, groups)[0] if setting else []
        return fit_best(model, setting, values, x, labels, folds, "f1_macro")


def fit_best(model, setting, values, x, answers, folds, scoring):
    """Fit a model with the value of its setting that has the best score over the folds, if any.

    answers: (N,) class codes or values; scoring: scikit-learn's name of the score.
    Returns the model and the value, None without folds.
    """
    value = None
    with threadpool_limits(1):  # more threads: small products wait
        if folds:
            value = choose_setting(model, setting, values, x, answers, folds, scoring)
            model.set_params(**{setting: value})
        return model.fit(x, answers), value


def choose_setting(model, setting, values, x, answers, folds, scoring):
    """The value of a setting with the best score over the folds."""
    if setting.endswith("n_neighbors"):
        smallest = min(len(train) for train, _ in folds)
        values = [value for value in values if value <= smallest]
    trees = model.get_params().get("n_estimators")
    if trees:
        model.set_params(n_estimators=SEARCH_TREES)
    search = GridSearchCV(model, {setting: values}, scoring=scoring, cv=folds, refit=False)
    value = search.fit(x, answers).best_params_[setting]
    if trees:
        model.set_params(n_estimators=trees)
    return value


def find_label_folds(labels, seed=0, groups=None):
    """Stratified folds of at most SEARCH_LABELS of the labels, with every class in every part.

    Folds of whole blocks, since neighbours are alike; a class that lies in a single block is left
    out. Folds of pixels where that loses more than a tenth of the labels; a class with a single
    label is left out. The number of folds is that of the blocks (or labels) of the smallest class,
    at most FOLDS. Few labels are partitioned several times: 200 / labels, at most REPEATS.
    groups: (N,) block of each label, or None where they are not known.
    Returns a list of (training, test) indices, and "blocks" or "pixels"; [] and "" for fewer than
    two classes.
    """
    rng = np.random.default_rng(seed)
    rows = keep_classes(rng.permutation(len(labels))[:SEARCH_LABELS], labels, rng, FOLDS)
    if groups is not None and (folds := _find_block_folds(rows, labels, groups, seed)):
        return folds, "blocks"
    rows, counts = _keep_several(rows, labels, np.arange(len(labels)))
    if len(counts) < 2:
        return [], ""
    splitter = RepeatedStratifiedKFold(
        n_splits=min(FOLDS, *counts), n_repeats=_count_repeats(rows), random_state=seed
    )
    folds = splitter.split(rows, labels[rows])
    return [(rows[train], rows[test]) for train, test in folds], "pixels"


def _find_block_folds(rows, labels, groups, seed):
    """Folds of whole groups, as many as leave every class in every part; or []."""
    kept, counts = _keep_several(rows, labels, groups)
    if len(counts) < 2 or len(kept) < BLOCK_SHARE * len(rows):
        return []
    labels, groups = labels[kept], groups[kept]
    for number in range(min(FOLDS, *counts), 1, -1):
        folds = []
        for repeat in range(_count_repeats(kept)):
            splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed + repeat)
            folds += splitter.split(kept, labels, groups)
        if all(len(np.unique(labels[part])) == len(counts) for fold in folds for part in fold):
            return [(kept[train], kept[test]) for train, test in folds]
    return []


def _keep_several(rows, labels, units):
    """The rows of classes that have several units (N,), and how many units each of these has."""
    counts = {
        code: len(np.unique(units[rows][labels[rows] == code])) for code in np.unique(labels[rows])
    }
    kept = [code for code, count in counts.items() if count > 1]
    return rows[np.isin(labels[rows], kept)], [counts[code] for code in kept]


def _count_repeats(rows):
    return max(1, min(REPEATS, 200 // len(rows)))
