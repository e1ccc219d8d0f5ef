"""Large maps on disk: space reserved first, filled block by block, kept over a kill."""

import json
import math
import os

import numpy as np

from running.errors import InputError
from running.files import create_npy, remove_parts, reserve, write_error, write_json

PROGRESS = ".progress.part.json"


class MapWriter:
    """Maps of one tile, filled from north to south; what is written outlives the process.

    Blocks of rows go to hidden files beside the maps. `.progress.part.json` records what they are
    made from and how many rows are safely on the disk: a run that makes the same resumes there.

    folder: of the maps; arrays: {name: (dtype, shape (H, W, ..))}; made_from: all that the maps
    depend on, for JSON; room: bytes that are kept free for the files that follow the maps.
    rows: how many are written. Raises InputError where the disk is full, and leaves nothing.
    """

    def __init__(self, folder, arrays, made_from, room=0):
        self.folder = folder
        self.arrays = {name: (np.dtype(kind), shape) for name, (kind, shape) in arrays.items()}
        self.made_from = json.loads(json.dumps(made_from))  # as it is read back
        self._room = folder / ".room.part.bin"
        self.rows = self._rows_of_earlier_run()
        kept = [PROGRESS, *(self._part(name).name for name in arrays)] if self.rows else []
        remove_parts(folder, kept)
        try:
            if not self.rows:
                for name, (kind, shape) in self.arrays.items():
                    create_npy(self._part(name), kind, shape)
            if room:
                reserve(self._room, room)
        except InputError:
            if not self.rows:
                remove_parts(folder)
            raise

    def _part(self, name):
        return self.folder / f".{name}.part.npy"

    def is_published(self, name):
        """Whether this map has its name already, from a run that was killed while it published."""
        return not self._part(name).exists()

    def _path(self, name):
        return self.folder / f"{name}.npy" if self.is_published(name) else self._part(name)

    def _rows_of_earlier_run(self):
        """How many rows are on the disk already; 0 where an earlier run cannot be resumed."""
        try:
            progress = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
            rows = progress["rows"] if progress["made_from"] == self.made_from else 0
            height = next(iter(self.arrays.values()))[1][0]
            for name, (kind, shape) in self.arrays.items():
                # only a run that had written all rows has begun to publish
                path = self._path(name) if rows == height else self._part(name)
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if (array.dtype, array.shape) != (kind, shape):
                    return 0
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
            return 0
        return rows if type(rows) is int and 0 <= rows <= height else 0

    def write(self, rows, blocks):
        """Write (first, last + 1) rows of maps, {name: (rows, W, ..)}, and note them as done."""
        for name, block in blocks.items():
            self.fill(name, rows[0], block)
        self.rows = rows[1]
        progress = {"rows": self.rows, "made_from": self.made_from}
        write_json(self.folder / PROGRESS, progress)

    def fill(self, name, first, block):
        """Write rows of one map from row `first` on, and wait until the disk has them."""
        kind, shape = self.arrays[name]
        row_bytes = kind.itemsize * math.prod(shape[1:])
        path = self._part(name)
        try:
            with open(path, "r+b") as file:
                header = file.seek(0, os.SEEK_END) - row_bytes * shape[0]
                file.seek(header + first * row_bytes)
                file.write(np.ascontiguousarray(block, kind))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(path, error) from None

    def read(self, name):
        """A map as a memory map (H, W, ..)."""
        return np.load(self._path(name), mmap_mode="r", allow_pickle=False)

    def free_room(self):
        """Give the reserved room to the files that follow."""
        self._room.unlink(missing_ok=True)

    def publish(self):
        """Give the maps their names."""
        for name in self.arrays:
            if not self.is_published(name):
                self._part(name).replace(self.folder / f"{name}.npy")


def quantise(representations):
    """int8 values and the float32 scale of each pixel: value = int8 * scale; scale NaN: no data.

    representations: (.., D) float32, NaN where there is no data. Returns (.., D) and (..).
    """
    scale = np.abs(representations).max(-1) / 127
    safe = np.where(np.isfinite(scale) & (scale > 0), scale, 1)[..., None]
    values = np.nan_to_num(representations / safe).round().astype(np.int8)
    return values, scale.astype(np.float32)


def refuse_shared_folders(sources, folders):
    """Raise InputError where the files of two sources, tiles or maps, would go to one folder."""
    taken = {}
    for source, folder in zip(sources, folders, strict=True):
        other = taken.setdefault(os.path.realpath(folder), source)
        if other != source:
            raise InputError(
                f"{source}: found {other} that goes to {folder} too, wanted folders of different "
                "names (or one call for each, with an output_dir of its own)"
            )
