"""Sentinel-2 tiles on disk: the tile contract, checked when a tile is opened.

A data set is a folder of tiles, `<base_path>/data/<dataset_name>/processed/MGRS-<id>/`; README.md
("Data structure") lists the files of a tile. Bands and masks stay memory-mapped and are read in
blocks of rows, so the size of a tile or a data set is bounded by the disk alone.

Shapes: H x W pixels, T dates, N chosen pixels, B bands.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from running.errors import InputError, notice
from running.files import atomic_write, open_npy

TRAIN, VALIDATION, TEST = 1, 2, 3  # codes of splits.npy; 0: no labels used, pretraining only
CACHE_PIXELS = 512  # pixels whose whole series fit into a core's own cache
CACHE_FILES = 2000  # most clear counts that are kept


class Tile:
    """One tile of the contract, opened and checked.

    Attributes: name, title (for pictures), path, shape (T, H, W, B), doys (T,) int16, band_mean
    and band_std (B,) float32, info (the content of tile.json), band_names (B names, or empty where
    tile.json does not tell). bands (T, H, W, B) uint16, masks (T, H, W) uint8, labels and splits
    (H, W) uint8 or None are opened as memory maps whenever they are asked for: a map that is let
    go gives its memory and its file handle back, so neither grows with the tiles.
    Raises InputError that names the file, what was found and what was wanted.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.name = Path(os.path.realpath(self.path)).name
        self.shape = self._load("bands.npy", ("T", "H", "W", "B"), np.uint16).shape
        self._load("masks.npy", self.shape[:3], np.uint8)
        self.doys = self._load_doys()
        self.band_mean = self._load_statistic("band_mean.npy")
        self.band_std = self._load_statistic("band_std.npy")
        splits = self.splits
        if splits is not None and splits.max() > TEST:
            self._fail("splits.npy", f"value {splits.max()}", "0, 1, 2 or 3")
        self.has_labels = self.labels is not None
        self.info = read_tile_json(self.path / "tile.json", self.shape)
        self.band_names = self.info.get("bands", [])
        self._check_constant_bands()
        self.title = f"{self.name} (simulated)" if self.info.get("simulated") else self.name

    @property
    def bands(self):
        return self._load("bands.npy", self.shape, np.uint16)

    @property
    def masks(self):
        return self._load("masks.npy", self.shape[:3], np.uint8)

    @property
    def labels(self):
        return self._load("labels.npy", self.shape[1:3], np.uint8, optional=True)

    @property
    def splits(self):
        return self._load("splits.npy", self.shape[1:3], np.uint8, optional=True)

    def _fail(self, name, found, wanted):
        raise InputError(f"{self.path / name}: found {found}, wanted {wanted}")

    def _load(self, name, shape, dtype, optional=False):
        """Memory-map a file and check it. shape: of numbers, or of names where any size is fine."""
        file = self.path / name
        if optional and not file.exists() and not file.is_symlink():
            return None
        array = open_npy(file, f"an array ({', '.join(map(str, shape))})")
        fits = array.ndim == len(shape) and all(
            isinstance(wanted, str) or size == wanted
            for size, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits or 0 in array.shape:
            self._fail(name, f"shape {array.shape}", f"({', '.join(map(str, shape))}), none 0")
        if not array.flags.c_contiguous:
            self._fail(name, "Fortran order", "C order (numpy.ascontiguousarray)")
        if not np.issubdtype(array.dtype, dtype):
            self._fail(name, f"dtype {array.dtype}", dtype.__name__)
        return array

    def _load_statistic(self, name):
        values = self._load(name, self.shape[3:], np.floating).astype(np.float32)
        if not np.isfinite(values).all() or (values < 0).any():
            self._fail(name, f"{values.tolist()}", "finite values of 0 or more")
        return values

    def _load_doys(self):
        doys = self._load("doys.npy", (self.shape[0],), np.integer)
        if doys.min() < 1 or doys.max() > 366 or (np.diff(doys.astype(int)) < 0).any():
            self._fail("doys.npy", f"{doys.tolist()}", "days of year 1..366 that do not decrease")
        return doys.astype(np.int16)

    def _check_constant_bands(self):
        """A deviation of 0 would leave a band unscaled: refuse it where the band varies."""
        constant = self.band_std == 0
        if constant.any():
            rows = self.row_ranges(1 << 12)[0][1]
            clear = self.bands[:, :rows, :, constant][self.masks[:, :rows] == 1]
            if len(clear) and (clear != clear[0]).any():
                self._fail("band_std.npy", f"{self.band_std.tolist()}", "0 only for constant bands")

    def row_ranges(self, num_pixels):
        """(first row, last row + 1) of consecutive blocks of about `num_pixels` pixels."""
        height, width = self.shape[1:3]
        rows = max(1, num_pixels // width)
        return [(row, min(row + rows, height)) for row in range(0, height, rows)]

    def clear_counts(self):
        """Clear observations of each pixel, (H, W) uint16.

        Counting reads all masks, so the answer is kept in the user's cache folder until masks.npy
        changes.
        """
        file = self.path / "masks.npy"
        stat = file.stat()
        # an unpacked archive can bring another file with the size and mtime of the last one
        key = [
            os.path.realpath(file),
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ctime_ns,
            stat.st_ino,
        ]
        cached = cache_folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            counts = np.load(cached, allow_pickle=False)
            if counts.shape == self.shape[1:3] and counts.dtype == np.uint16:
                return counts
        counts = np.empty(self.shape[1:3], np.uint16)
        for first, last in self.row_ranges(1 << 16):
            block = self.masks[:, first:last]
            if block.max() > 1:
                self._fail("masks.npy", f"value {block.max()}", "0 (not clear) or 1 (clear)")
            block.sum(0, dtype=np.uint16, out=counts[first:last])
        with contextlib.suppress(OSError, InputError):  # without a cache only time is lost
            _keep_counts(cached, counts)
        return counts

    def read_clear(self, pixels):
        """Whether each observation of some pixels is clear, (T, N) bool tensor.

        pixels: (N,) int, flat indices into the tile; a read is fastest where they ascend.
        """
        masks = self.masks.reshape(self.shape[0], -1)
        return torch.from_numpy(np.take(masks, pixels, axis=1)).bool()

    def read_dates(self, pixels, dates):
        """Chosen observations of some pixels.

        pixels: (N,) int as in `read_clear`; dates: (N, ..) int64 tensor of indices into the dates,
        -1 for padding.
        Returns tensors: bands (N, .., B) uint16 and days of year (N, ..) int16. Padding has doy 0,
        which tells it from data, and its bands have no meaning.
        """
        num_dates, height, width, num_bands = self.shape
        bands = self.bands.reshape(num_dates, height * width, num_bands)
        values = np.empty((*dates.shape, num_bands), np.uint16)
        index = dates.flatten(1).numpy()
        for start in range(0, len(pixels), CACHE_PIXELS):
            part = slice(start, start + CACHE_PIXELS)
            source, origin = bands, 0
            low, high = pixels[part].min(), pixels[part].max() + 1
            if high - low < 2 * CACHE_PIXELS:
                # neighbouring pixels: one contiguous copy is faster than scattered reads
                source, origin = bands[:, low:high].copy(), low
            rows = index[part] * source.shape[1] + (pixels[part] - origin)[:, None]
            out = values[part].reshape(*rows.shape, num_bands)
            np.take(source.reshape(-1, num_bands), rows, axis=0, out=out, mode="clip")
        # padding index -1 selects the appended 0
        doys = np.take(np.append(self.doys, np.int16(0)), dates.numpy())
        return torch.from_numpy(values), torch.from_numpy(doys)

    def split_map(self, block_size=16, seed=0):
        """Split of each pixel, (H, W) uint8: 1 train, 2 validation, 3 test, 0 pretraining only.

        `splits.npy` where there is one. Else square blocks of `block_size` pixels: about a fifth
        is validation, a fifth is test, and the rest train. Where tile.json tells CRS and transform,
        blocks lie on a fixed grid in map coordinates, so that the same ground has the same split in
        every tile and year of one CRS and pixel size. Else they are drawn by the tile's name, and
        overlapping tiles differ.
        """
        if (splits := self.splits) is not None:
            return np.asarray(splits)
        rows, columns = self.block_numbers(block_size)
        y, x = (np.arange(numbers.min(), numbers.max() + 1) for numbers in (rows, columns))
        draw = self._split_by_place if self.has_grid else self._split_by_name
        split = draw(y, x, seed)
        return split[np.ix_(rows - y[0], columns - x[0])]

    def block_numbers(self, block_size):
        """The row of blocks that each row of pixels lies in, (H,), and the column, (W,); int64.

        Blocks of a fixed grid in map coordinates where tile.json tells them, else from the corner.
        """
        if not self.has_grid:
            block_size = min(block_size, max(self.shape[1:3]))
            return tuple(np.arange(size) // block_size for size in self.shape[1:3])
        (a, _, c, _, e, f), (height, width) = self.info["transform"], self.shape[1:3]
        return _grid_index(f, e, height) // block_size, _grid_index(c, a, width) // block_size

    @property
    def has_grid(self):
        """Whether tile.json tells where the pixels lie, north up."""
        return "crs" in self.info and self.info["transform"][1] == self.info["transform"][3] == 0

    def _split_by_name(self, y, x, seed):
        """Splits of the blocks of rows y and columns x, in an order drawn from the tile's name."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        order = rng.permutation(len(y) * len(x)).reshape(len(y), len(x))
        fifth = round(order.size / 5)
        split = np.full(order.shape, TRAIN, np.uint8)
        split[order < fifth] = VALIDATION
        split[(order >= fifth) & (order < 2 * fifth)] = TEST
        return split

    def _split_by_place(self, y, x, seed):
        """Splits of the blocks of rows y and columns x of a fixed grid in map coordinates."""
        crs = int.from_bytes(hashlib.sha256(self.info["crs"].encode()).digest()[:8], "little")
        return split_blocks(x, y[:, None], crs ^ seed)


_MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


def _grid_index(origin, step, count):
    """Numbers of pixels on a grid that begins at 0, (count,) int64, equal for all tiles of it."""
    center = origin / abs(step) + np.sign(step) * (np.arange(count) + 0.5)
    return np.floor(np.round(center, 6)).astype(np.int64)  # a centre may lie on an edge of the grid


def scramble(state, value):
    """A well-mixed 64-bit number of two (the finaliser of splitmix64), elementwise."""
    z = np.asarray(state, np.uint64) ^ (np.asarray(value).astype(np.uint64) * _MIX[0])
    z = (z ^ (z >> np.uint64(30))) * _MIX[1]
    z = (z ^ (z >> np.uint64(27))) * _MIX[2]
    return z ^ (z >> np.uint64(31))


def split_blocks(x, y, seed):
    """Split of square blocks of a fixed grid, uint8: 3/5 train, 1/5 validation, 1/5 test.

    Of five neighbours from west to east one validates and one tests, chosen by place and seed.
    x, y: int64 column and row of each block on the grid, arrays that broadcast; seed: below 2^64.
    """
    random = scramble(scramble(scramble(np.uint64(seed), x // 5), y), 0)
    validation = random % 5
    test = (validation + 1 + (random >> 32) % 4) % 5
    place = x % 5
    return np.select([place == validation, place == test], [VALIDATION, TEST], TRAIN).astype(
        np.uint8
    )


# ---- files ---------------------------------------------------------------------------------------


def read_tile_json(path, shape=()):
    """The content of a tile.json, checked against the tile's shape (T, H, W, B); {} for none.

    shape: () where it is not known; then bands and dates, which depend on it, are not checked.
    A CRS is given back in the short form that GDAL has for it, such as EPSG:32633.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no readable JSON ({error}), wanted an object") from None
    if not isinstance(info, dict):
        raise InputError(f"{path}: found {type(info).__name__}, wanted a JSON object")
    for key, (is_right, wanted) in TILE_JSON.items():
        is_known = shape or key not in ("bands", "dates")
        if key in info and is_known and not is_right(info[key], shape):
            raise InputError(f"{path}: found {key} {_short(info[key])}, wanted {wanted}")
    if ("crs" in info) != ("transform" in info):
        raise InputError(f"{path}: found one of crs and transform, wanted both or none")
    if "crs" in info:
        info["crs"] = _check_crs(path, info["crs"])
    return info


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}.."


def _check_crs(path, text):
    from rasterio.crs import CRS  # takes a while, and most unlabelled toys have none
    from rasterio.errors import CRSError

    try:
        return CRS.from_user_input(text).to_string()
    except (CRSError, ValueError) as error:
        line = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(
            f"{path}: found crs {text!r} ({line}), wanted one like EPSG:32633"
        ) from None


def _is_band_list(value, shape):
    names = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return names and len(value) in (0, shape[3]) and len(set(value)) == len(value)


def _is_date_list(value, shape):
    return (
        isinstance(value, list)
        and len(value) == shape[0]
        and all(isinstance(day, str) and _is_date(day) for day in value)
    )


def _is_date(text):
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def _is_transform(value, shape):
    """Six numbers with which no coordinate of a pixel, nor the number of its block, overflows."""
    numbers = isinstance(value, list) and len(value) == 6
    if not numbers or not all(type(n) in (int, float) and abs(n) <= 1e9 for n in value):
        return False
    a, b, _, d, e, _ = value
    sizes = math.hypot(a, d), math.hypot(b, e)  # of a pixel, along a row and along a column
    return all(1e-9 <= size <= 1e7 for size in sizes) and abs(a * e - b * d) > 0


def is_class_table(value, shape=None):
    """Whether a value is {code: {"name": .., "color": ..}}, as tile.json has it of any shape."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"[1-9]\d{0,2}", code)
        and int(code) <= 255
        and isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and re.fullmatch(r"#[0-9a-fA-F]{6}", str(entry.get("color", "#000000")))
        for code, entry in value.items()
    )


TILE_JSON = {  # what is checked of tile.json, and the words of the error; other keys are free
    "bands": (_is_band_list, "a list of as many different names as there are bands"),
    "dates": (_is_date_list, "as many dates like 2021-06-05 as there are days"),
    "crs": (lambda value, shape: isinstance(value, str), "text like EPSG:32633"),
    "transform": (_is_transform, "six numbers a, b, c, d, e, f up to 1e9 that span an area"),
    "classes": (is_class_table, 'codes 1 to 255 with "name" and a "color" like #00aa00'),
    "simulated": (lambda value, shape: isinstance(value, bool), "true or false"),
}


def cache_folder():
    """Where clear counts are kept: XDG_CACHE_HOME, ~/.cache or, without a home, /tmp."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        home = Path(tempfile.gettempdir())
    return home / "pixel-series"


def _keep_counts(path, counts):
    """Write clear counts to the cache, and remove the oldest where it has too many files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        np.save(part, counts)
    files = sorted(path.parent.glob("*.npy"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-CACHE_FILES]:
        file.unlink(missing_ok=True)


# ---- data sets -----------------------------------------------------------------------------------


def tiles_folder(base_path, dataset_name):
    """Where the tiles of a data set lie."""
    return Path(base_path) / "data" / dataset_name / "processed"


def open_dataset(base_path, dataset_name, skip_bad_tiles=False):
    """The tiles of a data set, in order of name.

    Raises InputError where there is none, where one is out of contract, or where two differ in
    their bands. skip_bad_tiles: leave such a tile out, and say so.
    """
    folder = tiles_folder(base_path, dataset_name)
    # a link that leads nowhere is a tile, too: one that cannot be opened
    paths = [path for path in sorted(folder.glob("MGRS-*")) if path.is_dir() or path.is_symlink()]
    tiles = []
    for path in paths:
        try:
            tile = Tile(path)
            named = next((one for one in tiles if one.band_names), tiles[0] if tiles else tile)
            check_bands(tile, named.band_names, named.shape[3], named.path)
            tile.clear_counts()  # reads the masks, or the cache
            tiles.append(tile)
        except InputError as error:
            if not skip_bad_tiles:
                raise
            notice(f"left out: {error}")
    if not tiles:
        raise InputError(f"{folder}: found no tile, wanted folders MGRS-*")
    if len(tiles) < len(paths):
        notice(f"{folder}: {len(paths) - len(tiles)} of {len(paths)} tiles left out")
    named = next((tile for tile in tiles if tile.band_names), tiles[0])
    unnamed = [tile.name for tile in tiles if not tile.band_names]
    if named.band_names and unnamed:
        notice(
            f"{folder}: {len(unnamed)} of {len(tiles)} tiles have no bands in tile.json (first "
            f"{unnamed[0]}); taken to be {named.band_names} as in {named.name}"
        )
    return tiles


def check_bands(tile, band_names, num_bands, origin):
    """Refuse a tile whose bands differ from those of `origin` (a path, for the message)."""
    if tile.shape[3] != num_bands or (
        band_names and tile.band_names and tile.band_names != band_names
    ):
        found = tile.band_names or f"{tile.shape[3]} bands"
        raise InputError(f"{tile.path}: found {found}, wanted {band_names or num_bands} ({origin})")


def check_tile(tile, checkpoint, checkpoint_path):
    """Refuse a tile whose bands are not those that the checkpoint was trained on."""
    check_bands(tile, checkpoint["bands"], len(checkpoint["mean"]), checkpoint_path)
    if checkpoint["bands"] and not tile.band_names:
        notice(f"{tile.path}: no bands in tile.json; taken to be {checkpoint['bands']}")


def notice_splits(tiles):
    """Say which tiles split by name, where the same ground may lie in several splits."""
    by_name = [tile.name for tile in tiles if tile.splits is None and not tile.has_grid]
    if by_name:
        notice(
            f"{len(by_name)} of {len(tiles)} tiles (first {by_name[0]}) have neither splits.npy "
            "nor CRS and transform: their blocks are split by tile name, so where tiles overlap or "
            "show one place in several years, the same ground can be in training and test"
        )


def merge_classes(sources, refuse=True):
    """The classes of several tile.json or infer.json in one, {"10": {"name": .., "color": ..}}.

    sources: (path, content) of each; the first one that names a class counts. Another name for a
    code raises InputError that names both files (or, without `refuse`, prints it); another colour,
    and with `refuse` a source without classes beside others that have them, is printed.
    """
    merged, origin = {}, {}
    for path, info in sources:
        for code, entry in info.get("classes", {}).items():
            first = merged.setdefault(code, entry)
            origin.setdefault(code, path)
            for key in ("name", "color"):
                if entry.get(key, first.get(key)) == first.get(key, entry.get(key)):
                    continue
                line = (
                    f"{path}: found {key} {entry[key]!r} for class {code}, wanted {first[key]!r} "
                    f"as in {origin[code]}"
                )
                if key == "name" and refuse:
                    raise InputError(line)
                notice(f"{line}, which is used")
    unnamed = [path for path, info in sources if not info.get("classes")]
    if refuse and merged and unnamed:
        notice(
            f"{unnamed[0]}: found no classes (so in {len(unnamed)} of {len(sources)} files); the "
            "codes are taken to mean the same as in the others"
        )
    return merged


def find_band_names(tiles):
    """The band names of the first tile that has any; else an empty list."""
    return next((tile.band_names for tile in tiles if tile.band_names), [])


def pool_statistics(tiles, weights):
    """Mean and deviation of each band over the clear observations of all tiles.

    weights: clear observations of each tile.
    Returns mean, std: (B,) float32 in the units of bands.npy; a band that never varies gets 1.
    """
    weights = np.asarray(weights, dtype=np.float64)[:, None] / np.sum(weights)
    means = np.stack([tile.band_mean for tile in tiles]).astype(np.float64)
    stds = np.stack([tile.band_std for tile in tiles]).astype(np.float64)
    mean = (weights * means).sum(0)
    std = np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(0))
    std[std < 1e-6] = 1.0
    return mean.astype(np.float32), std.astype(np.float32)


def is_georeferenced(info):
    """Whether a tile.json or an infer.json tells where its pixels lie."""
    return {"crs", "transform"} <= set(info)
