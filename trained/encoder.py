"""A trained encoder from Python: numpy arrays in, numpy arrays out.

    from trained.encoder import Encoder

    encoder = Encoder.load("checkpoints/landcover/best.pt")
    embeddings = encoder.embed(reflectance, dates)  # (N, T, B) and (T,): (N, D)
    codes, names, probabilities = encoder.classify(reflectance, dates)

A pixel gets the numbers that infer.py writes for it with precision=float32. docs/python.md has an
example.

Shapes: N pixels, T dates, B bands, D dimensions of an embedding, C classes.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from running.checkpoints import KINDS, load_checkpoint
from running.config import check, find_season, in_season
from running.device import Runtime, start_runtime, store_in_bf16
from running.errors import InputError, notice
from running.files import Watch, file_hash
from running.tile_json import TILE_JSON, is_class_table, match_bands

import numpy as np
import torch

from backbones import decode_classes, decode_quantity, load_backbone, load_classifier
from transforms import clear_dates, even_dates, standardise
from utils import BLOCK_BYTES, encode_series

DATES = "days of year 1..366, or dates (numpy, datetime or text like 2021-06-05)"
LOW, HIGH = 2, 20_000  # between them lies the median of reflectance x 10000, of any ground


class Classes(NamedTuple):
    """What `Encoder.classify` finds. Where too few observations are clear: 0, "" and NaN.

    codes (..) uint8; names (..) text; probabilities (.., C) float32, in the order of
    `Encoder.class_names`.
    """

    codes: np.ndarray
    names: np.ndarray
    probabilities: np.ndarray


@dataclass
class Encoder:
    """A checkpoint to encode with, in eval mode. Made by `Encoder.load`.

    module: classifier or backbone. classes: of a classifier that classifies, as in tile.json and in
    the order of its head; else {}. target: of a regressor that estimates, the name, unit, mean and
    std of its quantity in training; else {}. min_valid: clear observations that a pixel needs.
    season: first and last day of year that are read, see `in_season`. size: D of its
    representations, the first of those that the network has.
    """

    path: Path
    checkpoint: dict
    sha256: str
    module: torch.nn.Module
    classes: dict
    target: dict
    min_valid: int
    season: tuple
    size: int
    runtime: Runtime

    def __repr__(self):
        reads = ", ".join(self.bands) or f"{len(self.checkpoint['mean'])} bands"
        gives = self.target.get("name", f"{len(self.classes)} classes")
        return f"Encoder({self.path}: {reads}; {self.size} dimensions, {gives})"

    @classmethod
    def load(
        cls,
        path,
        device="auto",
        classify="auto",
        min_valid=0,
        dimensions=0,
        start="",
        end="",
        precision="float32",
    ):
        """The Encoder of a checkpoint of train.py, train_classification.py or train_regression.py.

        device: "auto" (a GPU where there is one), "cpu" or "cuda". classify: "auto" (where the
        checkpoint is fine-tuned), "true" (refuse others) or "false". min_valid: 0: as in training.
        dimensions: of its representations, the first ones; 0: all. Classes are of all in any case.
        start, end: the season whose observations are read, as the keys of infer.py; "": as in
        training. precision: of products, "float32", "bfloat16" or "auto" (bfloat16 where the
        processor is fast with it).
        Raises InputError for a checkpoint that cannot be used.
        """
        keys = {"device": device, "classify": classify, "min_valid": min_valid}
        keys |= {"precision": precision}
        check(keys | {"dimensions": dimensions, "start": start, "end": end})
        runtime = start_runtime(device, precision)
        kinds = ("classifier",) if classify == "true" else tuple(KINDS)
        with Watch(Path(path).parent, [Path(path).name]):
            checkpoint = load_checkpoint(path, kinds)
            sha256 = file_hash(path)
        has_head = classify != "false" and checkpoint["kind"] != "pretrained"
        module = load_classifier(checkpoint) if has_head else load_backbone(checkpoint)
        size = getattr(module, "backbone", module).latent_dim
        _check_header(path, checkpoint, checkpoint["head"]["num_classes"] if has_head else 0, size)
        header = checkpoint if has_head else {}
        classes, target = header.get("classes", {}), header.get("target", {})
        min_valid = min_valid or checkpoint["config"]["min_valid"]
        if dimensions > size:
            raise InputError(f"dimensions={dimensions}: wanted at most the {size} of {path}")
        module, size = module.to(runtime.device), dimensions or size
        if runtime.in_bf16 and not runtime.on_gpu:
            store_in_bf16(module)
        more = {"classes": classes, "target": target, "min_valid": min_valid, "size": size}
        more["season"] = find_season({"start": start, "end": end}, checkpoint["config"])
        return cls(Path(path), checkpoint, sha256, module, **more, runtime=runtime)

    @property
    def bands(self):
        """Names of the bands that it reads, in its order; [] where training knew none."""
        return self.checkpoint["bands"]

    @property
    def applicability(self):
        """Of `describe_labels`, in evaluation/applicability.py; {} where it is not known."""
        return (self.classes or self.target) and self.checkpoint.get("applicability", {})

    @property
    def precision(self):
        """Of its matrix products: "bfloat16" or "float32"."""
        on_gpu = self.runtime.on_gpu and self.runtime.in_bf16
        stored = {weight.dtype for weight in self.module.parameters()}
        return "bfloat16" if on_gpu or torch.bfloat16 in stored else "float32"

    @property
    def codes(self):
        """The class codes, (C,) uint8."""
        return np.array([int(code) for code in self.classes], np.uint8)

    @property
    def class_names(self):
        """{code: name} of its classes, in the order of the probabilities."""
        return {int(code): entry["name"] for code, entry in self.classes.items()}

    def embed(self, reflectance, dates, masks=None, **keywords):
        """Embeddings (.., D) float32 of series; see `encode` for the arguments."""
        return self.encode(reflectance, dates, masks, **keywords)[0]

    def classify(self, reflectance, dates, masks=None, **keywords):
        """The most probable class of series: `Classes`; see `encode` for the arguments.

        Raises InputError for a checkpoint that is not fine-tuned, too.
        """
        if not self.classes:
            raise InputError(
                f"{self.path}: found a checkpoint without classes, wanted a fine-tuned one "
                "(train_classification.py)"
            )
        return self.choose(self.encode(reflectance, dates, masks, **keywords)[1])

    def estimate(self, reflectance, dates, masks=None, **keywords):
        """The quantity of series, (..) float32, in `target["unit"]`; as `classify` otherwise."""
        if not self.target:
            raise InputError(
                f"{self.path}: found a checkpoint without a quantity, wanted one of "
                "train_regression.py"
            )
        return self.encode(reflectance, dates, masks, **keywords)[1]

    def decode(self, outputs):
        """Of outputs of the head (N, C): probabilities (N, C), or of a regressor values (N,)."""
        if not self.target:
            return decode_classes(outputs, self.checkpoint.get("temperature", 1.0))
        return decode_quantity(outputs, self.target).float()

    def choose(self, probabilities):
        """`Classes` of probabilities (.., C): the most probable class."""
        known = np.isfinite(probabilities).all(-1)
        best = np.where(known, np.nan_to_num(probabilities).argmax(-1) + 1, 0)
        codes, names = np.append(np.uint8(0), self.codes), ["", *self.class_names.values()]
        return Classes(codes[best], np.array(names)[best], probabilities)

    def encode(self, reflectance, dates, masks=None, *, bands=None, scale=1, max_dates=24, draws=0):
        """Embeddings (.., D); and probabilities (.., C), or of a regressor values (..), or None.

        reflectance: (N, T, B), (H, W, T, B) or other axes before T. Times scale it is reflectance x
            10000; scale: 10000 for reflectance of 0 to 1. An observation with NaN in a band, or 0
            in all bands (nodata), is not clear.
        dates: (T,) for all series or (.., T), in any order: days of year 1..366, or dates (numpy,
            datetime or ISO text) of twelve months. 0, None or NaT: no observation.
        masks: (T,) or (.., T), 1 or True for a clear observation; None: all are.
        bands: B names, in any order and with others among them; None: those of training, in order.
        max_dates, draws: as the keys dates and draws of infer.py.
        A pixel with fewer than min_valid clear observations gets NaN. Memory beyond the arrays does
        not grow with the number of pixels. Raises InputError, in one line, for what does not fit.
        """
        reflectance, scale = _check_reflectance(reflectance), float(scale)
        check({"scale": scale, "dates": max_dates, "draws": draws})
        order = self._order_bands(reflectance.shape, bands)
        days = _fit(days_of_year(dates), "dates", reflectance)
        clear = _fit(True if masks is None else _check_masks(masks), "masks", reflectance)
        shape = reflectance.shape[:-2]
        embeddings = np.full((*shape, self.size), np.nan, np.float32)
        shape = shape if self.target else (*shape, len(self.classes))
        answers = np.full(shape, np.nan, np.float32)
        for place in self._blocks(reflectance):
            values = reflectance[place][..., order].astype(np.float32) * np.float32(scale)
            is_clear = clear[place] & (days[place] > 0) & has_data(values)
            is_clear &= in_season(days[place], *self.season)
            check_unit(values[is_clear], scale)
            dates_read = 0 if draws else max_dates
            rows, *found = self._encode_block(values, days[place], is_clear, dates_read, draws)
            target = tuple(index[rows] for index in place)
            embeddings[target] = found[0][:, : self.size].numpy()
            if self.classes or self.target:
                answers[target] = self.decode(found[1]).numpy()
        if reflectance.size and not np.isfinite(embeddings).any():
            notice(
                f"{self.path}: no series has {max(1, self.min_valid)} clear observations, so all "
                "embeddings are NaN: look at masks (1 = clear) and dates"
            )
        return embeddings, answers if self.classes or self.target else None

    def _blocks(self, reflectance):
        """Yield the indices of blocks of series of reflectance (.., T, B): tuples of (n,)."""
        *shape, num_dates, num_bands = reflectance.shape
        rows = max(1, BLOCK_BYTES // (4 * max(1, num_dates) * max(1, num_bands)))
        count, rows = math.prod(shape), min(rows, self.runtime.block_pixels)
        for first in range(0, count, rows):
            yield np.unravel_index(np.arange(first, min(first + rows, count)), tuple(shape))

    def _order_bands(self, shape, names):
        """Index of each band of the checkpoint along the last axis of reflectance."""
        num_bands = len(self.checkpoint["mean"])
        if names is None or not self.bands:
            if shape[-1] != num_bands:
                wanted = ", ".join(self.bands) or "as in training"
                raise InputError(
                    f"reflectance: found {shape[-1]} bands, wanted {num_bands}: {wanted} "
                    "(bands=[..] names those of an array that has others, too)"
                )
            return np.arange(num_bands)
        if len(names) != shape[-1]:
            raise InputError(f"bands: found {len(names)} names, wanted {shape[-1]}, one for each")
        return np.array(match_bands(list(names), self.bands, "bands", self.path))

    def _encode_block(self, values, days, clear, max_dates, draws):
        """Rows that have enough clear observations, their embeddings and logits (or None).

        values (n, T, B) float32, days (n, T), clear (n, T) bool.
        """
        rows = np.flatnonzero(clear.sum(1) >= max(1, self.min_valid))
        order = days[rows].argsort(1, kind="stable")
        in_order = np.take_along_axis(clear[rows], order, 1)
        chosen = even_dates(clear_dates(torch.from_numpy(in_order.T)), max_dates).numpy()
        place = np.take_along_axis(order, chosen.clip(0), 1)
        doys = np.where(chosen < 0, 0, np.take_along_axis(days[rows], place, 1))
        bands = values[rows[:, None], place]  # (n, S, B)
        bands[chosen < 0] = 0  # a NaN in padding would spread
        arrays = (torch.from_numpy(bands), torch.from_numpy(doys))
        mean, std = self.runtime.to_device(self.checkpoint["mean"], self.checkpoint["std"])
        bands, doys = self.runtime.to_device(*arrays)
        x = standardise(bands, mean, std)
        return rows, *encode_series(self.module, x, doys, self.runtime, draws)


def _check_header(path, checkpoint, num_classes, size):
    """Raise InputError where a checkpoint that can be loaded cannot be used.

    num_classes: of its head, 0 where it does not classify; size: D of its representations.
    """
    bands, min_valid = checkpoint["backbone"]["num_bands"], checkpoint["config"]["min_valid"]
    days = checkpoint.get("days", [])  # older checkpoints have none
    temperature = checkpoint.get("temperature", 1.0)
    classifies = num_classes and checkpoint["kind"] == "classifier"
    classes = checkpoint.get("classes") if classifies else {}
    lengths = {len(checkpoint[key]) for key in ("mean", "std", "bands")} - {0}
    if lengths != {bands}:
        found, wanted = (
            f"bands, mean and std of {sorted(lengths)} bands",
            f"{bands} as its backbone",
        )
    elif not 1 <= min_valid <= 65535:
        found, wanted = f"min_valid {min_valid}", "1 to 65535"
    elif not (isinstance(days, list) and all(type(day) is int and 0 < day < 367 for day in days)):
        found, wanted = f"days {days!r:.200}", "a list of days of year 1 to 366"
    elif classifies and not (is_class_table(classes) and len(classes) == num_classes):
        found, wanted = f"classes {classes!r:.200}", f"{num_classes}: {TILE_JSON['classes'][1]}"
    elif num_classes and not (classifies or _is_scaled_target(checkpoint.get("target"))):
        found, wanted = f"target {checkpoint.get('target')!r:.200}", "name, unit, mean and std"
    elif not (type(temperature) is float and 0 < temperature < math.inf):
        found, wanted = f"temperature {temperature!r:.200}", "a number above 0"
    elif num_classes and not _is_applicability(checkpoint.get("applicability"), size):
        found, wanted = "an applicability that cannot be read", "that of train_*.py"
    else:
        return
    raise InputError(f"{path}: found {found}, wanted {wanted}")


def _is_applicability(value, size):
    """Whether a checkpoint's applicability can be used, or is None: older ones have none.

    size: D of its representations.
    """
    if value is None:
        return True
    try:
        shapes = [tuple(value[key].shape) for key in ("mean", "std", "labels")]
        is_finite = all(value[key].isfinite().all() for key in ("mean", "std", "labels"))
        numbers = [float(value[key]) for key in ("distance", "threshold")]
    except (TypeError, KeyError, AttributeError, ValueError):
        return False
    right = shapes[:2] == [(size,)] * 2 and shapes[2][1:] == (size,) and is_finite
    return right and numbers[0] > 0 and math.isfinite(sum(numbers))


def _is_scaled_target(value):
    """Whether a value describes a quantity and how a regressor's outputs are scaled."""
    numbers = isinstance(value, dict) and [value.get("mean"), value.get("std")]
    scaled = numbers and all(type(n) is float and math.isfinite(n) for n in numbers)
    return bool(scaled) and TILE_JSON["target"][0](value)


