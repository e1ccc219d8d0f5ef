"""Data sets of Sentinel-2 tiles and their batches.

Shapes: N pixels of a batch, V views, S sampled dates, T dates, B bands.
"""

import hashlib
from copy import copy
from itertools import pairwise

from running.config import ALL_YEAR
from running.errors import InputError
from running.script import leave_signals_to_trainer
from running.tile_json import merge_classes, merge_targets

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tiles import TEST, TRAIN, VALIDATION, Bands, find_band_names, open_dataset, pool_statistics
from transforms import clear_dates, sample_dates, standardise
from utils import keep_classes

SHARDS = 64  # of a chunk: at most this number of processes x workers can share one
BLOCK_PIXELS = 2048  # pixels of a block, which is read in one piece
CHUNK_PIXELS = 1 << 19  # at most this many pixels are shuffled together, over all processes
CHUNK_BYTES = 1 << 29  # at most this many bytes of their observations are in memory
SAMPLE_PIXELS = 1 << 14  # views are sampled for this many pixels at once, within the CPU's cache


class _PixelDataset(IterableDataset):
    """From many tiles to batches: what both data sets share.

    batch_size: pixels of a batch, over all processes; the batches of an epoch differ by at most
        one pixel, and none is larger.
    min_valid: clear observations that a pixel needs to take part.
    split: a key of SPLITS; the splits of `Tile.split_map(block_size, split_seed)` that take part.
    label_count: take N of the pixels, chosen at random; 0 for all.
    seed: of the order, the views and the choice of label_count.
    bands: the Bands to read and to standardise with; None: those of the first tile that names its
        own, with statistics pooled over the tiles.
    season: first and last day of year of the observations to read, see `Tile.choose_dates`.
    skip_bad_tiles: leave out tiles that break the contract, and say so, in place of an error.
    process: rank and number of the processes that share each batch.

    tiles -> blocks   rows of a tile; each epoch puts the blocks of all tiles in a random order
    -> stream         the chosen pixels of one block after the other
    -> chunks         parts of the stream: whole batches, about CHUNK_PIXELS pixels
    -> shards         64 equal parts of a chunk, each shuffled
    -> samples        sample i of a chunk is pixel i // 64 of its shard i % 64; k samples: a batch

    For example, with 2 shards of 3 pixels, shuffled to (c a b) and (e f d), the samples are
    c e a f b d: every batch takes equally from each shard.

    Every random number is seeded by seed, epoch, chunk and shard, and a process or loader worker
    owns whole shards. So what a batch holds depends on seed, epoch and step alone. Iterating gives
    the batches `first_step` .. `last_step` - 1 (step = epoch * steps_per_epoch + k; one epoch
    unless `set_steps` changes it) as tuples of tensors, bands as they are stored; in a worker of a
    DataLoader, that worker's part of each. `iterate_batches` standardises them.
    """

    SPLITS = {"train": (TRAIN,), "validation": (VALIDATION,), "test": (TEST,)}
    SPLITS |= {"all": (0, TRAIN, VALIDATION, TEST), "train+validation": (0, TRAIN, VALIDATION)}

    def __init__(
        self,
        base_path,
        dataset_name,
        *,
        batch_size=256,
        min_valid=10,
        split="all",
        block_size=16,
        split_seed=0,
        label_count=0,
        seed=0,
        bands=None,
        season=ALL_YEAR,
        skip_bad_tiles=False,
        process=(0, 1),
    ):
        (self.rank, self.world_size), self.batch_size = process, batch_size
        if self.world_size > SHARDS:
            raise InputError(f"{self.world_size} processes: a batch is shared by at most {SHARDS}")
        opened = skip_bad_tiles, bands, self.answers, season
        self.tiles = open_dataset(base_path, dataset_name, *opened)
        self.seed, self.min_valid = seed, max(1, min_valid)
        self.split, self.block_size, self.split_seed = split, block_size, split_seed
        self.band_names, self.num_bands = find_band_names(self.tiles), len(self.tiles[0].order)
        clear_total = self._choose_pixels()
        if label_count:
            self._sample_labels(label_count)
        self._plan_epoch()
        mean, std = (bands.mean, bands.std) if bands else pool_statistics(self.tiles, clear_total)
        self.mean, self.std, self._arrays = torch.as_tensor(mean), torch.as_tensor(std), []
        origin = bands.origin if bands else self.tiles[0].path.parent
        self.bands = Bands(self.band_names, self.mean, self.std, origin)  # for other data sets

    def _choose_pixels(self):
        """Find the pixels that take part. Returns the clear observations of each tile."""
        self._chosen, clear_total, max_clear = [], [], 0  # one bit a pixel stays in memory
        self.split_hashes = {}  # of the split map of each tile
        # a tile without labels may show the ground that another one tests
        tests_nothing = not any(tile.answers for tile in self.tiles)
        for tile in self.tiles:
            clear = tile.clear_counts()
            clear_total.append(int(clear.sum(dtype=np.int64)))
            max_clear = max(max_clear, int(clear.max()))
            split = tile.split_map(self.block_size, self.split_seed)
            if tests_nothing and tile.splits is None:
                split[split == TEST] = TRAIN
            self.split_hashes[tile.path.name] = hashlib.sha256(split).hexdigest()[:12]
            chosen = (clear >= self.min_valid) & np.isin(split, self.SPLITS[self.split])
            if self.answers:
                chosen &= tile.find_known(self.answers)
            self._chosen.append(np.packbits(chosen, axis=1))
        if not any(chosen.any() for chosen in self._chosen):
            mend = "splits.npy, or a smaller block_size from the start"
            mend = "a lower min_valid or clearer tiles" if max_clear < self.min_valid else mend
            raise InputError(
                f"{self.tiles[0].path.parent}: found no {'labelled ' * bool(self.answers)}pixel "
                f"(split={self.split}, block_size={self.block_size}) with at least "
                f"min_valid={self.min_valid} clear observations; the clearest pixel has "
                f"{max_clear}; wanted {mend}"
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
        is_kept[keep_classes(kept, self.read_labels(), rng) if every_class else kept] = True
        for index, part in enumerate(np.split(is_kept, ends[:-1])):
            chosen = self.pixel_mask(index)
            chosen[chosen.copy()] = part
            self._chosen[index] = np.packbits(chosen, axis=1)

    def _plan_epoch(self):
        """List the blocks that hold the chosen pixels, and count the batches of an epoch."""
        blocks = [
            (index, first, last, np.bitwise_count(self._chosen[index][first:last]).sum(dtype=int))
            for index, tile in enumerate(self.tiles)
            for first, last in tile.row_ranges(BLOCK_PIXELS)
        ]
        self._blocks = np.array([block for block in blocks if block[3]])
        self.num_pixels = int(self._blocks[:, 3].sum())
        self.longest = max(tile.shape[0] for tile in self.tiles)
        self.steps_per_epoch = -(-self.num_pixels // self.batch_size)
        dates = self.num_views * self.sample_size if self.sample_size else self.longest
        chunk_pixels = min(CHUNK_PIXELS, CHUNK_BYTES // (2 * dates * self.num_bands))
        self._chunk_steps = max(1, chunk_pixels * self.steps_per_epoch // self.num_pixels)
        self.set_steps(0, self.steps_per_epoch)

    def pixel_mask(self, tile_index, rows=(0, None)):
        """Whether each pixel of a tile, or of some of its rows, takes part, (H, W) bool."""
        bits = self._chosen[tile_index][slice(*rows)]
        return np.unpackbits(bits, axis=1, count=self.tiles[tile_index].shape[2]).astype(bool)

    def refuse_single_pixels(self):
        """Raise InputError where batches would have one pixel: BatchNorm needs two."""
        if self.num_pixels < 2 * self.steps_per_epoch:
            raise InputError(
                f"batch_size={self.batch_size}: cuts {self.num_pixels} training pixels into "
                "batches of one, wanted two or more in each"
            )

    def describe(self):
        """What is compared on resume, beside `fingerprint`.

        Returns {"tiles": {name: number of pixels, and a hash}, "mean", "std"}. The hash is of the
        pixels that take part, their labels and clear counts, the tile's days and statistics.
        """
        tiles = {}
        for index, tile in enumerate(self.tiles):
            mask = self.pixel_mask(index)
            content = hashlib.sha256(self._chosen[index])
            content.update(tile.clear_counts()[mask])
            for numbers in (tile.doys, tile.band_mean, tile.band_std):
                content.update(np.ascontiguousarray(numbers))
            if self.answers:
                content.update(getattr(tile, self.answers)[mask])
            tiles[tile.path.name] = f"{mask.sum()} pixels {content.hexdigest()[:12]}"
        return {"tiles": tiles, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def fingerprint(self):
        """{tile: hash of a sample of its observations}, compared on resume."""
        return {tile.path.name: tile.fingerprint() for tile in self.tiles}

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
            # where the chunk's batches begin in the epoch's samples, and where the last one ends
            edges = self.num_pixels * np.arange(first, last + 1) // self.steps_per_epoch
            arrays, rows = self._read_chunk(epoch, first, edges[0], edges[-1], shards)
            for tile in self.tiles:
                tile.watch.check()
            edges = (edges - edges[0])[batch - first :][: self.last_step - step + 1]
            for start, stop in pairwise(edges):
                samples = np.arange(start, stop)
                own = rows[samples[np.argsort(samples % SHARDS, kind="stable")]]  # shard by shard
                own = own[own >= 0]
                # numpy copies whole rows, several times as fast as torch
                parts = [np.take(array.numpy(), own, axis=0) for array in arrays]
                yield self._trim_padding([torch.from_numpy(part) for part in parts])
                step += 1

    def _trim_padding(self, arrays):
        """A batch from its rows of a chunk's arrays, without needless padding."""
        return tuple(arrays)

    def _read_chunk(self, epoch, first, start, stop, shards):
        """Read some shards of a chunk, pixels `start` .. `stop` - 1 of the stream.

        first: the chunk's first batch in the epoch, for the seed.
        Returns arrays with a row for each pixel of the shards, in the order of the stream (the next
        chunk overwrites them), and the row of each sample of the chunk, -1 for other shards'.
        """
        size, longer = divmod(stop - start, SHARDS)  # the first `longer` shards have one more
        edges = start + np.arange(SHARDS + 1) * size + np.minimum(np.arange(SHARDS + 1), longer)
        origin, total = edges[shards.start], edges[shards.stop] - edges[shards.start]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        at_once = max(1, SAMPLE_PIXELS // max(1, size))
        for shard in shards[::at_once]:
            group = range(shard, min(shard + at_once, shards.stop))
            tiles, pixels = self._locate_pixels(order, edges[group.start], edges[group.stop])
            drawn = self._read_pixels(tiles, pixels, self._random(epoch, group, edges))
            if not self._arrays or len(self._arrays[0]) < total:  # reused: new memory is slow
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
        """Tile (N,) and flat index in it (N,) of the pixels place .. stop - 1 of the stream.

        order: of the blocks in this epoch.
        """
        ends = np.cumsum(self._blocks[order, 3])
        tiles, pixels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while place < stop:
            block = np.searchsorted(ends, place, side="right")
            tile_index, first, last, count = self._blocks[order[block]]
            begin = place - (ends[block] - count)
            chosen = np.flatnonzero(self.pixel_mask(tile_index, (first, last)))
            chosen = chosen[begin : begin + stop - place]
            pixels.append(chosen + first * self.tiles[tile_index].shape[2])
            tiles.append(np.full(len(chosen), tile_index))
            place += len(chosen)
        return np.concatenate(tiles), np.concatenate(pixels)

    def _random(self, epoch, shards, edges):
        """Random numbers in [0, 1) that choose the dates of views, (S, N, V) float32."""
        ends = edges[shards.start : shards.stop + 1] - edges[shards.start]
        random = torch.empty(self.sample_size, ends[-1], self.num_views)
        for shard, (start, stop) in zip(shards, pairwise(ends), strict=True):
            seed = np.random.default_rng([self.seed, epoch, edges[shard], shard]).integers(1 << 62)
            generator = torch.Generator().manual_seed(int(seed))
            random[:, start:stop].uniform_(generator=generator)
        return random

    def _runs(self, tiles):
        """(tile, slice) of each run of equal numbers in tile indices (N,); at least one."""
        if not len(tiles):
            yield self.tiles[0], slice(0, 0)
        for start, stop in pairwise([*np.flatnonzero(np.diff(tiles, prepend=-1)), len(tiles)]):
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

    Bands are copied to the runtime's device (None: the CPU) as stored, in half the bytes of
    float32, and standardised there. Days are on the device, labels and groups on the CPU.
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
    num_workers = min(num_workers, SHARDS // dataset.world_size)  # each owns at least one shard
    more = {"worker_init_fn": leave_signals_to_trainer}
    more |= {"prefetch_factor": 8} if num_workers else {}  # covers the time a chunk takes to read
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, **more)
    parts = iter(loader)
    for first in parts:
        rest = [next(parts) for _ in range(num_workers - 1)]
        yield _join([first, *rest]) if rest else first


def _join(parts):
    """A batch from its parts; series are padded with doy 0 to the longest."""
    batch = []
    for arrays in zip(*parts, strict=True):
        if arrays[0].ndim > 1:
            longest = max(part.shape[1] for part in arrays)
            room = (0, 0) * (arrays[0].ndim - 2)
            arrays = [F.pad(part, (*room, 0, longest - part.shape[1])) for part in arrays]
        batch.append(torch.cat(arrays))
    return tuple(batch)


class SentinelTimeSeriesDataset(_PixelDataset):
    """Unlabelled pixels for Barlow Twins: two views of each, in batches.

    Each epoch visits every valid pixel of `split` once, shuffled across all tiles, with fresh
    views. Batches: x (N, 2, S, B) float32, standardised; doys (N, 2, S) int16, ascending along S.

    split: "all"; "train", which leaves out the validation and the test split; "validation";
        "train+validation". Code 0 of a splits.npy, unused for labels, is trained on.
    Keywords, order and errors as in `_PixelDataset`.
    """

    answers, num_views = "", 2
    SPLITS = _PixelDataset.SPLITS | {"train": (0, TRAIN)}

    def __init__(self, base_path, dataset_name, *, sample_size=16, **keywords):
        self.sample_size = sample_size
        super().__init__(base_path, dataset_name, **keywords)

    def set_sample_size(self, sample_size):
        """Sample another number of dates for each view."""
        self.sample_size = sample_size
        self._plan_epoch()

    def _read_pixels(self, tiles, pixels, random):
        dates = sample_dates(self._read_clear(tiles, pixels), self.sample_size, random)
        return self._read_dates(tiles, pixels, dates)


class SentinelTimeSeriesDatasetForDownstreaming(_PixelDataset):
    """Labelled pixels of one split: series, days and label, in batches.

    Batches: x (N, S, B) float32, standardised; doys (N, S) int16; label (N,) uint8, the code in
    labels.npy, never 0; group (N,) int64, the square block of `block_size`
    pixels that holds the pixel (`Tile.block_numbers`), for cross-validation in space. On a map grid
    the same ground is in one group in every tile.

    sample_size: S dates sampled anew each epoch; 0 for all clear observations in order, padded at
        the end with doy 0 to the longest series of the batch.
    label_count: take N of the labelled pixels, chosen at random; 0 for all.
    Keywords, order and errors as in `_PixelDataset`; two names of one code raise InputError, too.
    """

    answers, num_views, dtype = "labels", 1, np.uint8
    SPLITS = _PixelDataset.SPLITS | {"train+validation": (TRAIN, VALIDATION)}

    def __init__(self, base_path, dataset_name, *, sample_size=0, split="train", **keywords):
        self.sample_size = sample_size
        super().__init__(base_path, dataset_name, split=split, **keywords)
        self._merge([(tile.path / "tile.json", tile.info) for tile in self.tiles])

    def _merge(self, sources):
        self.classes = merge_classes(sources)

    def read_labels(self):
        """Codes, or quantities, of the pixels that take part, (N,), tile by tile."""
        pairs = [(getattr(tile, self.answers), n) for n, tile in enumerate(self.tiles)]
        return np.concatenate([answers[self.pixel_mask(number)] for answers, number in pairs])

    def read_places(self):
        """Tile and flat index in it of each pixel, (N,) int64 each, in the order of the batches."""
        places = copy(self)
        places._arrays, places._trim_padding = [], tuple
        places._read_pixels = lambda *numbers: [*map(torch.from_numpy, numbers[:2])]
        return [torch.cat(parts).numpy() for parts in zip(*places, strict=True)]

    def keep_at_most(self, max_pixels):
        """Of more pixels keep max_pixels, chosen at random so that every class stays."""
        if self.num_pixels > max_pixels:
            self._sample_labels(max_pixels, every_class=self.answers == "labels")
            self._plan_epoch()

    def _read_pixels(self, tiles, pixels, random):
        clear = self._read_clear(tiles, pixels)
        if self.sample_size:
            dates = sample_dates(clear, self.sample_size, random)[:, 0]
        else:
            dates = clear_dates(clear)
            dates = F.pad(dates, (0, self.longest - dates.shape[1]), value=-1)
        labels, groups = np.empty(len(pixels), self.dtype), np.empty(len(pixels), np.int64)
        for tile, run in self._runs(tiles):
            row, column = np.divmod(pixels[run], tile.shape[2])
            labels[run] = getattr(tile, self.answers)[row, column]
            groups[run] = tile.block_ids(row, column, self.block_size, tiles[run])
        arrays = self._read_dates(tiles, pixels, dates)
        return *arrays, torch.from_numpy(labels), torch.from_numpy(groups)

    def _trim_padding(self, arrays):
        if self.sample_size:  # no padding; this process may have no pixel of a small batch
            return tuple(arrays)
        bands, doys, labels, groups = arrays
        longest = int((doys > 0).sum(1).max()) if len(doys) else 0
        return bands[:, :longest], doys[:, :longest], labels, groups


class SentinelTimeSeriesDatasetForRegression(SentinelTimeSeriesDatasetForDownstreaming):
    """Pixels of one split with a quantity: as above, but with targets.npy in place of the labels.

    Batches: x, doys, target (N,) float32, never NaN, and group. Pixels that take part are those
    with a target. Attribute target: {"name", "unit"} of the quantity, the same in all tiles.
    """

    answers, dtype = "targets", np.float32

    def _merge(self, sources):
        self.target = merge_targets(sources)
