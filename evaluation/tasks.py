"""What label_efficiency.py compares models at: classes, or a quantity. All in which the two differ.

A task has, of its class: answers, the tiles' attribute that is learned; dataset, the class of its
pixels; models and map_methods, the rows; fit and find_folds, for the rows of features; settings,
what fit chooses; script and kind, of the networks and their checkpoints; scores, {key in a row of
scores: `Score`} of tables, the first of which decides, and sign, -1 where a lower one is better;
logged, keys of the scores for the log. Of an object, made of the
answers of the test pixels (N,) and their data set: target, the name and unit of a quantity, or {};
about, what the JSON has of the test; and the methods below.

Shapes: N test pixels.
"""

from functools import partial
from typing import NamedTuple

from running.errors import InputError

import numpy as np
from sklearn.metrics import accuracy_score

from backbones import decode_quantity
from data import SentinelTimeSeriesDatasetForDownstreaming, SentinelTimeSeriesDatasetForRegression
from evaluation.classifiers import find_label_folds, fit_classifier
from evaluation.networks import predict, predict_values
from evaluation.quantities import resample_rmse, score_quantity
from evaluation.regressors import find_target_folds, fit_regressor
from evaluation.rows import MAP_METHODS, MODELS, QUANTITY_MAP_METHODS, QUANTITY_MODELS
from evaluation.scores import (
    MIN_TEST_PIXELS,
    count_classes,
    macro_f1,
    measurable_classes,
    resample_f1,
)
from maps.land_cover import class_legend
from tiles import tiles_folder


class Score(NamedTuple):
    """The name of a score, and the formats of its mean, and of its deviation and differences."""

    name: str
    number: str
    spread: str


class Classes:
    """Classes of land cover, of labels.npy."""

    answers, dataset = "labels", SentinelTimeSeriesDatasetForDownstreaming
    models, map_methods = MODELS, MAP_METHODS
    fit, find_folds = staticmethod(fit_classifier), staticmethod(find_label_folds)
    script, kind = "train_classification.py", "classifier"
    settings = "C, k and leaf size"
    scores, sign = {"macro_f1": Score("Macro-F1", ".3f", ".3f")}, 1
    logged, target = ("macro_f1", "overall_accuracy"), {}

    def __init__(self, labels, dataset):
        self.scored = measurable_classes(labels)
        legend = class_legend(np.unique(labels), dataset.classes)
        self.about = {"test_classes": count_classes(labels, self.scored, legend)}

    @staticmethod
    def name_lost(whole, some):
        """What the pixels of a data set have, and some of them have not, in words; or ""."""
        lost = np.setdiff1d(whole.read_labels(), some.read_labels()).tolist()
        return f"; found no pixel of classes {lost} among these" if lost else ""

    def score(self, labels, predicted):
        """The scores of a row, as plain numbers. labels, predicted: (N,)."""
        return {
            "macro_f1": macro_f1(labels, predicted, codes=self.scored),
            "macro_f1_all_classes": macro_f1(labels, predicted),
            "overall_accuracy": float(accuracy_score(labels, predicted)),
        }

    def predict(self, trained, network, dataset, runtime):
        """Answers (N,) of a data set, and what the network of a checkpoint predicts."""
        return predict(network, dataset, list(map(int, trained["classes"])), runtime)[:2]

    def resample(self, labels, predicted, blocks, times):
        """The first score in resamples of blocks, see `resample_f1`."""
        return resample_f1(labels, predicted, blocks, times, self.scored)

    def write_note(self):
        """What the scores are over, and what was chosen."""
        classes = self.about["test_classes"].values()
        out = [f"{entry['name']} ({entry['pixels']})" for entry in classes if not entry["scored"]]
        note = f"Macro-F1 is over {len(classes) - len(out)} classes"
        if out:
            note += f"; left out, with fewer than {MIN_TEST_PIXELS} test pixels: {', '.join(out)}"
        return f"{note}."


class Quantity:
    """A quantity, of targets.npy. Methods as in `Classes`."""

    answers, dataset = "targets", SentinelTimeSeriesDatasetForRegression
    models, map_methods = QUANTITY_MODELS, QUANTITY_MAP_METHODS
    fit, find_folds = staticmethod(fit_regressor), staticmethod(find_target_folds)
    resample = staticmethod(resample_rmse)
    script, kind = "train_regression.py", "regressor"
    settings = "Penalty, k and leaf size"
    scores, sign = {"rmse": Score("RMSE", ".4g", ".2g"), "r2": Score("R2", ".3f", ".3f")}, -1
    logged = ("rmse", "r2")

    def __init__(self, targets, dataset):
        self.target = dataset.target
        self.about = {"target": dataset.target, "test_deviation": float(targets.std())}

    @staticmethod
    def name_lost(whole, some):
        return ""

    def score(self, targets, predicted):
        scores = score_quantity(targets, predicted)
        return {key: scores[key] for key in ("rmse", "r2", "mae", "bias")}

    def predict(self, trained, network, dataset, runtime):
        decode = partial(decode_quantity, target=trained["target"])
        targets, predicted, _ = predict_values(network, dataset, decode, runtime)
        return targets.astype(np.float32), predicted

    def write_note(self):
        deviation = f"{self.about['test_deviation']:.4g} {self.target['unit']}".rstrip()
        return (
            f"{self.target['name'] or 'quantity'}: a lower RMSE is better; that of the mean of the "
            f"test pixels is {deviation}, with an R2 of 0."
        )


TASKS = {"classes": Classes, "quantity": Quantity}


def find_task(config):
    """The class of the task that the config names; of auto, by the files of the tiles."""
    if (name := config["task"]) in TASKS:
        return TASKS[name]
    if name != "auto":
        raise InputError(f"task={name}: wanted auto or one of {', '.join(TASKS)}")
    folder = tiles_folder(config["base_path"], config["dataset_name"])
    has = {answers: any(folder.glob(f"MGRS-*/{answers}.npy")) for answers in ("labels", "targets")}
    return Quantity if has["targets"] and not has["labels"] else Classes
