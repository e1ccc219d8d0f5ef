"""Change between the maps of two years: how far each pixel moved, and which classes became which.

Shapes: H x W pixels of a map, N pixels, D dimensions of a representation, G square blocks of a map,
C classes.
"""

import math
from pathlib import Path
from typing import NamedTuple

from running.errors import InputError, notice
from running.files import Watch, describe_files
from running.tile_json import find_years, is_georeferenced, match_classes

import numpy as np
from scipy.special import boxcox
from scipy.stats import norm

from maps.land_cover import class_legend, count_classes, row_hectares
from maps.reader import (
    RepresentationMap,
    check_same_place,
    check_together,
    find_labels,
    read_codes,
    read_map,
    row_blocks,
    scales_path,
)

UNCHANGED, CHANGED, CERTAIN = 1, 2, 3  # codes of changed.npy; 0: no data in one of the years
CHANGE_LEGEND = {
    UNCHANGED: {"name": "not changed", "color": "#dcdcdc"},
    CHANGED: {"name": "changed", "color": "#e69f00"},
    CERTAIN: {"name": "changed, and both classes are certain", "color": "#882255"},
}
CLASS_FILES = ("classification_map.npy", "confidence.npy")
KEPT = 0.8  # share of the pixels, those with the least change, that no change is learnt from
ROUNDS = 3  # of choosing them
ENOUGH = 20  # pixels for each dimension: with half of them false alarms are two to three times more
POWERS = np.linspace(0, 1 / 3, 11)  # from the logarithm to the root that makes chi-squared normal
BLOCKS = 10  # of a map along its longer side, for intervals ..
MIN_BLOCK = 16  # .. but none smaller than this, in pixels: a field should not fill several
BOOTSTRAPS = 1000


class Years:
    """The maps of two years of one place, read together in blocks of rows.

    before, after: RepresentationMap of each; both: a list of them. path, shape (H, W, D), info: of
    the place. names: of the years. legend: of the class maps, {} where one year has none.
    Raises InputError for maps of different places, shapes or checkpoints.
    """

    def __init__(self, before_path, after_path):
        paths = [Path(path) for path in (before_path, after_path)]
        paths = [path / "representation_map.npy" if path.is_dir() else path for path in paths]
        if paths[0].resolve() == paths[1].resolve():
            raise InputError(f"{paths[1]}: found the same map twice, wanted that of another year")
        self.before, self.after = self.both = [RepresentationMap(path) for path in paths]
        self.path, self.shape = self.after.path, self.before.shape
        check_together(self.both)
        if self.after.shape != self.shape:
            raise InputError(
                f"{self.path}: found {self.after.shape[0]} x {self.after.shape[1]} pixels, wanted "
                f"{self.shape[0]} x {self.shape[1]} as {self.before.path}"
            )
        check_same_place(self.path, self.after.info, self.before.info)
        infos = [one.info for one in self.both]
        if not all(map(is_georeferenced, infos)) and self.before.title != self.after.title:
            notice(f"{self.path}: not known whether it shows the place of {self.before.path}")
        self.info = {key: infos[0][key] for key in ("crs", "transform") if key in infos[0]}
        self.names = [find_years(info) for info in infos]
        if not all(self.names) or self.names[0] == self.names[1]:
            self.names = ["before", "after"]
        self.watch = [Watch(path.parent, CLASS_FILES) for path in paths]
        self.legend = self._read_legend()

    def _read_legend(self):
        folders = [one.path.parent for one in self.both]
        if not all((folder / name).exists() for folder in folders for name in CLASS_FILES):
            return {}
        counts = sum(count_classes(read_codes(f / CLASS_FILES[0], self.shape[:2])) for f in folders)
        return class_legend(np.flatnonzero(counts.sum(0)), self.before.info.get("classes", {}))

    def read(self, name, kind, rows):
        """Rows, a slice, of the maps of both years of a name in CLASS_FILES: (2, rows, W)."""
        for watch in self.watch:
            watch.check()
        folders = [one.path.parent for one in self.both]
        return np.stack([read_map(f / name, self.shape[:2], kind)[rows] for f in folders])

    def read_classes(self, rows):
        """Class codes of both years of rows, a slice: (2, rows, W) uint8."""
        return self.read(CLASS_FILES[0], "iu", rows).astype(np.uint8)

    def blocks(self, stride=1, start=0):
        """Yield (first row, representations of both years (rows, W, 2 D)), NaN for no data.

        stride, start: as of `RepresentationMap.blocks`.
        """
        pairs = zip(*(one.blocks(stride, start) for one in self.both), strict=True)
        for (first, before), (_, after) in pairs:
            yield first, np.concatenate([before, after], -1)

    def describe(self):
        """What a comparison is made from, for change.json."""
        keys = ("tile", "tile_path", "tile_files", "checkpoint_sha256", "years")
        return {
            name: {
                "path": str(one.path.resolve()),
                "files": describe_files(
                    one.path.parent, [one.path.name, scales_path(one.path).name, *CLASS_FILES]
                ),
                **{key: one.info[key] for key in keys if key in one.info},
            }
            for name, one in zip(("before", "after"), self.both, strict=True)
        }


