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
from sklearn.model_selection import GridSearchCV, RepeatedStratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from utils import keep_classes

FOLDS = 5
REPEATS = 4  # of the folds where labels are few: one partition of 50 labels chooses by chance
SEARCH_LABELS = 2000  # at most, chosen at random, that choose the setting
SEARCH_TREES = 100  # of a forest while its leaf size is chosen


def classifiers(seed):
    """{name: (classifier, name of its setting, values to choose from)}; of equal scores the first.

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
        smallest = min(len(train) for train, _ in folds)
        values = [value for value in values if value <= smallest]
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

    The number of folds is that of the labels of the smallest class, at most FOLDS, so that every
    class is in every part. A class with a single label cannot be, and is left out. Few labels are
    partitioned several times: 200 / labels, at most REPEATS. [] for fewer than two classes.
    """
    rng = np.random.default_rng(seed)
    rows = keep_classes(rng.permutation(len(labels))[:SEARCH_LABELS], labels, rng, FOLDS)
    codes, counts = np.unique(labels[rows], return_counts=True)
    several = counts > 1
    if several.sum() < 2:
        return []
    rows = rows[np.isin(labels[rows], codes[several])]
    number, repeats = min(FOLDS, counts[several].min()), max(1, min(REPEATS, 200 // len(rows)))
    splitter = RepeatedStratifiedKFold(n_splits=number, n_repeats=repeats, random_state=seed)
    return [(rows[train], rows[test]) for train, test in splitter.split(rows, labels[rows])]
