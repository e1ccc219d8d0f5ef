"""How good are the embeddings: test scores against the number of labels, beside honest baselines.

For each number of labels and each seed the same labelled pixels train three models, all scored on
the test split: logistic regression on the frozen encoder's representations, and logistic regression
and a random forest on the gap-filled raw series.

    python label_efficiency.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from backbones import load_backbone
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from files import load_checkpoint, make_output_dir, write_json
from runlog import refuse_training_folder, start_log
from runtime import InputError, check, notice, refuse_torchrun, run_script, start_runtime
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
    "most_pixels": 100_000,  # of a split that are held in memory; of more, so many at random
    "seeds": 3,  # draws of labels for each count; the mean is reported
    "draws": 0,  # representations from 0: all clear observations; else the mean of so many draws
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}


def open_split(split, checkpoint, config, label_count=0, seed=0):
    """Labelled pixels of a split, at most `most_pixels`.

    The labels that label_count and seed draw are those of train_classification.py.
    """
    keys = ("min_valid", "block_size", "split_seed")
    keywords = {key: checkpoint["config"][key] for key in keys}
    keywords |= {key: checkpoint[key] for key in ("mean", "std")} | {"split": split, "seed": seed}

    def open_data(label_count):
        return SentinelTimeSeriesDatasetForDownstreaming(
            config["base_path"], config["dataset_name"], label_count=label_count, **keywords
        )

    dataset = open_data(label_count)
    for tile in dataset.tiles:
        check_tile(tile, checkpoint, config["checkpoint_path"])
    if dataset.num_pixels > config["most_pixels"]:
        notice(
            f"{split}: {dataset.num_pixels} labelled pixels, cut to most_pixels="
            f"{config['most_pixels']} of them, drawn at random"
        )
        dataset = open_data(config["most_pixels"])
    return dataset


def read_split(dataset, config, backbone, runtime):
    """Representations (N, D), gap-filled raw series (N, features) and labels (N,) of a split."""
    days = torch.from_numpy(np.unique(np.concatenate([tile.doys for tile in dataset.tiles])))
    parts = []
    batches = tqdm(
        iterate_batches(dataset),
        desc=f"{dataset.split}, {dataset.num_pixels} pixels",
        total=dataset.steps_per_epoch,
        unit="batch",
        leave=False,
    )
    for x, doys, labels, _ in batches:
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
    only_one_class = len(np.unique(train[2])) == 1  # then that class is all that can be predicted
    for name, (model, on_representations) in models(seed).items():
        model = DummyClassifier() if only_one_class else model
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


def read_counts(config):
    """The numbers of labels, ascending, 0 (all) last."""
    text = config["label_counts"]
    try:
        counts = {int(count) for count in text.split(",")}
    except ValueError:
        raise InputError(f"label_counts={text}: wanted 50,100,..") from None
    if min(counts) < 0 or 1 in counts:
        raise InputError(f"label_counts={text}: wanted 0 (all) or 2 or more each")
    if max(counts) > config["most_pixels"]:
        raise InputError(
            f"label_counts={text}: found {max(counts)}, wanted most_pixels="
            f"{config['most_pixels']} or fewer (or a larger most_pixels)"
        )
    return sorted(counts, key=lambda count: count or math.inf)


def print_means(rows, count):
    """Print the mean scores of each model over the seeds. Returns them, for the log."""
    means = {}
    for name in models(0):
        here = [row for row in rows if row["model"] == name]
        mean = {k: float(np.mean([r[k] for r in here])) for k in ("macro_f1", "overall_accuracy")}
        print(
            f"{count:6d} labels  {name:34s} macro-F1 {mean['macro_f1']:.3f}  "
            f"overall accuracy {mean['overall_accuracy']:.3f}"
        )
        means |= {f"{name}/{key}": value for key, value in mean.items()}
    return means


def main(config):
    """Score and draw. Returns a list of dicts: label_count, seed, model, the scores."""
    refuse_torchrun()
    config = check(config)
    counts = read_counts(config)
    folder = config["output_dir"] or Path(config["checkpoint_path"]).parent / "label_efficiency"
    refuse_training_folder(folder)
    runtime = start_runtime(config["device"])
    checkpoint = load_checkpoint(config["checkpoint_path"])
    backbone = load_backbone(checkpoint).to(runtime.device)
    for count in counts:  # too few labels for one of them is told before hours of work
        open_split("train", checkpoint, config, count)
    test_set = open_split("test", checkpoint, config)
    output_dir = make_output_dir(folder)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    log = start_log(config, "label_efficiency", output_dir, runtime)

    # each count is written when it is done
    test = read_split(test_set, config, backbone, runtime)
    results, picture = [], output_dir / "label_efficiency.png"
    for count in counts:
        rows = []
        for seed in range(config["seeds"]):
            dataset = open_split("train", checkpoint, config, count, seed)
            train = read_split(dataset, config, backbone, runtime)
            for name, scores in score(train, test, seed).items():
                label_count = dataset.num_pixels  # of 0, all, how many that is
                rows.append({"label_count": label_count, "seed": seed, "model": name, **scores})
        results += rows
        write_json(output_dir / "label_efficiency.json", results)
        plot(results, config["dataset_name"], picture)
        log.line({"step": dataset.num_pixels, **print_means(rows, dataset.num_pixels)})
    log.images({"label_efficiency": picture})
    log.finish()
    print(f"{picture}: macro-F1 against the number of labels")
    return results


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
