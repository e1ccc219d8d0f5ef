"""Fine-tune an encoder for land cover, or train the same network from scratch.

    python train_classification.py checkpoint_path=checkpoints/simulated/best.pt
    python train_classification.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 freeze_backbone=true label_count=100
    python train_classification.py backbone=transformer   # from scratch, for comparison
    torchrun --nproc-per-node=2 train_classification.py ...

Labels come from labels.npy, splits from splits.npy or from blocks. With a pretrained encoder, the
head (linear or attention) starts from linear discriminant analysis of its representations; then
both are trained. best.pt is the start, or the epoch of the last third, with the best validation
macro-F1. With label_count no other labels are used, so best.pt is a mean of the weights at the
start and at the end. The test split is scored once, at the end. Started again with the same
output_dir, the run resumes from last.pt as if it had never stopped.
"""

import math
import time

from running.checkpoints import Run, find_last, inherit, load_checkpoint, one_run_at_a_time
from running.config import check
from running.device import start_runtime
from running.distributed import gather
from running.errors import InputError, notice
from running.files import file_hash, make_output_dir
from running.log import ProgressBar
from running.script import run_script, stop_on_signals

import numpy as np
import torch

from backbones import (
    BACKBONE_KEYS,
    BACKBONES,
    HEADS,
    Classifier,
    backbone_arguments,
    build_backbone,
    focal_loss,
    load_backbone,
)
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from evaluation.networks import predict, read_linear_start
from evaluation.scores import plot_confusion, score_classes, write_report
from evaluation.seen_pixels import notice_seen_pixels, record_splits
from maps.land_cover import class_legend
from tiles import checkpoint_bands, find_days, notice_splits
from transforms import drop_dates
from utils import learning_rate

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; empty: train from scratch
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "skip_bad_tiles": False,  # leave out tiles that are out of contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "overwrite": False,  # remove an earlier run from output_dir that this one cannot resume
    "label_count": 0,  # labelled pixels of the training split, chosen at random; 0: all of them
    "date_share": 0.6,  # a step reads from this share to all of a pixel's clear dates; 1: all
    # model
    "head": "linear",  # linear, mlp (BatchNorm, dropout) or attention (pooling over the dates)
    "dropout": 0.1,  # in the head
    "freeze_backbone": False,  # train the head alone
    # ignored when checkpoint_path is given: taken from the checkpoint
    "backbone": "transformer",  # transformer, cnn or mlp
    "sample_size": 16,  # dates that a cnn or mlp reads; ignored for a transformer, see date_share
    "latent_dim": 128,  # dimensions of a representation
    "width": 64,  # of the backbone; a multiple of 16 for the transformer
    "depth": 2,  # layers of the backbone
    "day_cycles": 8,  # highest harmonic of the year in the day encoding; 0: the backbone's default
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a block of one split where a tile has no splits.npy
    "split_seed": 0,  # of these blocks
    # loss
    "loss": "cross_entropy",  # cross_entropy or focal
    "focal_gamma": 2.0,  # of the focal loss: how little pixels count that are easily right
    "class_weights": False,  # weigh classes by the inverse root of their frequency
    # optimiser: AdamW, warm-up and cosine over the run's length
    "batch_size": 32,  # pixels a step, over all processes
    "epochs": 0,  # 0: as 27 sqrt(labels) steps need, with a pretrained encoder at most 25
    "learning_rate": 1e-3,  # after the warm-up
    "weight_decay": 1e-3,  # on all weights
    "seed": 0,  # of the choice of labels, the weights and the order
    # running: resumed from last.pt, which is saved after every epoch
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}

WARMUP = 0.05  # share of all steps
STEPS = 27  # times the square root of the number of labels: 190 for 50 labels, 1200 for 2000
MAX_EPOCHS = 25  # with a pretrained encoder: 50 steps for 50 labels
INHERITED = ("backbone", *BACKBONE_KEYS, "min_valid", "block_size", "split_seed")
# what may differ when a run is resumed, since the weights do not depend on it
FREE_KEYS = {"output_dir", "overwrite", "device", "num_workers", "wandb_mode", "wandb_dir"}
FREE_KEYS |= {"base_path", "skip_bad_tiles", "checkpoint_path"}
OLD_KEYS = {"start_share": -1.0, "warmup_fraction": WARMUP}  # a run that had others cannot resume


