"""Compare recipes of pretraining on small labelled tiles: one JSON line for each run.

A recipe is a dict of overrides of train.py's run_config. A run trains an encoder by one recipe on
one data set with one seed, by train.py, and scores logistic regression ("scores") and linear
discriminant analysis ("discriminant") on its frozen representations, with several numbers of
labels. CLASSICAL features are scored beside them.

    OMP_NUM_THREADS=1 python experiments/study.py part=0 parts=2 &
    OMP_NUM_THREADS=1 python experiments/study.py part=1 parts=2 &
    python experiments/study.py recipes=predict,sizes sets=arkansas_2021 seeds=0,1,2
    python experiments/study.py summary=true
    python experiments/study.py results=outputs/study.jsonl    # starts with no results

It can be stopped at any time: the same command skips the runs that the results have, resumes a
training from its last.pt, and does not train an encoder again that is in the folder `weights`.
"""

import hashlib
import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from running.checkpoints import load_checkpoint
from running.device import start_runtime
from running.errors import InputError
from running.script import run_script

import train
from backbones import load_backbone
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from evaluation.classifiers import fit_classifier
from evaluation.scores import macro_f1
from tiles import find_days
from transforms import gap_fill, harmonic_coefficients, split_dates
from utils import encode_series, rankme, retrieval

run_config = {
    "recipes": "",  # names in RECIPES and CLASSICAL, divided by commas; empty: all
    "sets": "arkansas_2021,california_2021,caatinga_2025,flanders_2018,flanders_2019,pyrenees_2023",
    "seeds": "0",  # of pretraining, divided by commas
    "base_path": "../shared",  # folder above data/
    "results": str(Path(__file__).with_name("results.jsonl")),
    "weights": "outputs/study",  # receives a folder of train.py's files for each encoder
    "part": 0,  # of the runs, every parts-th from this one on
    "parts": 1,
    "summary": False,  # print the table of what the results have, and train nothing
    "head": "scores",  # scores in the table: scores (logistic regression) or discriminant
    "over": "predict",  # the recipe that the table's gains are over
}

COUNTS = {50: 6, 100: 6, 500: 3, 2000: 2}  # labels (or all, where there are fewer): draws of them
# overrides of every run; last.pt is scored, so validating at the start and the end is enough
RUN = {"device": "cpu", "wandb_mode": "disabled", "val_interval": 1_000_000_000}


def steps(number):
    """Overrides for the length of a training: `number` steps of 256 pixels, or as many pixels."""
    return {"min_samples": 256 * number, "max_samples": 256 * number}


