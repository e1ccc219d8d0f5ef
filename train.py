"""Train an encoder of Sentinel-2 pixel series by Barlow Twins.

Two random clear subsamples of one pixel's year are two views of one place; the encoder learns to
give both the same embedding, with decorrelated dimensions.

    python train.py                                  # simulated tiles, made on first use
    python train.py base_path=/data dataset_name=austria_2022 output_dir=checkpoints/austria
    python train.py base_path=/data dataset_name=tyrol_2023 learning_rate=2e-3 \\
        checkpoint_path=checkpoints/austria/best.pt  # starts from an encoder of more regions
    torchrun --nproc-per-node=2 train.py base_path=/data dataset_name=austria_2022

Started again with the same output_dir it resumes from last.pt as if it had never stopped.
"""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

from running.checkpoints import Run, inherit, one_run_at_a_time, read_last
from running.config import check
from running.device import start_runtime
from running.errors import InputError, notice
from running.files import file_hash, make_output_dir
from running.log import ProgressBar, RecentSteps
from running.script import run_script, stop_on_signals

import torch

from backbones import BACKBONE_KEYS, BACKBONES, backbone_arguments
from barlow_twins import LOSSES, build_model, cross_correlation, normalise, training_loss
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from evaluation.seen_pixels import record_splits
from evaluation.validation import Validation
from tiles import Tile, checkpoint_bands, find_days, notice_splits
from training.recipe import fill_in, find_length, read_recipe
from transforms import AUGMENTATIONS
from utils import learning_rate, plot_cross_corr

run_config = {
    # input
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # tiles in <base_path>/data/<dataset_name>/processed/MGRS-*
    "val_dataset_name": "",  # validation tiles; empty: blocks held out of dataset_name
    "test_tile_path": "",  # tile of the false-colour picture; empty: the first training tile
    "skip_bad_tiles": False,  # leave out tiles that break the contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "sample_size": 0,  # clear dates sampled for a view; 0: half of a pixel's, at most 16
    "min_sample_size": 0,  # each step reads this number of them to all; 0: half of them or more
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a block that is held out (no splits.npy) or in one fold
    "split_seed": 0,  # of the held-out blocks
    # model
    "checkpoint_path": "",  # of train.py: an encoder to start from, in place of random weights
    # with a checkpoint_path, the next five, block_size and split_seed are its own, and so is
    # sample_size of a cnn or mlp
    "backbone": "transformer",  # transformer, cnn or mlp
    "latent_dim": 128,  # dimensions of a representation
    "width": 64,  # of the backbone; a multiple of 16 for the transformer
    "depth": 2,  # layers of the backbone
    "day_cycles": 8,  # highest harmonic of the year in the day encoding; 0: the backbone's default
    "projector_dim": 512,  # width of the projector and of the projections
    # loss
    "loss": "barlow_twins",  # a key of barlow_twins.LOSSES
    "barlow_lambda": 0.005,  # weight of the off-diagonal part
    "prediction": 100.0,  # weight of predicting each view's observations from the other; 0: none
    "harmonics": 8,  # the prediction has sines and cosines of 1 .. 8 cycles a year
    "blend": 0.5,  # share of pixels replaced by x + w (other - x), w in -0.5 .. 0.5
    "mix_up": 1.0,  # weight of mix-up regularisation, times barlow_lambda; 0: none
    "mix_up_every": 3,  # steps from one with mix-up to the next; there it has this many times more
    "augment": "vary_years",  # a key of transforms.AUGMENTATIONS
    # optimiser
    "batch_size": 256,  # pixels a step, over all processes
    "epochs": 0,  # passes over all valid pixels; 0: one, or more until min_samples, see below
    "min_samples": 0,  # pixels read of a small data set; 0: 10 a clear observation, 1e5 to 1e6
    "max_samples": 1_000_000_000,  # a large one ends after this many
    "max_steps": 0,  # stop after N steps, the schedule unchanged; 0: no limit
    "learning_rate": 6e-3,  # of AdamW, after the warm-up
    "weight_decay": 1e-4,  # on matrices; biases and norms have none
    "warmup_steps": 100,  # linear from 0; at most a tenth of all steps
    "hold_fraction": 0.3,  # share of the steps at the full rate, before the cosine to 0
    "clip_norm": 1.0,  # gradients are scaled down to this norm
    "seed": 0,  # of weights, order and views
    # running
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    # logging
    "log_interval": 10,  # steps between two lines of metrics.jsonl
    "val_interval": 500,  # steps between two validations, which choose best.pt
    "val_pixels": 4096,  # at most: of the loss (whole batches, at least one) and of the probe
    "checkpoint_interval": 200,  # steps between two last.pt
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}

