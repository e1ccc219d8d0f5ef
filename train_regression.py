"""Fine-tune an encoder for a quantity (biomass, height, yield, ..), or train it from scratch.

    python train_regression.py checkpoint_path=checkpoints/simulated/best.pt
    python train_regression.py checkpoint_path=checkpoints/fuel/best.pt \\
        base_path=../shared dataset_name=fuel_moisture freeze_backbone=true label_count=500
    python train_regression.py backbone=transformer   # from scratch, for comparison
    torchrun --nproc-per-node=2 train_regression.py ...

Targets come from targets.npy, splits from splits.npy or from blocks. With a pretrained encoder, the
head (linear or attention) starts from ridge regression of its representations; then both are
trained. best.pt is the start, or the epoch of the last third, with the lowest validation RMSE. With
label_count no other targets are used, so best.pt is a mean of the weights at the start and at the
end. The test split is scored once, at the end. Started again with the same output_dir, the run
resumes from last.pt as if it had never stopped.
"""

from functools import partial

from running.errors import InputError, notice
from running.script import run_script
from running.tile_json import describe_target

import numpy as np
import torch.nn.functional as F

from backbones import decode_quantity
from data import SentinelTimeSeriesDatasetForRegression
from evaluation.networks import fit_ridge_start, predict_values
from evaluation.quantities import (
    count_outside,
    plot_predicted,
    print_quantity_scores,
    score_quantity,
)
from training.finetuning import Task, fine_tune

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; empty: train from scratch
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # tiles with targets.npy
    "map_dataset_name": "",  # tiles to map when done, and to score by their labels; empty: none
    "skip_bad_tiles": False,  # leave out tiles that are out of contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "overwrite": False,  # remove an earlier run from output_dir that this one cannot resume
    "label_count": 0,  # pixels of the training split, chosen at random; 0: all with a target
    "start": "",  # day of year or date (90, 04-01) of the first observation that is read, and ..
    "end": "",  # .. of the last; before start: across New Year; empty: the whole year
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in pretraining, or 10
    "date_share": 0.6,  # a step reads from this share to all of a pixel's clear dates; 1: all
    # model
    "head": "linear",  # linear, mlp (BatchNorm, dropout) or attention (pooling over the dates)
    "dropout": 0.0,  # in the head; it makes the outputs of a linear one smaller
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
    # loss, of targets scaled to mean 0 and deviation 1
    "loss": "smooth_l1",  # smooth_l1 (squared below a deviation, then linear) or squared
    # optimiser: AdamW, warm-up and cosine over the run's length
    "batch_size": 32,  # pixels a step, over all processes
    "epochs": 0,  # 0: as 27 sqrt(pixels) steps need, with a pretrained encoder at most 25
    "learning_rate": 1e-3,  # after the warm-up
    "weight_decay": 1e-3,  # on all weights
    "seed": 0,  # of the choice of pixels, the weights and the order
    # running: resumed from last.pt, which is saved after every epoch
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}
LOSSES = {"smooth_l1": F.smooth_l1_loss, "squared": F.mse_loss}


class Quantity(Task):
    """A quantity; the one output is in deviations from the training mean. Methods as in `Task`.

    header: "target", {"name", "unit", "mean", "std", "low", "high"} of the training targets.
    """

    kind, dataset = "regressor", SentinelTimeSeriesDatasetForRegression
    losses, criterion, sign = tuple(LOSSES), "rmse", -1
    logged, reported = ("rmse", "r2"), ("rmse", "mae", "r2", "bias")
    picture, shows, size = "predicted_actual", "predicted against actual values", 1
    map = "regression_map"

    def __init__(self, config, train, runtime):
        targets = train.read_labels().astype(np.float64)
        numbers = {"mean": targets.mean(), "std": targets.std()}
        numbers |= {"low": targets.min(), "high": targets.max()}
        if numbers["low"] == numbers["high"]:
            path = train.tiles[0].path / "targets.npy"
            line = f"found {numbers['low']:g} in all {len(targets)} training pixels"
            raise InputError(f"{path}: {line}, wanted at least two values")
        self.target = train.target | {key: float(value) for key, value in numbers.items()}
        self.config, self.header = config, {"target": self.target}
        self.about = f"with {describe_target(self.target)}"

    def has_exact_start(self):
        return self.config["loss"] == "squared"

    def fit_start(self, y, labels, groups):
        return fit_ridge_start(y, self.encode(labels), groups)

    def encode(self, labels):
        return (labels - self.target["mean"]) / self.target["std"]

    def loss(self, outputs, target):
        return LOSSES[self.config["loss"]](outputs[:, 0].float(), target)

    def predict(self, network, dataset, runtime):
        decode = partial(decode_quantity, target=self.target)
        return predict_values(network, dataset, decode, runtime)

    def score(self, actual, predicted, blocks):
        scores = score_quantity(actual, predicted, blocks)
        outside = count_outside(predicted, self.target["low"], self.target["high"])
        return scores | {"outside_training_range": outside, "target": self.target}

    def plot(self, scores, predicted, path, title):
        plot_predicted(*predicted[:2], scores, self.target, path, title)

    def print_scores(self, scores):
        print_quantity_scores(scores, self.target)
        if outside := scores["outside_training_range"]["pixels"]:
            notice(
                f"{outside} of {scores['pixels']} predictions leave the range of the training "
                f"targets, {self.target['low']:.4g} to {self.target['high']:.4g} "
                f"{self.target['unit']}: "
                "nothing there has been learned from"
            )


def main(config):
    """Fine-tune. Returns the test scores (`score_quantity`), as in metrics.json."""
    return fine_tune(Quantity, config, run_config)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
