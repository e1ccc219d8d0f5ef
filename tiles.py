"""Sentinel-2 tiles on disk: the tile contract, checked when a tile is opened.

A data set is a folder of tiles, `<base_path>/data/<dataset_name>/processed/MGRS-<id>/`; README.md
("Data structure") lists the files of a tile. Bands and masks stay memory-mapped and are read in
blocks of rows, so the size of a tile or a data set is bounded by the disk alone.

Shapes: H x W pixels, T dates, N chosen pixels, B bands.
"""

import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from running.config import ALL_YEAR, in_season
from running.errors import InputError, notice, what_is_there
from running.files import Watch, cached_array, fetch_columns, near_parts, open_npy, read_sparsely
from running.tile_json import match_bands, read_tile_json

import numpy as np
import torch

TRAIN, VALIDATION, TEST = 1, 2, 3  # codes of splits.npy; 0: no labels used, pretraining only
CACHE_PIXELS = 512  # pixels whose whole series fit into a core's own cache
OBSERVATIONS = ("bands.npy", "masks.npy", "doys.npy")


class Bands(NamedTuple):
    """Bands to read from every tile, found there by name, and what standardises them.

    names: B names in the order of the bands; empty where they are not known, and then a tile must
    have B bands. mean, std: (B,). origin: where they come from, for messages.
    """

    names: list
    mean: torch.Tensor
    std: torch.Tensor
    origin: Path


def checkpoint_bands(checkpoint, path):
    """The Bands that a checkpoint was trained on; None for no checkpoint."""
    return checkpoint and Bands(checkpoint["bands"], checkpoint["mean"], checkpoint["std"], path)