def check_config(config):
    """The config, checked and frozen. Raises InputError for a value that cannot be trained with.

    For a backbone that reads series of any length, sample_size becomes 0: all dates are read.
    """
    if config["label_count"] == 1:
        raise InputError("label_count=1: wanted 0 (all) or 2 or more")
    if config["freeze_backbone"] and not config["checkpoint_path"]:
        raise InputError("freeze_backbone=true: wanted a checkpoint_path, or it stays at random")
    any_length = getattr(BACKBONES.get(config["backbone"]), "any_length", False)
    limits = {"head": HEADS, "backbone": BACKBONES, "loss": ("cross_entropy", "focal")}
    limits |= {"min_valid": (1, 65535), "sample_size": (1 - any_length, 1000)}
    config = check(config, **limits)
    return check({**config, "sample_size": 0}, **limits) if any_length else config


# ---- data ----------------------------------------------------------------------------------------


def open_split(config, split, **more):
    """Labelled pixels of a split; of the training split those that label_count and seed choose."""
    keys = ("base_path", "dataset_name", "batch_size", "min_valid", "block_size", "split_seed")
    keywords = {key: config[key] for key in (*keys, "skip_bad_tiles", "seed")}
    keywords["label_count"] = config["label_count"] if split == "train" else 0
    return SentinelTimeSeriesDatasetForDownstreaming(split=split, **keywords | more)


def open_splits(config, checkpoint, runtime):
    """Training, validation (None with label_count, as no other labels are used) and test pixels.

    Raises InputError where one is missing, or where a tile lacks a band of the checkpoint.
    """
    shared = {"process": (runtime.rank, runtime.world_size)}
    shared["bands"] = checkpoint_bands(checkpoint, config["checkpoint_path"])
    train = open_split(config, "train", sample_size=config["sample_size"], **shared)
    train.refuse_single_pixels()
    notice_splits(train.tiles)
    notice_seen_pixels(train, checkpoint, config["checkpoint_path"])
    shared["bands"] = train.bands
    validation = None if config["label_count"] else open_split(config, "validation", **shared)
    return train, validation, open_split(config, "test", **shared)


def find_legend(train):
    """{code: {"name", "color"}} of the classes in labelled tiles; InputError for fewer than 2."""
    codes = np.unique(np.concatenate([np.unique(tile.labels) for tile in train.tiles]))
    legend = class_legend(codes, train.classes)
    if len(legend) < 2:
        path = train.tiles[0].path / "labels.npy"
        raise InputError(f"{path}: found codes {list(legend)}, wanted two classes or more")
    if unseen := sorted(legend.keys() - set(np.unique(train.read_labels()).tolist())):
        names = ", ".join(f"{code} {legend[code]['name']}" for code in unseen)
        notice(
            f"{train.num_pixels} training labels: found none of class {names}, so no pixel will be "
            "predicted as such; wanted a larger label_count or another split"
        )
    return legend


# ---- model ---------------------------------------------------------------------------------------


def starts_from_probe(config):
    """Whether the head starts from a linear model; an MLP, or one without encoder, cannot."""
    return bool(config["checkpoint_path"]) and hasattr(HEADS[config["head"]], "start_from")


def build_classifier(config, checkpoint, num_bands, num_classes):
    """The network, and what a checkpoint needs to build it again."""
    torch.manual_seed(config["seed"])
    head = {key: config[key] for key in ("head", "dropout")} | {"num_classes": num_classes}
    if checkpoint:
        arguments, backbone = checkpoint["backbone"], load_backbone(checkpoint)
    else:
        sample_size = config["sample_size"] or run_config["sample_size"]
        arguments = backbone_arguments({**config, "sample_size": sample_size}, num_bands)
        backbone = build_backbone(**arguments)
    more = {"freeze_backbone": config["freeze_backbone"], "freeze_norm": starts_from_probe(config)}
    return Classifier(backbone, **head, **more), {"backbone": arguments, "head": head}


def start_head(classifier, config, train, legend, runtime):
    """Start the head from a linear model, which one process fits to all clear dates."""
    start = None
    if runtime.is_main:
        dataset = open_split(config, "train", batch_size=1024, bands=train.bands)
        codes, seed = list(legend), config["seed"]
        start = read_linear_start(classifier.backbone, dataset, codes, seed, runtime)
    classifier.head.start_from(*runtime.broadcast(start))


def build_optimiser(classifier, config):
    """AdamW on the head, and on the encoder where it is not frozen."""
    parts = (classifier.head, classifier.backbone)  # two groups: last.pt of older versions has them
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    return torch.optim.AdamW(groups, weight_decay=config["weight_decay"])


