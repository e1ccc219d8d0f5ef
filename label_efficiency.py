"""How good are the embeddings: test scores against the number of labels, beside honest baselines.

For each number of labels and each seed the same labelled pixels train three models, all scored on
the whole test split: logistic regression on the frozen encoder's representations,
logistic regression on the gap-filled raw series, and a random forest on the gap-filled raw series.

    python label_efficiency.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from backbones import load_backbone
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from runtime import (
    InputError,
    check,
    load_checkpoint,
    make_output_dir,
    refuse_torchrun,
    run_script,
    start_log,
    start_runtime,
    write_json,
)
from tiles import check_tile
from transforms import gap_fill
from utils import encode_series, save_figure

run_config = {
    # input
    "checkpoint_path": "",  # a checkpoint of train.py
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "output_dir": "",  # empty: beside the checkpoint, <its folder>/label_efficiency
    # labels
    "label_counts": "50,100,500,2000",  # drawn at random from the training split; 0: all of it
    "seeds": 3,  # draws of labels for each count; the mean is reported
    "draws": 0,  # representations from 0: all clear observations; else the mean of so many draws
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}


def read_split(split, checkpoint, config, backbone, runtime, label_count=0, seed=0):
    """Representations (N, D), gap-filled raw series (N, features) and labels (N,) of a split.

    The labels that label_count and seed draw are those of train_classification.py.
    """
    keys = ("min_valid", "block_size", "split_seed")
    dataset = SentinelTimeSeriesDatasetForDownstreaming(
        config["base_path"],
        config["dataset_name"],
        split=split,
        label_count=label_count,
        seed=seed,
        mean=checkpoint["mean"],
        std=checkpoint["std"],
        **{key: checkpoint["config"][key] for key in keys},
    )
    for tile in dataset.tiles:
        check_tile(tile, checkpoint, config["checkpoint_path"])
    days = torch.from_numpy(np.unique(np.concatenate([tile.doys for tile in dataset.tiles])))
    parts = []
    for x, doys, labels, _ in iterate_batches(dataset):
        y, _ = encode_series(backbone, x, doys, runtime, config["draws"])
        parts.append((y, gap_fill(x, doys, days).flatten(1), labels))
    return [torch.cat(arrays).numpy() for arrays in zip(*parts, strict=True)]


def models(seed):
    """Name -> (model, whether it reads representations)."""
    return {
        "embeddings + logistic regression": (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            True,
        ),
        "raw series + logistic regression": (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            False,
        ),
        "raw series + random forest": (
            RandomForestClassifier(500, n_jobs=-1, random_state=seed),
            False,
        ),
    }


def score(train, test, seed):
    """Test scores of each model fitted to the training pixels."""
    scores = {}
    for name, (model, on_representations) in models(seed).items():
        which = 0 if on_representations else 1
        with threadpool_limits(1):  # small products; more threads would wait for each other
            predicted = model.fit(train[which], train[2]).predict(test[which])
        scores[name] = {
            "macro_f1": float(f1_score(test[2], predicted, average="macro")),
            "overall_accuracy": float(accuracy_score(test[2], predicted)),
        }
    return scores


def plot(results, dataset_name, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in models(0):
        counts = sorted({row["label_count"] for row in results})
        rows = [
            [r["macro_f1"] for r in results if r["model"] == name and r["label_count"] == count]
            for count in counts
        ]
        mean, low, high = (np.array([f(row) for row in rows]) for f in (np.mean, np.min, np.max))
        axes.errorbar(counts, mean, [mean - low, high - mean], marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="labels", ylabel="test macro-F1", title=dataset_name)
    axes.legend()
    save_figure(figure, path)


def main(config):
    """Score and draw. Returns a list of dicts: label_count, seed, model, the scores."""
    refuse_torchrun()
    config = check(config)
    runtime = start_runtime(config["device"])
    checkpoint = load_checkpoint(config["checkpoint_path"])
    backbone = load_backbone(checkpoint).to(runtime.device)
    folder = config["output_dir"] or Path(config["checkpoint_path"]).parent / "label_efficiency"
    output_dir = make_output_dir(folder)
    try:
        counts = [int(text) for text in config["label_counts"].split(",")]
    except ValueError:
        raise InputError(f"label_counts={config['label_counts']}: wanted 50,100,..") from None

    if min(counts) < 0 or 1 in counts:
        raise InputError(f"label_counts={config['label_counts']}: wanted 0 (all) or 2 or more each")
    test = read_split("test", checkpoint, config, backbone, runtime)
    log = start_log(config, "label_efficiency", output_dir, runtime)
    results = []
    for count in counts:
        for seed in range(config["seeds"]):
            train = read_split("train", checkpoint, config, backbone, runtime, count, seed)
            for name, scores in score(train, test, seed).items():
                results.append({"label_count": count, "seed": seed, "model": name, **scores})
        for name in models(0):
            rows = [r for r in results if r["model"] == name and r["label_count"] == count]
            mean = {
                key: np.mean([row[key] for row in rows]) for key in ("macro_f1", "overall_accuracy")
            }
            print(
                f"{count:6d} labels  {name:34s} macro-F1 {mean['macro_f1']:.3f}  "
                f"overall accuracy {mean['overall_accuracy']:.3f}"
            )
            log.line({"step": count, **{f"{name}/{key}": float(v) for key, v in mean.items()}})
    write_json(output_dir / "label_efficiency.json", results)
    picture = output_dir / "label_efficiency.png"
    plot(results, config["dataset_name"], picture)
    log.images({"label_efficiency": picture})
    log.finish()
    print(f"{picture}: macro-F1 against the number of labels")
    return results


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
