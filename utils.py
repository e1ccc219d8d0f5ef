"""What two or more scripts share: overrides, processes and devices, wandb, checkpoints, pictures.

Nothing here knows a network's inside or a file's layout.
"""

import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rasterio
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from sklearn.decomposition import PCA
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from transforms import clear_steps, even_draws, standardise

FORMAT_VERSION = 1  # of checkpoints

WORLDCOVER = {  # classes of ESA WorldCover and their official colours; 0, no data, is no class
    10: {"name": "Tree cover", "color": "#006400"},
    20: {"name": "Shrubland", "color": "#ffbb22"},
    30: {"name": "Grassland", "color": "#ffff4c"},
    40: {"name": "Cropland", "color": "#f096ff"},
    50: {"name": "Built-up", "color": "#fa0000"},
    60: {"name": "Bare / sparse vegetation", "color": "#b4b4b4"},
    70: {"name": "Snow and ice", "color": "#f0f0f0"},
    80: {"name": "Permanent water bodies", "color": "#0064c8"},
    90: {"name": "Herbaceous wetland", "color": "#0096a0"},
    95: {"name": "Mangroves", "color": "#00cf75"},
    100: {"name": "Moss and lichen", "color": "#fae6a0"},
}


class InputError(ValueError):
    """A user's mistake (file, value or argument), told in one line."""


# ---- command line ------------------------------------------------------------------------------


def override(run_config, arguments):
    """run_config with `key=value` arguments put in; the default's type is the schema.

    Raises InputError that names the key and shows the present value.
    """
    config = dict(run_config)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in config:
            raise InputError(f"{argument}: wanted key=value with key one of {', '.join(config)}")
        config[key] = _parse(key, text, run_config[key])
    return config


def _parse(key, text, default):
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key}={text}: wanted true or false (now {str(default).lower()})")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{key}={text}: wanted {name} (now {default})") from None
    if value != value:
        raise InputError(f"{key}={text}: wanted a number (now {default})")
    return value


def check_choice(config, key, choices):
    """Raise InputError where config[key] is not one of the choices."""
    if config[key] not in choices:
        raise InputError(f"{key}={config[key]}: wanted one of {', '.join(map(str, choices))}")


def check_least(config, least, *keys):
    """Raise InputError where one of the keys' values is smaller than `least`."""
    for key in keys:
        if config[key] < least:
            raise InputError(f"{key}={config[key]}: wanted {least} or more")


def run_script(main, run_config, docstring):
    """Call main with the overridden config; a user's mistake ends in one line and status 1."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(docstring.strip(), "\n\nKeys and their defaults:")
        print("\n".join(f"  {key}={value}" for key, value in run_config.items()))
        return
    try:
        main(override(run_config, sys.argv[1:]))
    except (InputError, FloatingPointError, OSError) as error:
        # a loader worker's mistake comes with its traceback in front; the last line tells it
        line = str(error).strip().splitlines()[-1].removeprefix("utils.InputError: ")
        raise SystemExit(f"error: {line}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def freeze(config):
    """A read-only view of the config: what main has checked does not change behind its back."""
    return MappingProxyType(dict(config))


# ---- process and device --------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where a script runs. The only place that knows of CUDA, precision and process groups."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def autocast(self):
        """bf16 on a GPU; float32 on the CPU, where bf16 is slower."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_gpu)

    def compile(self, module):
        """Compile the module in place on a GPU: its keys and its type stay what they are."""
        if self.on_gpu:
            module.compile()

    def distribute(self, module):
        """The module with gradients averaged over the processes."""
        if self.world_size == 1:
            return module
        return torch.nn.parallel.DistributedDataParallel(module)

    def to_device(self, *tensors):
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def workers(self, num_workers):
        """Loader processes; -1: none on the CPU, whose cores train, and up to 8 for a GPU."""
        if num_workers >= 0:
            return num_workers
        return min(8, (os.cpu_count() or 1) // self.world_size) if self.on_gpu else 0

    @property
    def block_pixels(self):
        """Pixels that are read at once to be mapped."""
        return 1 << 16 if self.on_gpu else 1 << 13

    @property
    def batch_steps(self):
        """Steps of series that are encoded at once: as many as keep a GPU busy or a cache warm."""
        return 1 << 20 if self.on_gpu else 1 << 12

    @property
    def pad_steps(self):
        """Series are padded to a multiple of it: few shapes for a GPU, no padding on the CPU."""
        return 8 if self.on_gpu else 1

    def wait(self):
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, value):
        """The first process's value, in all of them."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def any(self, flag, now=True):
        """Whether any process says so; several processes ask each other only where `now`."""
        if self.world_size == 1 or not now:
            return flag and self.world_size == 1
        answer = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer)


def start_runtime(device="auto"):
    """Device, precision and, under torchrun, the process group.

    device: "auto" (a GPU where there is one), "cpu", "cuda". Raises InputError for another, or for
    a GPU that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device}: wanted auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("device=cuda: found no CUDA device, wanted one (or device=cpu)")
    use_gpu = has_gpu and device != "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    if use_gpu:
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_gpu else "gloo")
    return Runtime(
        torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"), rank, world_size
    )


