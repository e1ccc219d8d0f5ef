"""Models that are compared: fitted to the same labels, scored on the same pixels, kept when done.

Shapes: N pixels.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from running.checkpoints import OLD_CHECKPOINT_DEFAULTS, load_checkpoint
from running.config import ALL_YEAR, find_season
from running.device import Runtime
from running.errors import InputError, notice
from running.files import atomic_write, file_hash, write_json
from running.log import ProgressBar
from running.script import start_script

import numpy as np

from backbones import BACKBONE_KEYS, load_classifier
from evaluation.differences import run_tests
from evaluation.features import build_extractors, find_key, read_split, stack_features
from evaluation.rows import FEATURES
from evaluation.tasks import find_task
from tiles import checkpoint_bands

INHERITED = ("min_valid", "block_size", "split_seed")  # which pixels are in which split
ARCHITECTURE = ("backbone", *BACKBONE_KEYS)


def open_split(split, checkpoint, config, label_count=0, seed=0):
    """Labelled pixels of a split, at most `most_pixels`, in the data set of the task.

    label_count and seed choose the labels that they choose in the scripts of fine-tuning.
    """
    keywords = {key: checkpoint["config"][key] for key in INHERITED}
    keywords |= {"split": split, "seed": seed, "season": find_season(config)}
    keywords["min_valid"] = config["min_valid"] or keywords["min_valid"]
    keywords["bands"] = checkpoint_bands(checkpoint, config["checkpoint_path"])
    name = (config["test_dataset_name"] if split == "test" else "") or config["dataset_name"]
    task = find_task(config)

    def open_data(label_count):
        return task.dataset(config["base_path"], name, label_count=label_count, **keywords)

    dataset = open_data(label_count)
    if dataset.num_pixels > config["most_pixels"]:
        whole, dataset = dataset, open_data(config["most_pixels"])
        notice(
            f"{split}: {whole.num_pixels} labelled pixels, cut to most_pixels="
            f"{config['most_pixels']} of them, chosen at random{task.name_lost(whole, dataset)}"
        )
    return dataset


def train_network(task, name, path, checkpoint, config, label_count, seed, folder):
    """Train a network with the script of the task on the chosen labels. Returns its checkpoint.

    In a process of its own, as a user would run it. The folder is removed afterwards.
    """
    shared = ("base_path", "dataset_name", "device", "start", "end")
    keys = {key: config[key] for key in shared}
    keys |= {"label_count": label_count, "seed": seed, "output_dir": folder, "overwrite": "true"}
    if name == "finetuned":
        keys["checkpoint_path"] = path
    else:
        before = OLD_CHECKPOINT_DEFAULTS | checkpoint["config"]
        keys |= {key: before[key] for key in INHERITED + ARCHITECTURE}
    keys["min_valid"] = config["min_valid"] or checkpoint["config"]["min_valid"]
    keys |= {"wandb_mode": "disabled"}
    try:
        done = start_script(task.script, keys, capture_output=True, text=True)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"models={name}: {task.script} ended: {line}")
        return load_checkpoint(folder / "best.pt", (task.kind,))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Comparison:
    """What all models share: the runs of one config.

    task: see evaluation/tasks.py; models: {name: Model}; checkpoints: (path, content) of each;
    extractors: of `build_extractors`; maps: of the training split, as `read_split` takes them;
    test: the test split, as it gives it; kept: folder of `open_kept`; until: the last day that is
    read; known_by: as `read_split` takes it.
    """

    config: dict
    runtime: Runtime
    task: object
    models: dict
    checkpoints: list
    extractors: dict
    maps: dict
    test: tuple
    output_dir: Path
    kept: Path
    until: int = ALL_YEAR[1]
    known_by: int = ALL_YEAR[1]

    def score_count(self, count, all_labels, bar):
        """The rows of the scores for a count of labels, and the tests of the differences."""
        draws = [self.score_draw(count, seed, bar) for seed in range(self.config["seeds"])]
        tests = run_tests(draws, self.test, all_labels, self.task)
        return [row for draw in draws for row, _ in draw.values()], tests

    def score_draw(self, count, seed, bar):
        """Fit each model to one label draw: {name: (row of the scores, predicted codes (N,))}.

        Models that an earlier run with the same output_dir has kept are not fitted again.
        """
        number = seed % len(self.checkpoints)
        dataset = open_split("train", self.checkpoints[0][1], self.config, count, seed)
        named = f"{self.until}-{count}-{seed}"
        files = {name: self.kept / f"{named}-{name}.npz" for name in self.models}
        missing = [name for name, file in files.items() if not file.exists()]
        bar.update(len(files) - len(missing))
        parts = {part for name in missing for part in self.models[name].features.split("+")}
        keys = {find_key(part, number) for part in parts}
        extractors = {key: self.extractors[key] for key in keys & self.extractors.keys()}
        maps = {name: self.maps[name] for name in parts & self.maps.keys()}
        train = read_split(dataset, extractors, maps, self.known_by)
        unit = self.task.find_folds(train[1], seed, train[2])[1]
        for name in missing:
            bar.set_postfix_str(f"{dataset.num_pixels} labels, draw {seed}, {name}")
            predicted, chosen = self.fit_and_predict(name, train, seed, number)
            row = {
                "label_count": dataset.num_pixels,  # all labels where the count is 0
                "until": self.until,
                "seed": seed,
                "model": name,
                "checkpoint": number,
                **self.task.score(self.test[1], predicted),
                "chosen": None if chosen is None else float(chosen),
                "folds": None if chosen is None else unit,
            }
            with atomic_write(files[name]) as part:
                np.savez(part, row=json.dumps(row), predicted=predicted)
            bar.update()
        return {name: read_kept(file) for name, file in files.items()}

    def fit_and_predict(self, name, train, seed, number):
        """Predictions (N,) for the test pixels, and the setting that was chosen, or None."""
        (features, labels, groups), model = train, self.models[name]
        if model.features:
            x = stack_features(features, model.features, number)
            fitted, chosen = self.task.fit(model.method, x, labels, seed, groups)
            test_x = stack_features(self.test[0], model.features, number)
            return fitted.predict(test_x), chosen
        folder = self.output_dir / ".network"
        path, content = self.checkpoints[number]
        what = (self.config, len(labels), seed, folder)
        trained = train_network(self.task, name, path, content, *what)
        network = load_classifier(trained).to(self.runtime.device)
        dataset = open_split("test", trained, self.config)
        same_labels, predicted = self.task.predict(trained, network, dataset, self.runtime)
        assert np.array_equal(same_labels, self.test[1]), "the same test pixels for every model"
        return predicted, None


def open_kept(folder, config, checkpoints, train_set, test_set, maps):
    """The folder of what is done, emptied where that was made from other things than these."""
    keys = ("dataset_name", "test_dataset_name", "maps", "most_pixels", "draws", "until")
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


def find_season_models(models):
    """Of {name: Model}, those of features of the observations, which can be cut."""
    return {name: one for name, one in models.items() if {*one.features.split("+")} <= {*FEATURES}}


def score_season(comparison, days, count, train_set, test_set):
    """What is known by each of the days, with one count of labels: a dict for JSON.

    Every day has the same pixels: those with an observation up to the first of them. Rows are those
    of features of the observations; networks and maps of others have read the whole year.
    """
    config, contents = comparison.config, [content for _, content in comparison.checkpoints]
    models = find_season_models(comparison.models)
    result = {"days": days, "scores": [], "tests": []}
    bar = ProgressBar(total=len(days) * config["seeds"] * len(models), unit="model")
    for day in days:
        more = (config["draws"], comparison.runtime, day)
        extractors = build_extractors(contents, train_set.tiles, *more)
        test = read_split(test_set, extractors, known_by=days[0])
        cut = replace(
            comparison,
            task=type(comparison.task)(test[1], test_set),
            models=models,
            extractors=extractors,
            test=test,
            kept=comparison.kept / "season",
            until=day,
            known_by=days[0],
        )
        cut.kept.mkdir(exist_ok=True)
        rows, tests = cut.score_count(count, train_set.num_pixels, bar)
        result["scores"] += rows
        result["tests"] += tests
    bar.close()
    left_out = test_set.num_pixels - len(test[1])
    about = {"test_pixels": len(test[1]), "left_out": left_out, "note": cut.task.write_note()}
    return result | about