# values are given also where they are train.py's defaults, so that a recipe keeps its meaning
PREDICT = steps(1200) | {"sample_size": 16, "min_sample_size": 16, "blend": 0.0, "augment": "none"}
PREDICT |= {"latent_dim": 128, "width": 64, "depth": 2, "day_cycles": 0, "projector_dim": 512}
PREDICT |= {"barlow_lambda": 0.005, "mix_up": 0.0, "prediction": 100.0, "harmonics": 8}
PREDICT |= {"batch_size": 256, "learning_rate": 3e-3, "weight_decay": 1e-4, "hold_fraction": 0.3}
SIZES = PREDICT | {"min_sample_size": 8}
RATE = SIZES | {"learning_rate": 6e-3}
HALF = RATE | {"blend": 0.5}
MIXED = HALF | {"day_cycles": 8, "mix_up": 1.0, "mix_up_every": 1}
# train.py's defaults: views and length follow the data
DEFAULTS = MIXED | {"sample_size": 0, "min_sample_size": 0, "min_samples": 0}
DEFAULTS |= {"max_samples": train.run_config["max_samples"], "augment": "vary_years"}
DEFAULTS |= {"mix_up_every": 3}
RECIPES = {
    "untrained": PREDICT | {"learning_rate": 0.0, "max_steps": 1},
    "predict": PREDICT,
    "sizes": SIZES,  # 8 to 16 dates
    "sizes 8 to 24": SIZES | {"sample_size": 24},
    "sizes + rate 6e-3": RATE,
    "sizes + rate 6e-3 + decay .1": RATE | {"weight_decay": 0.1},
    "sizes + 400 steps": SIZES | steps(400),
    "sizes + jitter .1": SIZES | {"augment": "jitter_bands"},
    "sizes + no prediction": SIZES | {"prediction": 0.0},
    # one change at a time from "sizes + rate 6e-3"
    "rate + projector 1024": RATE | {"projector_dim": 1024},
    "rate + projector 256": RATE | {"projector_dim": 256},
    "rate + projector 128": RATE | {"projector_dim": 128},
    "rate + prediction 300": RATE | {"prediction": 300.0},
    "rate + latent 256": RATE | {"latent_dim": 256},
    "rate + float32": RATE | {"precision": "float32"},
    "rate + blend": RATE | {"blend": 1.0},
    "rate + blend half": HALF,
    # one change at a time from "rate + blend half"
    "half + latent 256": HALF | {"latent_dim": 256},
    "half + latent 64": HALF | {"latent_dim": 64},
    "half + harmonics 4": HALF | {"harmonics": 4},
    "half + prediction 30": HALF | {"prediction": 30.0},
    "half + prediction 300": HALF | {"prediction": 300.0},
    "half + lambda .02": HALF | {"barlow_lambda": 0.02},
    "half + lambda .001": HALF | {"barlow_lambda": 0.001},
    "half + batch 512": HALF | {"batch_size": 512},  # half as many steps: as many samples
    "half + batch 128": HALF | {"batch_size": 128},
    "half + depth 1": HALF | {"depth": 1} | steps(2000),  # takes about the same time
    "half + depth 3": HALF | {"depth": 3} | steps(850),
    "half + width 128": HALF | {"width": 128} | steps(520),
    "half + sizes 12 to 16": HALF | {"min_sample_size": 12},
    "half + sizes 4 to 16": HALF | {"min_sample_size": 4},
    "half + days to 8 cycles": HALF | {"day_cycles": 8},
    "half + days to 4 cycles": HALF | {"day_cycles": 4},
    "half + days to 2 cycles": HALF | {"day_cycles": 2},
    "half + rate 3e-3": HALF | {"learning_rate": 3e-3},
    "half + rate 12e-3": HALF | {"learning_rate": 12e-3},
    "half + 12000 steps": HALF | steps(12_000),
    "8 cycles + mix-up by day": MIXED,
    "8 cycles + mix-up by day + 4000 steps": MIXED | steps(4000),
    "from the data": DEFAULTS,
    "from the data + mix-up in every step": DEFAULTS | {"mix_up_every": 1},
}
CLASSICAL = ("series", "forest", "harmonic")  # features that need no training


# ---- runs ----------------------------------------------------------------------------------------


class Pixels:
    """The labelled pixels of a data set in memory.

    splits: {"train", "test"}: x (N, T, B) standardised, doys (N, T) padded with 0, labels (N,) and
    groups (N,) each; days: all days of the year that a tile has.
    """

    def __init__(self, base_path, name):
        every = SentinelTimeSeriesDataset(base_path, name, split="train")  # what train.py reads
        keywords = {"bands": every.bands, "batch_size": 1 << 20}
        self.splits = {}
        for split in ("train", "test"):
            labelled = SentinelTimeSeriesDatasetForDownstreaming(
                base_path, name, split=split, **keywords
            )
            self.splits[split] = next(iter(iterate_batches(labelled)))
        self.days = torch.tensor(find_days(every.tiles))


def score(features, splits, classifier):
    """Test macro-F1 for each number of labels, as in label_efficiency.py, the mean over draws.

    features: function of x, doys that gives (N, F).
    """
    (x, labels, groups), (test_x, test_labels, _) = (
        (features(x, doys).numpy(), labels.numpy(), groups.numpy())
        for x, doys, labels, groups in (splits["train"], splits["test"])
    )
    scores = {}
    for count, draws in COUNTS.items():
        results, count = [], min(count, len(labels))
        for draw in range(draws if count < len(labels) else 1):
            chosen = np.random.default_rng(draw).choice(len(labels), count, replace=False)
            model, _ = fit_classifier(classifier, x[chosen], labels[chosen], draw, groups[chosen])
            results.append(macro_f1(test_labels, model.predict(test_x)))
        scores[count] = round(float(np.mean(results)), 4)
    return scores


def run_classical(pixels, name):
    """Score features that need no training: what their row has beside recipe, set and seed."""

    def series(x, doys):
        return gap_fill(x, doys, pixels.days).flatten(1)

    features = harmonic_coefficients if name == "harmonic" else series
    first = "random forest" if name == "forest" else "logistic regression"
    names = {"scores": first, "discriminant": "discriminant analysis"}
    return {key: score(features, pixels.splits, classifier) for key, classifier in names.items()}


