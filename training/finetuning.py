"""The loop of fine-tuning: the same whatever is learned, classes or a quantity.

A script gives its `Task`. With a pretrained encoder the head starts from a linear model of its
representations (LP-FT, Kumar et al. 2022, arXiv 2202.10054); then both are trained.

Shapes: N pixels, S dates, B bands, C outputs of the head.
"""

import math
import time
from abc import ABC, abstractmethod
from functools import partial

from running.checkpoints import Run, find_last, inherit, one_run_at_a_time
from running.config import check, find_season
from running.device import start_runtime
from running.distributed import gather
from running.errors import InputError, notice
from running.files import file_hash, make_output_dir
from running.log import ProgressBar
from running.script import stop_on_signals

import numpy as np
import torch

from backbones import (
    BACKBONE_KEYS,
    BACKBONES,
    HEADS,
    Classifier,
    backbone_arguments,
    build_backbone,
    load_backbone,
)
from data import iterate_batches
from evaluation.networks import read_representations
from evaluation.seen_pixels import notice_seen_pixels, record_splits
from tiles import checkpoint_bands, find_days, notice_splits, open_dataset
from trained.card import write_card
from training.mapping import map_tiles
from training.report import complete_best, report_test, save_best
from transforms import drop_dates
from utils import learning_rate, notice_few_clear

WARMUP = 0.05  # share of all steps
STEPS = 27  # times the square root of the number of labels: 190 for 50 labels, 1200 for 2000
MAX_EPOCHS = 25  # with a pretrained encoder: 50 steps for 50 labels
INHERITED = ("backbone", *BACKBONE_KEYS, "block_size", "split_seed")
MIN_VALID = 10  # clear observations, without an encoder whose training had another number
# what may differ when a run is resumed, since the weights do not depend on it
FREE_KEYS = {"output_dir", "overwrite", "device", "num_workers", "wandb_mode", "wandb_dir"}
FREE_KEYS |= {"base_path", "skip_bad_tiles", "checkpoint_path", "map_dataset_name"}
OLD_KEYS = {"start_share": -1.0, "warmup_fraction": WARMUP}  # a run that had others cannot resume


class Task(ABC):
    """What is learned, and how it is scored: all in which two scripts of fine-tuning differ.

    Of the class: kind, of its checkpoints; dataset, the class of its pixels; losses, the names that
    the key loss may have; criterion, the score of the validation split that chooses best.pt, and
    sign, -1 where a lower one is better; logged and reported, the scores of the validation and of
    the test split that the log gets; picture, the name of the report's, and what it shows; map,
    the name of infer.py's.
    Of an object: size, C; header, what its checkpoints hold of it, for JSON, too; about, words for
    what its pixels have. Made of the config, the training pixels and the runtime; raises InputError
    for pixels that nothing can be learned from.
    """

    kind, dataset, losses, criterion, sign = "", None, (), "", 1
    logged, reported, picture, shows, map = (), (), "", "", ""

    @abstractmethod
    def has_exact_start(self):
        """Whether a frozen encoder's linear head starts at the minimum of the loss."""

    @abstractmethod
    def fit_start(self, y, labels, groups):
        """What a head's `start_from` takes, of representations (N, D), labels and blocks (N,)."""

    @abstractmethod
    def encode(self, labels):
        """Labels (N,) of a batch as `loss` takes them."""

    @abstractmethod
    def loss(self, outputs, target):
        """The loss of outputs (N, C) and target (N,) float32, of `encode`; a scalar tensor."""

    @abstractmethod
    def predict(self, network, dataset, runtime):
        """What `score` takes, of a data set: arrays (N,)."""

    @abstractmethod
    def score(self, *predicted):
        """All scores of what is predicted, as plain numbers for JSON."""

    @abstractmethod
    def plot(self, scores, predicted, path, title):
        """Plot the scores, or what is predicted, to a PNG."""

    @abstractmethod
    def print_scores(self, scores):
        """Print all scores, and warnings."""

    def calibrate(self, predicted, y, labels, groups):
        """What best.pt gets for its confidence; {} where there is none.

        predicted: of `predict` on the validation split, or None; the others as `fit_start` has
        them, of best.pt.
        """
        return {}

    def score_test(self, predicted, best):
        """More scores of the test split, as plain numbers for JSON; best: content of best.pt."""
        return {}


