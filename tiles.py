"""Sentinel-2 tiles on disk: the tile contract, checked when a tile is opened.

A data set is a folder of tiles, `<base_path>/data/<dataset_name>/processed/MGRS-<id>/`; README.md
("Data structure") lists the files of a tile. Bands and masks stay memory-mapped and are read in
blocks of rows, so the size of a tile or a data set is bounded by the disk alone.

Shapes: H x W pixels, T dates, N chosen pixels, B bands.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from runtime import InputError

TRAIN, VALIDATION, TEST = 1, 2, 3  # codes of splits.npy; 0 is unused
CACHE_PIXELS = 512  # pixels whose whole series fit into a core's own cache
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pixel-series"


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
        self.name = self.path.resolve().name
        self.shape = self._load("bands.npy", ("T", "H", "W", "B"), np.uint16).shape
        self._load("masks.npy", self.shape[:3], np.uint8)
        self.doys = self._load_doys()
        self.band_mean = self._load_statistic("band_mean.npy")
        self.band_std = self._load_statistic("band_std.npy")
        splits = self.splits
        if splits is not None and splits.max() > TEST:
            self._fail("splits.npy", f"value {splits.max()}", "0, 1, 2 or 3")
        self.has_labels = self.labels is not None
        self.info = self._load_info()
        self.band_names = self.info.get("bands", [])
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
        if optional and not file.exists():
            return None
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            self._fail(name, "no such file", f"an array of shape {shape}")
        except (OSError, ValueError, EOFError) as error:
            self._fail(name, f"no readable array ({error})", f"a .npy file of shape {shape}")
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

    def _load_info(self):
        try:
            info = json.loads((self.path / "tile.json").read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._fail("tile.json", f"no readable JSON ({error})", "a JSON object")
        if not isinstance(info, dict):
            self._fail("tile.json", type(info).__name__, "a JSON object")
        if len(info.get("bands", [])) not in (0, self.shape[3]):
            self._fail("tile.json", f"bands {info['bands']}", f"{self.shape[3]} band names")
        return info

    def row_blocks(self, num_pixels):
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
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        cached = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            counts = np.load(cached, allow_pickle=False)
            if counts.shape == self.shape[1:3]:
                return counts
        counts = np.empty(self.shape[1:3], np.uint16)
        for first, last in self.row_blocks(1 << 16):
            block = self.masks[:, first:last]
            if block.max() > 1:
                self._fail("masks.npy", f"value {block.max()}", "0 (not clear) or 1 (clear)")
            block.sum(0, dtype=np.uint16, out=counts[first:last])
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            CACHE.mkdir(parents=True, exist_ok=True)
            part = cached.with_suffix(f".{os.getpid()}.npy")
            np.save(part, counts)
            part.replace(cached)
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
        """Split of each pixel, (H, W) uint8: 1 train, 2 validation, 3 test, 0 unused.

        `splits.npy` where there is one. Else square blocks of `block_size` pixels, put in an order
        that is drawn from the tile's name and the seed: a fifth is validation, a fifth is test, and
        the rest train. A tile without labels needs no test split and trains on it.
        """
        if (splits := self.splits) is not None:
            return np.asarray(splits)
        rows, columns = (-(-size // block_size) for size in self.shape[1:3])
        rng = np.random.default_rng([seed, *self.name.encode()])
        order = rng.permutation(rows * columns).reshape(rows, columns)
        fifth = round(rows * columns / 5)
        split = np.full(order.shape, TRAIN, np.uint8)
        split[order < fifth] = VALIDATION
        split[(order >= fifth) & (order < 2 * fifth)] = TEST if self.has_labels else TRAIN
        split = split.repeat(block_size, 0).repeat(block_size, 1)
        return split[: self.shape[1], : self.shape[2]]


def tiles_folder(base_path, dataset_name):
    """Where the tiles of a data set lie."""
    return Path(base_path) / "data" / dataset_name / "processed"


def open_dataset(base_path, dataset_name):
    """The tiles of a data set, in order of name.

    Raises InputError where there is none, or where two tiles differ in their bands.
    """
    folder = tiles_folder(base_path, dataset_name)
    tiles = [Tile(path) for path in sorted(folder.glob("MGRS-*")) if path.is_dir()]
    if not tiles:
        raise InputError(f"{folder}: found no tile, wanted folders MGRS-*")
    for tile in tiles[1:]:
        check_bands(tile, tiles[0].band_names, tiles[0].shape[3], tiles[0].path)
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
