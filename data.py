"""The batches that training draws from Sentinel-2 tiles.

Shapes: N pixels of a batch, V views, S drawn dates, T dates, B bands.
"""

import hashlib
import signal
import zlib
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from running.errors import InputError
from tiles import (
    TEST,
    TRAIN,
    VALIDATION,
    find_band_names,
    merge_classes,
    open_dataset,
    pool_statistics,
    tiles_folder,
)
from transforms import clear_dates, sample_dates, standardise
from utils import keep_classes

SHARDS = 64  # of a chunk: the most processes x workers that can share one
BLOCK_PIXELS = 2048  # about what one read of consecutive rows holds
CHUNK_PIXELS = 1 << 19  # most pixels that are shuffled together, over all processes
CHUNK_BYTES = 1 << 29  # most bytes that their observations have in memory
DRAW_PIXELS = 1 << 14  # pixels whose views are drawn at once: many, yet within the CPU's cache


class _PixelDataset(IterableDataset):
    """The way from many tiles to batches, which both data sets share.

    batch_size: pixels of a batch, over all processes; the batches of an epoch are equal to one
        pixel, and never larger.
    min_valid: clear observations that a pixel needs to take part.
    split: the split of `Tile.split_map(block_size, split_seed)` that takes part, a key of SPLITS.
    label_count: so many of the pixels, drawn at random; 0 for all.
    seed: of the order, the views and the choice of label_count.
    mean, std: (B,) statistics to standardise with; None for those pooled over the tiles.
    rank, world_size: of the processes that share each batch.

    tiles -> blocks   rows of a tile; an epoch puts the blocks of all tiles in a random order
    -> stream         the chosen pixels of one block after the other
    -> chunks         of the stream, each of so many whole batches that it has CHUNK_PIXELS pixels
    -> shards         64 equal parts of a chunk, each shuffled
    -> samples        number i of a chunk is pixel i // 64 of its shard i % 64; k samples: a batch

    Every random number is seeded by seed, epoch, chunk and shard, and a process or loader worker
    owns whole shards, so what a batch holds depends on seed, epoch and step alone.

    Iterating gives the batches `first_step` .. `last_step` - 1 (step = epoch * steps_per_epoch + k;
    one epoch unless `set_steps` says otherwise) as tuples of tensors, bands as they are stored; in
    a worker of a DataLoader, that worker's part of each. `iterate_batches` makes them ready.
    """

    SPLITS = {"train": (TRAIN,), "validation": (VALIDATION,), "test": (TEST,)}
    SPLITS |= {"all": (0, TRAIN, VALIDATION, TEST), "train+validation": (0, TRAIN, VALIDATION)}

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
            raise InputError(f"{world_size} processes: a batch is shared by at most {SHARDS}")
        self.tiles, self.seed, self.min_valid = tiles, seed, max(1, min_valid)
        self.split, self.block_size, self.split_seed = split, block_size, split_seed
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.band_names, self.num_bands = find_band_names(tiles), tiles[0].shape[3]
        clear_total = self._choose_pixels()
        if label_count:
            self._sample_labels(label_count)
        self._plan_epoch(batch_size)
        if mean is None:
            mean, std = pool_statistics(tiles, clear_total)
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)
        self._arrays = []

    def _choose_pixels(self):
        """Find the pixels that take part. Returns the clear observations of each tile."""
        self._chosen, clear_total, most = [], [], 0  # one bit a pixel: it stays in memory
        self.split_hashes = {}  # of the split map of each tile
        # a tile without labels may show the ground that another one tests
        tests_nothing = not any(tile.has_labels for tile in self.tiles)
        for tile in self.tiles:
            clear = tile.clear_counts()
            clear_total.append(int(clear.sum(dtype=np.int64)))
            most = max(most, int(clear.max()))
            split = tile.split_map(self.block_size, self.split_seed)
            if tests_nothing and tile.splits is None:
                split[split == TEST] = TRAIN
            self.split_hashes[tile.path.name] = hashlib.sha256(split).hexdigest()[:12]
            chosen = (clear >= self.min_valid) & np.isin(split, self.SPLITS[self.split])
            if self.labelled:
                chosen &= np.asarray(tile.labels) > 0
            self._chosen.append(np.packbits(chosen, axis=1))
        if not any(chosen.any() for chosen in self._chosen):
            mend = "splits.npy, or a smaller block_size from pretraining on"
            raise InputError(
                f"{self.tiles[0].path.parent}: found no {'labelled ' * self.labelled}pixel "
                f"(split={self.split}, block_size={self.block_size}) with at least "
                f"min_valid={self.min_valid} clear observations; the clearest pixel has {most}; "
                f"wanted {mend if most >= self.min_valid else 'clearer tiles'}"
            )
        return clear_total

    def _sample_labels(self, label_count, every_class=False):
        """Keep label_count of the chosen pixels, at random; every_class: see `keep_classes`."""
        ends = np.cumsum([np.bitwise_count(chosen).sum(dtype=int) for chosen in self._chosen])
        rng, is_kept = np.random.default_rng(self.seed), np.zeros(ends[-1], bool)
        if label_count > ends[-1]:
            found = f"{self.tiles[0].path.parent}: found {ends[-1]} labelled pixels"
            raise InputError(f"{found} (split={self.split}), wanted label_count={label_count}")
        kept = rng.choice(ends[-1], label_count, replace=False)
        if every_class:
            kept = keep_classes(kept, self.read_labels(), rng)
        is_kept[kept] = True
        for index, part in enumerate(np.split(is_kept, ends[:-1])):
            chosen = self.pixel_mask(index)
            chosen[chosen.copy()] = part
            self._chosen[index] = np.packbits(chosen, axis=1)

    def _plan_epoch(self, batch_size):
        """List the blocks that hold the chosen pixels, and count the batches of an epoch."""
        blocks = [
            (index, first, last, np.bitwise_count(self._chosen[index][first:last]).sum(dtype=int))
            for index, tile in enumerate(self.tiles)
            for first, last in tile.row_ranges(BLOCK_PIXELS)
        ]
        self._blocks = np.array([block for block in blocks if block[3]])
        self.num_pixels = int(self._blocks[:, 3].sum())
        self.longest = max(tile.shape[0] for tile in self.tiles)
        self.steps_per_epoch = -(-self.num_pixels // batch_size)
        dates = self.num_views * self.sample_size if self.sample_size else self.longest
        chunk_pixels = min(CHUNK_PIXELS, CHUNK_BYTES // (2 * dates * self.num_bands))
        self._chunk_steps = max(1, chunk_pixels * self.steps_per_epoch // self.num_pixels)
        self.set_steps(0, self.steps_per_epoch)

    def _unpack(self, tile_index, rows=(0, None)):
        """Whether each pixel of some rows takes part, (rows, W) of 0 and 1."""
        bits = self._chosen[tile_index][slice(*rows)]
        return np.unpackbits(bits, axis=1, count=self.tiles[tile_index].shape[2])

    def pixel_mask(self, tile_index):
        """Whether each pixel of a tile takes part, (H, W) bool."""
        return self._unpack(tile_index).astype(bool)

    def refuse_single_pixels(self):
        """Raise InputError where batches would have one pixel: BatchNorm needs two."""
        if self.num_pixels < 2 * self.steps_per_epoch:
            raise InputError(
                f"batch_size={self.batch_size}: cuts {self.num_pixels} training pixels into "
                "batches of one, wanted two or more in each"
            )

    def describe(self):
        """What is drawn from, to tell other data by.

        Returns {"tiles": {name: how many pixels, and a hash}, "mean", "std"}. The hash is of which
        pixels, their labels and numbers of clear dates, the tile's days, and its statistics, which
        stand for its bands.
        """
        tiles = {}
        for index, tile in enumerate(self.tiles):
            mask = self.pixel_mask(index)
            content = hashlib.sha256(self._chosen[index])
            content.update(tile.clear_counts()[mask])
            for numbers in (tile.doys, tile.band_mean, tile.band_std):
                content.update(np.ascontiguousarray(numbers))
            if self.labelled:
                content.update(tile.labels[mask])
            tiles[tile.path.name] = f"{mask.sum()} pixels {content.hexdigest()[:12]}"
        return {"tiles": tiles, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def set_steps(self, first, last):
        """Iterate the batches first .. last - 1 of training, over as many epochs as it takes."""
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
            # samples of the epoch at which the chunk's batches begin, and the end of the last
            edges = self.num_pixels * np.arange(first, last + 1) // self.steps_per_epoch
            arrays, rows = self._read_chunk(epoch, first, edges[0], edges[-1], shards)
            edges = (edges - edges[0])[batch - first :][: self.last_step - step + 1]
            for start, stop in pairwise(edges):
                samples = np.arange(start, stop)
                samples = samples[np.argsort(samples % SHARDS, kind="stable")]  # shard by shard
                own = rows[samples]
                own = own[own >= 0]
                # numpy copies whole rows, several times as fast as torch
                parts = [np.take(array.numpy(), own, axis=0) for array in arrays]
                yield self._trim_padding([torch.from_numpy(part) for part in parts])
                step += 1

    def _trim_padding(self, arrays):
        """A batch from the rows that it takes of a chunk's arrays."""
        return tuple(arrays)

    def _read_chunk(self, epoch, first, start, stop, shards):
        """Read and draw some shards of the chunk that is `start` .. `stop` - 1 of the stream.

        Returns arrays with a row for each pixel of the shards, in the order of the stream, which
        the next chunk overwrites, and the row of each of the chunk's samples, -1 for those of other
        shards. first: the chunk's first batch in the epoch, a seed.
        """
        size, longer = divmod(stop - start, SHARDS)  # the first `longer` shards have one more
        edges = start + np.arange(SHARDS + 1) * size + np.minimum(np.arange(SHARDS + 1), longer)
        origin, total = edges[shards.start], edges[shards.stop] - edges[shards.start]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        at_once = max(1, DRAW_PIXELS // max(1, size))
        for shard in shards[::at_once]:
            group = range(shard, min(shard + at_once, shards.stop))
            tiles, pixels = self._locate_pixels(order, edges[group.start], edges[group.stop])
            drawn = self._draw(tiles, pixels, self._random(epoch, group, edges))
            if not self._arrays or len(self._arrays[0]) < total:  # kept: new memory is slow
                self._arrays = [values.new_empty(total, *values.shape[1:]) for values in drawn]
            for array, values in zip(self._arrays, drawn, strict=True):
                array[edges[group.start] - origin : edges[group.stop] - origin] = values
        rows = np.full(stop - start, -1)
        for shard in shards:
            rng = np.random.default_rng([self.seed, epoch, first, shard])
            count = edges[shard + 1] - edges[shard]
            rows[shard::SHARDS] = edges[shard] - origin + rng.permutation(count)
        return self._arrays, rows

    def _locate_pixels(self, order, place, stop):
        """Tile and flat index in the tile of each pixel of a part of the stream: (N,), (N,).

        order: of the blocks in this epoch; place, stop: the part's first pixel, and its end.
        """
        ends = np.cumsum(self._blocks[order, 3])
        tiles, pixels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while place < stop:
            block = np.searchsorted(ends, place, side="right")
            tile_index, first, last, count = self._blocks[order[block]]
            begin = place - (ends[block] - count)
            chosen = np.flatnonzero(self._unpack(tile_index, (first, last)))
            chosen = chosen[begin : begin + stop - place]
            pixels.append(chosen + first * self.tiles[tile_index].shape[2])
            tiles.append(np.full(len(chosen), tile_index))
            place += len(chosen)
        return np.concatenate(tiles), np.concatenate(pixels)

    def _random(self, epoch, shards, edges):
        """Numbers in [0, 1) to draw the views of some shards with, (S, N, V) float32."""
        ends = edges[shards.start : shards.stop + 1] - edges[shards.start]
        random = torch.empty(self.sample_size, ends[-1], self.num_views)
        for shard, (start, stop) in zip(shards, pairwise(ends), strict=True):
            seed = np.random.default_rng([self.seed, epoch, edges[shard], shard]).integers(1 << 62)
            generator = torch.Generator().manual_seed(int(seed))
            random[:, start:stop].uniform_(generator=generator)
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

    def _read_dates(self, tiles, pixels, dates):
        """Bands (N, .., B) uint16 and days (N, ..) int16 of dates (N, ..) of pixels."""
        parts = [tile.read_dates(pixels[run], dates[run]) for tile, run in self._runs(tiles)]
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(arrays) for arrays in zip(*parts, strict=True)]


def iterate_batches(dataset, num_workers=0, runtime=None):
    """Yield a data set's batches, read by `num_workers` processes (0: by this one).

    Bands come to the runtime's device (None: the CPU) as they are stored, in half the bytes of
    float32, and are standardised there. Days are on the device, labels and groups on the CPU.
    """
    batches = _read_batches(dataset, num_workers)
    mean, std = dataset.mean, dataset.std
    if runtime:
        batches, (mean, std) = runtime.copy_ahead(batches), runtime.to_device(mean, std)
    for bands, *rest in batches:
        yield standardise(bands, mean, std), *rest


def _read_batches(dataset, num_workers):
    """A data set's batches as they are stored, on the CPU.

    Workers own shards, not batches: each gives its part of every batch, put together here.
    """
    num_workers = min(num_workers, SHARDS // dataset.world_size)  # each owns a shard at least
    ahead = {"prefetch_factor": 8} if num_workers else {}  # covers the time a chunk takes to read
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_trainer,
        **ahead,
    )
    parts = iter(loader)
    for first in parts:
        rest = [next(parts) for _ in range(num_workers - 1)]
        yield dataset.merge([first, *rest]) if rest else first


def _leave_signals_to_trainer(_):
    """A queue or a Ctrl-C signals all processes; the trainer saves first and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class SentinelTimeSeriesDataset(_PixelDataset):
    """Unlabelled pixels for Barlow Twins: two views of each, in batches.

    Each epoch visits every valid pixel of `split` once, shuffled across all tiles, with fresh
    views. Batches: x (N, 2, S, B) float32, standardised; doys (N, 2, S) int16, ascending along S.

    split: "all"; "train", which leaves out the validation and the test split; "validation";
        "train+validation". Code 0 of a splits.npy, unused for labels, is trained on.
    skip_bad_tiles: leave tiles out that are out of contract, and say so, in place of an error.
    Keywords, order and errors as in `_PixelDataset`.
    """

    labelled, num_views = False, 2
    SPLITS = _PixelDataset.SPLITS | {"train": (0, TRAIN)}

    def __init__(
        self, base_path, dataset_name, *, sample_size=16, skip_bad_tiles=False, **keywords
    ):
        self.sample_size = sample_size
        super().__init__(open_dataset(base_path, dataset_name, skip_bad_tiles), **keywords)

    def _draw(self, tiles, pixels, random):
        dates = sample_dates(self._read_clear(tiles, pixels), self.sample_size, random)
        return self._read_dates(tiles, pixels, dates)

    def merge(self, parts):
        return tuple(torch.cat(arrays) for arrays in zip(*parts, strict=True))


class SentinelTimeSeriesDatasetForDownstreaming(_PixelDataset):
    """Labelled pixels of one split: series, days and label, in batches.

    Batches: x (N, S, B) float32, standardised; doys (N, S) int16; label (N,) uint8, the code in
    labels.npy (0, no label, never comes out); group (N,) int64, the square block of `block_size`
    pixels that holds the pixel (`Tile.block_numbers`), for cross-validation in space. On a map grid
    the same ground is in one group in every tile.

    sample_size: S dates drawn afresh each epoch; 0 for all clear observations in order, padded at
        the end with doy 0 to the longest series of the batch.
    label_count: only N of the labelled pixels, chosen at random; 0 for all.
    Keywords, order and errors as in `_PixelDataset`; two names of one code raise InputError, too.
    """

    labelled, num_views = True, 1
    SPLITS = _PixelDataset.SPLITS | {"train+validation": (TRAIN, VALIDATION)}

    def __init__(
        self,
        base_path,
        dataset_name,
        *,
        sample_size=0,
        split="train",
        skip_bad_tiles=False,
        **keywords,
    ):
        tiles = open_dataset(base_path, dataset_name, skip_bad_tiles)
        tiles = [tile for tile in tiles if tile.has_labels]
        if not tiles:
            folder = tiles_folder(base_path, dataset_name)
            raise InputError(f"{folder}: found no labels.npy, wanted at least one labelled tile")
        self.classes = merge_classes([(tile.path / "tile.json", tile.info) for tile in tiles])
        self.sample_size = sample_size
        super().__init__(tiles, split=split, **keywords)

    def read_labels(self):
        """Codes of the pixels that take part, (N,) uint8, tile by tile."""
        labels = [tile.labels[self.pixel_mask(index)] for index, tile in enumerate(self.tiles)]
        return np.concatenate(labels)

    def keep_at_most(self, max_pixels):
        """Of more pixels keep max_pixels, chosen at random so that every class stays."""
        if self.num_pixels > max_pixels:
            self._sample_labels(max_pixels, every_class=True)
            self._plan_epoch(self.batch_size)

    def _draw(self, tiles, pixels, random):
        clear = self._read_clear(tiles, pixels)
        if self.sample_size:
            dates = sample_dates(clear, self.sample_size, random)[:, 0]
        else:
            dates = clear_dates(clear)
            dates = F.pad(dates, (0, self.longest - dates.shape[1]), value=-1)
        labels, groups = np.empty(len(pixels), np.uint8), np.empty(len(pixels), np.int64)
        for tile, run in self._runs(tiles):
            row, column = np.divmod(pixels[run], tile.shape[2])
            labels[run] = tile.labels[row, column]
            rows, columns = tile.block_numbers(self.block_size)
            # on a map grid the same ground is one group in every tile and year
            grid = 1 << 14 | zlib.crc32(tile.info["crs"].encode()) >> 18 if tile.has_grid else 0
            groups[run] = (grid or tiles[run]) << 48
            groups[run] |= (rows[row] % (1 << 24)) << 24 | columns[column] % (1 << 24)
        arrays = self._read_dates(tiles, pixels, dates)
        return *arrays, torch.from_numpy(labels), torch.from_numpy(groups)

    def _trim_padding(self, arrays):
        if self.sample_size:  # also where no pixel of a batch is this process's
            return tuple(arrays)
        bands, doys, labels, groups = arrays
        longest = int((doys > 0).sum(1).max()) if len(doys) else 0
        return bands[:, :longest], doys[:, :longest], labels, groups

    def merge(self, parts):
        bands, doys, labels, groups = zip(*parts, strict=True)
        longest = max(part.shape[1] for part in doys)
        bands = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in bands]
        doys = [F.pad(part, (0, longest - part.shape[1])) for part in doys]
        return torch.cat(bands), torch.cat(doys), torch.cat(labels), torch.cat(groups)
