"""Fine-tune an encoder for land cover, or train the same network from scratch.

    python train_classification.py checkpoint_path=checkpoints/simulated/best.pt
    python train_classification.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 freeze_backbone=true label_count=100
    python train_classification.py backbone=transformer   # from scratch, for comparison
    torchrun --nproc-per-node=2 train_classification.py ...

Labels come from labels.npy, splits from splits.npy or from blocks. An encoder's head (linear or
attention) starts from linear discriminant analysis of its representations, then both are trained.
With label_count, nothing is learned from other labels, and a mean of the weights at the start and
at the end counts; else the start or the epoch of the last third with the best validation macro-F1.
The test split is scored once, at the end. Started again with the same output_dir it goes on from
last.pt as if it had never stopped.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from backbones import (
    BACKBONES,
    HEADS,
    Classifier,
    backbone_arguments,
    build_backbone,
    focal_loss,
    load_backbone,
)
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from evaluation.classifiers import fit_linear_start, read_representations
from evaluation.scores import score_classes, write_report
from maps.land_cover import class_legend, merge_classes
from running.checkpoints import (
    Run,
    inherit,
    load_checkpoint,
    one_run_at_a_time,
    read_last,
    remove_run,
)
from running.config import MAX_INT, check
from running.device import start_runtime
from running.distributed import BatchGenerator, gather, share
from running.errors import InputError, notice
from running.files import file_hash, make_output_dir
from running.script import run_script, stop_on_signals
from tiles import check_tile, notice_splits
from transforms import drop_dates
from utils import encode_series, learning_rate

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; empty: train from scratch
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "skip_bad_tiles": False,  # leave tiles out that are out of contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "overwrite": False,  # remove an earlier run from output_dir that this one cannot continue
    "label_count": 0,  # so many labelled pixels of the training split, at random; 0: all
    "sample_size": -1,  # dates drawn to train on; 0: all clear ones; -1: all clear ones where the
    # backbone can read them, or as many as it was pretrained with
    "date_share": 0.6,  # of all clear dates, the least share that a step reads of a pixel; 1: all
    # model
    "head": "linear",  # linear, mlp (BatchNorm, dropout) or attention (pooling over the dates)
    "dropout": 0.1,  # in the head
    "freeze_backbone": False,  # train the head alone
    # ignored when checkpoint_path is given: taken from the checkpoint
    "backbone": "transformer",  # transformer, cnn or mlp
    "latent_dim": 128,
    "width": 64,
    "depth": 2,
    "day_cycles": 8,
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a block of one split where a tile has no splits.npy
    "split_seed": 0,
    # loss
    "loss": "cross_entropy",  # cross_entropy or focal
    "focal_gamma": 2.0,
    "class_weights": False,  # weigh classes by the inverse root of their frequency
    # optimiser: AdamW, warm-up and cosine over the run's length
    "batch_size": 32,
    "epochs": 0,  # 0: as many as give 27 sqrt(labels) steps, at most 25 after an encoder's start
    "learning_rate": 1e-3,  # of the head
    "backbone_learning_rate": 1e-3,  # of the encoder where it is not frozen
    "weight_decay": 1e-3,
    "warmup_fraction": 0.05,
    "start_share": -1.0,  # of the weights at the start in the result, with label_count; -1: a half
    # for 100 labels or fewer, 5 / sqrt(labels) for more
    "seed": 0,  # of the labels, weights and order
    # running: resumed from last.pt, which is saved after every epoch
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

SAMPLE_SIZE = 16  # dates that a network from scratch draws where it cannot read all
STEPS = 27  # 190 steps for 50 labels, 1200 for 2000
MOST_EPOCHS = 25  # after an encoder's start: 50 steps for 50 labels
INHERITED = ("backbone", "latent_dim", "width", "depth", "day_cycles")
INHERITED += ("min_valid", "block_size", "split_seed")
# what may differ between a run and its continuation, since the weights do not depend on it
FREE_KEYS = {"output_dir", "overwrite", "device", "num_workers", "wandb_mode", "base_path"}
FREE_KEYS |= {"skip_bad_tiles", "checkpoint_path"}


def check_config(config):
    """The config, checked and frozen. Raises InputError for a value that cannot be trained with."""
    if config["label_count"] == 1:
        raise InputError("label_count=1: wanted 0 (all) or 2 or more")
    if config["freeze_backbone"] and not config["checkpoint_path"]:
        raise InputError("freeze_backbone=true: wanted a checkpoint_path, or it stays at random")
    config = check(
        config,
        head=HEADS,
        backbone=BACKBONES,
        loss=("cross_entropy", "focal"),
        sample_size=(-1, 1000),
        epochs=(0, MAX_INT),
    )
    averages = config["label_count"] and starts_from_probe(config)
    if config["start_share"] != -1 and not (averages and config["start_share"] >= 0):
        raise InputError(
            f"start_share={config['start_share']}: wanted -1, or 0 to 1 with label_count, "
            "checkpoint_path and a linear or attention head"
        )
    return config


def choose_sample_size(config, checkpoint):
    """Config with the number of dates to draw that sample_size=-1 leaves open."""
    if config["sample_size"] != -1:
        return config
    drawn = checkpoint["config"]["sample_size"] if checkpoint else SAMPLE_SIZE
    backbone = BACKBONES.get(config["backbone"])  # check_config tells of an unknown one
    return {**config, "sample_size": 0 if backbone and backbone.any_length else drawn}


# ---- data ----------------------------------------------------------------------------------------


def open_split(config, split, **more):
    """Labelled pixels of a split; of the training split those that label_count and seed draw."""
    keys = ("batch_size", "min_valid", "block_size", "split_seed", "skip_bad_tiles", "seed")
    keywords = {key: config[key] for key in keys} | more
    label_count = config["label_count"] if split == "train" else 0
    return SentinelTimeSeriesDatasetForDownstreaming(
        config["base_path"],
        config["dataset_name"],
        split=split,
        label_count=label_count,
        **keywords,
    )


def open_splits(config, checkpoint, runtime):
    """Training, validation (None with label_count, whose labels are all there is) and test pixels.

    Raises InputError where one is missing, or a band.
    """
    keywords = {"rank": runtime.rank, "world_size": runtime.world_size}
    statistics = {key: checkpoint[key] for key in ("mean", "std")} if checkpoint else {}
    train = open_split(config, "train", sample_size=config["sample_size"], **keywords, **statistics)
    for tile in train.tiles if checkpoint else ():
        check_tile(tile, checkpoint, config["checkpoint_path"])
    train.refuse_single_pixels()
    notice_splits(train.tiles)
    keywords |= {"mean": train.mean, "std": train.std}
    validation = None if config["label_count"] else open_split(config, "validation", **keywords)
    return train, validation, open_split(config, "test", **keywords)


def find_legend(tiles):
    """Names and colours of the classes in labelled tiles; InputError for fewer than 2."""
    codes = np.unique(np.concatenate([np.unique(tile.labels) for tile in tiles]))
    classes = merge_classes([(tile.path / "tile.json", tile.info) for tile in tiles])
    unnamed = [tile.name for tile in tiles if not tile.info.get("classes")]
    if classes and unnamed:
        notice(
            f"{len(unnamed)} of {len(tiles)} tiles (first {unnamed[0]}) have no classes in "
            "tile.json; their codes are taken to mean the same as in the others"
        )
    legend = class_legend(codes, classes)
    if len(legend) < 2:
        raise InputError(
            f"{tiles[0].path / 'labels.npy'}: found codes {list(legend)}, "
            "wanted two classes or more"
        )
    return legend


class ClassIndex:
    """Class codes of labels.npy to class numbers 0 .. C - 1, and back."""

    def __init__(self, legend):
        self.codes = torch.tensor(list(legend))
        self.numbers = torch.full((256,), -1)
        self.numbers[self.codes] = torch.arange(len(self.codes))

    def __call__(self, codes):
        return self.numbers[codes.long()]


# ---- model ---------------------------------------------------------------------------------------


def starts_from_probe(config):
    """Whether the head starts from a linear model; an MLP, or one without encoder, cannot."""
    return bool(config["checkpoint_path"]) and hasattr(HEADS[config["head"]], "start_from")


def start_head(classifier, config, train, class_index, runtime):
    """Start the head from a linear model, fitted by one process, on all clear dates."""
    start = None
    if runtime.is_main:
        statistics = {"mean": train.mean, "std": train.std}
        batches = iterate_batches(open_split(config, "train", batch_size=1024, **statistics))
        y, codes = read_representations(classifier.backbone, batches, runtime)
        classes = class_index(torch.from_numpy(codes)).numpy()
        start = fit_linear_start(y, classes, len(class_index.codes), config["seed"])
    classifier.head.start_from(*runtime.broadcast(start))


def build_classifier(config, checkpoint, num_bands, num_classes):
    """The network, and what a checkpoint needs to build it again."""
    torch.manual_seed(config["seed"])
    head = {key: config[key] for key in ("head", "dropout")} | {"num_classes": num_classes}
    if checkpoint:
        arguments, backbone = checkpoint["backbone"], load_backbone(checkpoint)
    else:
        sample_size = config["sample_size"] or SAMPLE_SIZE
        arguments = backbone_arguments({**config, "sample_size": sample_size}, num_bands)
        backbone = build_backbone(**arguments)
    classifier = Classifier(
        backbone,
        **head,
        freeze_backbone=config["freeze_backbone"],
        freeze_norm=starts_from_probe(config),
    )
    if not backbone.any_length and config["sample_size"] != backbone.sample_size:
        raise InputError(
            f"sample_size={config['sample_size']}: wanted {backbone.sample_size}, the dates that "
            f"this {arguments['name']} takes"
        )
    return classifier, {"backbone": arguments, "head": head}


def build_optimiser(classifier, config):
    """AdamW with a peak rate of its own for the head and for an encoder that is not frozen."""
    return torch.optim.AdamW(
        [
            {"params": classifier.head.parameters(), "peak": config["learning_rate"]},
            {
                "params": [p for p in classifier.backbone.parameters() if p.requires_grad],
                "peak": config["backbone_learning_rate"],
            },
        ],
        weight_decay=config["weight_decay"],
    )


def class_weights(train, class_index, runtime):
    """Inverse root of each class's share of the training labels, of mean 1 over them: (C,)."""
    count = torch.zeros(len(class_index.codes))
    for _, _, label, _ in iterate_batches(train):
        count += torch.bincount(class_index(label), minlength=len(count))
    (count,) = runtime.to_device(count)
    count = gather(count[None]).sum(0)
    weight = count.clamp(min=1).rsqrt()
    return weight * count.sum() / (weight * count).sum()