# ---- distances -----------------------------------------------------------------------------------


class NoChange(NamedTuple):
    """How representations differ between two years where nothing has changed.

    center (D,): mean difference. whitening (D, D): makes the differences alike in all directions.
    power: with which Box and Cox's transform of their squared length is normal; median, deviation:
    of that.
    """

    center: np.ndarray
    whitening: np.ndarray
    power: float
    median: float
    deviation: float

    def scores(self, pair):
        """How unusual the difference of each pixel is, in standard deviations: (..) float32.

        pair: (.., 2 D) representations of both years. About a share norm.sf(x) of the unchanged
        pixels is above x. NaN where one of the years has no data.
        """
        before, after = np.split(pair, 2, -1)
        length = squared_length(after - before - self.center, self.whitening)
        return ((boxcox(length, self.power) - self.median) / self.deviation).astype(np.float32)


def squared_length(difference, whitening):
    """Squared lengths (..) of differences (.., D), whitened; above 0."""
    return np.maximum(np.square(difference @ whitening).sum(-1), np.finfo(np.float32).tiny)


def fit_change(sample, path):
    """The NoChange of a sample (N, 2 D) of pixels with data in both years.

    Most pixels are taken to be unchanged: mean and covariance, which is shrunk half way to a
    sphere, are those of the share KEPT that moved least, found in ROUNDS. Median and deviation are
    robust: of all, but from quartiles and the median absolute deviation.
    path: of a map, for the InputError where nothing differs, and a notice where the pixels are few.
    """
    before, after = np.split(sample.astype(np.float64), 2, -1)
    difference = after - before
    count, size = difference.shape
    if count < ENOUGH * size:
        notice(
            f"{path}: found {count} pixels to learn no change of {size} dimensions from, wanted "
            f"{ENOUGH * size} or more: more than false_alarms may be called changed (a larger map "
            "or sample_pixels, or fewer dimensions= of infer.py)"
        )
    kept = np.ones(len(sample), bool)
    for _ in range(ROUNDS):
        center = difference[kept].mean(0)
        covariance = np.cov(difference[kept].T)
        sphere = np.trace(covariance) / len(covariance)
        if not sphere > 0:
            raise InputError(f"{path}: found what the other map has, wanted another year")
        covariance += sphere * np.eye(len(covariance))
        whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T
        length = squared_length(difference - center, whitening)
        kept = length <= np.quantile(length, KEPT)
    power = min(POWERS, key=lambda power: _skewness(boxcox(length, power)))
    values = boxcox(length, power)
    deviation = np.median(np.abs(values - np.median(values))) / norm.ppf(0.75)
    arrays = (array.astype(np.float32) for array in (center, whitening))
    return NoChange(*arrays, float(power), float(np.median(values)), max(float(deviation), 1e-6))


