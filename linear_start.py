"""Linear discriminant analysis of an encoder's representations: fine-tuning's start (LP-FT).

A head at random would pull the encoder away from what it has learned before it fits (Kumar et al.
2022, arXiv 2202.10054). Of few labels, discriminant analysis makes more than logistic regression
does (docs/results.md). Shapes: N pixels, D dimensions of a representation, C classes.
"""

import numpy as np
import torch
from sklearn.dummy import DummyClassifier

from comparison import fit_classifier
from utils import encode_series

MOST_LABELS = 10_000  # that it is fitted to: more hardly change it, and take long
EPS = 1e-5  # of BatchNorm, which standardises with sqrt(variance + EPS)
NEVER = -10.0  # the logit of a class without a label, where the highest is never below 0


def read_representations(backbone, batches, runtime):
    """Representations (N, D) and labels (N,) of the first MOST_LABELS pixels, numpy.

    batches: as a labelled data set of all clear observations gives them.
    """
    parts, count = [], 0
    for x, doys, labels, _ in batches:
        parts.append((encode_series(backbone, x, doys, runtime)[0], labels))
        count += len(labels)
        if count >= MOST_LABELS:
            break
    return [torch.cat(arrays)[:MOST_LABELS].numpy() for arrays in zip(*parts, strict=True)]


def fit_linear_start(y, labels, num_classes, seed=0):
    """What a head's `start_from` takes, from representations y (N, D) and classes labels (N,).

    The model is discriminant analysis as in `comparison.fit_classifier`.
    Returns float32 tensors: mean and variance (D,) of the representations, weights (C, D) and
    biases (C,) of the classes, which give the probabilities that scikit-learn's model gives.
    """
    model, _ = fit_classifier("discriminant analysis", y, labels, seed)
    mean, var = y.mean(0), y.var(0)
    weight, bias = np.zeros((num_classes, y.shape[1])), np.full(num_classes, NEVER)
    if isinstance(model, DummyClassifier):  # nothing to tell apart: one class everywhere
        bias[np.unique(labels)] = 0.0
    else:
        weights, biases = model.coef_, model.intercept_ + model.coef_ @ mean
        if len(model.classes_) == 2:  # scikit-learn gives the second class's logit less the first's
            weights, biases = np.outer([-0.5, 0.5], weights), np.outer([-0.5, 0.5], biases)[:, 0]
        # what all classes share changes no probability, but may lie below NEVER
        weights, biases = weights - weights.mean(0), biases - biases.mean()
        weight[model.classes_], bias[model.classes_] = weights * np.sqrt(var + EPS), biases
    return [torch.from_numpy(np.float32(part)) for part in (mean, var, weight, bias)]