def check_config(config, losses):
    """The config, checked and frozen. Raises InputError for a value that cannot be trained with.

    For a backbone that reads series of any length, sample_size becomes 0: all dates are read.
    """
    if config["label_count"] == 1:
        raise InputError("label_count=1: wanted 0 (all) or 2 or more")
    if config["freeze_backbone"] and not config["checkpoint_path"]:
        raise InputError("freeze_backbone=true: wanted a checkpoint_path, or it stays at random")
    any_length = getattr(BACKBONES.get(config["backbone"]), "any_length", False)
    limits = {"head": HEADS, "backbone": BACKBONES, "loss": losses}
    limits |= {"min_valid": (1, 65535), "sample_size": (1 - any_length, 1000)}
    config = check(config, **limits)
    return check({**config, "sample_size": 0}, **limits) if any_length else config


# ---- data ----------------------------------------------------------------------------------------


def open_split(dataset, config, split, **more):
    """Pixels of a split (dataset: their class); label_count and seed choose those of training."""
    keys = ("base_path", "dataset_name", "batch_size", "min_valid", "block_size", "split_seed")
    keywords = {key: config[key] for key in (*keys, "skip_bad_tiles", "seed")}
    keywords["season"] = find_season(config)
    keywords["label_count"] = config["label_count"] if split == "train" else 0
    return dataset(split=split, **keywords | more)


def open_splits(dataset, config, checkpoint, runtime):
    """Training, validation (None with label_count, as no other labels are used) and test pixels.

    Raises InputError where one is missing, or where a tile lacks a band of the checkpoint.
    """
    shared = {"process": (runtime.rank, runtime.world_size)}
    shared["bands"] = checkpoint_bands(checkpoint, config["checkpoint_path"])
    train = open_split(dataset, config, "train", sample_size=config["sample_size"], **shared)
    train.refuse_single_pixels()
    notice_splits(train.tiles)
    notice_few_clear(train.tiles, config["min_valid"])
    notice_seen_pixels(train, checkpoint, config["checkpoint_path"])
    shared["bands"] = train.bands
    few = config["label_count"]
    validation = None if few else open_split(dataset, config, "validation", **shared)
    return train, validation, open_split(dataset, config, "test", **shared)


def open_labels(config, train):
    """All training pixels with all of their clear dates, for one process."""
    return open_split(type(train), config, "train", batch_size=1024, bands=train.bands)


# ---- model ---------------------------------------------------------------------------------------


def starts_from_probe(config):
    """Whether the head starts from a linear model; an MLP, or one without encoder, cannot."""
    return bool(config["checkpoint_path"]) and hasattr(HEADS[config["head"]], "start_from")


def build_network(config, checkpoint, num_bands, size, sample_size):
    """The network, and what a checkpoint needs to build it again.

    size: outputs of the head; sample_size: of a new backbone, where the config has none.
    """
    torch.manual_seed(config["seed"])
    head = {key: config[key] for key in ("head", "dropout")} | {"num_classes": size}
    if checkpoint:
        arguments, backbone = checkpoint["backbone"], load_backbone(checkpoint)
    else:
        sample_size = config["sample_size"] or sample_size
        arguments = backbone_arguments({**config, "sample_size": sample_size}, num_bands)
        backbone = build_backbone(**arguments)
    more = {"freeze_backbone": config["freeze_backbone"], "freeze_norm": starts_from_probe(config)}
    return Classifier(backbone, **head, **more), {"backbone": arguments, "head": head}


def start_head(network, config, train, task, runtime):
    """Start the head from a linear model, which one process fits to all clear dates."""
    start = None
    if runtime.is_main:
        dataset = open_labels(config, train)
        start = task.fit_start(*read_representations(network.backbone, dataset, runtime))
    network.head.start_from(*runtime.broadcast(start))


def build_optimiser(network, config):
    """AdamW on the head, and on the encoder where it is not frozen."""
    parts = (network.head, network.backbone)  # two groups: last.pt of older versions has them
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    return torch.optim.AdamW(groups, weight_decay=config["weight_decay"])


# ---- loop ----------------------------------------------------------------------------------------


def training_step(run, model, x, doys, target, longest, task):
    """The loss of a step, a tensor. x: (N, S, B); doys: (N, S); target: (N,) of `Task.encode`.

    longest: dates of the longest series.
    """
    config, runtime = run.config, run.runtime
    seed = config["seed"] * 1_000_003 + run.progress.step  # what is random depends on it alone
    if run.model.any_length and config["date_share"] < 1:
        doys = drop_dates(doys, config["date_share"], seed, longest)
    torch.manual_seed(seed)  # of dropout
    x, doys, target = runtime.to_device(x, doys, target)
    with runtime.autocast(training=True):
        _, outputs = model(x, doys, *((doys == 0,) if run.model.any_length else ()))
    loss = task.loss(outputs, gather(target.float()))  # sums over processes are of floats
    run.optimiser.zero_grad()
    loss.backward()
    run.optimiser.step()
    return loss.detach()


