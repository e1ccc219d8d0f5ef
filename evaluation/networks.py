"""Networks on labelled pixels: representations, predictions, and the linear start of a head.

Shapes: N pixels, D dimensions of a representation, C classes.
"""

from running.distributed import gather
from running.log import ProgressBar

import numpy as np
import torch
from sklearn.dummy import DummyClassifier

from data import iterate_batches
from evaluation.classifiers import fit_classifier
from evaluation.regressors import fit_regressor
from utils import encode_series

MAX_LABELS = 10_000  # that a head's start is fitted to: more hardly change it, and take long
BATCHNORM_EPS = 1e-5  # BatchNorm standardises with sqrt(variance + BATCHNORM_EPS)
UNSEEN_CLASS_LOGIT = -10.0  # of a class without a label; the highest logit is never below 0


def walk(dataset, runtime=None):
    """The batches of a data set (`iterate_batches`), with a progress bar while they are read.

    runtime: of several processes, the first one shows the bar; None: batches stay on the CPU.
    """
    return ProgressBar(
        iterate_batches(dataset, runtime=runtime),
        desc=f"{dataset.split}, {dataset.num_pixels} pixels",
        total=dataset.steps_per_epoch,
        unit="batch",
        leave=False,
        disable=runtime is not None and not runtime.is_main,
    )


def predict(classifier, dataset, codes, runtime):
    """Labels and predicted class codes of a labelled data set, (N,) int64; logits (N, C); blocks.

    codes: (C,) of its classes; else as `predict_values`.
    """
    labels, logits, blocks = predict_values(classifier, dataset, lambda logits: logits, runtime)
    return labels.astype(np.int64), np.asarray(codes, np.int64)[logits.argmax(1)], logits, blocks


def predict_values(network, dataset, decode, runtime):
    """Labels (N,), predicted values (N, ..) and blocks (N,) of a labelled data set, float64, numpy.

    network: gives representations and outputs (N, C); it is left in train mode. decode: makes
    values (N,) or (N, K) of the outputs. Blocks have numbers from 0 on. All clear observations are
    read.
    Several processes share the pixels; each of them gets all, those of the first process first.
    """
    network.eval()
    rows = []
    for x, doys, labels, groups in walk(dataset, runtime):
        _, outputs = encode_series(network, x, doys, runtime)
        values = decode(outputs).double()
        rows.append(torch.column_stack([labels.double(), *_halves(groups), values]))
    network.train()
    (rows,) = runtime.to_device(torch.cat(rows))  # `gather` adds floats
    labels, *halves = (rows := gather(rows).cpu().numpy()).T[:3]
    blocks = np.unique(np.stack(halves), axis=1, return_inverse=True)[1]
    return labels, rows[:, 3] if values.ndim == 1 else rows[:, 3:], blocks.ravel()


def _halves(groups):
    """Ids of blocks (N,) int64 in two numbers that float64 holds exactly."""
    return (groups >> 32).double(), (groups & 0xFFFFFFFF).double()


def read_representations(backbone, dataset, runtime, max_labels=0):
    """Representations (N, D), labels (N,) and blocks (N,) of a data set.

    Of at most max_labels pixels, 0: MAX_LABELS.
    """
    dataset.keep_at_most(max_labels or MAX_LABELS)
    parts = [
        (encode_series(backbone, x, doys, runtime)[0], labels, groups)
        for x, doys, labels, groups in iterate_batches(dataset)
    ]
    return [torch.cat(arrays).numpy() for arrays in zip(*parts, strict=True)]


def fit_linear_start(y, labels, num_classes, seed=0):
    """What a head's `start_from` takes, from representations y (N, D) and class numbers (N,).

    The model is discriminant analysis as in `fit_classifier`.
    Returns float32 tensors: mean and variance (D,) of the representations, weights (C, D) and
    biases (C,) of the classes, which give the probabilities that scikit-learn's model gives.
    """
    model, _ = fit_classifier("discriminant analysis", y, labels, seed)
    mean, var = y.mean(0), y.var(0)
    weight, bias = np.zeros((num_classes, y.shape[1])), np.full(num_classes, UNSEEN_CLASS_LOGIT)
    if isinstance(model, DummyClassifier):  # one class, which is predicted everywhere
        bias[np.unique(labels)] = 0.0
    else:
        weights, biases = model.coef_, model.intercept_ + model.coef_ @ mean
        if len(model.classes_) == 2:  # scikit-learn gives the second class's logit less the first's
            weights, biases = np.outer([-0.5, 0.5], weights), np.outer([-0.5, 0.5], biases)[:, 0]
        # what all classes share changes no probability, but may lie below UNSEEN_CLASS_LOGIT
        weights, biases = weights - weights.mean(0), biases - biases.mean()
        weight[model.classes_] = weights * np.sqrt(var + BATCHNORM_EPS)
        bias[model.classes_] = biases
    return [torch.from_numpy(np.float32(part)) for part in (mean, var, weight, bias)]


def fit_ridge_start(y, targets, blocks):
    """What a head's `start_from` takes, from representations y (N, D), by ridge regression.

    targets: (N,), of mean 0 and deviation 1; blocks: (N,). Returns as `fit_linear_start`.
    """
    model, _ = fit_regressor("ridge regression", y, targets, 0, blocks)
    scaler, ridge = model[0], model[-1]
    weight = ridge.coef_ * np.sqrt(scaler.var_ + BATCHNORM_EPS) / scaler.scale_
    parts = (scaler.mean_, scaler.var_, weight[None], [ridge.intercept_])
    return [torch.from_numpy(np.float32(part)) for part in parts]