# ---- arguments -----------------------------------------------------------------------------------


def has_data(values):
    """Whether observations (.., B) have data: a number in each band, and not 0 in all of them."""
    return np.isfinite(values).all(-1) & (values != 0).any(-1)


def check_unit(values, scale):
    """Raise InputError where values, multiplied by scale, cannot be reflectance x 10000."""
    if not len(values):
        return
    values = values[:: max(1, len(values) // 10_000)]
    median = float(np.median(values))
    if not LOW <= median <= HIGH:
        mend = "scale=10000 multiplies reflectance of 0 to 1" if median < LOW else "scale=1"
        times = "" if scale == 1 else f" times scale={scale:g}"
        found = f"a median of {median / scale:.4g}{times}"
        raise InputError(f"reflectance: found {found}, wanted reflectance x 10000 ({mend})")


def _check_reflectance(values):
    values = np.asanyarray(values)
    if values.ndim < 3 or values.dtype.kind not in "iuf":
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"reflectance: found {found}, wanted numbers of shape (.., T, B)")
    return values


def _check_masks(masks):
    masks = np.asarray(masks)
    wrong = masks[(masks != 0) & (masks != 1)] if masks.dtype.kind in "biuf" else masks.ravel()[:1]
    if len(wrong):
        raise InputError(f"masks: found value {wrong[0]}, wanted 0 (not clear) or 1 (clear)")
    return masks.astype(bool)


def _fit(values, name, reflectance):
    """values as (.., T) of reflectance (.., T, B), by a view. Raises InputError."""
    try:
        return np.broadcast_to(values, reflectance.shape[:-1])
    except ValueError:
        hint = (
            "" if reflectance.ndim < 4 else "; of a tile's (T, H, W, B): numpy.moveaxis(.., 0, 2)"
        )
        raise InputError(
            f"{name}: found shape {np.shape(values)} beside reflectance {reflectance.shape}, "
            f"wanted (.., T) as in its (.., T, B){hint}"
        ) from None


def read_dates(values):
    """Dates as datetime64[D], or days of year as int16, in an array of the same shape.

    values: as in `Encoder.encode`; NaT or 0 where there is none. Raises InputError.
    """
    if values is None:
        raise InputError(f"dates: found None, wanted {DATES}")
    values = np.asarray(values)
    if values.dtype.kind in "iuf":
        days = np.nan_to_num(values) if values.dtype.kind == "f" else values
        wrong = days[(days < 0) | (days > 366) | (days != np.round(days))]
        if len(wrong):
            raise InputError(f"dates: found {wrong[0]:.10g}, wanted {DATES}")
        return days.astype(np.int16)
    days = _as_days(values)
    if days is None:
        wrong = next((one for one in values.ravel() if _as_days(one) is None), values.dtype)
        raise InputError(f"dates: found {wrong!s:.40}, wanted {DATES}")
    return days


def _as_days(values):
    """values as datetime64[D], or None where one is no date of 1972 to 2170."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of a time zone: the date is as written
            days = np.asarray(values).astype("datetime64[D]")
    except (ValueError, TypeError):
        return None
    number = days.astype(np.int64)  # since 1970; text like 5 or 20210605 is read as a number
    far = ~np.isnat(days) & ((number < 730) | (number > 200 * 366))
    return None if far.any() else days


def days_of_year(dates):
    """Days of year (.., T) int16 of dates as in `Encoder.encode`; 0 where there is none.

    Raises InputError for dates that cannot be read, or a series of more than twelve months.
    """
    dates = read_dates(dates)
    if dates.dtype.kind != "M" or not dates.size:
        return dates.astype(np.int16)
    known, number = ~np.isnat(dates), dates.astype(np.int64)
    first, last = np.where(known, number, 1 << 40).min(-1), np.where(known, number, -1).max(-1)
    longest = np.argmax(last - first)
    if (last - first).flat[longest] > 365:
        first, last = (np.datetime64(int(one.flat[longest]), "D") for one in (first, last))
        raise InputError(f"dates: found {first} to {last}, wanted a year at most")
    doys = (dates - dates.astype("datetime64[Y]")).astype(np.int64) + 1
    return np.where(known, doys, 0).astype(np.int16)