LAST_PIXELS, PREVIEW_PIXELS = 512, 96  # a side, of the false colour at the end and before
INHERITED = ("backbone", *BACKBONE_KEYS[1:], "block_size", "split_seed")  # [0]: sample_size
# keys that may differ when a run is resumed, since the weights do not depend on them
FREE_KEYS = {"output_dir", "test_tile_path", "max_steps", "device", "num_workers", "log_interval"}
FREE_KEYS |= {"checkpoint_interval", "wandb_mode", "wandb_dir", "base_path", "skip_bad_tiles"}
FREE_KEYS |= {"checkpoint_path"}


def check_config(config):
    """The config, checked and frozen. Raises InputError for a value that cannot be trained with."""
    if config["backbone"] == "transformer" and config["width"] % 16:
        raise InputError(f"width={config['width']}: wanted a multiple of 16 for the transformer")
    names = {"backbone": BACKBONES, "loss": LOSSES, "augment": AUGMENTATIONS}
    config = check(config, **names, min_valid=(1, 65535))
    if config["min_samples"] > config["max_samples"]:
        raise InputError(
            f"min_samples={config['min_samples']}: wanted at most max_samples="
            f"{config['max_samples']}"
        )
    return config


# ---- data ----------------------------------------------------------------------------------------


def make_simulated_tiles(config, runtime):
    """Simulate the default data set where it is asked for and not there."""
    folder = Path(config["base_path"]) / "data" / "simulated"
    if config["dataset_name"] == "simulated" and runtime.is_main and not folder.exists():
        from preparation.simulated import simulate_dataset  # takes a while, and is needed once

        simulate_dataset(folder)
    runtime.barrier()


class Data(NamedTuple):
    """What a training reads."""

    train: SentinelTimeSeriesDataset
    validation: SentinelTimeSeriesDataset
    labelled: SentinelTimeSeriesDatasetForDownstreaming | None  # validation pixels for the probe
    picture_tile: Tile  # for the false-colour picture


def open_data(config, runtime, checkpoint=None):
    """The config, with what follows from the data, and the Data of a training.

    Bands and their statistics are the checkpoint's, if any. Raises InputError for tiles that break
    the contract, or that lack a band.
    """
    base_path, name = config["base_path"], config["val_dataset_name"] or config["dataset_name"]
    keys = ("min_valid", "block_size", "split_seed", "seed", "skip_bad_tiles")
    keywords = {key: config[key] for key in keys}
    keywords["bands"] = checkpoint_bands(checkpoint, config["checkpoint_path"])
    views = {"batch_size": config["batch_size"], "process": (runtime.rank, runtime.world_size)}
    train_set = SentinelTimeSeriesDataset(
        base_path, config["dataset_name"], split="train", **views, **keywords
    )
    config = fill_in(config, read_recipe(train_set))
    views["sample_size"] = config["sample_size"]
    train_set.set_sample_size(config["sample_size"])
    keywords["bands"] = train_set.bands
    keywords["split"] = "train+validation" if config["val_dataset_name"] else "validation"
    val_set = SentinelTimeSeriesDataset(base_path, name, **views, **keywords)
    labelled = None
    try:
        labelled = SentinelTimeSeriesDatasetForDownstreaming(
            base_path, name, batch_size=config["val_pixels"], **keywords
        )
    except InputError as error:  # no labels among the validation pixels, or of different classes
        notice(f"{error}; without a probe, the loss chooses best.pt")
    tile = Tile(config["test_tile_path"]) if config["test_tile_path"] else train_set.tiles[0]
    tile.choose_bands(train_set.bands)
    check_data(config, train_set, val_set)
    return config, Data(train_set, val_set, labelled, tile)