def predict(classifier, dataset, class_index, runtime):
    """Labels and predicted class codes of a split, (N,) each, from all clear observations."""
    classifier.eval()
    labels, predicted = [], []
    batches = tqdm(
        iterate_batches(dataset, runtime=runtime),
        desc=dataset.split,
        total=dataset.steps_per_epoch,
        unit="batch",
        leave=False,
        disable=not runtime.is_main,
    )
    for x, doys, label, _ in batches:
        _, logits = encode_series(classifier, x, doys, runtime)
        labels.append(label.long())
        predicted.append(class_index.codes[logits.argmax(1)])
    classifier.train()
    codes = torch.stack([torch.cat(labels), torch.cat(predicted)], 1)
    (codes,) = runtime.to_device(codes.float())
    return gather(codes).long().cpu().numpy().T


# ---- loop ----------------------------------------------------------------------------------------


def sample_subsets(run, doys, longest):
    """Days (N, S) of random subsets of a batch's dates, 0 for those left out; by step alone.

    longest: S of the longest series of all, for which every process draws the same numbers.
    """
    config = run.config
    if config["sample_size"] or config["date_share"] == 1:
        return doys
    seed = config["seed"] * 1_000_003 + run.progress.step
    generator = BatchGenerator(*share(len(doys)), seed, doys.device)
    random = generator.uniform(1 + longest)[:, : 1 + doys.shape[1]]
    return drop_dates(doys, random, config["date_share"])