def train_encoder(row, config):
    """Train the encoder of a row's recipe, set and seed, or take the one that is kept.

    Returns its backbone, and what the row has of the training. The weights are those of last.pt,
    at the end of the schedule; best.pt is chosen by labels.
    """
    recipe = train.run_config | RUN | RECIPES[row["recipe"]]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{row['recipe'].replace(' ', '_')}-{digest}-{row['set']}-{row['seed']}"
    folder = Path(config["weights"]) / name
    recipe |= {"base_path": config["base_path"], "dataset_name": row["set"], "seed": row["seed"]}
    start, is_new = time.process_time(), not (folder / "last.pt").exists()
    train.main(recipe | {"output_dir": str(folder)})
    result = {"overrides": RECIPES[row["recipe"]]}
    if is_new:  # else an earlier command did a part of the training, or all of it
        result["train_seconds"] = round(time.process_time() - start, 1)
    return load_backbone(load_checkpoint(folder / "last.pt")), result


def run_recipe(pixels, row, config):
    """Train and score an encoder: what its row has beside recipe, set and seed."""
    backbone, result = train_encoder(row, config)
    runtime = start_runtime("cpu")

    def encode(x, doys):
        return encode_series(backbone, x, doys, runtime)[0]

    x, doys, *_ = pixels.splits["test"]
    halves = split_dates(x[:4000], doys[:4000], torch.Generator().manual_seed(0))
    return result | {
        "scores": score(encode, pixels.splits, "logistic regression"),
        "discriminant": score(encode, pixels.splits, "discriminant analysis"),
        "retrieval": round(retrieval(*(encode(*half) for half in halves)), 4),
        "rankme": round(rankme(encode(x, doys))[0], 1),
    }


# ---- results -------------------------------------------------------------------------------------


def read_results(path):
    """The rows of the results, without those of recipes whose overrides have been changed since.

    Rows without "overrides" are from an earlier trainer (see README.md) and count by their name.
    """
    path, rows = Path(path), []
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        today = RECIPES.get(row["recipe"], row.get("overrides"))
        if row.get("overrides", today) == today:
            rows.append(row)
    return rows


def summarise(results, head, over):
    """Print test macro-F1 by data set and number of labels, and the mean gain over a recipe."""
    results = [row for row in results if head in row]
    sets = sorted({row["set"] for row in results})
    table = {}
    for row in results:
        scores = list(row[head].values())
        table.setdefault(row["recipe"], {}).setdefault(row["set"], []).append(scores)
    means = {
        name: {data: np.mean(rows, 0) for data, rows in by_set.items()}
        for name, by_set in table.items()
    }
    print("| recipe | gain | " + " | ".join(sets) + " |\n" + "|---" * (len(sets) + 2) + "|")
    for name, by_set in means.items():
        gains = [by_set[data] - means[over][data] for data in by_set if data in means[over]]
        cells = [" ".join(f"{value:.3f}"[1:] for value in by_set.get(data, ())) for data in sets]
        seeds = min(len(rows) for rows in table[name].values())
        gain = f"{np.mean(gains):+.3f} ({len(gains)} sets, {seeds} seed)"
        print(f"| {name} | {gain} | " + " | ".join(cells) + " |")


def main(config):
    """Do the runs that the results do not have, or print the table of those that they have."""
    if config["head"] not in ("scores", "discriminant"):
        raise InputError(f"head={config['head']}: wanted scores or discriminant")
    results, known = read_results(config["results"]), [*CLASSICAL, *RECIPES]
    if config["summary"]:  # also recipes of the past, of which there are rows
        known = list(dict.fromkeys(row["recipe"] for row in results))
    names = config["recipes"].split(",") if config["recipes"] else known
    shown = [*names, config["over"]] if config["summary"] else names
    if unknown := [name for name in shown if name not in known]:
        raise InputError(f"found no recipe {unknown[0]!r}, wanted some of {', '.join(known)}")
    if config["summary"]:
        results = [row for row in results if row["recipe"] in shown]
        return summarise(results, config["head"], config["over"])
    Path(config["results"]).parent.mkdir(parents=True, exist_ok=True)
    runs = list(product(config["seeds"].split(","), names, config["sets"].split(",")))
    loaded = {}
    for seed, name, data in runs[config["part"] :: config["parts"]]:
        row = {"recipe": name, "set": data, "seed": int(seed)}
        if any(done.items() >= row.items() for done in read_results(config["results"])):
            continue
        if data not in loaded:
            loaded[data] = Pixels(config["base_path"], data)
        if name in CLASSICAL:
            row |= run_classical(loaded[data], name)
        else:
            row |= run_recipe(loaded[data], row, config)
        with open(config["results"], "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