def check_data(config, train_set, val_set):
    """Refuse data that do not belong together: InputError."""
    if config["val_dataset_name"]:
        train_paths = {os.path.realpath(tile.path) for tile in train_set.tiles}
        for tile in val_set.tiles:
            if os.path.realpath(tile.path) in train_paths:
                name = config["val_dataset_name"]
                raise InputError(f"val_dataset_name={name}: {tile.path} is a training tile")
    train_set.refuse_single_pixels()
    notice_splits(train_set.tiles)


# ---- step ------------------------------------------------------------------------------


def build_optimiser(model, config):
    """AdamW; biases and norms have no weight decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, weight_decay=config["weight_decay"], fused=True)


def train_step(model, optimiser, x, doys, config, runtime, step, rate):
    """One step at a learning rate; never synchronises with the GPU.

    Returns the parts of the loss and the projections, as `training_loss`.
    """
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss, parts, z = training_loss(model, x, doys, config, runtime, step)
    loss.backward()
    parts["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
    optimiser.step()
    optimiser.zero_grad()
    return parts, z


# ---- pictures ------------------------------------------------------------------------------------


def plot_embeddings(run, data, max_pixels):
    """False colour of the picture tile, of at most max_pixels a side, to the folder and to wandb.

    Returns the path of the picture, or None where too little is valid.
    """
    # take .3 s to import, and a first step draws nothing
    from maps.false_color import color_tile
    from maps.pictures import plot_false_color, thin_place

    tile, path = data.picture_tile, run.output_dir / "false_color.png"
    stride = -(-max(tile.shape[1:3]) // max_pixels)
    statistics = data.train.mean, data.train.std, run.config["min_valid"]
    rgba = color_tile(run.model.backbone.eval(), tile, *statistics, run.runtime, stride)
    run.model.train()
    if rgba is None:
        return None
    title = f"{tile.title}, step {run.progress.step}"
    plot_false_color(rgba, rgba.shape[:2], path, title, thin_place(tile.info, stride))
    run.log.images({"false_color": path}, run.progress.step)
    return path


def plot_correlation(z, run):
    """Picture of a batch's cross-correlation matrix, to the folder and to wandb. z: V of (N, P)."""
    c = cross_correlation(normalise(z[0].detach()), normalise(z[1].detach()))
    path, step = run.output_dir / "cross_correlation.png", run.progress.step
    plot_cross_corr(c.cpu().numpy(), path, f"{run.config['dataset_name']}, step {step}")
    run.log.images({"cross_correlation": path}, step)


# ---- loop ----------------------------------------------------------------------------------------


def keep_best(run, score, total_steps):
    """Save best.pt where the score is the best so far.

    In the last third, where the learning rate has fallen, the choice starts anew: an early score
    may be the highest by chance, of an encoder that is far from done. The validation that ends a
    run at max_steps chooses only where no other has, so that a run which is resumed later has the
    best.pt of one that was never stopped.
    """
    progress, settled = run.progress, total_steps * 2 // 3
    if progress.step == total_steps or progress.step % run.config["val_interval"] == 0:
        if score > progress.best_score or progress.best_step < settled <= progress.step:
            progress.best_score, progress.best_step = score, progress.step
            run.save("best.pt")
    elif not progress.best_step:
        run.save("best.pt")