def training_step(run, model, batch, target, weight):
    """The loss of a step, a tensor. batch: x (N, S, B) and doys (N, S); target: (N,) classes."""
    config, runtime = run.config, run.runtime
    torch.manual_seed(config["seed"] * 1_000_003 + run.progress.step)  # dropout, by step alone
    x, doys, target = runtime.to_device(*batch, target)
    padding = (doys == 0,) if run.model.any_length and not config["sample_size"] else ()
    with runtime.autocast(training=True):
        _, logits = model(x, doys, *padding)
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
    # a few labels move an encoder away from its good start if it trains on them for long
    return min(MOST_EPOCHS, epochs) if starts_from_probe(config) else epochs


def fit(run, train, validation, legend):
    """The loop, from the run's step to the last one; raises Stopped after a signal."""
    config, runtime, progress = run.config, run.runtime, run.progress
    class_index, epoch_steps = ClassIndex(legend), train.steps_per_epoch
    weight = class_weights(train, class_index, runtime) if config["class_weights"] else None
    epochs = count_epochs(config, train)
    total_steps = epochs * epoch_steps
    train.set_steps(progress.step, total_steps)
    batches = iterate_batches(train, runtime.workers(config["num_workers"]), runtime)
    model, stop = runtime.distribute(run.model), stop_on_signals()
    bar = tqdm(total=epochs, unit="epoch", disable=not runtime.is_main)
    bar.update(progress.step // epoch_steps)
    if progress.step == 0 and starts_from_probe(config):
        end_epoch(run, 0, epochs, validation, legend, bar)
        run.save("last.pt")
    run.model.train()
    while progress.step < total_steps:
        x, doys, label, _ = next(batches)
        doys = sample_subsets(run, doys, train.longest)
        for group in run.optimiser.param_groups:
            warmup_steps = config["warmup_fraction"] * total_steps
            group["lr"] = learning_rate(group["peak"], progress.step, total_steps, warmup_steps)
        loss = training_step(run, model, (x, doys), class_index(label), weight)
        progress.losses.append(loss)
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
        # of a run that was continued, some are numbers and the rest lies on the GPU
        line["loss"] = float(np.mean([float(loss) for loss in progress.losses]))
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"loss {line['loss']} in epoch {line['step']}; the best checkpoint stays"
            )
    if validation:
        predicted = predict(run.model, validation, ClassIndex(legend), run.runtime)
        scores = score_classes(*predicted, legend)
        line |= {f"val_{key}": scores[key] for key in ("macro_f1", "overall_accuracy")}
    progress.line, progress.losses = line, []
    run.log.line(line)
    bar.update(line["step"] - bar.n)
    bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "step"))
    settled = epoch == 0 or epoch >= epochs * 2 // 3
    if validation and settled and line["val_macro_f1"] > progress.best_score:
        progress.best_score, progress.best_step = line["val_macro_f1"], progress.step
        run.save("best.pt")


