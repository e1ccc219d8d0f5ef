"""Regressors of features, whose settings are chosen by cross-validation over blocks.

Shapes: N pixels, F features.
"""

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, KFold
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.classifiers import FOLDS, LEAF_SIZES, NEIGHBOURS, SEARCH_LABELS, fit_best

ALPHAS = 10.0 ** np.arange(-2, 6.5, 0.5)  # penalties on features of deviation 1


def regressors(seed):
    """{name: (regressor, name of its setting, values to choose from)}; of equal scores the first.

    A split of the forest looks at a third of the features, as Breiman (2001) has it for regression.
    """
    ridge = make_pipeline(StandardScaler(), Ridge())
    neighbours = make_pipeline(StandardScaler(), KNeighborsRegressor(1))
    forest = RandomForestRegressor(500, max_features=1 / 3, n_jobs=-1, random_state=seed)
    return {
        "ridge regression": (ridge, "ridge__alpha", list(ALPHAS)),
        "k nearest neighbours": (neighbours, "kneighborsregressor__n_neighbors", NEIGHBOURS),
        "random forest": (forest, "min_samples_leaf", LEAF_SIZES),
    }


def fit_regressor(name, x, targets, seed=0, groups=None):
    """Fit one of `regressors`; its setting is chosen on these targets alone.

    The setting with the lowest squared error over the folds is fitted to all targets.
    x: (N, F); targets: (N,); groups: (N,) blocks, see `find_target_folds`.
    Returns the regressor and the chosen value, None where there was nothing to choose by.
    """
    model, setting, values = regressors(seed)[name]
    x = x.astype(np.float64)  # in float32, products of features that are alike lose their digits
    folds = find_target_folds(targets, seed, groups)[0]
    return fit_best(model, setting, values, x, targets, folds, "neg_mean_squared_error")


def find_target_folds(targets, seed=0, groups=None):
    """Folds of at most SEARCH_LABELS of the targets: of whole blocks, where there are two.

    Pixels of one block resemble each other: over single pixels, a setting that is too flexible
    would win. groups: (N,) block of each target, or None.
    Returns a list of (training, test) indices, and "blocks" or "pixels"; [] and "" of one target.
    """
    if len(targets) < 2:
        return [], ""
    rows = np.arange(len(targets))
    if len(rows) > SEARCH_LABELS:
        rows = np.random.default_rng(seed).choice(rows, SEARCH_LABELS, replace=False)
    blocks = 0 if groups is None else len(np.unique(groups[rows]))
    if blocks > 1:
        folds = GroupKFold(min(FOLDS, blocks)).split(rows, groups=groups[rows])
    else:
        folds = KFold(min(FOLDS, len(rows)), shuffle=True, random_state=seed).split(rows)
    unit = "blocks" if blocks > 1 else "pixels"
    return [(rows[train], rows[test]) for train, test in folds], unit