def count_epochs(config, train, task):
    """Epochs of the run; 0 where the head's start is all there is to learn."""
    if config["epochs"]:
        return config["epochs"]
    if config["freeze_backbone"] and config["head"] == "linear" and task.has_exact_start():
        return 0
    epochs = max(1, round(STEPS * math.sqrt(train.num_pixels) / train.steps_per_epoch))
    # few labels move an encoder away from its good start if it trains on them for long
    return min(MAX_EPOCHS, epochs) if starts_from_probe(config) else epochs


def fit(run, train, validation, task):
    """The loop, from the run's step to the last one; raises Stopped after a signal."""
    config, runtime, progress = run.config, run.runtime, run.progress
    epoch_steps, epochs = train.steps_per_epoch, count_epochs(config, train, task)
    total_steps = epochs * epoch_steps
    schedule = (total_steps, WARMUP * total_steps)
    train.set_steps(progress.step, total_steps)
    run.log.wait()  # no thread may be at work where loader processes are forked
    batches = iterate_batches(train, runtime.workers(config["num_workers"]), runtime)
    model, stop = runtime.distribute(run.model), stop_on_signals()
    bar = ProgressBar(total=epochs, unit="epoch", disable=not runtime.is_main)
    bar.update(progress.step // epoch_steps)
    if progress.step == 0 and starts_from_probe(config):
        end_epoch(run, 0, epochs, validation, task, bar)
        run.save("last.pt")
    run.model.train()
    while progress.step < total_steps:
        x, doys, label, _ = next(batches)
        rate = learning_rate(config["learning_rate"], progress.step, *schedule)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        target = task.encode(label)
        progress.losses.append(training_step(run, model, x, doys, target, train.longest, task))
        progress.step += 1
        end_of_epoch = progress.step % epoch_steps == 0
        if end_of_epoch:
            end_epoch(run, progress.step // epoch_steps, epochs, validation, task, bar)
        # several processes ask each other now and then: an epoch may take hours
        ask_now = end_of_epoch or progress.step % 10 == 0
        stopped = runtime.max_over_processes(stop.status, now=ask_now)
        if end_of_epoch or stopped:
            progress.losses = [float(loss) for loss in progress.losses]
            run.save("last.pt")
        if stopped:
            bar.close()
            raise run.stopped(stopped)
    bar.close()
    stop.release()


def end_epoch(run, epoch, epochs, validation, task, bar):
    """Log the epoch; validate where there is a split for it, and keep the model if it is best.

    The start and the epochs of the last third, where the rates have fallen, can be the best: an
    earlier one may have the highest score by chance.
    """
    progress, line = run.progress, {"step": epoch}
    if progress.losses:  # none at the start
        # of a resumed run, some are numbers and the others are on the GPU
        line["loss"] = float(np.mean([float(loss) for loss in progress.losses]))
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(f"loss {line['loss']} in epoch {epoch}; best.pt stays")
    if validation:
        predicted = task.predict(run.model, validation, run.runtime)
        scores = task.score(*predicted)
        line |= {f"val_{key}": scores[key] for key in task.logged}
    progress.line, progress.losses = line, []
    run.log.line(line)
    bar.update(epoch - bar.n)
    bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "step"))
    settled = epoch == 0 or epoch >= epochs * 2 // 3
    if validation and settled and task.sign * scores[task.criterion] > progress.best_score:
        progress.best_score, progress.best_step = task.sign * scores[task.criterion], progress.step
        run.save("best.pt")
        if run.runtime.is_main:
            title = f"{run.config['dataset_name']}, validation, epoch {epoch}"
            name = f"{task.picture}_validation"
            task.plot(scores, predicted, run.output_dir / f"{name}.png", title)
            run.log.images({name: run.output_dir / f"{name}.png"}, epoch)