# ---- output folder, wandb ------------------------------------------------------------------------


def make_output_dir(path):
    """Make the folder and see that files can be written there; else InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output_dir={path}: not writable ({error.strerror})") from None
    return path


@contextmanager
def written_beside(path):
    """Yield a path to write to; on success it takes the place of `path`, which is never half."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    with written_beside(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


class RunLog:
    """metrics.jsonl and the wandb run of a script; silent on all processes but the first."""

    def __init__(self, file, run):
        self.file, self.run = file, run
        self.run_id = run.id if run else ""

    def line(self, metrics):
        """Log numbers; metrics["step"] counts up."""
        if self.file:
            with open(self.file, "a") as lines:
                lines.write(json.dumps(metrics) + "\n")
        if self.run:
            self.run.log(metrics, step=metrics["step"])

    def images(self, files, step=None):
        """Log pictures, {name: path of a PNG}."""
        if self.run:
            self.run.log({name: wandb.Image(str(file)) for name, file in files.items()}, step=step)

    def finish(self):
        if self.run:
            self.run.finish()


def start_log(config, job_type, output_dir, runtime, run_id=""):
    """Begin the log of a script in output_dir.

    config["wandb_mode"]: auto (online where the user is logged in, else offline), online, offline,
    disabled. Where the server cannot be reached the run is logged offline. run_id: of a wandb run
    to go on with.
    """
    if not runtime.is_main:
        return RunLog(None, None)
    check_choice(config, "wandb_mode", ("auto", "online", "offline", "disabled"))
    file, mode = output_dir / "metrics.jsonl", config["wandb_mode"]
    if mode == "auto" and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        mode = os.environ["WANDB_MODE"]
    elif mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"
        if mode == "offline":
            print("wandb: not logged in, so the run is logged offline (wandb sync uploads it)")
    if mode == "disabled":
        return RunLog(file, None)
    options = {
        "project": "barlow-twins-sentinel-2",
        "job_type": job_type,
        "config": dict(config),
        "dir": str(output_dir),
        "id": run_id or None,
        "resume": "allow" if run_id else None,
        "reinit": "finish_previous",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return RunLog(file, wandb.init(mode=attempt, **options))
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            print(f"wandb: {attempt} logging failed ({str(error).splitlines()[0]})")
    return RunLog(file, None)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path, kind, **content):
    """Write a checkpoint beside `path` and rename it. kind: "pretrained" or "classifier"."""
    with written_beside(path) as part:
        torch.save({"format": FORMAT_VERSION, "kind": kind, **content}, part)


