"""The simple loop: a small head on a saved representation map and its labels.

    python train_classification_maddy.py \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy

Pixels split by splits_path (1 train, 2 and 3 test) where it is given, else 80:20 at random.
"""

import math
from pathlib import Path

from running.config import MAX_INT, check
from running.device import start_runtime
from running.errors import InputError, notice
from running.files import make_output_dir
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn

from backbones import focal_loss
from evaluation.scores import score_classes, write_report
from maps.land_cover import class_legend
from maps.reader import RepresentationMap, find_labels, read_codes, read_provenance
from tiles import TEST

run_config = {
    "representation_path": "outputs/MGRS-SIM1/representation_map.npy",  # (H, W, D), of infer.py
    "labels_path": "",  # (H, W) codes, 0: no label; empty: of the tile that infer.json names
    "splits_path": "",  # (H, W): 1 train, 2 and 3 test; empty: 80:20 at random
    "output_dir": "",  # empty: beside the representation map, <its folder>/maddy
    "hidden": 128,  # width of the head's hidden layer
    "loss": "cross_entropy",  # cross_entropy or focal
    "focal_gamma": 2.0,  # of the focal loss: how little pixels count that are easily right
    "batch_size": 512,  # pixels a step
    "epochs": 20,  # passes over the training pixels
    "learning_rate": 1e-3,  # AdamW's
    "seed": 0,  # of the split, the weights and the order
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def read_pixels(config, labels_path):
    """Representations (N, D), labels (N,) and splits (N,) of the labelled pixels with data."""
    path = config["representation_path"]
    representations = RepresentationMap(path)
    shape = representations.shape[:2]
    if not labels_path:
        raise InputError(f"{path}: found no infer.json that names labels, wanted labels_path=")
    labels = read_codes(labels_path, shape)
    splits = read_codes(config["splits_path"], shape, TEST) if config["splits_path"] else None
    parts = []
    for first, block in representations.blocks():
        rows = slice(first, first + len(block))
        valid = np.isfinite(block).all(-1) & (labels[rows] > 0)
        split = np.ones(valid.sum(), np.uint8) if splits is None else splits[rows][valid]
        parts.append((block[valid], labels[rows][valid], split))
    pixels, labels, split = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(pixels):
        raise InputError(f"{labels_path}: found no labelled pixel that has data")
    if splits is None and len(pixels) > 1:
        order = np.arange(len(split))
        split[train_test_split(order, test_size=0.2, random_state=config["seed"])[1]] = 3
    return pixels, labels, split


def main(config):
    """Train the head. Returns the test scores (`score_classes`) of the last epoch."""
    refuse_torchrun()
    config = check(config, loss=("cross_entropy", "focal"), epochs=(1, MAX_INT))

    # data
    info = read_provenance(config["representation_path"])
    labels_path, tile_info = find_labels(config["labels_path"], info)
    if info.get("classify"):
        notice(
            f"{config['representation_path']}: of an encoder that was fine-tuned on labels, maybe "
            "on those that are tested here; a map of train.py's encoder gives honest scores"
        )
    pixels, labels, split = read_pixels(config, labels_path)
    codes, target = np.unique(labels, return_inverse=True)
    train, test = split == 1, split >= 2
    if train.sum() < 2 or not test.any():
        raise InputError(
            f"{labels_path}: found {train.sum()} training and {test.sum()} "
            "test pixels, wanted 2 and 1 or more"
        )
    mean, std = pixels[train].mean(0), pixels[train].std(0) + 1e-6
    x = torch.from_numpy((pixels - mean) / std).float()
    target = torch.from_numpy(target)
    x_train, y_train, x_test = x[train], target[train], x[test]

    # model
    torch.manual_seed(config["seed"])
    head = nn.Sequential(
        nn.Linear(x.shape[1], config["hidden"]), nn.ReLU(), nn.Linear(config["hidden"], len(codes))
    )
    optimiser = torch.optim.AdamW(head.parameters(), config["learning_rate"])
    folder = config["output_dir"] or Path(config["representation_path"]).parent / "maddy"
    refuse_training_folder(folder)
    output_dir = make_output_dir(folder)
    runtime = start_runtime("cpu")
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    log = start_log(config, "train_classification_maddy", output_dir, runtime)
    legend = class_legend(codes, tile_info.get("classes") or info.get("classes", {}))

    # loop
    gamma = config["focal_gamma"] if config["loss"] == "focal" else 0.0
    bar = ProgressBar(range(1, config["epochs"] + 1), unit="epoch")
    for epoch in bar:
        total = 0.0
        for batch in torch.randperm(len(x_train)).split(config["batch_size"]):
            loss = focal_loss(head(x_train[batch]), y_train[batch], gamma)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(batch)
        if not math.isfinite(total):
            raise FloatingPointError(f"loss {total} in epoch {epoch}, wanted a lower learning_rate")
        with torch.no_grad():
            predicted = codes[head(x_test).argmax(1).numpy()]
        scores = score_classes(labels[test], predicted, legend)
        line = {key: scores[key] for key in ("overall_accuracy", "macro_f1", "weighted_f1")}
        log.line({"step": epoch, "loss": total / len(x_train), **line})
        bar.set_postfix_str(f"accuracy {line['overall_accuracy']:.3f}, F1 {line['macro_f1']:.3f}")

    # wrap up
    scores["split"] = "test"
    write_report(scores, legend, output_dir, f"test split, {test.sum()} pixels", log)
    log.finish()
    return scores


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
