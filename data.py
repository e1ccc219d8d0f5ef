"""Sentinel-2 tiles on disk and the batches that are drawn from them.

A data set is a folder of tiles, `<base_path>/data/<dataset_name>/processed/MGRS-<id>/`; README.md
("Data structure") lists the files of a tile. Bands and masks stay memory-mapped and are read in
blocks of rows, so the size of a tile or a data set is bounded by the disk alone.

Shapes: H x W pixels, T dates, N pixels of a batch, S drawn steps, B bands.
"""

import contextlib
import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transforms import clear_steps, draw_steps, standardise
from utils import InputError

TRAIN, VALIDATION, TEST = 1, 2, 3  # codes of splits.npy; 0 is unused
SHARDS = 64  # virtual shards of an epoch: the most processes x workers that can share one
BLOCK_PIXELS = 2048  # about what one read of consecutive rows holds
SHUFFLE_PIXELS = 1 << 19  # pixels that are shuffled together, over all processes
DRAW_PIXELS = 1 << 14  # pixels whose views are drawn at once: many, yet within the CPU's cache
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
        self.shape = self._load("bands.npy", "(T, H, W, B)", np.uint16).shape
        self.doys = self._load_doys()
        self.band_mean = self._load_statistic("band_mean.npy")
        self.band_std = self._load_statistic("band_std.npy")
        splits = self.splits
        if splits is not None and splits.max() > TEST:
            self._fail("splits.npy", f"value {splits.max()}", "0, 1, 2 or 3")
        self.has_labels = self.labels is not None
        self.masks  # noqa: B018 (opened once to be checked)
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
        file = self.path / name
        if optional and not file.exists():
            return None
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            self._fail(name, "no such file", f"an array of shape {shape}")
        except (OSError, ValueError, EOFError) as error:
            self._fail(name, f"no readable array ({error})", f"a .npy file of shape {shape}")
        wrong = array.ndim != 4 if isinstance(shape, str) else array.shape != shape
        if wrong or 0 in array.shape:
            self._fail(name, f"shape {array.shape}", f"{shape}, none of them 0")
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
        step = max(1, num_pixels // width)
        return [(row, min(row + step, height)) for row in range(0, height, step)]

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

    def read_steps(self, pixels, steps):
        """Chosen observations of some pixels.

        pixels: (N,) int as in `read_clear`; steps: (N, ..) int64 tensor of indices into the dates,
        -1 for padding.
        Returns tensors: bands (N, .., B) uint16 and days of year (N, ..) int16. Padding has the
        doy 0, which is how it is told from data, and its bands mean nothing.
        """
        num_dates, height, width, num_bands = self.shape
        bands = self.bands.reshape(num_dates, height * width, num_bands)
        found = np.empty((*steps.shape, num_bands), np.uint16)
        dates = steps.flatten(1).numpy()
        for start in range(0, len(pixels), CACHE_PIXELS):
            part = slice(start, start + CACHE_PIXELS)
            source, origin = bands, 0
            low, high = pixels[part].min(), pixels[part].max() + 1
            if high - low < 2 * CACHE_PIXELS:  # a copy reads ahead where single rows would wait
                source, origin = bands[:, low:high].copy(), low
            rows = dates[part] * source.shape[1] + (pixels[part] - origin)[:, None]
            out = found[part].reshape(*rows.shape, num_bands)
            np.take(source.reshape(-1, num_bands), rows, axis=0, out=out, mode="clip")
        # the 0 at the end is what -1 finds
        doys = np.take(np.append(self.doys, np.int16(0)), steps.numpy())
        return torch.from_numpy(found), torch.from_numpy(doys)

    def split_map(self, block_size=16, seed=0):
        """Side of each pixel, (H, W) uint8: 1 train, 2 validation, 3 test, 0 unused.

        `splits.npy` where there is one. Else square blocks of `block_size` pixels, put in an order
        that is drawn from the tile's name and the seed: a fifth is validation, a fifth is test, and
        the rest train. A tile without labels needs no test side and trains on it.
        """
        if (splits := self.splits) is not None:
            return np.asarray(splits)
        rows, columns = (-(-size // block_size) for size in self.shape[1:3])
        rng = np.random.default_rng([seed, *self.name.encode()])
        place = rng.permutation(rows * columns).reshape(rows, columns)
        fifth = round(rows * columns / 5)
        side = np.full(place.shape, TRAIN, np.uint8)
        side[place < fifth] = VALIDATION
        side[(place >= fifth) & (place < 2 * fifth)] = TEST if self.has_labels else TRAIN
        side = side.repeat(block_size, 0).repeat(block_size, 1)
        return side[: self.shape[1], : self.shape[2]]


def open_dataset(base_path, dataset_name):
    """The tiles of a data set, in order of name.

    Raises InputError where there is none, or where two tiles differ in their bands.
    """
    folder = Path(base_path) / "data" / dataset_name / "processed"
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


class _PixelDataset(IterableDataset):
    """The walk over the pixels of many tiles that both data sets share.

    batch_size: pixels of a batch, over all processes; the batches of an epoch are equal to one
        pixel, and never larger.
    min_valid: clear observations that a pixel needs to take part.
    split: the side of `Tile.split_map(block_size, split_seed)` that takes part, a key of SIDES.
    seed: of the order, the views and the choice of label_count.
    mean, std: (B,) statistics to standardise with; None for those pooled over the tiles.
    rank, world_size: of the processes that share each batch.

    An epoch is a stream: the blocks of all tiles in a drawn order, the chosen pixels of each block
    in the order of the disk. The stream is cut into SHARDS equal stretches, and every batch takes
    its share of each. So many batches at a time that they hold SHUFFLE_PIXELS are read, drawn and
    shuffled. Every draw is seeded by seed, epoch and place in the stream, and processes and workers
    own whole shards, in order, so what a batch holds depends on seed, epoch and step alone.

    Iterating gives the batches `first_step` .. `last_step` - 1 (step = epoch * steps_per_epoch + k;
    one epoch unless `set_steps` says otherwise) as tuples of tensors; in a worker of a DataLoader,
    that worker's part of each. `iterate_batches` puts the parts together.
    """

    SIDES = {
        "all": (0, TRAIN, VALIDATION, TEST),
        "train": (TRAIN,),
        "validation": (VALIDATION,),
        "test": (TEST,),
        "train+validation": (0, TRAIN, VALIDATION),
    }

    def __init__(
        self,
        tiles,
        *,
        batch_size=256,
        min_valid=10,
        split="all",
        block_size=16,
        split_seed=0,
        label_count=0,
        seed=0,
        mean=None,
        std=None,
        rank=0,
        world_size=1,
    ):
        if world_size > SHARDS:
            raise InputError(f"{world_size} processes: an epoch is cut for at most {SHARDS}")
        self.tiles, self.seed, self.min_valid = tiles, seed, max(1, min_valid)
        self.split, self.block_size, self.split_seed = split, block_size, split_seed
        self.rank, self.world_size = rank, world_size
        self.band_names, self.num_bands = tiles[0].band_names, tiles[0].shape[3]
        clear_total = self._choose_pixels()
        if label_count:
            self._keep_few(label_count)
        self._plan_epoch(batch_size)
        if mean is None:
            mean, std = pool_statistics(tiles, clear_total)
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)
        self._buffers = []

    def _choose_pixels(self):
        """Find the pixels that take part. Returns the clear observations of each tile."""
        self._chosen, clear_total, best = [], [], 0  # one bit a pixel: it stays in memory
        for tile in self.tiles:
            clear = tile.clear_counts()
            clear_total.append(int(clear.sum(dtype=np.int64)))
            best = max(best, int(clear.max()))
            side = tile.split_map(self.block_size, self.split_seed)
            chosen = (clear >= self.min_valid) & np.isin(side, self.SIDES[self.split])
            if self.labelled:
                chosen &= np.asarray(tile.labels) > 0
            self._chosen.append(np.packbits(chosen, axis=1))
        if not any(chosen.any() for chosen in self._chosen):
            raise InputError(
                f"{self.tiles[0].path.parent}: found no pixel (split={self.split}, block_size="
                f"{self.block_size}) with at least min_valid={self.min_valid} clear observations; "
                f"the clearest pixel has {best}"
            )
        return clear_total

    def _keep_few(self, label_count):
        """Thin the chosen pixels out to so many, drawn at random."""
        tiles = [np.flatnonzero(self._unpack(index)) for index in range(len(self.tiles))]
        ends = np.cumsum([len(pixels) for pixels in tiles])
        if label_count > ends[-1]:
            raise InputError(
                f"{self.tiles[0].path.parent}: found {ends[-1]} labelled pixels "
                f"(split={self.split}), wanted label_count={label_count}"
            )
        kept = np.random.default_rng(self.seed).choice(ends[-1], label_count, replace=False)
        for index, pixels in enumerate(tiles):
            here = kept[(kept < ends[index]) & (kept >= ends[index] - len(pixels))]
            chosen = np.zeros(self.tiles[index].shape[1:3], bool)
            chosen.flat[pixels[here - (ends[index] - len(pixels))]] = True
            self._chosen[index] = np.packbits(chosen, axis=1)

    def _plan_epoch(self, batch_size):
        """List the blocks that hold the chosen pixels, and cut the epoch into batches."""
        blocks = []
        for index, tile in enumerate(self.tiles):
            for first, last in tile.row_blocks(BLOCK_PIXELS):
                count = int(np.bitwise_count(self._chosen[index][first:last]).sum())
                if count:
                    blocks.append((index, first, last, count))
        self._blocks = np.array(blocks)
        self.num_pixels = int(self._blocks[:, 3].sum())
        self.longest = max(tile.shape[0] for tile in self.tiles)
        self.steps_per_epoch = -(-self.num_pixels // batch_size)
        self._chunk_steps = max(1, SHUFFLE_PIXELS * self.steps_per_epoch // self.num_pixels)
        self.set_steps(0, self.steps_per_epoch)

    def _unpack(self, tile_index, rows=(0, None)):
        """Whether each pixel of some rows takes part, (rows, W) of 0 and 1."""
        bits = self._chosen[tile_index][slice(*rows)]
        return np.unpackbits(bits, axis=1, count=self.tiles[tile_index].shape[2])

    def set_steps(self, first, last):
        """Iterate the batches first .. last - 1 of training, through as many epochs as it takes."""
        self.first_step, self.last_step = first, last

    def __iter__(self):
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        parts, part = self.world_size * workers, self.rank * workers + worker_id
        shards = range(SHARDS * part // parts, SHARDS * (part + 1) // parts)
        step = self.first_step
        while step < self.last_step:
            epoch, batch = divmod(step, self.steps_per_epoch)
            first = batch - batch % self._chunk_steps
            last = min(first + self._chunk_steps, self.steps_per_epoch)
            arrays, ends = self._chunk(epoch, shards, first, last)
            ends = ends[batch - first :][: self.last_step - step + 1]
            for start, stop in pairwise(ends):
                yield self._finish([array[start:stop] for array in arrays])
                step += 1

    def _chunk(self, epoch, shards, first, last):
        """The part that some shards have in the batches first .. last - 1 of an epoch.

        Returns arrays, batch after batch, and where the batches end in them (last - first + 1,).
        """
        # batch k holds numbers edges[k] .. edges[k + 1] - 1; number i is of shard i % SHARDS
        edges = self.num_pixels * np.arange(first, last + 1) // self.steps_per_epoch
        size, longer = divmod(self.num_pixels, SHARDS)
        stretches, sizes, shuffled, total = [], [], [], 0
        for shard in shards:
            start = shard * size + min(shard, longer)  # of the shard's stretch of the stream
            share = start - (shard - edges) // SHARDS  # of batch k: share[k] .. share[k + 1] - 1
            stretches.append((shard, share[0], share[-1]))
            sizes.append(np.diff(share))
            rng = np.random.default_rng([self.seed, epoch, first, shard])
            shuffled.append(total + rng.permutation(share[-1] - share[0]))
            total += share[-1] - share[0]
        batch = np.repeat(np.tile(np.arange(last - first), len(shards)), np.concatenate(sizes))
        row = np.empty(total, np.int64)  # of each pixel of the stretches, one after the other
        row[np.concatenate(shuffled)[np.argsort(batch, kind="stable")]] = np.arange(total)
        ends = np.append(0, np.sum(sizes, 0).cumsum())
        return self._fill(epoch, stretches, row), ends

    def _fill(self, epoch, stretches, row):
        """Read and draw stretches of an epoch's stream, and put pixel i in row[i] of the arrays."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        ends = np.cumsum(self._blocks[order, 3])
        filled, waiting = 0, []
        for stretch in stretches:
            waiting.append(stretch)
            count = sum(stop - start for _, start, stop in waiting)
            if count < DRAW_PIXELS and stretch != stretches[-1]:
                continue
            drawn = self._draw(*self._find(order, ends, waiting), self._random(epoch, waiting))
            if not self._buffers or len(self._buffers[0]) < len(row):  # kept: new memory is slow
                self._buffers = [part.new_empty(len(row), *part.shape[1:]) for part in drawn]
            for buffer, part in zip(self._buffers, drawn, strict=True):
                buffer.numpy()[row[filled : filled + count]] = part.numpy()
            filled, waiting = filled + count, []
        return self._buffers

    def _find(self, order, ends, stretches):
        """Tile and flat index in the tile of each pixel in stretches of the stream: (N,), (N,)."""
        tiles, pixels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for _, place, stop in stretches:
            while place < stop:
                index = np.searchsorted(ends, place, side="right")
                tile_index, first, last, count = self._blocks[order[index]]
                begin = place - (ends[index] - count)
                found = np.flatnonzero(self._unpack(tile_index, (first, last)))
                found = found[begin : begin + stop - place]
                pixels.append(found + first * self.tiles[tile_index].shape[2])
                tiles.append(np.full(len(found), tile_index))
                place += len(found)
        return np.concatenate(tiles), np.concatenate(pixels)

    def _random(self, epoch, stretches):
        """Numbers in [0, 1) to draw views with, (S, N, V) float32."""
        ends = np.cumsum([stop - start for _, start, stop in stretches])
        random = torch.empty(self.sample_size, ends[-1], self.num_views)
        for (shard, start, stop), end in zip(stretches, ends, strict=True):
            seed = np.random.default_rng([self.seed, epoch, start, shard]).integers(1 << 62)
            generator = torch.Generator().manual_seed(int(seed))
            random[:, end - (stop - start) : end].uniform_(generator=generator)
        return random

    def _runs(self, tiles):
        """(tile, slice) of each run of one tile in a list of tile indices (N,); at least one."""
        if not len(tiles):
            yield self.tiles[0], slice(0, 0)
        starts = np.flatnonzero(np.diff(tiles, prepend=-1))
        for start, stop in pairwise([*starts, len(tiles)]):
            yield self.tiles[tiles[start]], slice(start, stop)

    def _read_clear(self, tiles, pixels):
        """Whether the observations of pixels are clear, (T, N) bool, T of the longest tile."""
        clear = torch.zeros(self.longest, len(pixels), dtype=torch.bool)
        for tile, run in self._runs(tiles):
            clear[: tile.shape[0], run] = tile.read_clear(pixels[run])
        return clear

    def _read_steps(self, tiles, pixels, steps):
        """Bands (N, .., B) uint16 and days (N, ..) int16 of dates (N, ..) of pixels."""
        parts = [tile.read_steps(pixels[run], steps[run]) for tile, run in self._runs(tiles)]
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(arrays) for arrays in zip(*parts, strict=True)]


def iterate_batches(dataset, num_workers=0, pin_memory=False):
    """Yield a data set's batches, read by `num_workers` processes (0: by this one).

    Workers own shards, not batches: each gives its part of every batch, put together here, and
    into memory from which a GPU copies while it computes where `pin_memory` asks for it.
    """
    ahead = {"prefetch_factor": 8} if num_workers else {}  # of the pause while a chunk is read
    parts = iter(DataLoader(dataset, None, num_workers=num_workers, **ahead))
    for first in parts:
        rest = [next(parts) for _ in range(num_workers - 1)]
        batch = dataset.merge([first, *rest]) if rest else first
        yield tuple(array.pin_memory() for array in batch) if pin_memory else batch


class SentinelTimeSeriesDataset(_PixelDataset):
    """Unlabelled pixels for Barlow Twins: two views of each, in batches.

    Each epoch visits every valid pixel of `split` once, shuffled across all tiles, with fresh
    views. Batches: x (N, 2, S, B) float32, standardised; doys (N, 2, S) int16, ascending along S.

    split: "all"; "train", which leaves out the validation and the test side; "validation";
        "train+validation". Side 0 of a splits.npy, unused for labels, is trained on.
    Keywords, order and errors as in `_PixelDataset`.
    """

    labelled, num_views = False, 2
    SIDES = _PixelDataset.SIDES | {"train": (0, TRAIN)}

    def __init__(self, base_path, dataset_name, *, sample_size=16, **keywords):
        self.sample_size = sample_size
        super().__init__(open_dataset(base_path, dataset_name), **keywords)
        numbers = self.num_views * sample_size
        self._pixel_mean, self._pixel_std = self.mean.repeat(numbers), self.std.repeat(numbers)

    def _draw(self, tiles, pixels, random):
        steps = draw_steps(self._read_clear(tiles, pixels), self.sample_size, random)
        return self._read_steps(tiles, pixels, steps)

    def _finish(self, arrays):
        bands, doys = arrays
        x = standardise(bands.flatten(1), self._pixel_mean, self._pixel_std)
        return x.view(bands.shape), doys.clone()

    def merge(self, parts):
        return tuple(torch.cat(arrays) for arrays in zip(*parts, strict=True))


class SentinelTimeSeriesDatasetForDownstreaming(_PixelDataset):
    """Labelled pixels of one side of the split: series, days and label, in batches.

    Batches: x (N, S, B) float32, standardised; doys (N, S) int16; label (N,) uint8, the code in
    labels.npy (0, no label, never comes out); group (N,) int64, the square block of `block_size`
    pixels that holds the pixel, for cross-validation in space.

    sample_size: S steps drawn afresh each epoch; 0 for all clear observations in order, padded at
        the end with doy 0 to the longest series of the batch.
    label_count: only so many of the labelled pixels, drawn at random; 0 for all.
    Keywords, order and errors as in `_PixelDataset`.
    """

    labelled, num_views = True, 1

    def __init__(self, base_path, dataset_name, *, sample_size=0, split="train", **keywords):
        tiles = [tile for tile in open_dataset(base_path, dataset_name) if tile.has_labels]
        if not tiles:
            folder = Path(base_path) / "data" / dataset_name / "processed"
            raise InputError(f"{folder}: found no labels.npy, wanted at least one labelled tile")
        self.sample_size = sample_size
        super().__init__(tiles, split=split, **keywords)

    def _draw(self, tiles, pixels, random):
        clear = self._read_clear(tiles, pixels)
        if self.sample_size:
            steps = draw_steps(clear, self.sample_size, random)[:, 0]
        else:
            steps = clear_steps(clear)
            steps = F.pad(steps, (0, self.longest - steps.shape[1]), value=-1)
        labels, groups = np.empty(len(pixels), np.uint8), np.empty(len(pixels), np.int64)
        for tile, run in self._runs(tiles):
            row, column = np.divmod(pixels[run], tile.shape[2])
            labels[run] = tile.labels[row, column]
            across = -(-tile.shape[2] // self.block_size)
            groups[run] = row // self.block_size * across + column // self.block_size
        groups += tiles << 40
        arrays = self._read_steps(tiles, pixels, steps)
        return *arrays, torch.from_numpy(labels), torch.from_numpy(groups)

    def _finish(self, arrays):
        bands, doys, labels, groups = arrays
        longest = int((doys > 0).sum(1).max()) if len(doys) else 0
        bands = standardise(bands[:, :longest], self.mean, self.std)
        return bands, doys[:, :longest].clone(), labels.clone(), groups.clone()

    def merge(self, parts):
        bands, doys, labels, groups = zip(*parts, strict=True)
        longest = max(part.shape[1] for part in doys)
        bands = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in bands]
        doys = [F.pad(part, (0, longest - part.shape[1])) for part in doys]
        return torch.cat(bands), torch.cat(doys), torch.cat(labels), torch.cat(groups)