def _skewness(values):
    """How far the quartiles of values are from symmetric, 0 to 1."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return abs(high + low - 2 * middle) / max(high - low, 1e-12)


def find_change(scores, threshold, classes=None, confidence=None, least=1):
    """Codes of changed.npy, (rows, W) uint8, of scores (rows, W).

    classes, confidence: (2, rows, W) of both years, or None where they are not known. least: the
    confidence of classes that are certain.
    """
    codes = np.where(scores > threshold, CHANGED, UNCHANGED).astype(np.uint8)
    if classes is not None:
        is_certain = (confidence >= least).all(0) & (classes[0] != classes[1])
        codes[(codes == CHANGED) & is_certain] = CERTAIN
    codes[np.isnan(scores)] = 0
    return codes


# ---- areas ---------------------------------------------------------------------------------------


class Areas(NamedTuple):
    """Areas of a comparison in each of G blocks of the map, in hectares or, `unit`, in pixels.

    states: (G, 4) of each code of changed.npy. matrix: (G, C, C) of each class of the legend before
    and after, where what has not changed keeps its class. certain: (G, C, C) of certain changes.
    """

    unit: str
    states: np.ndarray
    matrix: np.ndarray
    certain: np.ndarray

    def interval(self, areas, seed=0):
        """95 % interval of the sum over blocks of areas (G, ..): low, high (..).

        From whole blocks resampled with replacement, since neighbours change together. It says how
        far a sum depends on which blocks the map has, not how right the map is.
        """
        count = len(areas)
        times = np.random.default_rng(seed).multinomial(count, [1 / count] * count, BOOTSTRAPS)
        sums = times @ areas.reshape(count, -1)
        return np.percentile(sums, [2.5, 97.5], axis=0).reshape(2, *areas.shape[1:])


def measure_areas(codes, years):
    """The Areas of a map (H, W) of codes as in changed.npy, and of its classes."""
    height, width = codes.shape
    side = max(MIN_BLOCK, -(-max(codes.shape) // BLOCKS))
    columns, num_classes = -(-width // side), len(years.legend)
    num_blocks, place = -(-height // side) * columns, np.zeros(256, np.int64)
    place[list(years.legend)] = np.arange(num_classes)
    hectares = row_hectares(years.info, height, width)
    sizes = np.ones(height) if hectares is None else hectares
    shapes = [(num_blocks, 4), *[(num_blocks, num_classes, num_classes)] * 2]
    sums = [np.zeros(math.prod(shape)) for shape in shapes]
    for first, state in row_blocks(codes):
        rows = np.arange(first, first + len(state))
        size = np.broadcast_to(sizes[rows, None], state.shape)
        block = (rows // side * columns)[:, None] + np.arange(width) // side
        sums[0] += np.bincount((block * 4 + state).ravel(), size.ravel(), len(sums[0]))
        if num_classes:
            before, after = years.read_classes(slice(first, first + len(state)))
            after = np.where(state >= CHANGED, after, before)
            index = (block * num_classes + place[before]) * num_classes + place[after]
            state = np.where((before > 0) & (after > 0), state, 0)
            for total, is_in in zip(sums[1:], (state > 0, state == CERTAIN), strict=True):
                total += np.bincount(index[is_in], size[is_in], len(total))
    unit = "pixels" if hectares is None else "ha"
    return Areas(unit, *(total.reshape(shape) for total, shape in zip(sums, shapes, strict=True)))


def describe_areas(areas, legend, seed=0):
    """The sums of Areas as plain numbers for change.json, each with its 95 % interval (low, high).

    "matrix", with rows of the class before and columns of that after, in the order of "classes", is
    {} without a legend.
    """
    changed, matrix = areas.states[:, CHANGED:].sum(1), {}
    if legend:
        low, high = areas.interval(areas.matrix, seed)
        sums = {"area": areas.matrix.sum(0), "low": low, "high": high}
        sums["certain"] = areas.certain.sum(0)
        matrix = {name: values.tolist() for name, values in sums.items()}
    return {
        "unit": areas.unit,
        "compared": float(areas.states[:, UNCHANGED:].sum()),
        "changed": float(changed.sum()),
        "interval": areas.interval(changed, seed).tolist(),
        "classes": {str(code): entry["name"] for code, entry in legend.items()},
        "matrix": matrix,
    }


# ---- truth ---------------------------------------------------------------------------------------


def find_truth(truth_path, years):
    """What is known of true change: (words for it, a function), or ("", None) for nothing.

    truth_path: of a map (H, W), 1 or true where the place changed; empty: changed.npy of the later
    tile, else labels of both tiles, compared by the names of their classes. changed.npy says what
    changed since a first year, so it counts where the earlier tile has none. The function gives of
    rows, a slice, where the truth is known and where it is change, both (rows, W) bool.
    """
    earlier, later = (find_labels("", one.info, "changed.npy")[0] for one in years.both)
    if path := truth_path or (later if not earlier else ""):
        truth = read_map(path, years.shape[:2], "biu")
        if truth.min() < 0 or truth.max() > 1:
            raise InputError(f"{path}: found values other than 0 and 1, wanted 1 for change")
        return path, lambda rows: (np.ones_like(truth[rows], bool), truth[rows] > 0)
    found = [find_labels("", one.info) for one in years.both]
    if not all(path for path, _ in found):
        return "", None
    first, second = (read_codes(path, years.shape[:2]) for path, _ in found)
    table = np.array(match_classes(*(info.get("classes", {}) for _, info in found)), np.uint8)

    def read(rows):
        before, after = first[rows], table[second[rows]]
        return (before > 0) & (after > 0), before != after

    return f"labels of both years ({found[0][0]}, {found[1][0]})", read


def score_change(codes, truth):
    """Of a map (H, W) of codes as in changed.npy: recall, false_alarms and precision, or None.

    truth: the function of `find_truth`. recall: share of the true change that is called so;
    false_alarms: share of the rest that is; precision: share of true change in what is called so.
    """
    counts = np.zeros((2, 2), np.int64)  # of truth and of what was found
    for first, block in row_blocks(codes):
        known, changed = truth(slice(first, first + len(block)))
        seen = known & (block > 0)
        pairs = changed[seen] * 2 + (block[seen] >= CHANGED)
        counts += np.bincount(pairs, minlength=4).reshape(2, 2)
    (right, false), (_, hit) = counts.tolist()
    shares = {
        "recall": (hit, counts[1].sum()),
        "false_alarms": (false, right + false),
        "precision": (hit, counts[:, 1].sum()),
    }
    return {name: float(part / whole) if whole else None for name, (part, whole) in shares.items()}