class Tile:
    """One tile of the contract, opened and checked.

    Attributes, as they lie in the files: name, title (for pictures), path, file_shape (T, H, W, B),
    band_mean and band_std (B,) float32, info (the content of tile.json), band_names (B names, or
    none). bands (T, H, W, B) uint16, masks (T, H, W) uint8, labels and splits (H, W) uint8 or None,
    targets (H, W) float32 or None are memory maps, opened at each access, so that memory and open
    files do not grow with the number of tiles. answers: which of labels and targets it has.
    watch: of the files of observations, which a long run checks. What is read of them: order,
    read_names: places and names of bands, see `choose_bands`; dates, doys: places and days (T,) of
    dates, see `choose_dates`; shape: with their T. statistics: False for a tile that has none yet.
    Raises InputError that names the file, what was found and what was wanted.
    """

    def __init__(self, path, statistics=True):
        self.path = Path(path)
        self.watch = Watch(self.path, OBSERVATIONS)
        self.name = Path(os.path.realpath(self.path)).name
        self.file_shape = self._load("bands.npy", ("T", "H", "W", "B"), np.uint16).shape
        self.shape, self.dates = self.file_shape, np.arange(self.file_shape[0])
        self._load("masks.npy", self.shape[:3], np.uint8)
        self.doys = self._load_doys()
        splits = self.splits
        if splits is not None and splits.max() > TEST:
            self._fail("splits.npy", f"value {splits.max()}", "0, 1, 2 or 3")
        self.answers = [name for name in ("labels", "targets") if getattr(self, name) is not None]
        blocks = self.row_ranges(1 << 20) if "targets" in self.answers else ()
        if any(np.isinf(self.targets[first:last]).any() for first, last in blocks):
            self._fail("targets.npy", "an infinite value", "finite numbers, and NaN for none")
        self.info = read_tile_json(self.path / "tile.json", self.shape)
        self.band_names = self.read_names = self.info.get("bands", [])
        self.order = np.arange(self.shape[3])
        if statistics:
            self.band_mean = self._load_statistic("band_mean.npy")
            self.band_std = self._load_statistic("band_std.npy")
            self._check_constant_bands()
        self.title = f"{self.name} (simulated)" if self.info.get("simulated") else self.name

    def choose_bands(self, bands):
        """Read these Bands, in their order, whatever the order in the file.

        InputError where one is missing, or without names on either side, where the number differs.
        """
        if bands.names and self.band_names:
            mend = "make the tile with them (prepare_tiles.py bands=) or correct names in tile.json"
            found = match_bands(self.band_names, bands.names, self.path, bands.origin, f"; {mend}")
            self.order = np.array(found)
        elif self.shape[3] != len(bands.mean):
            found = self.band_names or f"{self.shape[3]} bands"
            wanted = bands.names or f"{len(bands.mean)} bands"
            raise InputError(
                f"{self.path}: found {found}, wanted {wanted} ({bands.origin}); where both have "
                "names (bands of tile.json), bands are found by name"
            )
        self.read_names = bands.names or self.band_names

    def choose_dates(self, start, end):
        """Read the dates from one day of year to another alone, as if the tile had no others.

        start > end: across New Year, days >= start and days <= end. InputError where none is left.
        """
        chosen = in_season(self.doys, start, end)
        if not chosen.any():
            self._fail("doys.npy", f"no day from {start} to {end}", "a date in start= to end=")
        self.dates, self.doys = self.dates[chosen], self.doys[chosen]
        self.shape = (len(self.dates), *self.shape[1:])

    @property
    def bands(self):
        return self._load("bands.npy", self.file_shape, np.uint16)

    @property
    def masks(self):
        return self._load("masks.npy", self.file_shape[:3], np.uint8)

    @property
    def labels(self):
        return self._load("labels.npy", self.shape[1:3], np.uint8, optional=True)

    @property
    def targets(self):
        return self._load("targets.npy", self.shape[1:3], np.float32, optional=True)

    def find_known(self, answers):
        """Where one of `answers` is known, (H, W) bool: codes above 0, numbers but not NaN."""
        values = getattr(self, answers)
        return np.asarray(values) > 0 if answers == "labels" else ~np.isnan(values)

    @property
    def splits(self):
        return self._load("splits.npy", self.shape[1:3], np.uint8, optional=True)

    def _fail(self, name, found, wanted):
        raise InputError(f"{self.path / name}: found {found}, wanted {wanted}")

    def _load(self, name, shape, dtype, optional=False):
        """Memory-map a file and check it. shape: numbers, or names where any size is allowed."""
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
        """Refuse a deviation of 0, which would leave a band unscaled, where the band varies."""
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

        Counting reads all masks, so counts are kept in the user's cache folder until they change.
        """
        file = self.path / "masks.npy"
        stat = file.stat()
        # ctime and inode too: an unpacked archive can bring another file of the same size and mtime
        key = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        key = (os.path.realpath(file), *key, *self.dates.tolist())
        return cached_array(key, self.shape[1:3], np.uint16, self._count_clear)

    def _count_clear(self):
        counts = np.empty(self.shape[1:3], np.uint16)
        for first, last in self.row_ranges(1 << 16):
            block = self.masks[self.dates, first:last]
            if block.max() > 1:
                self._fail("masks.npy", f"value {block.max()}", "0 (not clear) or 1 (clear)")
            block.sum(0, dtype=np.uint16, out=counts[first:last])
        return counts

    def fingerprint(self):
        """Hash of a sample of the observations: on each date 64 neighbouring pixels in 4 places."""
        content, masks = hashlib.sha256(), self.masks.reshape(self.file_shape[0], -1)
        places = scramble(np.arange(len(masks))[:, None], np.arange(4))
        bands, places = self.bands.reshape(*masks.shape, -1), places % max(1, masks.shape[1] - 63)
        with read_sparsely(bands), read_sparsely(masks):
            for date, place in np.ndindex(places.shape):  # other places on each date
                pixels = slice(int(places[date, place]), int(places[date, place]) + 64)
                content.update(bands[date, pixels])
                content.update(masks[date, pixels])
        return content.hexdigest()[:16]

    def read_clear(self, pixels):
        """Whether each observation of some pixels is clear, (T, N) bool tensor.

        pixels: (N,) int, flat indices into the tile; ascending ones are read fastest.
        """
        masks = self.masks.reshape(self.file_shape[0], -1)
        return torch.from_numpy(np.take(masks, pixels, axis=1)[self.dates]).bool()

    def read_dates(self, pixels, dates):
        """Chosen observations of some pixels.

        pixels: (N,) int as in `read_clear`; dates: (N, ..) int64 tensor of indices into the dates,
        -1 for padding.
        Returns tensors: bands (N, .., B) uint16, those of `choose_bands`, and days of year (N, ..)
        int16. Padding has doy 0; its bands have no meaning.
        """
        num_dates, height, width, num_bands = self.file_shape
        bands = self.bands.reshape(num_dates, height * width, num_bands)
        values = np.empty((*dates.shape, len(self.order)), np.uint16)
        as_in_file = np.array_equal(self.order, np.arange(num_bands))
        index = np.take(np.append(self.dates, -1), dates.flatten(1).numpy())  # -1: padding
        for part in near_parts(pixels, CACHE_PIXELS):
            source, origin, low, high = bands, 0, pixels[part].min(), pixels[part].max() + 1
            if high - low < 64 * CACHE_PIXELS:  # else most of it would be pixels between them
                fetch_columns(bands, low, high)
            if high - low < 2 * CACHE_PIXELS:
                # neighbouring pixels: one contiguous copy is faster than scattered reads
                source, origin = bands[:, low:high].copy(), low
            rows = index[part] * source.shape[1] + (pixels[part] - origin)[:, None]
            out = values[part].reshape(*rows.shape, len(self.order))
            taken = out if as_in_file else np.empty((*rows.shape, num_bands), np.uint16)
            np.take(source.reshape(-1, num_bands), rows, axis=0, out=taken, mode="clip")
            if not as_in_file:
                np.take(taken, self.order, axis=2, out=out, mode="clip")
        doys = np.take(np.append(self.doys, np.int16(0)), dates.numpy())
        return torch.from_numpy(values), torch.from_numpy(doys)

    def split_map(self, block_size=16, seed=0):
        """Split of each pixel, (H, W) uint8: 1 train, 2 validation, 3 test, 0 pretraining only.

        From `splits.npy` where it exists. Else from square blocks of `block_size` pixels: about a
        fifth validates, a fifth tests, the rest trains. Where tile.json has CRS and transform,
        blocks lie on a fixed grid in map coordinates, so that the same ground has the same split in
        every tile and year of one CRS and pixel size. Else they depend on the tile's name, and
        overlapping tiles differ.
        """
        if (splits := self.splits) is not None:
            return np.asarray(splits)
        rows, columns = self.block_numbers(block_size)
        y, x = (np.arange(numbers.min(), numbers.max() + 1) for numbers in (rows, columns))
        split = (self._split_by_place if self.has_grid else self._split_by_name)(y, x, seed)
        return split[np.ix_(rows - y[0], columns - x[0])]

    def block_numbers(self, block_size):
        """The row of blocks that each row of pixels lies in, (H,), and the column, (W,); int64.

        Of a fixed grid in map coordinates where the tile has one, else from the tile's corner.
        """
        if not self.has_grid:
            block_size = min(block_size, max(self.shape[1:3]))
            return tuple(np.arange(size) // block_size for size in self.shape[1:3])
        (a, _, c, _, e, f), (height, width) = self.info["transform"], self.shape[1:3]
        return _grid_index(f, e, height) // block_size, _grid_index(c, a, width) // block_size

    def block_ids(self, row, column, block_size, number):
        """Id of the block that holds each pixel at (row, column), (N,) int64.

        number: of the tile. On a map grid the same ground has one id in every tile and year.
        """
        rows, columns = self.block_numbers(block_size)
        if self.has_grid:
            number = 1 << 14 | zlib.crc32(self.info["crs"].encode()) >> 18
        place = (rows[row] % (1 << 24)) << 24 | columns[column] % (1 << 24)
        return np.asarray(number, np.int64) << 48 | place

    @property
    def has_grid(self):
        """Whether tile.json has a place whose rows and columns run along the map's axes."""
        return "crs" in self.info and self.info["transform"][1] == self.info["transform"][3] == 0

    def _split_by_name(self, y, x, seed):
        """Splits of the blocks of rows y and columns x, in a random order seeded by the name."""
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
    """Index of each pixel on the grid that starts at coordinate 0, (count,) int64."""
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
    splits = np.select([x % 5 == validation, x % 5 == test], [VALIDATION, TEST], TRAIN)
    return splits.astype(np.uint8)