def class_weights(train, legend, runtime):
    """Inverse root of each class's share of the training labels, of mean 1 over them: (C,)."""
    count = torch.from_numpy(np.bincount(train.read_labels(), minlength=256)[list(legend)])
    (count,) = runtime.to_device(count.float())
    weight = count.clamp(min=1).rsqrt()
    return weight * count.sum() / (weight * count).sum()


# ---- loop ----------------------------------------------------------------------------------------


def training_step(run, model, x, doys, target, longest, weight):
    """The loss of a step, a tensor. x: (N, S, B); doys: (N, S); target: (N,) class numbers.

    longest: dates of the longest series; weight: (C,) of the classes, or None.
    """
    config, runtime = run.config, run.runtime
    seed = config["seed"] * 1_000_003 + run.progress.step  # what is random depends on it alone
    if run.model.any_length and config["date_share"] < 1:
        doys = drop_dates(doys, config["date_share"], seed, longest)
    torch.manual_seed(seed)  # of dropout
    x, doys, target = runtime.to_device(x, doys, target)
    with runtime.autocast(training=True):
        _, logits = model(x, doys, *((doys == 0,) if run.model.any_length else ()))
    gamma = config["focal_gamma"] if config["loss"] == "focal" else 0.0
    target = gather(target.float()).long()  # sums over processes are of floats
    loss = focal_loss(logits, target, gamma, weight)
    run.optimiser.zero_grad()
    loss.backward()
    run.optimiser.step()
    return loss.detach()


def count_epochs(config, train):
    """Epochs of the run; 0 where the head's start is all there is to learn."""
    if config["epochs"]:
        return config["epochs"]
    plain = config["head"] == "linear" and config["loss"] == "cross_entropy"
    if config["freeze_backbone"] and plain and not config["class_weights"]:
        return 0
    epochs = max(1, round(STEPS * math.sqrt(train.num_pixels) / train.steps_per_epoch))
    # few labels move an encoder away from its good start if it trains on them for long
    return min(MAX_EPOCHS, epochs) if starts_from_probe(config) else epochs


def fit(run, train, validation, legend):
    """The loop, from the run's step to the last one; raises Stopped after a signal."""
    config, runtime, progress = run.config, run.runtime, run.progress
    codes, epoch_steps = torch.tensor(list(legend)), train.steps_per_epoch
    weight = class_weights(train, legend, runtime) if config["class_weights"] else None
    epochs = count_epochs(config, train)
    total_steps = epochs * epoch_steps
    schedule = (total_steps, WARMUP * total_steps)
    train.set_steps(progress.step, total_steps)
    batches = iterate_batches(train, runtime.workers(config["num_workers"]), runtime)
    model, stop = runtime.distribute(run.model), stop_on_signals()
    bar = ProgressBar(total=epochs, unit="epoch", disable=not runtime.is_main)
    bar.update(progress.step // epoch_steps)
    if progress.step == 0 and starts_from_probe(config):
        end_epoch(run, 0, epochs, validation, legend, bar)
        run.save("last.pt")
    run.model.train()
    while progress.step < total_steps:
        x, doys, label, _ = next(batches)
        rate = learning_rate(config["learning_rate"], progress.step, *schedule)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        target = torch.searchsorted(codes, label.long())
        progress.losses.append(training_step(run, model, x, doys, target, train.longest, weight))
        progress.step += 1
        end_of_epoch = progress.step % epoch_steps == 0
        if end_of_epoch:
            end_epoch(run, progress.step // epoch_steps, epochs, validation, legend, bar)
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


def end_epoch(run, epoch, epochs, validation, legend, bar):
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
        scores = score_classes(*predict(run.model, validation, list(legend), run.runtime), legend)
        line |= {f"val_{key}": scores[key] for key in ("macro_f1", "overall_accuracy")}
    progress.line, progress.losses = line, []
    run.log.line(line)
    bar.update(epoch - bar.n)
    bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "step"))
    settled = epoch == 0 or epoch >= epochs * 2 // 3
    if validation and settled and line["val_macro_f1"] > progress.best_score:
        progress.best_score, progress.best_step = line["val_macro_f1"], progress.step
        run.save("best.pt")
        if run.runtime.is_main:
            title = f"{run.config['dataset_name']}, validation, epoch {epoch}"
            picture = run.output_dir / "confusion_matrix_validation.png"
            plot_confusion(np.array(scores["confusion_matrix"]), legend, picture, title)
            run.log.images({"confusion_matrix_validation": picture}, epoch)


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


