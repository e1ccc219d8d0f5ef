"""How good are the embeddings: test scores against the number of labels, beside honest baselines.

For each number of labels, labelled pixels are chosen at random several times (label draws). The
same pixels train every model, and all are scored on the same pixels of the test split. Settings
(C, k, leaf size) are chosen by cross-validation on the training labels alone. Also: whether the
difference to the best baseline is more than chance, and how steady the embeddings are when other
dates of a pixel are read.

    python label_efficiency.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021
    python label_efficiency.py checkpoint_path=checkpoints/a/best.pt,checkpoints/b/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 models=all
    python label_efficiency.py checkpoint_path=checkpoints/flanders/best.pt base_path=../shared \\
        dataset_name=flanders_2018 test_dataset_name=flanders_2019
    python label_efficiency.py checkpoint_path=checkpoints/austria/best.pt dataset_name=austria \\
        maps=tessera=maps/tessera,aef=alphaearth:maps/aef_2021

Stopped and started again with the same output_dir, it resumes after the last model it has scored.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from running.checkpoints import OLD_CHECKPOINT_DEFAULTS, load_checkpoint
from running.config import MAX_INT, check
from running.device import Runtime, start_runtime
from running.errors import InputError, notice
from running.files import atomic_write, file_hash, lock_folder, make_output_dir, write_json
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script

import numpy as np
from sklearn.metrics import accuracy_score

from backbones import BACKBONE_KEYS, load_classifier
from data import SentinelTimeSeriesDatasetForDownstreaming
from evaluation.classifiers import find_label_folds, fit_classifier
from evaluation.differences import run_tests
from evaluation.features import (
    build_extractors,
    find_key,
    measure_ranks,
    measure_steadiness,
    read_split,
    stack_features,
)
from evaluation.label_report import (
    FEATURES,
    MODELS,
    NETWORKS,
    OWN,
    find_means,
    list_models,
    save_result,
    write_table,
)
from evaluation.networks import predict
from evaluation.scores import count_classes, macro_f1, measurable_classes
from evaluation.seen_pixels import notice_seen_pixels
from evaluation.shared_labels import notice_same_ground, share_labels
from maps.embeddings import parse_sources
from maps.land_cover import class_legend
from tiles import checkpoint_bands, notice_splits

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; several (seeds) divided by commas: draw s uses s mod N
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "test_dataset_name": "",  # another year or region: all its labels test, all of the first train
    "maps": "",  # embeddings of others, NAME=PATH,.. or (AlphaEarth's int8) NAME=alphaearth:PATH
    "output_dir": "",  # empty: beside the checkpoint, <its folder>/label_efficiency
    # models
    "models": "fast",  # all; fast: without networks, which take minutes; or some: series,forest
    # labels
    "label_counts": "50,100,500,2000",  # chosen at random from the training split; 0: all of it
    "most_pixels": 100_000,  # at most: of a split, chosen at random, that are held in memory
    "seeds": 5,  # label draws for each count; mean and standard deviation are reported
    "draws": 0,  # representations from 0: all clear dates; else the mean of N even draws of dates
    # steadiness
    "retrieval_pixels": 10_000,  # at most: of the test split; more: a harder task, more memory
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}

INHERITED = ("min_valid", "block_size", "split_seed")  # which pixels are in which split
ARCHITECTURE = ("backbone", *BACKBONE_KEYS)


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


def read_models(config, sources):
    """{name: Model} of the chosen MODELS, in their order, and of all maps (`parse_sources`)."""
    text = config["models"]
    fast = [name for name in MODELS if name not in NETWORKS]
    chosen = {"all": list(MODELS), "fast": fast}.get(text, text.split(","))
    if unknown := [name for name in chosen if name not in MODELS]:
        raise InputError(
            f"models={text}: found {unknown[0]!r}, wanted all, fast or some of {','.join(MODELS)}"
        )
    if config["test_dataset_name"] and (networks := [n for n in NETWORKS if n in chosen]):
        raise InputError(
            f"models={text}: found {','.join(networks)} with test_dataset_name, wanted fast or "
            "others (a network is chosen on validation labels, and there all labels train)"
        )
    models = list_models(sources)
    return {name: models[name] for name in models if name in chosen or name not in MODELS}


def load_checkpoints(config):
    """{path: content} of every checkpoint; InputError where they are not of one data set.

    Of train.py alone: the encoder of a classifier has learned from labels that are chosen anew.
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


