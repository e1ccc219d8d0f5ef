"""How good are the embeddings: test scores against the number of labels, beside honest baselines.

For each number of labels and each draw of them (seed), the same labelled pixels train every model,
and all are scored on the same pixels of the test split. Settings (C, k, leaf size) are chosen by
cross-validation on the training labels alone. Also: whether the difference to the best baseline is
more than chance, and how steady the embeddings are when other dates of a pixel are seen.

    python label_efficiency.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021
    python label_efficiency.py checkpoint_path=checkpoints/a/best.pt,checkpoints/b/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 models=all

Ended and started again with the same output_dir it goes on behind the last model that was scored.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from tqdm import tqdm

from backbones import BACKBONE_KEYS, BACKBONES, build_backbone, load_backbone, load_classifier
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from evaluation.classifiers import fit_classifier
from evaluation.differences import run_tests
from evaluation.label_report import MODELS, NETWORKS, OWN, find_means, save_result, write_table
from evaluation.scores import macro_f1
from running.checkpoints import OLD_CHECKPOINT_DEFAULTS, load_checkpoint
from running.config import MAX_INT, check
from running.device import Runtime, start_runtime
from running.errors import InputError, notice
from running.files import atomic_write, file_hash, lock_folder, make_output_dir, write_json
from running.log import refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script
from tiles import check_tile, notice_splits
from transforms import gap_fill, harmonic_coefficients, split_dates
from utils import encode_series, rankme, retrieval

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; several, divided by commas: draw s of the labels uses
    # checkpoint s modulo their number, so that the spread includes them (seeds of one recipe)
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "output_dir": "",  # empty: beside the checkpoint, <its folder>/label_efficiency
    # models
    "models": "fast",  # all; fast: all but those that train a network, which take minutes for each
    # draw; or some, as series,forest: the names are the keys of MODELS
    # labels
    "label_counts": "50,100,500,2000",  # drawn at random from the training split; 0: all of it
    "most_pixels": 100_000,  # of a split that are held in memory; of more, so many at random
    "seeds": 5,  # draws of labels for each count; mean and standard deviation are reported
    "draws": 0,  # representations from 0: all clear observations; else the mean of so many draws
    # steadiness
    "retrieval_pixels": 10_000,  # of the test split at most; more: a harder task, more memory
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}


INHERITED = ("min_valid", "block_size", "split_seed")  # which pixels are in which split
ARCHITECTURE = ("backbone", *BACKBONE_KEYS)
MOST_DAYS = 73  # that series are gap-filled to; many tiles have more days, 5 days apart suffices


# ---- config --------------------------------------------------------------------------------------


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


def read_models(config):
    """Names of the chosen MODELS, in their order."""
    text = config["models"]
    fast = [name for name in MODELS if name not in NETWORKS]
    chosen = {"all": list(MODELS), "fast": fast}.get(text, text.split(","))
    if unknown := [name for name in chosen if name not in MODELS]:
        raise InputError(
            f"models={text}: found {unknown[0]!r}, wanted all, fast or some of {','.join(MODELS)}"
        )
    return [name for name in MODELS if name in chosen]


def load_checkpoints(config):
    """Path -> content of every checkpoint; InputError where they are not of one data set.

    Of train.py alone: the encoder of a classifier has learned from labels that are drawn anew here.
    """
    paths = config["checkpoint_path"].split(",")
    checkpoints = {path: load_checkpoint(path, ("pretrained",)) for path in paths}
    first = checkpoints[paths[0]]
    for path, other in checkpoints.items():
        differ = [key for key in INHERITED if other["config"][key] != first["config"][key]]
        differ += [key for key in ("mean", "std") if not other[key].equal(first[key])]
        if differ:
            raise InputError(
                f"{path}: found another {', '.join(differ)} than in {paths[0]}, wanted checkpoints "
                "of one data set and one split"
            )
    return checkpoints


# ---- data ----------------------------------------------------------------------------------------


def open_split(split, checkpoint, config, label_count=0, seed=0):
    """Labelled pixels of a split, at most `most_pixels`.

    The labels that label_count and seed draw are those of train_classification.py.
    """
    keywords = {key: checkpoint["config"][key] for key in INHERITED}
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


def build_extractors(checkpoints, tiles, config, runtime):
    """(features, number of the checkpoint) -> function of x, doys that gives features (N, F).

    The untrained encoder of a checkpoint has its architecture, and weights of its number as seed.
    """
    days = np.unique(np.concatenate([tile.doys for tile in tiles]))
    if len(days) > MOST_DAYS:
        days = np.linspace(days[0], days[-1], MOST_DAYS)
    days = torch.from_numpy(days)

    def encode(module, x, doys):
        return encode_series(module, x, doys, runtime, config["draws"])[0]

    extractors = {
        ("series", 0): lambda x, doys: gap_fill(x, doys, days).flatten(1),
        ("harmonic", 0): harmonic_coefficients,
    }
    for number, checkpoint in enumerate(checkpoints):
        torch.manual_seed(number)
        untrained = build_backbone(**checkpoint["backbone"]).eval().to(runtime.device)
        trained = load_backbone(checkpoint).to(runtime.device)
        extractors["embedding", number] = partial(encode, trained)
        extractors["untrained", number] = partial(encode, untrained)
    return extractors


def walk(dataset):
    """Batches of a data set, with a progress bar that goes away."""
    description = f"{dataset.split}, {dataset.num_pixels} pixels"
    steps = dataset.steps_per_epoch
    return tqdm(iterate_batches(dataset), description, steps, leave=False, unit="batch")


def read_split(dataset, extractors):
    """Features {key: (N, F) float32}, labels (N,) and blocks (N,) of a split."""
    features, labels, groups = {key: [] for key in extractors}, [], []
    for x, doys, label, group in walk(dataset):
        for key, extract in extractors.items():
            features[key].append(extract(x, doys))
        labels.append(label)
        groups.append(group)
    features = {key: torch.cat(parts).numpy() for key, parts in features.items()}
    return features, torch.cat(labels).numpy(), torch.cat(groups).numpy()


def measure_steadiness(dataset, extractors):
    """How well a pixel is found again from other dates: {features: a share for each checkpoint}.

    The dates of each pixel are divided at random into two halves, each read as a whole year.
    """
    halves, generator = {key: ([], []) for key in extractors}, torch.Generator().manual_seed(0)
    pixels = 0
    for x, doys, *_ in walk(dataset):
        two = (doys > 0).sum(1) > 1
        pixels += int(two.sum())
        for place, half in enumerate(split_dates(x[two], doys[two], generator)):
            for key, extract in extractors.items() if two.any() else ():
                halves[key][place].append(extract(*half))
    result = {"pixels": pixels}
    for name, number in halves if pixels > 1 else ():
        a, b = (torch.cat(parts) for parts in halves[name, number])
        result.setdefault(name, []).append(retrieval(a, b))
    return result


def measure_ranks(features, most):
    """RankMe of at most so many representations: {features: a value for each checkpoint}."""
    ranks = {}
    for (name, _), values in sorted(features.items()):
        if name in ("embedding", "untrained"):
            ranks.setdefault(name, []).append(rankme(values[:most])[0])
    return ranks


# ---- models --------------------------------------------------------------------------------------


def train_network(name, path, checkpoint, config, label_count, seed, folder):
    """Train a network with train_classification.py on the drawn labels; its checkpoint.

    In a process of its own, as a user would run it. The folder is removed afterwards.
    """
    keys = {key: config[key] for key in ("base_path", "dataset_name", "device")}
    keys |= {"label_count": label_count, "seed": seed, "output_dir": folder, "overwrite": "true"}
    if name == "finetuned":
        keys["checkpoint_path"] = path
    else:
        before = OLD_CHECKPOINT_DEFAULTS | checkpoint["config"]
        keys |= {key: before[key] for key in INHERITED + ARCHITECTURE}
        if BACKBONES[keys["backbone"]].any_length:
            del keys["sample_size"]  # it reads all dates, as the fine-tuned one does
    script = Path(__file__).with_name("train_classification.py")
    arguments = [f"{key}={value}" for key, value in (keys | {"wandb_mode": "disabled"}).items()]
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True
        )
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"models={name}: train_classification.py ended: {line}")
        return load_checkpoint(folder / "best.pt", ("classifier",))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def predict_network(checkpoint, config, runtime):
    """Labels and predicted codes of the test split, (N,) each, in the order of `read_split`."""
    codes = np.array([int(code) for code in checkpoint["classes"]], np.uint8)
    classifier = load_classifier(checkpoint).to(runtime.device)
    labels, predicted = [], []
    for x, doys, label, _ in walk(open_split("test", checkpoint, config)):
        _, logits = encode_series(classifier, x, doys, runtime)
        labels.append(label.numpy())
        predicted.append(codes[logits.argmax(1).numpy()])
    return np.concatenate(labels), np.concatenate(predicted)


@dataclass(frozen=True)
class Comparison:
    """What all models share.

    test: as `read_split` gives it; checkpoints: (path, content) each; kept: folder of `open_kept`.
    """

    config: dict
    runtime: Runtime
    names: list
    checkpoints: list
    extractors: dict
    test: tuple
    output_dir: Path
    kept: Path

    def score_draw(self, count, seed, bar):
        """Fit each model to one draw of labels: {name: (row of the scores, predictions (N,))}.

        Those that a run which was ended has kept are not fitted again.
        """
        number = seed % len(self.checkpoints)
        dataset = open_split("train", self.checkpoints[0][1], self.config, count, seed)
        files = {name: self.kept / f"{count}-{seed}-{name}.npz" for name in self.names}
        missing = [name for name, file in files.items() if not file.exists()]
        bar.update(len(files) - len(missing))
        keys = {find_key(MODELS[name].features, number) for name in missing}
        train = read_split(dataset, {key: self.extractors[key] for key in keys if key[0]})
        for name in missing:
            bar.set_postfix_str(f"{dataset.num_pixels} labels, draw {seed}, {name}")
            predicted, chosen = self.predict(name, train, seed, number)
            row = {
                "label_count": dataset.num_pixels,  # of 0, all, how many that is
                "seed": seed,
                "model": name,
                "checkpoint": number,
                "macro_f1": macro_f1(self.test[1], predicted),
                "overall_accuracy": float(accuracy_score(self.test[1], predicted)),
                "chosen": None if chosen is None else float(chosen),
            }
            with atomic_write(files[name]) as part:
                np.savez(part, row=json.dumps(row), predicted=predicted)
            bar.update()
        return {name: read_kept(file) for name, file in files.items()}

    def predict(self, name, train, seed, number):
        """Predicted codes (N,) of the test pixels, and the setting that was chosen, or None."""
        (features, labels, _), model = train, MODELS[name]
        if model.features:
            key = find_key(model.features, number)
            fitted, chosen = fit_classifier(model.classifier, features[key], labels, seed)
            return fitted.predict(self.test[0][key]), chosen
        folder = self.output_dir / ".network"
        path, content = self.checkpoints[number]
        trained = train_network(name, path, content, self.config, len(labels), seed, folder)
        same_labels, predicted = predict_network(trained, self.config, self.runtime)
        assert np.array_equal(same_labels, self.test[1]), "the same test pixels for every model"
        return predicted, None


def open_kept(folder, config, checkpoints, train_set, test_set):
    """The folder of what is done, emptied where that was made from other things than these."""
    made_from = {key: config[key] for key in ("dataset_name", "most_pixels", "draws")}
    made_from |= {"checkpoints": [file_hash(path) for path in checkpoints]}
    made_from |= {"train": train_set.describe(), "test": test_set.describe()}
    file = folder / "made_from.json"
    if not file.exists() or json.loads(file.read_text()) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(file, made_from)
    return folder


def read_kept(file):
    """A row of the scores and predictions (N,) that `score_draw` kept."""
    with np.load(file, allow_pickle=False) as kept:
        return json.loads(str(kept["row"])), kept["predicted"]


def find_key(features, number):
    """The key of `build_extractors` for features of a checkpoint."""
    return features, number if features in ("embedding", "untrained") else 0


# ---- report --------------------------------------------------------------------------------------


def main(config):
    """Compare. Returns what `compare` does."""
    refuse_torchrun()
    config = check(config, retrieval_pixels=(2, 100_000))
    counts, names = read_counts(config), read_models(config)
    folder = config["output_dir"] or (
        Path(config["checkpoint_path"].split(",")[0]).parent / "label_efficiency"
    )
    refuse_training_folder(folder)
    runtime = start_runtime(config["device"])
    checkpoints = load_checkpoints(config)
    first = next(iter(checkpoints.values()))
    for count in counts:  # too few labels for one of them is told before hours of work
        open_split("train", first, config, count)
    test_set = open_split("test", first, config)
    notice_splits(test_set.tiles)
    output_dir = make_output_dir(folder)
    with lock_folder(output_dir):
        return compare(config, counts, names, checkpoints, test_set, output_dir, runtime)


def compare(config, counts, names, checkpoints, test_set, output_dir, runtime):
    """Score, test and draw. Returns a dict of scores, tests, retrieval, rankme and config.

    scores: a dict for each count, seed and model (label_count, seed, model, checkpoint, macro_f1,
    overall_accuracy, chosen).
    """
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    log = start_log(config, "label_efficiency", output_dir, runtime)

    # features of the test split, and how steady they are
    contents = list(checkpoints.values())
    first = contents[0]
    extractors = build_extractors(contents, test_set.tiles, config, runtime)
    some = min(test_set.num_pixels, config["retrieval_pixels"])
    steadiness = measure_steadiness(open_split("test", first, config, some), extractors)
    test = read_split(test_set, extractors)
    train_set = open_split("train", first, config | {"most_pixels": MAX_INT})
    all_labels = train_set.num_pixels
    result = {"scores": [], "tests": [], "retrieval": steadiness, "all_labels": all_labels}
    result |= {"rankme": measure_ranks(test[0], some), "config": dict(config)}

    # each count is written when it is done, and what is done of it is kept until the end
    kept = open_kept(output_dir / ".kept", config, checkpoints, train_set, test_set)
    comparison = Comparison(
        config, runtime, names, list(checkpoints.items()), extractors, test, output_dir, kept
    )
    bar = tqdm(total=len(counts) * config["seeds"] * len(names), unit="model")
    for count in counts:
        draws = [comparison.score_draw(count, seed, bar) for seed in range(config["seeds"])]
        rows = [row for draw in draws for row, _ in draw.values()]
        result["scores"] += rows
        result["tests"] += run_tests(draws, test, all_labels, OWN)
        save_result(result, output_dir)
        log.line({"step": rows[0]["label_count"], **find_means(rows, names)})
    bar.close()
    shutil.rmtree(kept)
    picture = output_dir / "label_efficiency.png"
    log.images({"label_efficiency": picture})
    log.finish()
    print(f"\n{write_table(result)}\n{picture}: macro-F1 against the number of labels")
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
