"""Fine-tune an encoder for land cover, or train the same network from scratch.

    python train_classification.py checkpoint_path=checkpoints/simulated/best.pt
    python train_classification.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 freeze_backbone=true label_count=100
    python train_classification.py backbone=transformer   # from scratch, for comparison
    torchrun --nproc-per-node=2 train_classification.py ...

Labels come from labels.npy, splits from splits.npy or from blocks. With a pretrained encoder, the
head (linear or attention) starts from linear discriminant analysis of its representations; then
both are trained. best.pt is the start, or the epoch of the last third, with the best validation
macro-F1. With label_count no other labels are used, so best.pt is a mean of the weights at the
start and at the end. The test split is scored once, at the end. Started again with the same
output_dir, the run resumes from last.pt as if it had never stopped.
"""

from running.errors import InputError, notice
from running.script import run_script

import numpy as np
import torch

from backbones import focal_loss
from data import SentinelTimeSeriesDatasetForDownstreaming
from evaluation.areas import find_intervals, print_intervals
from evaluation.calibration import fit_temperature, predict_folds, score_calibration
from evaluation.networks import fit_linear_start, predict
from evaluation.scores import plot_confusion, print_scores, score_classes
from maps.land_cover import class_legend
from training.finetuning import Task, fine_tune

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; empty: train from scratch
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "map_dataset_name": "",  # tiles to map when done, and to score by their labels; empty: none
    "skip_bad_tiles": False,  # leave out tiles that are out of contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "overwrite": False,  # remove an earlier run from output_dir that this one cannot resume
    "label_count": 0,  # labelled pixels of the training split, chosen at random; 0: all of them
    "start": "",  # day of year or date (90, 04-01) of the first observation that is read, and ..
    "end": "",  # .. of the last; before start: across New Year; empty: the whole year
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in pretraining, or 10
    "date_share": 0.6,  # a step reads from this share to all of a pixel's clear dates; 1: all
    # model
    "head": "linear",  # linear, mlp (BatchNorm, dropout) or attention (pooling over the dates)
    "dropout": 0.1,  # in the head
    "freeze_backbone": False,  # train the head alone
    # ignored when checkpoint_path is given: taken from the checkpoint
    "backbone": "transformer",  # transformer, cnn or mlp
    "sample_size": 16,  # dates that a cnn or mlp reads; ignored for a transformer, see date_share
    "latent_dim": 128,  # dimensions of a representation
    "width": 64,  # of the backbone; a multiple of 16 for the transformer
    "depth": 2,  # layers of the backbone
    "day_cycles": 8,  # highest harmonic of the year in the day encoding; 0: the backbone's default
    "block_size": 16,  # pixels along a block of one split where a tile has no splits.npy
    "split_seed": 0,  # of these blocks
    # loss
    "loss": "cross_entropy",  # cross_entropy or focal
    "focal_gamma": 2.0,  # of the focal loss: how little pixels count that are easily right
    "class_weights": False,  # weigh classes by the inverse root of their frequency
    # optimiser: AdamW, warm-up and cosine over the run's length
    "batch_size": 32,  # pixels a step, over all processes
    "epochs": 0,  # 0: as 27 sqrt(labels) steps need, with a pretrained encoder at most 25
    "learning_rate": 1e-3,  # after the warm-up
    "weight_decay": 1e-3,  # on all weights
    "seed": 0,  # of the choice of labels, the weights and the order
    # running: resumed from last.pt, which is saved after every epoch
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def find_legend(train):
    """{code: {"name", "color"}} of the classes in labelled tiles; InputError for fewer than 2."""
    codes = np.unique(np.concatenate([np.unique(tile.labels) for tile in train.tiles]))
    legend = class_legend(codes, train.classes)
    if len(legend) < 2:
        path = train.tiles[0].path / "labels.npy"
        raise InputError(f"{path}: found codes {list(legend)}, wanted two classes or more")
    if unseen := sorted(legend.keys() - set(np.unique(train.read_labels()).tolist())):
        names = ", ".join(f"{code} {legend[code]['name']}" for code in unseen)
        notice(
            f"{train.num_pixels} training labels: found none of class {names}, so no pixel will be "
            "predicted as such; wanted a larger label_count or another split"
        )
    return legend


def weigh_classes(train, codes, runtime):
    """Inverse root of each class's share of the training labels, of mean 1 over them: (C,)."""
    count = torch.from_numpy(np.bincount(train.read_labels(), minlength=256)[codes])
    (count,) = runtime.to_device(count.float())
    weight = count.clamp(min=1).rsqrt()
    return weight * count.sum() / (weight * count).sum()


class LandCover(Task):
    """Classes of land cover; outputs are logits. Methods as in `Task`."""

    kind, dataset = "classifier", SentinelTimeSeriesDatasetForDownstreaming
    losses, criterion, sign = ("cross_entropy", "focal"), "macro_f1", 1
    logged = ("macro_f1", "overall_accuracy")
    reported = ("overall_accuracy", "macro_f1", "weighted_f1", "expected_calibration_error")
    picture, shows = "confusion_matrix", "what was mapped as what"
    map = "classification_map"

    def __init__(self, config, train, runtime):
        self.config, self.legend = config, find_legend(train)
        self.codes = list(self.legend)
        self.weight = weigh_classes(train, self.codes, runtime) if config["class_weights"] else None
        self.size, self.about = len(self.codes), f"of {len(self.codes)} classes"
        self.header = {"classes": {str(code): entry for code, entry in self.legend.items()}}

    def has_exact_start(self):
        return self.config["loss"] == "cross_entropy" and not self.config["class_weights"]

    def fit_start(self, y, labels, groups):
        numbers = np.searchsorted(self.codes, labels)
        return fit_linear_start(y, numbers, self.size, self.config["seed"])

    def encode(self, labels):
        return torch.searchsorted(torch.tensor(self.codes), labels.long())

    def loss(self, outputs, target):
        gamma = self.config["focal_gamma"] if self.config["loss"] == "focal" else 0.0
        return focal_loss(outputs, target.long(), gamma, self.weight)

    def predict(self, network, dataset, runtime):
        return predict(network, dataset, self.codes, runtime)

    def calibrate(self, predicted, y, labels, groups):
        if predicted:
            labels, _, logits, _ = predicted
        numbers = np.searchsorted(self.codes, labels)
        if not predicted:
            logits, numbers = predict_folds(y, numbers, self.size, groups, self.config["seed"])
        if not len(numbers):
            notice("confidence is not calibrated: found too few training labels to leave some out")
            return {"temperature": 1.0, "calibrated_on": "none"}
        source = "validation" if predicted else "folds"
        return {"temperature": fit_temperature(logits, numbers), "calibrated_on": source}

    def score_test(self, predicted, best):
        labels, codes, logits, blocks = predicted
        about = best["temperature"], best["calibrated_on"]
        scores = score_calibration(logits, np.searchsorted(self.codes, labels), *about)
        return scores | {"intervals": find_intervals(labels, codes, blocks, self.codes)}

    def score(self, labels, predicted, logits, blocks):
        return score_classes(labels, predicted, self.legend)

    def plot(self, scores, predicted, path, title):
        plot_confusion(np.array(scores["confusion_matrix"]), self.legend, path, title)

    def print_scores(self, scores):
        print_scores(scores)
        print_intervals(scores["intervals"])


def main(config):
    """Fine-tune. Returns the test scores (`score_classes`), as in metrics.json."""
    return fine_tune(LandCover, config, run_config)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