def open_split(split, checkpoint, config, label_count=0, seed=0):
    """Labelled pixels of a split, at most `most_pixels`.

    label_count and seed choose the labels that they choose in train_classification.py.
    """
    keywords = {key: checkpoint["config"][key] for key in INHERITED}
    keywords |= {"split": split, "seed": seed}
    keywords["bands"] = checkpoint_bands(checkpoint, config["checkpoint_path"])
    name = (config["test_dataset_name"] if split == "test" else "") or config["dataset_name"]

    def open_data(label_count):
        return SentinelTimeSeriesDatasetForDownstreaming(
            config["base_path"], name, label_count=label_count, **keywords
        )

    dataset = open_data(label_count)
    if dataset.num_pixels > config["most_pixels"]:
        whole, dataset = dataset, open_data(config["most_pixels"])
        lost = np.setdiff1d(whole.read_labels(), dataset.read_labels()).tolist()
        notice(
            f"{split}: {whole.num_pixels} labelled pixels, cut to most_pixels="
            f"{config['most_pixels']} of them, chosen at random"
            + (f"; found no pixel of classes {lost} among these" if lost else "")
        )
    return dataset


# ---- models --------------------------------------------------------------------------------------


def train_network(name, path, checkpoint, config, label_count, seed, folder):
    """Train a network with train_classification.py on the chosen labels. Returns its checkpoint.

    In a process of its own, as a user would run it. The folder is removed afterwards.
    """
    keys = {key: config[key] for key in ("base_path", "dataset_name", "device")}
    keys |= {"label_count": label_count, "seed": seed, "output_dir": folder, "overwrite": "true"}
    if name == "finetuned":
        keys["checkpoint_path"] = path
    else:
        before = OLD_CHECKPOINT_DEFAULTS | checkpoint["config"]
        keys |= {key: before[key] for key in INHERITED + ARCHITECTURE}
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


@dataclass(frozen=True)
class Comparison:
    """What all models share: the runs of one config.

    models: {name: Model}; checkpoints: (path, content) of each; extractors: of `build_extractors`;
    maps: of the training split, as `read_split` takes them; test: the test split, as it gives it;
    scored: (C,) codes of the classes that macro-F1 is over; kept: folder of `open_kept`.
    """

    config: dict
    runtime: Runtime
    models: dict
    checkpoints: list
    extractors: dict
    maps: dict
    test: tuple
    scored: np.ndarray
    output_dir: Path
    kept: Path

    def score_draw(self, count, seed, bar):
        """Fit each model to one label draw: {name: (row of the scores, predicted codes (N,))}.

        Models that an earlier run with the same output_dir has kept are not fitted again.
        """
        number = seed % len(self.checkpoints)
        dataset = open_split("train", self.checkpoints[0][1], self.config, count, seed)
        files = {name: self.kept / f"{count}-{seed}-{name}.npz" for name in self.models}
        missing = [name for name, file in files.items() if not file.exists()]
        bar.update(len(files) - len(missing))
        parts = {part for name in missing for part in self.models[name].features.split("+")}
        keys = {find_key(part, number) for part in parts}
        extractors = {key: self.extractors[key] for key in keys & self.extractors.keys()}
        maps = {name: self.maps[name] for name in parts & self.maps.keys()}
        train = read_split(dataset, extractors, maps)
        _, unit = find_label_folds(train[1], seed, train[2])
        for name in missing:
            bar.set_postfix_str(f"{dataset.num_pixels} labels, draw {seed}, {name}")
            predicted, chosen = self.fit_and_predict(name, train, seed, number)
            row = {
                "label_count": dataset.num_pixels,  # all labels where the count is 0
                "seed": seed,
                "model": name,
                "checkpoint": number,
                "macro_f1": macro_f1(self.test[1], predicted, codes=self.scored),
                "macro_f1_all_classes": macro_f1(self.test[1], predicted),
                "overall_accuracy": float(accuracy_score(self.test[1], predicted)),
                "chosen": None if chosen is None else float(chosen),
                "folds": None if chosen is None else unit,
            }
            with atomic_write(files[name]) as part:
                np.savez(part, row=json.dumps(row), predicted=predicted)
            bar.update()
        return {name: read_kept(file) for name, file in files.items()}

    def fit_and_predict(self, name, train, seed, number):
        """Predicted codes (N,) of the test pixels, and the setting that was chosen, or None."""
        (features, labels, groups), model = train, self.models[name]
        if model.features:
            x = stack_features(features, model.features, number)
            fitted, chosen = fit_classifier(model.classifier, x, labels, seed, groups)
            test_x = stack_features(self.test[0], model.features, number)
            return fitted.predict(test_x), chosen
        folder = self.output_dir / ".network"
        path, content = self.checkpoints[number]
        trained = train_network(name, path, content, self.config, len(labels), seed, folder)
        classifier = load_classifier(trained).to(self.runtime.device)
        dataset, codes = open_split("test", trained, self.config), map(int, trained["classes"])
        same_labels, predicted = predict(classifier, dataset, list(codes), self.runtime)
        assert np.array_equal(same_labels, self.test[1]), "the same test pixels for every model"
        return predicted, None