def report(run, recent, length, bar):
    """Show and return the line of metrics.jsonl for the steps since the last one."""
    step, line = run.progress.step, recent.summary(run.runtime.world_size)
    if run.runtime.is_main and bar.n == bar.initial:  # the first line
        minutes = (length.stop_step - step) * recent.seconds_per_step() / 60
        left = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "a minute or less"
        bar.write(f"{left} left (Ctrl-C stops, the same command resumes)")
    bar.update(step - bar.n)
    bar.set_postfix_str(f"loss {line['loss']:.2f}, {line['samples_per_second']:.0f} samples/s")
    return {"step": step, "epoch": step / length.steps_per_epoch, **line}


def announce(run, length, bar, what):
    """Show what takes time beside the bar; after the last step, where the bar stands, on a line."""
    if run.runtime.is_main and run.progress.step == length.stop_step:
        bar.write(what)
    bar.set_postfix_str(what)


def train(run, data, validate, length):
    """The loop, from the run's step to the last one; raises Stopped after a signal."""
    config, runtime, progress = run.config, run.runtime, run.progress
    model, stop, recent = runtime.distribute(run.model), stop_on_signals(), RecentSteps()
    warmup_steps = min(config["warmup_steps"], math.ceil(length.total_steps / 10))
    schedule = (length.total_steps, warmup_steps, config["hold_fraction"])
    data.train.set_steps(progress.step, length.stop_step)
    run.log.wait()  # no thread may be at work where loader processes are forked
    workers = runtime.workers(config["num_workers"])
    bar = ProgressBar(
        total=length.stop_step, initial=progress.step, unit="step", disable=not runtime.is_main
    )
    for x, doys in iterate_batches(data.train, workers, runtime):
        rate = learning_rate(config["learning_rate"], progress.step, *schedule)
        parts, z = train_step(model, run.optimiser, x, doys, config, runtime, progress.step, rate)
        recent.add(progress.step, rate, parts, x)
        progress.step += 1

        # log, validate, save; report ends the run where a loss is not finite
        due = {
            key: progress.step == length.stop_step or progress.step % config[f"{key}_interval"] == 0
            for key in ("log", "val", "checkpoint")
        }
        stopped = runtime.max_over_processes(stop.status, now=any(due.values()))
        if not stopped and not any(due.values()):
            continue
        progress.line = report(run, recent, length, bar)
        if due["val"]:
            announce(run, length, bar, "validation: loss, RankMe and linear probe")
            progress.line |= validate(run.model)
            progress.rotation = validate.rotation
        run.log.line(progress.line)
        if due["val"] and runtime.is_main:
            announce(run, length, bar, "pictures: cross-correlation and false colour")
            plot_correlation(z, run)
            at_end = progress.step == length.stop_step
            plot_embeddings(run, data, LAST_PIXELS if at_end else PREVIEW_PIXELS)
        announce(run, length, bar, "saving best.pt and last.pt")
        if due["val"]:
            keep_best(run, progress.line["score"], length.total_steps)
        if due["checkpoint"] or stopped:
            run.save("last.pt")
        recent.restart()
        if stopped and progress.step < length.stop_step:
            bar.close()
            raise run.stopped(stopped)
    bar.close()
    stop.release()


# ---- the script ----------------------------------------------------------------------------------


def make_header(config, checkpoint, data, validate):
    """What every checkpoint of the run carries beside its weights."""
    train_set, path = data.train, config["checkpoint_path"]
    return {
        "config": dict(config),
        "backbone": backbone_arguments(config, train_set.num_bands),
        "bands": train_set.band_names,
        "mean": train_set.mean,
        "std": train_set.std,
        "days": find_days(train_set.tiles),
        "classes": data.picture_tile.info.get("classes", {}),
        "splits": record_splits(train_set, checkpoint),
        "data": {
            "training": train_set.describe(),
            "validation": data.validation.describe(),
            "probe": validate.probe.describe() if validate.probe else "none",
            "observations": train_set.fingerprint() | data.validation.fingerprint(),
            # a checkpoint is known by its content, not by its path
            "checkpoint_sha256": file_hash(path) if checkpoint else None,
        },
    }


