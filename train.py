"""Train an encoder of Sentinel-2 pixel series by Barlow Twins.

Two random clear subsamples of one pixel's year are two views of one place; the encoder learns to
give both the same embedding, with decorrelated dimensions.

    python train.py                                  # simulated tiles, made on first use
    python train.py base_path=/data dataset_name=austria_2022 output_dir=checkpoints/austria
    python train.py base_path=/data dataset_name=tyrol_2023 min_samples=300000 learning_rate=2e-3 \\
        checkpoint_path=checkpoints/austria/best.pt  # goes on from an encoder of more regions
    torchrun --nproc-per-node=2 train.py base_path=/data dataset_name=austria_2022

Started again with the same output_dir it goes on from last.pt as if it had never stopped.
"""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.image import imsave
from tqdm import tqdm

from backbones import BACKBONE_KEYS, BACKBONES, backbone_arguments, build_backbone, load_backbone
from barlow_twins import (
    LOSSES,
    BarlowTwins,
    HarmonicDecoder,
    Projector,
    cross_correlation,
    normalise,
    pretraining_loss,
)
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from evaluation.seen_pixels import record_splits
from evaluation.validation import Validation
from maps.false_color import apply_basis, fit_basis
from preparation.simulated import simulate_dataset
from running.checkpoints import inherit, one_run_at_a_time, read_last, start_run
from running.config import MAX_INT, check
from running.device import start_runtime
from running.distributed import BatchGenerator, share
from running.errors import InputError, Stopped, notice
from running.files import atomic_write, file_hash, make_output_dir
from running.log import RecentSteps
from running.script import run_script, stop_on_signals
from tiles import Tile, check_bands, check_tile, notice_splits
from transforms import AUGMENTATIONS, add_mixed_view, blend_pixels, thin_dates
from utils import extract_representations, learning_rate, plot_cross_corr