def open_kept(folder, config, checkpoints, train_set, test_set, maps):
    """The folder of what is done, emptied where that was made from other things than these."""
    keys = ("dataset_name", "test_dataset_name", "maps", "most_pixels", "draws")
    made_from = {key: config[key] for key in keys}
    made_from["map_files"] = [
        one.describe() for kinds in maps.values() for own in kinds.values() for one in own
    ]
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


# ---- report --------------------------------------------------------------------------------------


def main(config):
    """Compare models. Returns what `score_models` does."""
    refuse_torchrun()
    config = check(config)
    sources = parse_sources(config["maps"], reserved={*MODELS, *FEATURES})
    counts, models = read_counts(config), read_models(config, sources)
    folder = config["output_dir"] or (
        Path(config["checkpoint_path"].split(",")[0]).parent / "label_efficiency"
    )
    refuse_training_folder(folder)
    runtime = start_runtime(config["device"])
    checkpoints = load_checkpoints(config)
    first = next(iter(checkpoints.values()))
    with tempfile.TemporaryDirectory(prefix="label_efficiency-") as base_path:
        data, maps = config, {"train": {}, "test": {}}
        if sources or config["test_dataset_name"]:
            data = config | {"base_path": base_path}
            maps = share_labels(config, sources, first, base_path)
        for count in counts:  # too few labels for one of them are found before hours of work
            open_split("train", first, data, count)
        test_set = open_split("test", first, data)
        if config["test_dataset_name"]:
            whole = open_split("train", first, data | {"most_pixels": MAX_INT})
            notice_same_ground(whole, test_set)
        else:
            notice_splits(test_set.tiles)
            for path, checkpoint in checkpoints.items():
                notice_seen_pixels(test_set, checkpoint, path)
        output_dir = make_output_dir(folder)
        with lock_folder(output_dir):
            return score_models(
                config, data, models, checkpoints, maps, test_set, output_dir, runtime
            )


def score_models(config, data, models, checkpoints, maps, test_set, output_dir, runtime):
    """Score, test and plot. Returns a dict of scores, tests, retrieval, rankme, test_classes, ..

    data: the config with the base_path of the tiles that are read; maps: of `share_labels`.
    scores: a dict for each count, seed and model (label_count, seed, model, checkpoint, macro_f1,
    macro_f1_all_classes, overall_accuracy, chosen, folds).
    """
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    log = start_log(config, "label_efficiency", output_dir, runtime)

    # features of the test split, and how steady they are
    contents = list(checkpoints.values())
    first = contents[0]
    train_set = open_split("train", first, data | {"most_pixels": MAX_INT})
    extractors = build_extractors(contents, train_set.tiles, config["draws"], runtime)
    some = min(test_set.num_pixels, config["retrieval_pixels"])
    steadiness = measure_steadiness(open_split("test", first, data, some), extractors)
    test = read_split(test_set, extractors, maps["test"])
    scored = measurable_classes(test[1])
    all_labels = train_set.num_pixels
    result = {"scores": [], "tests": [], "retrieval": steadiness, "all_labels": all_labels}
    result |= {"rankme": measure_ranks(test[0], some), "config": dict(config)}
    result["dimensions"] = first["backbone"]["latent_dim"]
    result["rows"] = {name: models[name].label for name in models}  # as in table, figure and wandb
    result["maps"] = list(maps["train"])
    legend = class_legend(np.unique(test[1]), test_set.classes)
    result["test_classes"] = count_classes(test[1], scored, legend)

    # each count is written when it is done; what is done of one is kept until the end
    kept = open_kept(output_dir / ".kept", config, checkpoints, train_set, test_set, maps)
    pairs, counts = list(checkpoints.items()), read_counts(config)
    comparison = Comparison(
        data, runtime, models, pairs, extractors, maps["train"], test, scored, output_dir, kept
    )
    bar = ProgressBar(total=len(counts) * config["seeds"] * len(models), unit="model")
    for count in counts:
        draws = [comparison.score_draw(count, seed, bar) for seed in range(config["seeds"])]
        rows = [row for draw in draws for row, _ in draw.values()]
        result["scores"] += rows
        result["tests"] += run_tests(draws, test, all_labels, OWN, scored)
        save_result(result, output_dir)
        log.line({"step": rows[0]["label_count"], **find_means(rows, result["rows"])})
    bar.close()
    shutil.rmtree(kept)
    picture = output_dir / "label_efficiency.png"
    log.images({"label_efficiency": picture})
    log.finish()
    print(f"\n{write_table(result)}\n{picture}: macro-F1 against the number of labels")
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