def print_start(run, data, length):
    """Print what is trained on, and how long."""
    dates, fewest = (run.config[key] for key in ("sample_size", "min_sample_size"))
    fewest = min(fewest, dates) if BACKBONES[run.config["backbone"]].any_length else dates
    step = run.progress.step  # beyond stop_step where max_steps was larger before
    print(
        f"{run.config['dataset_name']}: {len(data.train.tiles)} tiles, {data.train.num_bands} "
        f"bands, {data.train.num_pixels} training and {data.validation.num_pixels} validation "
        f"pixels; {run.config['backbone']} on {run.runtime.device}\n"
        f"steps {step} to {max(step, length.stop_step)} of {length.total_steps}, "
        f"{length.total_steps / length.steps_per_epoch:.3g} passes over the training pixels; "
        f"views of {fewest} to {dates} clear dates"
    )


def wrap_up(run, data, validate):
    """Print where the files of the run are."""
    from trained.card import write_card  # as in plot_embeddings

    output_dir, progress = run.output_dir, run.progress
    run.keep_a_best()
    write_card(run, run_config, (data.train, data.validation))
    picture = output_dir / "false_color.png"
    if picture.exists() or plot_embeddings(run, data, LAST_PIXELS):
        print(f"{picture}: representations of {data.picture_tile.title} as false colour")
    print(f"{output_dir / 'cross_correlation.png'}: of the projections of two views")
    score = "macro-F1 of the probe" if validate.probe else "minus the validation loss"
    best = progress.best_score if progress.best_step else progress.line["score"]
    print(f"{output_dir / 'best.pt'}: best checkpoint, {score} {best:.3f}")


def main(config):
    """Train an encoder. Returns a dict: output_dir, and the last line of metrics.jsonl."""
    config, checkpoint = inherit(config, INHERITED, ("pretrained",))
    if checkpoint and not BACKBONES[config["backbone"]].any_length:
        config = {**config, "sample_size": checkpoint["backbone"]["sample_size"]}
    config = check_config(config)

    # process and data; the folder comes after them, so that a mistake leaves none behind
    runtime = start_runtime(config["device"], config["precision"])
    make_simulated_tiles(config, runtime)
    config, data = open_data(config, runtime, checkpoint)
    output_dir = make_output_dir(
        config["output_dir"] or runtime.broadcast(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    with one_run_at_a_time(output_dir, runtime):
        return pretrain(config, checkpoint, data, output_dir, runtime)


def pretrain(config, checkpoint, data, output_dir, runtime):
    """Train, or resume, and plot. Returns what `main` does."""
    # model and optimiser
    model = build_model(config, data.train.num_bands, checkpoint).to(runtime.device)
    runtime.compile(model)
    optimiser = build_optimiser(model, config)
    validate = Validation(data.validation, data.labelled, config, runtime)
    header = make_header(config, checkpoint, data, validate)

    # the run, from its start or from where an earlier one of this folder stopped
    last = read_last(output_dir, "pretrained", config, header["data"], run_config, FREE_KEYS)
    length = find_length(config, data.train)
    if last and last["step"] >= length.stop_step and "score" not in last["line"]:
        raise InputError(
            f"max_steps={config['max_steps']}: found a run that stopped at step {last['step']} "
            "between two validations, wanted more steps (or 0), or another output_dir"
        )
    run = Run("pretrained", config, runtime, output_dir, model, optimiser, header)
    run.start(last)
    if runtime.is_main:
        print_start(run, data, length)
    if not last:
        run.log.line({"step": 0, **validate(model)})  # before training, to compare with

    # loop
    train(run, data, validate, length)

    # wrap up
    if runtime.is_main:
        wrap_up(run, data, validate)
    run.log.finish()
    return {"output_dir": output_dir, **run.progress.line}


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
