"""How good an encoder is while it trains: loss, RankMe, and a linear probe on held-out pixels."""

import hashlib
import itertools

from running.distributed import gather
from running.errors import notice

import numpy as np
import torch
from joblib import parallel_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from barlow_twins import pretraining_loss
from data import iterate_batches
from utils import encode_series, find_rotation, rankme


class Validation:
    """Loss on fixed views of validation pixels, RankMe of their representations, linear probe.

    val_set: views of pixels that are neither trained on nor in the test split; labelled: the
    labelled ones among them, or None. Called with a model, it returns a dict of numbers, whose
    `score` is better the larger it is: macro-F1 of the probe, or minus the loss without one.
    rotation: orders the dimensions of that model, see `find_rotation`.
    """

    def __init__(self, val_set, labelled, config, runtime):
        self.config, self.runtime = config, runtime
        batches = max(1, config["val_pixels"] // config["batch_size"])
        self.batches = list(itertools.islice(iterate_batches(val_set), batches))
        self.probe = LinearProbe.open(labelled) if labelled else None
        if labelled and not self.probe:
            notice(
                f"val_pixels={config['val_pixels']}: found no two classes in two blocks each among "
                "the labelled validation pixels, so the loss chooses best.pt"
            )
        lost = np.setdiff1d(labelled.read_labels(), self.probe.labels) if self.probe else ()
        if len(lost):
            notice(
                f"val_pixels={config['val_pixels']}: the probe leaves out classes {lost.tolist()}, "
                f"of which its {len(self.probe.labels)} pixels have none, or in one block alone"
            )

    @torch.no_grad()
    def __call__(self, model):
        model.eval()
        losses, sizes, representations = [], [], []
        for x, doys in self.batches:
            x, doys = self.runtime.to_device(x, doys)
            self.runtime.mark_dynamic(x, doys)
            with self.runtime.autocast():
                y, z, predicted = model(x, doys, doys)
            losses.append(float(pretraining_loss(z, predicted, x, self.config)[0]))
            sizes.append(len(z[0]))
            representations.append(gather(y[:, 0].float()).cpu())
        representations = torch.cat(representations)
        if not representations.isfinite().all():
            raise FloatingPointError(
                "validation: found representations that are not finite; the learning rate is too "
                "high; the last good checkpoint stays"
            )
        self.rotation = find_rotation(representations)
        rank, rank_share = rankme(representations)
        result = {"val_loss": float(np.average(losses, weights=sizes))}
        result |= {"rankme": rank, "rankme_normalised": rank_share, "score": -result["val_loss"]}
        if self.probe:
            macro_f1 = self.probe.score(model.backbone, self.runtime)
            result |= {"probe_macro_f1": macro_f1, "score": macro_f1}
        model.train()
        return result


class LinearProbe:
    """Macro-F1 of logistic regression on representations, cross-validated over blocks of pixels.

    x (N, T, B), doys (N, T) and labels (N,) as a labelled data set gives them; folds: pairs of
    indices of training and test pixels.
    """

    def __init__(self, x, doys, labels, folds):
        self.x, self.doys, self.labels, self.folds = x, doys, labels, folds

    @classmethod
    def open(cls, labelled):
        """The first batch of a labelled data set; None for fewer than two classes in two blocks.

        Cross-validation needs each class in at least 2 blocks; other classes are left out.
        """
        x, doys, labels, groups = next(iter(iterate_batches(labelled)))
        blocks = {int(code): len(groups[labels == code].unique()) for code in labels.unique()}
        counts = [count for count in blocks.values() if count > 1]
        if len(counts) < 2:
            return None
        keep = torch.tensor([blocks[int(code)] > 1 for code in labels])
        labels, groups = labels[keep], groups[keep]
        folds = find_folds(labels.numpy(), groups.numpy(), min(5, *counts))
        return cls(x[keep], doys[keep], labels, folds) if folds else None

    def describe(self):
        """Fingerprint of the labels, compared when a run resumes: how many, and a hash of them."""
        digest = hashlib.sha256(self.labels.numpy()).hexdigest()[:12]
        return f"{len(self.labels)} labels {digest}"

    def score(self, backbone, runtime):
        """Macro-F1 over the classes, on representations of all clear observations."""
        y, _ = encode_series(backbone, self.x, self.doys, runtime)
        labels = self.labels.numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        # the products are too small to be divided, so each thread has a fold of its own
        with threadpool_limits(1), parallel_config("threading", n_jobs=torch.get_num_threads()):
            predicted = cross_val_predict(probe, y.numpy(), labels, cv=self.folds)
        return float(f1_score(labels, predicted, average="macro"))


def find_folds(labels, groups, max_folds):
    """At most max_folds folds of whole groups, none of which trains on a single class.

    labels, groups: (N,). Returns a list of (training indices, test indices), or [] for none.
    """
    for number in range(max_folds, 1, -1):
        folds = list(StratifiedGroupKFold(number).split(labels, labels, groups))
        if all(len(test) and len(np.unique(labels[train])) > 1 for train, test in folds):
            return folds
    return []