@torch.no_grad()
def average_with_start(run, checkpoint, train, legend):
    """Draw the trained weights towards those at the start, by start_share.

    A few labels teach much about themselves: a mean of both networks is better than either
    (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). The start is computed anew, as the run did.
    """
    config, share_of_start = run.config, run.config["start_share"]
    if share_of_start < 0:
        share_of_start = min(0.5, 5 / math.sqrt(train.num_pixels))
    if starts_from_probe(config) and share_of_start:
        start, _ = build_classifier(config, checkpoint, train.num_bands, len(legend))
        start.to(run.runtime.device)
        start_head(start, config, train, ClassIndex(legend), run.runtime)
        for trained, first in zip(run.model.parameters(), start.parameters(), strict=True):
            trained.lerp_(first, share_of_start)
        if run.runtime.is_main:
            print(f"{share_of_start:.0%} of the weights at the start, the rest as trained")


def report_test(run, test, legend):
    """Score the best model on the test split, once. Returns the scores."""
    best = load_checkpoint(run.output_dir / "best.pt", ("classifier",))
    for name, module in run.model.named_children():
        module.load_state_dict(best[f"{name}_state"], strict=True)
    labels, predicted = predict(run.model, test, ClassIndex(legend), run.runtime)
    scores = score_classes(labels, predicted, legend)
    scores |= {"split": "test", "best_epoch": best["line"]["step"]}
    if "val_macro_f1" in best["line"]:
        scores["validation_macro_f1"] = best["best_score"]
    names = ("overall_accuracy", "macro_f1", "weighted_f1")
    step = run.progress.line["step"] + 1
    run.log.line({"step": step, **{f"test_{name}": scores[name] for name in names}})
    if run.runtime.is_main:
        title = f"{run.config['dataset_name']}, test"
        write_report(scores, legend, run.output_dir, title, run.log)
        print(f"{run.output_dir / 'best.pt'}: of epoch {scores['best_epoch']}")
    return scores