run_config = {
    # input
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # tiles in <base_path>/data/<dataset_name>/processed/MGRS-*
    "val_dataset_name": "",  # validation tiles; empty: blocks held out of dataset_name
    "test_tile_path": "",  # tile of the false-colour picture; empty: the first training tile
    "skip_bad_tiles": False,  # leave tiles out that are out of contract, in place of an error
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "sample_size": 16,  # clear dates drawn for a view; repeated where a pixel has fewer
    "min_sample_size": 8,  # of them so many or more are read, another number in each step
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a held-out block where a tile has no splits.npy; and along
    # the squares that the probe's folds keep whole
    "split_seed": 0,  # of the held-out blocks
    # model
    "checkpoint_path": "",  # of train.py: the encoder to go on from, in place of random weights
    # with checkpoint_path, the next five, sample_size, block_size and split_seed are taken from it
    "backbone": "transformer",  # transformer, cnn or mlp
    "latent_dim": 128,  # dimensions of a representation
    "width": 64,  # of the backbone; a multiple of 16 for the transformer
    "depth": 2,  # layers of the backbone
    "day_cycles": 8,  # highest harmonic of the year in the encoding of days; 0: the backbone's own
    "projector_dim": 512,  # width of the projector and of the projections
    # loss
    "loss": "barlow_twins",  # a key of barlow_twins.LOSSES
    "barlow_lambda": 0.005,  # weight of the off-diagonal part
    "prediction": 100.0,  # weight of predicting each view's observations from the other; 0: none
    "harmonics": 8,  # of the year that is predicted: sines and cosines of 1 .. 8 cycles
    "blend": 0.5,  # share of the pixels that become new ones, half way at most to or from another
    "mix_up": 1.0,  # weight of mix-up regularisation, times barlow_lambda; 0: none
    "augment": "none",  # a key of transforms.AUGMENTATIONS
    # optimiser
    "batch_size": 256,  # pixels a step, over all processes
    "epochs": 0,  # times that every valid pixel is visited; 0: once, but within these bounds
    "min_samples": 1_000_000,  # pixels drawn in all, so that a small set is visited many times
    "max_samples": 1_000_000_000,  # and of a large one no more than this is drawn
    "max_steps": 0,  # stop after so many steps, the schedule unchanged; 0: no limit
    "learning_rate": 6e-3,  # AdamW's, after warm-up
    "weight_decay": 1e-4,  # on matrices; biases and norms have none
    "warmup_steps": 100,  # linear from 0; at most a tenth of all steps
    "hold_fraction": 0.3,  # of all steps, at the full rate, before the cosine to 0
    "clip_norm": 1.0,  # gradients are scaled down to this norm
    "seed": 0,  # of weights, order and views
    # running
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    # logging
    "log_interval": 10,  # steps between two lines of metrics.jsonl
    "val_interval": 500,  # steps between two validations, which choose best.pt
    "val_pixels": 4096,  # at most: of the loss, in whole batches, one at least; of the probe
    "checkpoint_interval": 200,  # steps between two last.pt
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

INHERITED = ("backbone", *BACKBONE_KEYS, "block_size", "split_seed")
# what may differ between a run and its continuation, since the weights do not depend on it
FREE_KEYS = {"output_dir", "test_tile_path", "max_steps", "device", "num_workers", "log_interval"}
FREE_KEYS |= {"checkpoint_interval", "wandb_mode", "base_path", "skip_bad_tiles", "checkpoint_path"}


def check_config(config):
    """The config, checked and frozen. Raises InputError for a value that cannot be trained with."""
    if config["backbone"] == "transformer" and config["width"] % 16:
        raise InputError(f"width={config['width']}: wanted a multiple of 16 for the transformer")
    names = {"backbone": BACKBONES, "loss": LOSSES, "augment": AUGMENTATIONS}
    config = check(config, **names, epochs=(0, MAX_INT))
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
        simulate_dataset(folder)
    runtime.barrier()


def open_data(config, runtime, checkpoint=None):
    """Training data, validation data, its labelled pixels or None, and the tile to draw.

    Bands are standardised by the statistics of the checkpoint to go on from, where there is one.
    """
    base_path, name = config["base_path"], config["val_dataset_name"] or config["dataset_name"]
    keys = ("min_valid", "block_size", "split_seed", "seed", "skip_bad_tiles")
    keywords = {key: config[key] for key in keys}
    views = {key: config[key] for key in ("sample_size", "batch_size")}
    views |= {"rank": runtime.rank, "world_size": runtime.world_size}
    statistics = {key: checkpoint[key] for key in ("mean", "std")} if checkpoint else {}
    train_set = SentinelTimeSeriesDataset(
        base_path, config["dataset_name"], split="train", **views, **keywords, **statistics
    )
    keywords |= {"mean": train_set.mean, "std": train_set.std}
    keywords["split"] = "train+validation" if config["val_dataset_name"] else "validation"
    val_set = SentinelTimeSeriesDataset(base_path, name, **views, **keywords)
    if config["val_dataset_name"]:
        train_paths = {os.path.realpath(tile.path) for tile in train_set.tiles}
        for tile in val_set.tiles:
            if os.path.realpath(tile.path) in train_paths:
                raise InputError(f"val_dataset_name={name}: {tile.path} is a training tile")
    try:
        labelled = SentinelTimeSeriesDatasetForDownstreaming(
            base_path, name, batch_size=config["val_pixels"], **keywords
        )
    except InputError as error:  # no labels among the validation pixels, or of different classes
        notice(f"{error}; without a probe, the loss chooses best.pt")
        labelled = None
    picture = Tile(config["test_tile_path"]) if config["test_tile_path"] else train_set.tiles[0]
    for tile in (*val_set.tiles, picture):
        origin = train_set.tiles[0].path.parent
        check_bands(tile, train_set.band_names, train_set.num_bands, origin)
    for tile in (*train_set.tiles, *val_set.tiles, picture) if checkpoint else ():
        check_tile(tile, checkpoint, config["checkpoint_path"])
    train_set.refuse_single_pixels()
    notice_splits(train_set.tiles)
    return train_set, val_set, labelled, picture


# ---- model and loss ------------------------------------------------------------------------------


def build_model(config, num_bands, checkpoint=None):
    """Backbone, projector and decoder from a config: the same weights for the same seed.

    The backbone is the checkpoint's, where there is one to go on from.
    """
    torch.manual_seed(config["seed"])
    size = config["projector_dim"]
    # the projector first: the order decides which random weights each of them gets
    projector = Projector(latent_dim=config["latent_dim"], width=size, projection_dim=size)
    backbone, decoder = build_backbone(**backbone_arguments(config, num_bands)), None
    if checkpoint:
        backbone = load_backbone(checkpoint).train()
    if config["prediction"]:
        decoder = HarmonicDecoder(
            latent_dim=config["latent_dim"], num_bands=num_bands, harmonics=config["harmonics"]
        )
    return BarlowTwins(backbone, projector, decoder)


def build_optimiser(model, config):
    """AdamW; biases and norms have no weight decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, weight_decay=config["weight_decay"], fused=True)


def training_loss(model, x, doys, config, runtime, step):
    """The loss of a step on views x (N, 2, S, B), doys (N, 2, S).

    Returns the loss, a dict of its parts, and the projections (V of (N, P)): tensors.
    """
    seed = config["seed"] * 1_000_003 + step  # each step has its own numbers, on any machine
    rows, total = share(len(x))
    # seeds far away (of one, 32 bits count), so that no two of these draw the same numbers
    generator = BatchGenerator(rows, total, seed + (1 << 31), x.device)
    if config["blend"]:
        x = blend_pixels(x, doys, config["blend"], seed, rows, total)
    observed, days_observed, mixture = x, doys, None
    if BACKBONES[config["backbone"]].any_length:
        x, doys = thin_dates(x, doys, config["min_sample_size"], seed)
    x, doys = AUGMENTATIONS[config["augment"]](x, doys, generator)
    if config["mix_up"]:
        x, doys, mixture = add_mixed_view(x, doys, seed + (1 << 30), rows, total)
    runtime.mark_dynamic(x, doys, days_observed)
    with runtime.autocast(training=True):
        _, z, predicted = model(x, doys, days_observed)
    loss, parts = pretraining_loss(z, predicted, observed, config, mixture)
    return loss, {"loss": loss, "loss_per_dim": loss / z[0].shape[1], **parts}, z


def train_step(model, optimiser, x, doys, config, runtime, step, rate):
    """One step at a learning rate, in which no number of a GPU's is waited for.

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


def plot_false_color(backbone, tile, train_set, config, runtime, path):
    """False colour of a tile at up to 512 pixels a side; False where too little is valid."""
    stride = -(-max(tile.shape[1:3]) // 512)
    height, width = (-(-size // stride) for size in tile.shape[1:3])
    image = np.full((height, width, config["latent_dim"]), np.nan, np.float32)
    for _, row, column, y, _ in extract_representations(
        backbone.eval(), tile, train_set.mean, train_set.std, config["min_valid"], runtime, stride
    ):
        image[row // stride, column // stride] = y.numpy()
    pixels = image[np.isfinite(image[..., 0])]
    if len(pixels) <= 3:
        print(f"{tile.path}: {len(pixels)} valid pixels, too few for a false-colour picture")
        return False
    scale = max(1, 512 // max(height, width))  # a small tile is drawn larger
    rgba = apply_basis(fit_basis(pixels), image)
    with atomic_write(path) as part:
        imsave(part, rgba.repeat(scale, 0).repeat(scale, 1))
    return True


def plot_correlation(z, run):
    """Picture of a batch's cross-correlation matrix, to the folder and to wandb. z: V of (N, P)."""
    if run.runtime.is_main:
        c = cross_correlation(normalise(z[0].detach()), normalise(z[1].detach()))
        path, step = run.output_dir / "cross_correlation.png", run.progress.step
        plot_cross_corr(c.cpu().numpy(), path, f"{run.config['dataset_name']}, step {step}")
        run.log.images({"cross_correlation": path}, step)


# ---- loop ----------------------------------------------------------------------------------------


class Length(NamedTuple):
    """How long a training is, in steps."""

    epoch: int  # steps that visit every pixel once
    total: int  # steps of the schedule
    last: int  # where this run ends


def find_length(config, train_set):
    """Length of a training: `epochs` passes, or one pass between min_samples and max_samples."""
    epoch, pixels = train_set.steps_per_epoch, train_set.num_pixels
    samples = min(max(pixels, config["min_samples"]), config["max_samples"])
    total = config["epochs"] * epoch or -(-samples * epoch // pixels)
    return Length(epoch, total, min(total, config["max_steps"] or total))


def keep_best(run, score, total_steps):
    """Save best.pt where the score is the best so far.

    In the last third, where the learning rate has fallen, scores are compared anew: an early one
    may be the highest by chance, of an encoder that is far from done. The validation that ends a
    run at max_steps chooses only where no other has: a run that goes on later has the best.pt of
    one that was never stopped.
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
        minutes = (length.last - step) * recent.seconds_per_step() / 60
        bar.write(f"about {minutes:.0f} minutes to go (Ctrl-C stops, the same command goes on)")
    bar.update(step - bar.n)
    bar.set_postfix_str(f"loss {line['loss']:.2f}, {line['samples_per_second']:.0f} samples/s")
    return {"step": step, "epoch": step / length.epoch, **line}


def train(run, batches, validate, length):
    """The loop, from the run's step to the last one; raises Stopped after a signal."""
    config, runtime, progress = run.config, run.runtime, run.progress
    model, stop, recent = runtime.distribute(run.model), stop_on_signals(), RecentSteps()
    warmup_steps = min(config["warmup_steps"], math.ceil(length.total / 10))
    schedule = (length.total, warmup_steps, config["hold_fraction"])
    bar = tqdm(total=length.last, initial=progress.step, unit="step", disable=not runtime.is_main)
    for x, doys in batches:
        rate = learning_rate(config["learning_rate"], progress.step, *schedule)
        parts, z = train_step(model, run.optimiser, x, doys, config, runtime, progress.step, rate)
        recent.add(progress.step, rate, parts, x)
        progress.step += 1

        # log, validate, save; a loss that is not finite ends the run in report
        due = {
            key: progress.step == length.last or progress.step % config[f"{key}_interval"] == 0
            for key in ("log", "val", "checkpoint")
        }
        stopped = runtime.max_over_processes(stop.status, now=any(due.values()))
        if not stopped and not any(due.values()):
            continue
        progress.line = report(run, recent, length, bar)
        if due["val"]:
            progress.line |= validate(run.model)
            plot_correlation(z, run)
        run.log.line(progress.line)
        if due["val"]:
            keep_best(run, progress.line["score"], length.total)
        if due["checkpoint"] or stopped:
            run.save("last.pt")
        recent.restart()
        if stopped and progress.step < length.last:
            bar.close()
            run.log.finish()
            raise Stopped(run.describe_stop(), stopped)
    bar.close()
    stop.release()


def main(config):
    """Train an encoder. Returns a dict: output_dir, and the last line of metrics.jsonl."""
    config, checkpoint = inherit(config, INHERITED, ("pretrained",))
    config = check_config(config)

    # process and data; the folder comes after them, so that a mistake leaves none behind
    runtime = start_runtime(config["device"], config["precision"])
    make_simulated_tiles(config, runtime)
    train_set, val_set, labelled, picture_tile = open_data(config, runtime, checkpoint)
    output_dir = make_output_dir(
        config["output_dir"] or runtime.broadcast(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    with one_run_at_a_time(output_dir, runtime):
        validate = Validation(val_set, labelled, config, runtime)
        data = train_set, val_set, validate, picture_tile
        return pretrain(config, checkpoint, data, output_dir, runtime)


def make_header(config, checkpoint, data):
    """What every checkpoint of the run carries beside its weights."""
    train_set, val_set, validate, picture_tile = data
    header = {
        "config": dict(config),
        "backbone": backbone_arguments(config, train_set.num_bands),
        "bands": train_set.band_names or (checkpoint["bands"] if checkpoint else []),
        "mean": train_set.mean,
        "std": train_set.std,
        "classes": picture_tile.info.get("classes", {}),
        "splits": record_splits(train_set, checkpoint),
        "data": {
            "training": train_set.describe(),
            "validation": val_set.describe(),
            "probe": validate.probe.describe() if validate.probe else "none",
        },
    }
    path = config["checkpoint_path"]  # whatever it is called: what is in it counts
    header["data"]["checkpoint_sha256"] = file_hash(path) if checkpoint else None
    return header


def print_start(run, train_set, val_set, length):
    """Print what is trained on, and how long."""
    print(
        f"{run.config['dataset_name']}: {len(train_set.tiles)} tiles, {train_set.num_bands} bands, "
        f"{train_set.num_pixels} training and {val_set.num_pixels} validation pixels; "
        f"{run.config['backbone']} on {run.runtime.device}\n"
        f"steps {run.progress.step} to {length.last} of {length.total}, "
        f"{length.total / length.epoch:.3g} passes over the training pixels"
    )


def print_end(run, train_set, validate, picture_tile):
    """Draw the false colour, and print where the files of the run are."""
    config, output_dir, progress = run.config, run.output_dir, run.progress
    picture, backbone = output_dir / "false_color.png", run.model.backbone
    if plot_false_color(backbone, picture_tile, train_set, config, run.runtime, picture):
        run.log.images({"false_color": picture}, progress.step)
        print(f"{picture}: representations of {picture_tile.title} as false colour")
    print(f"{output_dir / 'cross_correlation.png'}: of the projections of two views")
    score = "macro-F1 of the probe" if validate.probe else "minus the validation loss"
    best = progress.best_score if progress.best_step else progress.line["score"]
    print(f"{output_dir / 'best.pt'}: best checkpoint, {score} {best:.3f}")


def pretrain(config, checkpoint, data, output_dir, runtime):
    """Train, or continue, and draw. Returns what `main` does."""
    # model and optimiser
    train_set, val_set, validate, picture_tile = data
    model = build_model(config, train_set.num_bands, checkpoint).to(runtime.device)
    runtime.compile(model)
    optimiser, header = build_optimiser(model, config), make_header(config, checkpoint, data)
    modules = dict(model.named_children())  # backbone, projector and, where there is one, decoder

    # the run, from its start or from where an earlier one of this folder stopped
    last = read_last(output_dir, "pretrained", config, header["data"], run_config, FREE_KEYS)
    length = find_length(config, train_set)
    if last and last["step"] >= length.last and "score" not in last["line"]:
        raise InputError(
            f"max_steps={config['max_steps']}: found a run that stopped at step {last['step']} "
            "between two validations, wanted more steps (or 0), or another output_dir"
        )
    run = start_run(
        "pretrained", config, header, model, modules, optimiser, last, output_dir, runtime
    )
    progress = run.progress
    if runtime.is_main:
        print_start(run, train_set, val_set, length)
    if not last:
        run.log.line({"step": 0, **validate(model)})  # before training, to compare with

    # loop
    train_set.set_steps(progress.step, length.last)
    workers = runtime.workers(config["num_workers"])
    batches = iterate_batches(train_set, workers, runtime)
    train(run, batches, validate, length)

    # wrap up
    if runtime.is_main:
        print_end(run, train_set, validate, picture_tile)
    run.log.finish()
    return {"output_dir": output_dir, **progress.line}


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