# ---- data sets -----------------------------------------------------------------------------------


def tiles_folder(base_path, dataset_name):
    """Where the tiles of a data set lie."""
    return Path(base_path) / "data" / dataset_name / "processed"


def open_dataset(
    base_path, dataset_name, skip_bad_tiles=False, bands=None, answers="", season=ALL_YEAR
):
    """The tiles of a data set, in order of name.

    bands: the Bands to read from each; where these have no names, or for None, those of the first
    tile that names its own. answers: "labels" or "targets": only tiles that have them.
    season: first and last day of year of the dates to read, see `Tile.choose_dates`.
    Raises InputError where there is none, where one breaks the contract, or where one lacks a band.
    skip_bad_tiles: leave such a tile out, and say so.
    """
    folder = tiles_folder(base_path, dataset_name)
    # a link that leads nowhere is a tile, too: one that cannot be opened
    paths = [path for path in sorted(folder.glob("MGRS-*")) if path.is_dir() or path.is_symlink()]
    tiles = []
    for path in paths:
        try:
            tile = Tile(path)
            tile.choose_dates(*season)
            if bands:
                tile.choose_bands(bands)
            tile.clear_counts()  # reads the masks, or the cache
        except InputError as error:
            if not skip_bad_tiles:
                raise
            notice(f"left out: {error}")
            continue
        tiles.append(tile)
        if not bands or (tile.band_names and not bands.names):
            bands = Bands(tile.band_names, tile.band_mean, tile.band_std, path)
    if not tiles:
        raise InputError(f"{folder}: found no tile, wanted folders MGRS-*{what_is_there(folder)}")
    if len(tiles) < len(paths):
        notice(f"{folder}: {len(paths) - len(tiles)} of {len(paths)} tiles left out")
    notice_unnamed(tiles, bands)
    tiles = [tile for tile in tiles if not answers or answers in tile.answers]
    if not tiles:
        wanted = "at least one labelled tile" if answers == "labels" else "a tile with a quantity"
        raise InputError(f"{folder}: found no {answers}.npy, wanted {wanted}")
    return tiles


