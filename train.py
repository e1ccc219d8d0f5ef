"""Train an encoder of Sentinel-2 pixel series by Barlow Twins.

Two random clear subsamples of one pixel's year are two views of one place; the encoder learns to
give both the same embedding, with decorrelated dimensions.

    python train.py                                  # simulated tiles, made on first use
    python train.py base_path=/data dataset_name=austria_2022 output_dir=checkpoints/austria
    torchrun --nproc-per-node=2 train.py base_path=/data dataset_name=austria_2022

Started again with the same output_dir it goes on from last.pt as if it had never stopped.
"""

import contextlib
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import utils
from backbones import BACKBONES, build_backbone
from barlow_twins import (
    BarlowTwins,
    Projector,
    barlow_twins_loss,
    cross_correlation,
    gather,
    mix_up_loss,
    normalise,
    share,
)
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    Tile,
    check_bands,
    iterate_batches,
)
from transforms import mix_up
from utils import InputError

run_config = {
    # input
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # tiles in <base_path>/data/<dataset_name>/processed/MGRS-*
    "val_dataset_name": "",  # validation tiles; empty: blocks held out of dataset_name
    "test_tile_path": "",  # tile of the false-colour picture; empty: the first training tile
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "sample_size": 16,  # clear steps drawn for a view; repeated where a pixel has fewer
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a held-out block where a tile has no splits.npy
    "split_seed": 0,  # of the held-out blocks
    # model
    "backbone": "transformer",  # transformer, cnn or mlp
    "latent_dim": 128,  # dimensions of a representation
    "width": 128,  # of the backbone; a multiple of 16 for the transformer
    "depth": 2,  # layers of the backbone
    "projector_dim": 512,  # width of the projector and of the projections
    # loss
    "barlow_lambda": 0.005,  # weight of the off-diagonal part
    "mix_up": 1.0,  # weight of mix-up regularisation, times barlow_lambda; 0: none
    # optimiser
    "batch_size": 256,  # pixels a step, over all processes
    "epochs": 2,  # times that every valid pixel is visited
    "max_steps": 0,  # stop after so many steps, the schedule unchanged; 0: no limit
    "learning_rate": 1e-3,  # AdamW's, after warm-up
    "weight_decay": 1e-4,  # on matrices; biases and norms have none
    "warmup_steps": 100,  # linear from 0; at most a tenth of all steps
    "hold_fraction": 0.3,  # of all steps, at the full rate, before the cosine to 0
    "clip_norm": 1.0,  # gradients are scaled down to this norm
    "seed": 0,  # of weights, order and views
    # running
    "device": "auto",  # auto, cpu or cuda
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    # logging
    "log_interval": 10,  # steps between two lines of metrics.jsonl
    "val_interval": 200,  # steps between two validations, which choose best.pt
    "val_pixels": 4096,  # most pixels that a validation looks at
    "checkpoint_interval": 200,  # steps between two last.pt
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

# what may differ between a run and its continuation, since the weights do not depend on it
FREE_KEYS = {"output_dir", "test_tile_path", "max_steps", "device", "num_workers", "log_interval"}
FREE_KEYS |= {"checkpoint_interval", "wandb_mode", "base_path"}


def check_config(config):
    """Raise InputError for a value that cannot be trained with."""
    utils.check_choice(config, "backbone", tuple(BACKBONES))
    positive = ("sample_size", "min_valid", "block_size", "latent_dim", "width", "depth", "epochs")
    utils.check_least(config, 1, *positive, "log_interval", "val_interval", "checkpoint_interval")
    utils.check_least(config, 2, "batch_size", "projector_dim", "val_pixels")
    utils.check_least(config, 0, "max_steps", "mix_up", "barlow_lambda", "learning_rate", "seed")
    utils.check_least(config, 0, "weight_decay", "warmup_steps", "hold_fraction", "split_seed")
    utils.check_least(config, -1, "num_workers")
    if config["backbone"] == "transformer" and config["width"] % 16:
        raise InputError(f"width={config['width']}: wanted a multiple of 16 for the transformer")


def learning_rate(step, total_steps, config):
    """Warm-up, hold and cosine decay, a pure function of the step (0-based)."""
    warmup = min(config["warmup_steps"], math.ceil(total_steps / 10))
    if step < warmup:
        return config["learning_rate"] * (step + 1) / (warmup + 1)
    decay_start = max(warmup, config["hold_fraction"] * total_steps)
    progress = max(0.0, (step - decay_start) / max(1, total_steps - decay_start))
    return config["learning_rate"] * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_simulated_tiles(config, runtime):
    """Simulate the default data set where it is asked for and not there."""
    folder = Path(config["base_path"]) / "data" / "simulated"
    if config["dataset_name"] == "simulated" and runtime.is_main and not folder.exists():
        script = Path(__file__).with_name("make_demo_data.py")
        arguments = [sys.executable, str(script), f"base_path={config['base_path']}"]
        if subprocess.run(arguments, check=False).returncode:
            raise InputError(f"{folder}: could not be simulated (see above)")
    runtime.wait()


def open_data(config, runtime):
    """Training data, validation data, its labelled pixels or None, and the tile to draw."""
    base_path, name = config["base_path"], config["val_dataset_name"] or config["dataset_name"]
    keywords = {key: config[key] for key in ("min_valid", "block_size", "split_seed", "seed")}
    views = {key: config[key] for key in ("sample_size", "batch_size")}
    views |= {"rank": runtime.rank, "world_size": runtime.world_size}
    train_set = SentinelTimeSeriesDataset(
        base_path, config["dataset_name"], split="train", **views, **keywords
    )
    keywords |= {"mean": train_set.mean, "std": train_set.std}
    keywords["split"] = "train+validation" if config["val_dataset_name"] else "validation"
    val_set = SentinelTimeSeriesDataset(base_path, name, **views, **keywords)
    if config["val_dataset_name"]:
        train_paths = {tile.path.resolve() for tile in train_set.tiles}
        for tile in val_set.tiles:
            if tile.path.resolve() in train_paths:
                raise InputError(f"val_dataset_name={name}: {tile.path} is a training tile")
    labelled = None
    with contextlib.suppress(InputError):  # no labels among the validation pixels: no probe
        labelled = SentinelTimeSeriesDatasetForDownstreaming(
            base_path, name, batch_size=config["val_pixels"], **keywords
        )
    picture = Tile(config["test_tile_path"]) if config["test_tile_path"] else train_set.tiles[0]
    for tile in (val_set.tiles[0], picture):
        first = train_set.tiles[0]
        check_bands(tile, first.band_names, first.shape[3], first.path)
    return train_set, val_set, labelled, picture


class Validation:
    """Loss on fixed views of validation pixels, RankMe of their representations, linear probe.

    Nothing here is a training pixel or belongs to the test side of a labelled tile.
    """

    def __init__(self, val_set, labelled, config, runtime):
        self.barlow_lambda, self.runtime = config["barlow_lambda"], runtime
        batches = max(1, config["val_pixels"] // config["batch_size"])
        self.batches = list(itertools.islice(iterate_batches(val_set), batches))
        self.probe = self._open_probe(labelled) if labelled else None

    def _open_probe(self, labelled):
        """Labelled pixels of the classes that can be told apart in space; None for fewer than 2.

        Cross-validation needs each class in at least 2 blocks and pixels.
        """
        x, doys, labels, groups = next(iter(iterate_batches(labelled)))
        blocks = {int(c): len(groups[labels == c].unique()) for c in labels.unique()}
        self.probe_folds = min(5, *(count for count in blocks.values() if count > 1), 5)
        keep = torch.tensor([blocks[int(c)] > 1 for c in labels])
        if sum(count > 1 for count in blocks.values()) < 2:
            return None
        return x[keep], doys[keep], labels[keep], groups[keep]

    @torch.no_grad()
    def __call__(self, model):
        """Returns a dict of numbers; best is larger `score`."""
        model.eval()
        losses, sizes, representations = [], [], []
        for x, doys in self.batches:
            x, doys = self.runtime.to_device(x, doys)
            with self.runtime.autocast():
                y = model.backbone(x.flatten(0, 1), doys.flatten(0, 1)).unflatten(0, x.shape[:2])
                z = [gather(model.projector(view).float()) for view in y.unbind(1)]
            c = cross_correlation(*map(normalise, z))
            losses.append(float(barlow_twins_loss(c, self.barlow_lambda)[0]))
            sizes.append(len(z[0]))
            representations.append(gather(y[:, 0].float()).cpu())
        rank, rank_share = utils.rankme(torch.cat(representations))
        result = {"val_loss": float(np.average(losses, weights=sizes))}
        result |= {"rankme": rank, "rankme_normalised": rank_share}
        score = self.score_probe(model.backbone)
        result |= {} if score is None else {"probe_macro_f1": score}
        model.train()
        return result | {"score": -result["val_loss"] if score is None else score}

    def score_probe(self, backbone):
        """Macro-F1 of logistic regression on representations, cross-validated over blocks."""
        if self.probe is None:
            return None
        x, doys, labels, groups = self.probe
        y = utils.encode_series(backbone, x, doys, self.runtime).numpy()
        labels = labels.numpy()
        folds = StratifiedGroupKFold(self.probe_folds)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        with threadpool_limits(1):  # small products; more threads would wait for each other
            found = cross_val_predict(probe, y, labels, groups=groups, cv=folds)
        return float(f1_score(labels, found, average="macro"))


def add_mixed_view(x, doys, seed):
    """A third view, x_a mixed with another pixel's x_b, the partners drawn from the whole batch.

    x: (N, 2, S, B); doys: (N, 2, S). Returns x (N, 3, S, B), doys (N, 3, S), and of the whole
    batch the weights (N,) and the order (N,) that picks the partners.
    """
    here, total = share(len(x), x.device)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(total, generator=generator).to(x.device)
    order = torch.randperm(total, generator=generator).to(x.device)
    doys = doys.float()
    partner_x, partner_doys = (gather(view)[order][here] for view in (x[:, 1], doys[:, 1]))
    x_m, doys_m = mix_up(x[:, 0], doys[:, 0], partner_x, partner_doys, weight[here])
    x, doys = torch.cat([x, x_m[:, None]], 1), torch.cat([doys, doys_m[:, None]], 1)
    return x, doys, weight, order


def training_loss(model, x, doys, config, runtime, step):
    """Returns the loss, a dict of its parts (tensors) and the cross-correlation matrix (P, P)."""
    mixed = config["mix_up"] > 0
    if mixed:
        seed = config["seed"] * 1_000_003 + step  # every step its own mixture, on any machine
        x, doys, weight, order = add_mixed_view(x, doys, seed)
    with runtime.autocast():
        z = model(x, doys)
    z_a, z_b, *z_m = map(normalise, z)
    c = cross_correlation(z_a, z_b)
    loss, on_diag, off_diag = barlow_twins_loss(c, config["barlow_lambda"])
    parts = {"on_diag": on_diag, "off_diag": off_diag}
    if mixed:
        parts["mix_up_loss"] = mix_up_loss(z_m[0], z_a, z_b[order], z_b, weight)
        loss = loss + config["mix_up"] * config["barlow_lambda"] * parts["mix_up_loss"]
    return loss, {"loss": loss, "loss_per_dim": loss / len(c), **parts}, c.detach()


class Recent:
    """The steps since the last logged one, kept on the device: no step waits for a number."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.steps, self.pixels, self.start = [], 0, time.perf_counter()

    def add(self, step, rate, parts, x):
        values = torch.stack([value.detach().float() for value in parts.values()])
        self.steps.append((step, rate, list(parts), values, torch.stack(x.aminmax())))
        self.pixels += len(x)

    def summary(self, world_size):
        """Means over the steps and the throughput; FloatingPointError for a loss not finite."""
        for step, rate, _, values, extremes in self.steps:
            if not values[0].isfinite():
                low, high = extremes.tolist()
                raise FloatingPointError(
                    f"loss {float(values[0])} at step {step}, learning rate {rate:.3g}, "
                    f"standardised input from {low:.3g} to {high:.3g}; "
                    "the last good checkpoint stays"
                )
        means = torch.stack([values for *_, values, _ in self.steps]).mean(0).tolist()
        seconds = time.perf_counter() - self.start
        rate = {"samples_per_second": world_size * self.pixels / seconds}
        return dict(zip(self.steps[-1][2], means, strict=True)) | rate


def build_model(config, train_set, runtime):
    """Backbone, projector and optimiser from a config; the same weights for the same seed."""
    torch.manual_seed(config["seed"])
    arguments = {
        "name": config["backbone"],
        "num_bands": train_set.num_bands,
        **{key: config[key] for key in ("sample_size", "latent_dim", "width", "depth")},
    }
    projector = Projector(
        latent_dim=config["latent_dim"],
        width=config["projector_dim"],
        projection_dim=config["projector_dim"],
    )
    model = BarlowTwins(build_backbone(**arguments), projector).to(runtime.device)
    runtime.compile(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=config["weight_decay"], fused=True)
    return model, optimiser, arguments


def read_last(path, config):
    """The content of last.pt, or None; InputError where its config would give another result."""
    if not path.exists():
        return None
    last = utils.load_checkpoint(path, ("pretrained",))
    differ = [
        f"{key}={config[key]} (was {last['config'].get(key)})"
        for key in config
        if key not in FREE_KEYS and config[key] != last["config"].get(key)
    ]
    if differ:
        raise InputError(
            f"{path}: found a run with another {', '.join(differ)}; "
            "wanted the same, or another output_dir"
        )
    return last


def cut_metrics(path, step, runtime):
    """Drop the lines behind a step, which the continued run will write again."""
    if runtime.is_main and path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        with utils.written_beside(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines))


def draw_false_color(backbone, tile, train_set, config, runtime, path):
    """False colour of a tile at up to 512 pixels a side; False where too little is valid."""
    stride = -(-max(tile.shape[1:3]) // 512)
    height, width = (-(-size // stride) for size in tile.shape[1:3])
    image = np.full((height, width, config["latent_dim"]), np.nan, np.float32)
    for _, row, column, y in utils.extract_representations(
        backbone.eval(), tile, train_set.mean, train_set.std, config["min_valid"], runtime, stride
    ):
        image[row // stride, column // stride] = y.numpy()
    pixels = image[np.isfinite(image[..., 0])]
    if len(pixels) <= 3:
        print(f"{tile.path}: {len(pixels)} valid pixels, too few for a false-colour picture")
        return False
    scale = max(1, 512 // max(height, width))  # a small tile is drawn larger
    rgba = utils.apply_basis(utils.fit_basis(pixels), image)
    with utils.written_beside(path) as part:
        plt.imsave(part, rgba.repeat(scale, 0).repeat(scale, 1))
    return True


def draw_correlation(c, run, config):
    """Picture of the last batch's cross-correlation matrix, to the folder and to wandb."""
    if run.runtime.is_main:
        path = run.output_dir / "cross_correlation.png"
        utils.plot_cross_corr(c.cpu().numpy(), path, f"{config['dataset_name']}, step {run.step}")
        run.log.images({"cross_correlation": path}, run.step)


class Run:
    """What is saved and logged of a training: model, optimiser, step, best score so far."""

    def __init__(self, config, runtime, output_dir, train_set, classes):
        self.runtime, self.output_dir = runtime, output_dir
        self.model, self.optimiser, arguments = build_model(config, train_set, runtime)
        self.step, self.best_score, self.line = 0, -math.inf, {"step": 0}
        last = read_last(output_dir / "last.pt", config)
        self.resumed = last is not None
        if last:
            self.model.backbone.load_state_dict(last["backbone_state"], strict=True)
            self.model.projector.load_state_dict(last["projector_state"], strict=True)
            self.optimiser.load_state_dict(last["optimiser_state"])
            self.step, self.best_score = last["step"], last["best_score"]
            self.line = last["line"]
            cut_metrics(output_dir / "metrics.jsonl", self.step, runtime)
        wandb_id = last["wandb_id"] if last else ""
        self.log = utils.start_log(config, "train", output_dir, runtime, wandb_id)
        self.header = {
            "config": dict(config),
            "backbone": arguments,
            "bands": train_set.band_names,
            "mean": train_set.mean,
            "std": train_set.std,
            "classes": classes,
            "wandb_id": self.log.run_id or wandb_id,
        }

    def report(self, line, validated):
        """Log a line; where it was validated, keep the model if it is the best so far."""
        self.line = line
        self.log.line(line)
        if validated and line["score"] > self.best_score:
            self.best_score = line["score"]
            self.save("best.pt")

    def save(self, name):
        if self.runtime.is_main:  # all processes hold the same weights
            utils.save_checkpoint(
                self.output_dir / name,
                "pretrained",
                **self.header,
                backbone_state=self.model.backbone.state_dict(),
                projector_state=self.model.projector.state_dict(),
                optimiser_state=self.optimiser.state_dict(),
                step=self.step,
                best_score=self.best_score,
                line=self.line,
            )


def stop_on_signals():
    """An event set by Ctrl-C or SIGTERM, so that a run ends between two steps."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
    return stop


def train(run, batches, validate, config, total_steps, last_step):
    """The loop, from run.step to last_step or a signal."""
    runtime, stop, recent = run.runtime, stop_on_signals(), Recent()
    model = runtime.distribute(run.model)
    bar = tqdm(total=last_step, initial=run.step, unit="step", disable=not runtime.is_main)
    for x, doys in batches:
        # one step
        rate = learning_rate(run.step, total_steps, config)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        x, doys = runtime.to_device(x, doys)
        loss, parts, c = training_loss(model, x, doys, config, runtime, run.step)
        loss.backward()
        parts["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        run.optimiser.step()
        run.optimiser.zero_grad()
        recent.add(run.step, rate, parts, x)
        run.step += 1

        # log, validate, save; a loss that is not finite ends the run in recent.summary
        due = {
            key: run.step == last_step or run.step % config[f"{key}_interval"] == 0
            for key in ("log", "val", "checkpoint")
        }
        stopping = runtime.any(stop.is_set(), now=any(due.values()))
        if not stopping and not any(due.values()):
            continue
        line = {"step": run.step, "epoch": run.step * config["epochs"] / total_steps}
        line |= {"learning_rate": rate, **recent.summary(runtime.world_size)}
        bar.update(run.step - bar.n)
        bar.set_postfix_str(f"loss {line['loss']:.2f}, {line['samples_per_second']:.0f} samples/s")
        if due["val"]:
            line |= validate(run.model)
            draw_correlation(c, run, config)
        run.report(line, due["val"])
        if due["checkpoint"] or stopping:
            run.save("last.pt")
        recent.restart()
        if stopping:
            break
    bar.close()


def main(config):
    """Train an encoder. Returns a dict: output_dir, and the last line of metrics.jsonl."""
    config = utils.freeze(config)
    check_config(config)

    # data; the folder comes after it, so that a mistake leaves none behind
    runtime = utils.start_runtime(config["device"])
    make_simulated_tiles(config, runtime)
    train_set, val_set, labelled, picture_tile = open_data(config, runtime)
    output_dir = utils.make_output_dir(
        config["output_dir"] or runtime.agree(time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S"))
    )
    validate = Validation(val_set, labelled, config, runtime)

    # model, optimiser, and where an earlier run of this folder stopped
    run = Run(config, runtime, output_dir, train_set, picture_tile.info.get("classes", {}))
    total_steps = config["epochs"] * train_set.steps_per_epoch
    last_step = min(total_steps, config["max_steps"] or total_steps)
    if runtime.is_main:
        utils.write_json(output_dir / "config.json", dict(config))
        print(
            f"{config['dataset_name']}: {len(train_set.tiles)} tiles, {train_set.num_bands} bands, "
            f"{train_set.num_pixels} training and {val_set.num_pixels} validation pixels; "
            f"{config['backbone']} on {runtime.device}, steps {run.step} to {last_step}"
        )
    if not run.resumed:
        run.log.line({"step": 0, **validate(run.model)})  # the untrained encoder, to compare with

    # loop
    train_set.set_steps(run.step, last_step)
    workers = runtime.workers(config["num_workers"])
    batches = iterate_batches(train_set, workers, pin_memory=runtime.on_gpu)
    train(run, batches, validate, config, total_steps, last_step)

    # wrap up
    if runtime.is_main and run.step < last_step:
        print(f"stopped at step {run.step}; the same command with output_dir={output_dir} goes on")
    elif runtime.is_main:
        picture = output_dir / "false_color.png"
        backbone = run.model.backbone
        if draw_false_color(backbone, picture_tile, train_set, config, runtime, picture):
            run.log.images({"false_color": picture}, run.step)
            print(f"{picture}: representations of {picture_tile.title} as false colour")
        print(f"{output_dir / 'cross_correlation.png'}: of the projections of two views")
        print(f"{output_dir / 'best.pt'}: best checkpoint, score {run.best_score:.3f}")
    run.log.finish()
    return {"output_dir": output_dir, **run.line}


if __name__ == "__main__":
    utils.run_script(main, run_config, __doc__)