def load_checkpoint(path, kinds=("pretrained", "classifier")):
    """Read a checkpoint of one of the kinds onto the CPU; raises InputError for anything else."""
    if not path:
        raise InputError(f"checkpoint_path: wanted a {' or '.join(kinds)} checkpoint, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: found no file, wanted a checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a file that is cut off or foreign
        raise InputError(
            f"{path}: found no whole checkpoint ({type(error).__name__}), wanted one of ours"
        ) from None
    if not isinstance(content, dict) or "format" not in content or "kind" not in content:
        raise InputError(f"{path}: found a file of another program, wanted a checkpoint of ours")
    if content["format"] != FORMAT_VERSION:
        raise InputError(f"{path}: found format {content['format']}, wanted {FORMAT_VERSION}")
    if content["kind"] not in kinds:
        raise InputError(
            f"{path}: found a {content['kind']} checkpoint, wanted a {' or '.join(kinds)} one"
        )
    return content


# ---- representations -----------------------------------------------------------------------------


def rankme(representations):
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values' shares.

    representations: (N, D), several thousand rows for a steady value.
    Returns rankme in 1 .. D and its normalised form, entropy / log D, in 0 .. 1.
    """
    singular = torch.linalg.svdvals(torch.as_tensor(representations).double())
    shares = singular / singular.sum() + 1e-7
    entropy = float(-(shares * shares.log()).sum())
    return math.exp(entropy), entropy / math.log(representations.shape[1])


def encode_series(module, x, doys, runtime, draws=0):
    """What a backbone or classifier gives for whole series; deterministic, pixel by pixel.

    draws: 0 reads all clear observations at once (a module that takes a fixed number of steps: 8
    draws); else so many even draws of its `sample_size` steps, whose outputs are averaged.
    x: (N, T, B) standardised and doys: (N, T), padded with doy 0 at the end; on the CPU or GPU.
    Returns (N, D) float32 on the CPU, or a tuple of such where the module does.
    """
    x, doys = runtime.to_device(x, doys)
    if not module.any_length:
        draws = draws or 8
    batches = _split_by_length((doys > 0).sum(1).cpu().numpy(), module, runtime, draws)
    parts = []
    for places, length in batches:
        where = torch.from_numpy(places).to(x.device)
        parts.append(_encode_batch(module, x[where, :length], doys[where, :length], runtime, draws))
    order = np.argsort(np.concatenate([places for places, _ in batches]))
    return _join(parts, torch.from_numpy(order))


def _split_by_length(lengths, module, runtime, draws):
    """Split series into batches of alike length, so that next to nothing is computed for padding.

    lengths: (N,) clear observations. Returns a list of (places (n,) int, length): no batch holds
    more than `runtime.batch_steps` steps unless it is of one series.
    """
    longest = -(-lengths // runtime.pad_steps) * runtime.pad_steps
    if draws:  # each costs the same, and reads all of its series
        longest = np.full(len(lengths), lengths.max(initial=1))
    batches = []
    for length in np.unique(longest).tolist():
        places = np.flatnonzero(longest == length)
        size = max(1, runtime.batch_steps // (draws * module.sample_size or length))
        batches += [(places[i : i + size], length) for i in range(0, len(places), size)]
    return batches


def _encode_batch(module, x, doys, runtime, draws):
    with torch.no_grad(), runtime.autocast():
        if not draws:
            padding = doys == 0
            return _map(torch.Tensor.float, module(x, doys, padding if padding.any() else None))
        x, doys = even_draws(x, doys, module.sample_size, draws)
        y = module(x.flatten(0, 1), doys.flatten(0, 1))
        return _map(lambda part: part.float().unflatten(0, x.shape[:2]).mean(1), y)


def _map(function, value):
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


def _join(parts, order):
    if isinstance(parts[0], tuple):
        return tuple(_join(part, order) for part in zip(*parts, strict=True))
    return torch.cat(parts).cpu()[order]


def extract_representations(module, tile, mean, std, min_valid, runtime, stride=1, draws=0):
    """Walk over a tile in blocks of rows and yield what `encode_series` gives for its pixels.

    module: a backbone or classifier in eval mode. stride: only every so many-th row and column (a
    quick look).
    Yields (rows, row, column, output) of each block: (first, last + 1), and of its pixels with at
    least `min_valid` clear observations (N,) int, (N,) int, (N, D) float32 on the CPU.
    """
    counts, width = tile.clear_counts(), tile.shape[2]
    mean, std = runtime.to_device(mean, std)
    for first, last in tile.row_blocks(runtime.block_pixels):
        wanted = counts[first:last] >= min_valid
        wanted[(np.arange(first, last) % stride) > 0] = False
        wanted[:, (np.arange(width) % stride) > 0] = False
        pixels = first * width + np.flatnonzero(wanted)
        if len(pixels):
            steps = clear_steps(tile.read_clear(pixels))
            bands, doys = runtime.to_device(*tile.read_steps(pixels, steps))
            y = encode_series(module, standardise(bands, mean, std), doys, runtime, draws)
            yield (first, last), pixels // width, pixels % width, y


# ---- maps on disk --------------------------------------------------------------------------------


def _load_npy(path, wanted):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: found no file, wanted {wanted}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: found no readable array ({error}), wanted {wanted}") from None


def read_map(path, shape=()):
    """A (H, W) array of a .npy file, memory-mapped; InputError for another shape than wanted."""
    array = _load_npy(path, "a map (.npy)")
    if array.ndim != 2 or (shape and array.shape != shape):
        raise InputError(f"{path}: found shape {array.shape}, wanted {shape or '(H, W)'}")
    return array


def scales_path(path):
    """Where the scales of an int8 representation map lie: beside it, <name>_scales.npy."""
    path = Path(path)
    return path.with_name(f"{path.stem}_scales.npy")


def open_representations(path):
    """A representation map on disk: memory map (H, W, D), and the scales (H, W) of int8 or None.

    Raises InputError for anything else.
    """
    array = _load_npy(path, "a representation map (.npy)")
    if array.ndim != 3 or array.dtype not in (np.float32, np.float16, np.int8):
        raise InputError(
            f"{path}: found {array.dtype} {array.shape}, wanted float32, float16 or int8 (H, W, D)"
        )
    scales = read_map(scales_path(path), array.shape[:2]) if array.dtype == np.int8 else None
    return array, scales


def read_representations(path, rows=slice(None)):
    """Rows of a representation map as float32 (rows, W, D), NaN where there is no data."""
    array, scales = open_representations(path)
    values = array[rows].astype(np.float32)
    return values if scales is None else values * scales[rows, :, None]


def write_geotiff(path, array, georeference, nodata, legend=None):
    """Write (H, W) or (H, W, bands) as a tiled, compressed GeoTIFF.

    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and the class names in the .aux.xml beside the file.
    """
    bands = array[..., None] if array.ndim == 2 else array
    profile = {
        "driver": "GTiff",
        "height": bands.shape[0],
        "width": bands.shape[1],
        "count": bands.shape[2],
        "dtype": bands.dtype,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
    }
    if bands.shape[2] == 4:
        profile |= {"photometric": "RGB", "ALPHA": "YES"}
    with written_beside(path) as part, rasterio.open(part, "w", **profile) as file:
        file.write(np.moveaxis(bands, -1, 0))
        if legend:
            colors = {code: matplotlib.colors.to_rgba(e["color"]) for code, e in legend.items()}
            colors = {code: tuple(round(255 * c) for c in rgba) for code, rgba in colors.items()}
            file.write_colormap(1, {0: (0, 0, 0, 0)} | colors)
    if legend:
        _write_category_names(path, legend)


def _write_category_names(path, legend):
    """Class names where GDAL and QGIS look for them: <path>.aux.xml, one name a code from 0 up."""
    dataset = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(dataset, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for code in range(max(legend) + 1):
        entry = ElementTree.SubElement(names, "Category")
        entry.text = legend[code]["name"] if code in legend else "no data" if code == 0 else ""
    with written_beside(f"{path}.aux.xml") as part:
        ElementTree.ElementTree(dataset).write(part)


def focal_loss(logits, target, gamma, weight=None):
    """Focal Loss (Lin et al. 2017), in float32: cross-entropy times (1 - p)^gamma; gamma 0: plain.

    logits: (N, C); target: (N,) class numbers; weight: (C,) of the classes, or None.
    """
    loss = F.cross_entropy(logits.float(), target, weight=weight, reduction="none")
    if gamma:
        chance = logits.float().softmax(1).gather(1, target[:, None])[:, 0]
        loss = (1 - chance) ** gamma * loss
    return loss.mean() if weight is None else loss.sum() / weight[target].sum()


# ---- pictures ------------------------------------------------------------------------------------


def fit_basis(pixels):
    """False-colour basis: three principal components and the percentiles 2 and 98 along each.

    pixels: (N, D) representations, N > 3 of valid pixels. Returns a dict of float32 arrays: mean
    (D,), components (3, D), low (3,), high (3,).
    """
    pca = PCA(3, random_state=0).fit(pixels)
    low, high = np.percentile(pca.transform(pixels), (2, 98), axis=0)
    basis = {"mean": pca.mean_, "components": pca.components_, "low": low, "high": high}
    return {name: np.asarray(values, np.float32) for name, values in basis.items()}


def apply_basis(basis, representations):
    """Representations (.., D), NaN where there is no data, to RGBA (.., 4) uint8.

    A pixel's colour depends on its representation and the basis alone; no data is transparent.
    """
    valid = np.isfinite(representations).all(-1)
    pixels = representations[valid].astype(np.float32)
    places = (pixels - basis["mean"]) @ basis["components"].T
    places = (places - basis["low"]) / np.maximum(basis["high"] - basis["low"], 1e-12)
    rgba = np.zeros((*valid.shape, 4), np.uint8)
    rgba[valid, :3] = (places.clip(0, 1) * 255).round()
    rgba[valid, 3] = 255
    return rgba


def class_legend(codes, classes):
    """{code: {"name", "color"}} of class codes, in order.

    classes: {"10": {"name": .., "color": ..}} as in tile.json, or empty; what it does not tell
    comes from WorldCover where it names none of the codes, else it is made up. 0 is no class.
    """
    legend, made_up = {}, plt.get_cmap("tab20")
    for index, code in enumerate(sorted(int(code) for code in codes if int(code) > 0)):
        told = classes.get(str(code), {}) if classes else WORLDCOVER.get(code, {})
        color = matplotlib.colors.to_hex(made_up(index % 20))
        legend[code] = {"name": f"class {code}", "color": color} | told
    return legend


def plot_class_map(class_map, legend, path, title=""):
    """Draw a map of class codes (H, W) with its legend to a PNG; 0 is no data and transparent."""
    rgba = np.zeros((*class_map.shape, 4))
    for code, entry in legend.items():
        rgba[class_map == code] = matplotlib.colors.to_rgba(entry["color"])
    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    axes.imshow(rgba, interpolation="none")
    axes.set_title(title)
    axes.set_axis_off()
    handles = [
        matplotlib.patches.Patch(color=entry["color"], label=f"{code} {entry['name']}")
        for code, entry in legend.items()
        if (class_map == code).any()
    ]
    if (class_map == 0).any():
        handles.append(matplotlib.patches.Patch(fc="none", ec="gray", label="no data"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    if path:
        save_figure(figure, path)
    return figure


def plot_confusion(matrix, legend, path, title=""):
    """Draw a confusion matrix (classes, classes) of counts, rows labelled, columns predicted."""
    names = [entry["name"] for entry in legend.values()]
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 3 + 0.5 * len(names)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, int(count), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="labelled", title=title)
    figure.colorbar(image, label="share of the labelled")
    save_figure(figure, path)


def score_classes(labels, predicted, legend):
    """The full report of a classification, as plain numbers for JSON.

    labels, predicted: (N,) class codes. Returns overall_accuracy, macro_f1 and weighted_f1 (over
    the classes that occur), per_class (precision, recall, f1, support by code) and the confusion
    matrix, whose rows and columns follow `classes`.
    """
    codes = list(legend)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=codes, zero_division=0
    )
    rows = zip(codes, precision, recall, f1, support, strict=True)
    return {
        "overall_accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "weighted_f1": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
        "per_class": {
            str(code): {
                "name": legend[code]["name"],
                "precision": float(p),
                "recall": float(r),
                "f1": float(f),
                "support": int(n),
            }
            for code, p, r, f, n in rows
        },
        "confusion_matrix": confusion_matrix(labels, predicted, labels=codes).tolist(),
        "classes": {str(code): entry for code, entry in legend.items()},
    }


def write_report(scores, legend, output_dir, title, log):
    """metrics.json and confusion_matrix.png of `score_classes`, to the folder, wandb and screen."""
    write_json(output_dir / "metrics.json", scores)
    picture = output_dir / "confusion_matrix.png"
    plot_confusion(np.array(scores["confusion_matrix"]), legend, picture, title)
    log.images({"confusion_matrix": picture})
    print_scores(scores)
    print(f"{picture}: {title}")


def print_scores(scores):
    """Print a report of `score_classes`."""
    print(
        f"overall accuracy {scores['overall_accuracy']:.3f}  macro-F1 {scores['macro_f1']:.3f}  "
        f"weighted F1 {scores['weighted_f1']:.3f}"
    )
    for code, row in scores["per_class"].items():
        print(
            f"{code:>4} {row['name']:28.28s} precision {row['precision']:.3f}  "
            f"recall {row['recall']:.3f}  F1 {row['f1']:.3f}  support {row['support']}"
        )


def plot_cross_corr(correlation, path, title=""):
    """Draw a cross-correlation matrix (P, P) to a PNG, red 1, white 0, blue -1."""
    figure, axes = plt.subplots(figsize=(5.5, 4.8), layout="constrained")
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
    axes.set(title=title, xlabel="dimension, view B", ylabel="dimension, view A")
    figure.colorbar(image, label="cross-correlation")
    save_figure(figure, path)


def save_figure(figure, path):
    with written_beside(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
