"""Score the dates that a map reads: all clear ones of a pixel, or at most N, evenly spaced.

An encoder's line has test macro-F1 of logistic regression with 50, 100, 500 and 2000 labels, as
study.py scores; a fine-tuned network's has its own macro-F1 and overall accuracy.

    python experiments/dates.py dataset_name=arkansas_2021 \\
        checkpoint_path=checkpoints/arkansas/best.pt,checkpoints/landcover/best.pt
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import Pixels, score

from backbones import load_backbone, load_classifier
from evaluation.scores import macro_f1
from running.checkpoints import load_checkpoint
from running.device import start_runtime
from running.script import run_script
from transforms import even_dates
from utils import encode_series

run_config = {
    "base_path": "../shared",  # folder above data/
    "dataset_name": "arkansas_2021",
    "checkpoint_path": "",  # of train.py or train_classification.py; several divided by commas
    "dates": "0,24,16",  # most dates of a pixel; 0: all
}


def thin(x, doys, most):
    """Series (N, T, B) and days (N, T), padded, cut to at most `most` dates."""
    place = torch.arange(doys.shape[1]).where(doys > 0, -1)
    dates = even_dates(place, most)
    pixel, padding = torch.arange(len(x))[:, None], dates < 0
    dates = dates.clamp(min=0)
    return x[pixel, dates], doys[pixel, dates].masked_fill(padding, 0)


def score_encoder(checkpoint, pixels, most, runtime):
    backbone = load_backbone(checkpoint)

    def encode(x, doys):
        return encode_series(backbone, *thin(x, doys, most), runtime)[0]

    return score(encode, pixels.splits, "logistic regression")


def score_classifier(checkpoint, pixels, most, runtime):
    x, doys, labels, _ = pixels.splits["test"]
    _, logits = encode_series(load_classifier(checkpoint), *thin(x, doys, most), runtime)
    predicted = np.array([int(code) for code in checkpoint["classes"]])[logits.argmax(1)]
    return {
        "macro_f1": round(macro_f1(labels, predicted), 4),
        "overall_accuracy": round(float(accuracy_score(labels, predicted)), 4),
    }


def main(config):
    pixels, runtime = Pixels(config["base_path"], config["dataset_name"]), start_runtime("cpu")
    for path in config["checkpoint_path"].split(","):
        checkpoint = load_checkpoint(path)
        kind = score_classifier if checkpoint["kind"] == "classifier" else score_encoder
        for most in map(int, config["dates"].split(",")):
            scores = kind(checkpoint, pixels, most, runtime)
            print(json.dumps({"checkpoint": path, "dates": most, **scores}), flush=True)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