@torch.no_grad()
def average_with_start(run, start, train):
    """Move the trained weights towards those at the start: half way, less for over 100 labels.

    A few labels teach much about themselves: a mean of both networks is better than either
    (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). start: parameters of the network, tensors.
    """
    share_of_start = min(0.5, 5 / math.sqrt(train.num_pixels))
    for trained, first in zip(run.model.parameters(), start, strict=True):
        trained.lerp_(first, share_of_start)
    if run.runtime.is_main:
        print(
            f"best.pt is a weighted mean of two networks: {share_of_start:.0%} the one before "
            f"training, {1 - share_of_start:.0%} the trained one"
        )


# ---- run -----------------------------------------------------------------------------------------


def fine_tune(task_class, config, defaults):
    """Fine-tune for a `Task`. Returns the scores of the test split, as in metrics.json.

    defaults: the run_config of the script.
    """
    inherited = INHERITED if config["min_valid"] else (*INHERITED, "min_valid")
    config = {**config, "min_valid": config["min_valid"] or MIN_VALID}
    config, checkpoint = inherit(config, inherited)
    config = check_config(config, task_class.losses)
    if checkpoint and checkpoint["kind"] != "pretrained" and config["label_count"]:
        notice(
            f"{config['checkpoint_path']}: found a {checkpoint['kind']}, whose encoder has learned "
            "from labels that label_count does not count; wanted train.py's best.pt for honest "
            "scores"
        )

    # process, data and what is learned
    runtime = start_runtime(config["device"], config["precision"])
    splits = open_splits(task_class.dataset, config, checkpoint, runtime)
    task = task_class(config, splits[0], runtime)
    data = config["base_path"], config["map_dataset_name"], config["skip_bad_tiles"]
    to_map = open_dataset(*data, splits[0].bands) if config["map_dataset_name"] else []

    # folder; after the checks, so that a mistake leaves none behind
    output_dir = make_output_dir(
        config["output_dir"] or runtime.broadcast(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    with one_run_at_a_time(output_dir, runtime):
        scores = train_and_score(config, defaults, checkpoint, splits, task, output_dir, runtime)
    if to_map and runtime.is_main:
        map_tiles(to_map, config, task.map, output_dir)
    return scores


def make_header(config, checkpoint, arguments, splits, task):
    """What every checkpoint of the run has beside its weights."""
    train, names = splits[0], ("training", "validation", "test")
    data = {name: split.describe() for name, split in zip(names, splits, strict=True) if split}
    data |= {**task.header, "observations": train.fingerprint()}
    # whatever the file is called: what is in it counts
    data["checkpoint_sha256"] = file_hash(config["checkpoint_path"]) if checkpoint else None
    return {
        "config": dict(config),
        **arguments,
        "bands": train.band_names,
        "mean": train.mean,
        "std": train.std,
        "days": find_days(train.tiles),
        **task.header,
        "splits": record_splits(train, checkpoint),
        "data": data,
    }


def train_and_score(config, defaults, checkpoint, splits, task, output_dir, runtime):
    """Train from the start or from last.pt, and score. Returns the test scores."""
    # model and optimiser
    train, validation, test = splits
    sizes = (train.num_bands, task.size, defaults["sample_size"])
    network, arguments = build_network(config, checkpoint, *sizes)
    optimiser = build_optimiser(network.to(runtime.device), config)
    header = make_header(config, checkpoint, arguments, splits, task)

    # the run, from the head's start or from where an earlier run stopped
    old = OLD_KEYS | {"backbone_learning_rate": config["learning_rate"]}
    keys, before = {**config, **old}, defaults | old
    last = find_last(output_dir, task.kind, keys, header["data"], before, FREE_KEYS, runtime)
    averages = config["label_count"] > 0 and starts_from_probe(config)
    if averages or (last is None and starts_from_probe(config)):
        start_head(network, config, train, task, runtime)
    start = [parameter.detach().clone() for parameter in network.parameters()]
    run = Run(task.kind, config, runtime, output_dir, network, optimiser, header)
    run.start(last)
    if runtime.is_main:
        print(
            f"{config['dataset_name']}: {train.num_pixels} training, "
            f"{validation.num_pixels if validation else 'no'} validation, {test.num_pixels} test "
            f"pixels {task.about}"
        )

    # loop, and the test split, once
    fit(run, train, validation, task)
    if averages:
        average_with_start(run, start, train)
    save_best(run, last, validation)
    read_labels = partial(open_labels, config, train)
    best = complete_best(run, validation, read_labels, task)
    scores = report_test(run, best, test, task)
    if runtime.is_main:
        write_card(run, defaults, splits, scores)
    run.log.finish()
    return scores