def read_or_remove_last(output_dir, config, data, runtime):
    """The content of last.pt, or None where a run has to start; removes a run of overwrite=true."""
    mend = "another output_dir or overwrite=true"
    try:
        return read_last(output_dir, "classifier", config, data, run_config, FREE_KEYS, mend)
    except InputError:
        if not config["overwrite"]:
            raise
    runtime.barrier()  # all processes have looked
    if runtime.is_main:
        remove_run(output_dir, "classifier")
    runtime.barrier()
    return None


def main(config):
    """Fine-tune. Returns the test scores (`score_classes`), as in metrics.json."""
    config, checkpoint = inherit(config, INHERITED)
    config = check_config(choose_sample_size(config, checkpoint))
    if checkpoint and checkpoint["kind"] == "classifier" and config["label_count"]:
        notice(
            f"{config['checkpoint_path']}: found a classifier, whose encoder has learned from "
            "labels that label_count does not count"
        )

    # process, data and classes
    runtime = start_runtime(config["device"], config["precision"])
    splits = open_splits(config, checkpoint, runtime)
    legend = find_legend(splits[0].tiles)

    # folder, which a mistake above does not leave behind
    output_dir = make_output_dir(
        config["output_dir"] or runtime.broadcast(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    own = checkpoint and output_dir.samefile(Path(config["checkpoint_path"]).parent)
    if own and config["overwrite"] and checkpoint["kind"] == "classifier":
        raise InputError(
            f"output_dir={output_dir}: holds checkpoint_path, which overwrite=true would remove; "
            "wanted another output_dir"
        )
    with one_run_at_a_time(output_dir, runtime):
        return fine_tune(config, checkpoint, splits, legend, output_dir, runtime)


def make_header(config, checkpoint, arguments, splits, legend):
    """What every checkpoint of the run carries beside its weights."""
    train, classes = splits[0], {str(code): entry for code, entry in legend.items()}
    header = {
        "config": dict(config),
        **arguments,
        "bands": train.band_names or (checkpoint["bands"] if checkpoint else []),
        "mean": train.mean,
        "std": train.std,
        "classes": classes,
        "data": {
            name: dataset.describe()
            for name, dataset in zip(("training", "validation", "test"), splits, strict=True)
            if dataset
        },
    }
    header["data"]["classes"] = classes
    path = config["checkpoint_path"]  # whatever it is called: what is in it counts
    header["data"]["checkpoint_sha256"] = file_hash(path) if checkpoint else None
    return header


def fine_tune(config, checkpoint, splits, legend, output_dir, runtime):
    """Train, or continue, and score. Returns the test scores."""
    # model and optimiser
    train, validation, test = splits
    classifier, arguments = build_classifier(config, checkpoint, train.num_bands, len(legend))
    classifier.to(runtime.device)
    optimiser = build_optimiser(classifier, config)
    header = make_header(config, checkpoint, arguments, splits, legend)

    # the run, from its start or from where an earlier one of this folder stopped
    last = read_or_remove_last(output_dir, config, header["data"], runtime)
    run = Run("classifier", config, runtime, output_dir, classifier, optimiser, header)
    run.start(last)
    if runtime.is_main:
        print(
            f"{config['dataset_name']}: {train.num_pixels} training, "
            f"{validation.num_pixels if validation else 'no'} validation, {test.num_pixels} test "
            f"pixels of {len(legend)} classes"
        )
    if run.progress.step == 0 and starts_from_probe(config):
        start_head(classifier, config, train, ClassIndex(legend), runtime)

    # loop, and the test split, once
    fit(run, train, validation, legend)
    if not validation:
        average_with_start(run, checkpoint, train, legend)
        run.save("best.pt")
    runtime.barrier()  # best.pt is written
    scores = report_test(run, test, legend)
    run.log.finish()
    return scores


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
