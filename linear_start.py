"""Logistic regression on an encoder's representations, which fine-tuning starts from (LP-FT).

A head at random would pull the encoder away from what it has learned before it fits (Kumar et al.
2022, arXiv 2202.10054). Shapes: N pixels, D dimensions of a representation, C classes.
"""

import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict
from threadpoolctl import threadpool_limits

from utils import encode_series
from validation import find_folds

PENALTIES = (0.01, 0.1, 1.0, 10.0)  # values of scikit-learn's C to choose from
FOLDS = 5
MOST_LABELS = 10_000  # that it is fitted to: more hardly change it, and take long
EPS = 1e-5  # of BatchNorm, which standardises with sqrt(variance + EPS)


def read_representations(backbone, batches, runtime):
    """Representations (N, D), labels (N,) and groups (N,) of the first MOST_LABELS pixels, numpy.

    batches: as a labelled data set of all clear observations gives them.
    """
    parts, count = [], 0
    for x, doys, labels, groups in batches:
        parts.append((encode_series(backbone, x, doys, runtime)[0], labels, groups))
        count += len(labels)
        if count >= MOST_LABELS:
            break
    return [torch.cat(arrays)[:MOST_LABELS].numpy() for arrays in zip(*parts, strict=True)]


def fit_linear_start(y, labels, groups, num_classes):
    """What a head's `start_from` takes, from representations y (N, D) and classes labels (N,).

    groups: (N,) of pixels that lie side by side, which cross-validation keeps together. Returns
    float32 tensors: mean and variance (D,) of the representations, weights (C, D) and biases (C,)
    of the classes, which give the probabilities that scikit-learn's model gives.
    """
    mean, var = y.mean(0, dtype=np.float64), y.var(0, dtype=np.float64)
    z = (y - mean) / np.sqrt(var + EPS)
    weight, bias = np.zeros((num_classes, y.shape[1])), np.full(num_classes, -10.0)
    found = np.unique(labels)
    if len(found) == 1:  # nothing to tell apart: that class everywhere
        bias[found] = 0.0
    else:
        with threadpool_limits(1):  # small products; more threads would wait for each other
            model = _model(choose_penalty(z, labels, groups)).fit(z, labels)
        weights, biases = model.coef_, model.intercept_
        if len(found) == 2:  # scikit-learn gives the second class's logit less the first's
            weights, biases = np.outer([-0.5, 0.5], weights), np.outer([-0.5, 0.5], biases)[:, 0]
        weight[found], bias[found] = weights, biases
        bias[np.setdiff1d(np.arange(num_classes), found)] = biases.min() - 10
    return [torch.from_numpy(part).float() for part in (mean, var, weight, bias)]


def _model(penalty):
    return LogisticRegression(C=penalty, max_iter=2000)


def choose_penalty(z, labels, groups):
    """The C of least cross-validated loss; 0.1 where there are too few labels to validate with."""
    most = min(FOLDS, len(np.unique(groups)), np.bincount(labels).max())
    folds = find_folds(labels, groups, most)
    if not folds:
        return 0.1
    losses = []
    with warnings.catch_warnings():  # of classes that a fold does not have
        warnings.simplefilter("ignore")
        for penalty in PENALTIES:
            keywords = {"cv": folds, "method": "predict_proba"}
            probabilities = cross_val_predict(_model(penalty), z, labels, **keywords)
            losses.append(log_loss(labels, probabilities))
    return PENALTIES[np.argmin(losses)]