def notice_unnamed(tiles, bands):
    """Say which bands tiles without names are taken to have, and which of named ones are not read.

    tiles: for which `bands` were chosen.
    """
    unnamed = [tile.path for tile in tiles if not tile.band_names]
    if bands.names and unnamed:
        notice(
            f"{unnamed[0]}: no bands in tile.json (so in {len(unnamed)} of {len(tiles)} tiles); "
            f"taken to be {bands.names} as in {bands.origin}"
        )
    more = [tile for tile in tiles if len(tile.order) < tile.shape[3]]
    if more:
        places = np.setdiff1d(np.arange(more[0].shape[3]), more[0].order)
        names = ",".join(more[0].band_names[place] for place in places)
        notice(
            f"{more[0].path}: {names} not read (so in {len(more)} of {len(tiles)} tiles), as "
            f"{bands.origin} has none"
        )


def notice_splits(tiles):
    """Say which tiles split by their name, since then the same ground may lie in several splits."""
    by_name = [tile.name for tile in tiles if tile.splits is None and not tile.has_grid]
    if by_name:
        notice(
            f"{len(by_name)} of {len(tiles)} tiles (first {by_name[0]}) have neither splits.npy "
            "nor CRS and transform: their blocks are split by tile name, so where tiles overlap or "
            "show one place in several years, the same ground can be in training and test"
        )


def find_band_names(tiles):
    """The names of the bands that are read, where a tile has any; else an empty list."""
    return next((tile.read_names for tile in tiles if tile.read_names), [])


def find_days(tiles):
    """Days of year on which a tile has a date, ascending, as a list."""
    return sorted({int(day) for tile in tiles for day in tile.doys})


def pool_statistics(tiles, weights):
    """Mean and deviation of each band that is read, over the clear observations of all tiles.

    weights: clear observations of each tile.
    Returns mean, std: (B,) float32 in the units of bands.npy; a band that never varies gets 1.
    """
    weights = np.asarray(weights, dtype=np.float64)[:, None] / np.sum(weights)
    means = np.stack([tile.band_mean[tile.order] for tile in tiles]).astype(np.float64)
    stds = np.stack([tile.band_std[tile.order] for tile in tiles]).astype(np.float64)
    mean = (weights * means).sum(0)
    std = np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(0))
    std[std < 1e-6] = 1.0
    return mean.astype(np.float32), std.astype(np.float32)