def report_test(run, test, legend):
    """Score the best model on the test split, once. Returns the scores."""
    if run.runtime.is_main:
        print(f"test split: best.pt on {test.num_pixels} pixels, scored once")
    best = load_checkpoint(run.output_dir / "best.pt", ("classifier",))
    for name, module in run.model.named_children():
        module.load_state_dict(best[f"{name}_state"], strict=True)
    scores = score_classes(*predict(run.model, test, list(legend), run.runtime), legend)
    scores |= {"split": "test", "best_epoch": best["line"]["step"]}
    if "val_macro_f1" in best["line"]:
        scores["validation_macro_f1"] = best["best_score"]
    line = {f"test_{key}": scores[key] for key in ("overall_accuracy", "macro_f1", "weighted_f1")}
    run.log.line({"step": run.progress.line["step"] + 1, **line})
    if run.runtime.is_main:
        title = f"test split of {run.config['dataset_name']}, {test.num_pixels} pixels"
        write_report(scores, legend, run.output_dir, title, run.log)
        print(f"{run.output_dir / 'best.pt'}: of epoch {scores['best_epoch']}")
    return scores


# ---- run -----------------------------------------------------------------------------------------


def main(config):
    """Fine-tune. Returns the test scores (`score_classes`), as in metrics.json."""
    config, checkpoint = inherit(config, INHERITED)
    config = check_config(config)
    if checkpoint and checkpoint["kind"] == "classifier" and config["label_count"]:
        notice(
            f"{config['checkpoint_path']}: found a classifier, whose encoder has learned from "
            "labels that label_count does not count; wanted train.py's best.pt for honest scores"
        )

    # process, data and classes
    runtime = start_runtime(config["device"], config["precision"])
    splits = open_splits(config, checkpoint, runtime)
    legend = find_legend(splits[0])

    # folder; after the checks, so that a mistake leaves none behind
    output_dir = make_output_dir(
        config["output_dir"] or runtime.broadcast(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    with one_run_at_a_time(output_dir, runtime):
        return fine_tune(config, checkpoint, splits, legend, output_dir, runtime)


def make_header(config, checkpoint, arguments, splits, legend):
    """What every checkpoint of the run has beside its weights."""
    train, classes = splits[0], {str(code): entry for code, entry in legend.items()}
    names = ("training", "validation", "test")
    data = {name: split.describe() for name, split in zip(names, splits, strict=True) if split}
    data |= {"classes": classes, "observations": train.fingerprint()}
    # whatever the file is called: what is in it counts
    data["checkpoint_sha256"] = file_hash(config["checkpoint_path"]) if checkpoint else None
    return {
        "config": dict(config),
        **arguments,
        "bands": train.band_names,
        "mean": train.mean,
        "std": train.std,
        "days": find_days(train.tiles),
        "classes": classes,
        "splits": record_splits(train, checkpoint),
        "data": data,
    }


def fine_tune(config, checkpoint, splits, legend, output_dir, runtime):
    """Train from the start or from last.pt, and score. Returns the test scores."""
    # model and optimiser
    train, validation, test = splits
    classifier, arguments = build_classifier(config, checkpoint, train.num_bands, len(legend))
    classifier.to(runtime.device)
    optimiser = build_optimiser(classifier, config)
    header = make_header(config, checkpoint, arguments, splits, legend)

    # the run, from the head's start or from where an earlier run stopped
    old = OLD_KEYS | {"backbone_learning_rate": config["learning_rate"]}
    keys, defaults, data = {**config, **old}, run_config | old, header["data"]
    last = find_last(output_dir, "classifier", keys, data, defaults, FREE_KEYS, runtime)
    averages = config["label_count"] > 0 and starts_from_probe(config)
    if averages or (last is None and starts_from_probe(config)):
        start_head(classifier, config, train, legend, runtime)
    start = [parameter.detach().clone() for parameter in classifier.parameters()]
    run = Run("classifier", config, runtime, output_dir, classifier, optimiser, header)
    run.start(last)
    if runtime.is_main:
        print(
            f"{config['dataset_name']}: {train.num_pixels} training, "
            f"{validation.num_pixels if validation else 'no'} validation, {test.num_pixels} test "
            f"pixels of {len(legend)} classes"
        )

    # loop, and the test split, once
    fit(run, train, validation, legend)
    if averages:
        average_with_start(run, start, train)
    if runtime.is_main:
        print("saving best.pt")
    if not validation:
        run.save("best.pt")
    elif runtime.is_main:
        run.keep_a_best()
    runtime.barrier()  # best.pt is written
    scores = report_test(run, test, legend)
    run.log.finish()
    return scores


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
