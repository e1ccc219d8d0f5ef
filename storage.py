"""Large maps on disk: space reserved first, filled block by block, and kept over a kill."""

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from files import remove_parts, write_error, write_json
from runtime import InputError

PROGRESS = ".progress.part.json"


# ---- single files --------------------------------------------------------------------------------


def file_hash(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder, names):
    """{name: [size in bytes, time of the last change in ns]} of those files that are there."""
    stats = {name: Path(folder, name).stat() for name in names if Path(folder, name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def reserve(path, size):
    """Give a file its full size on the disk; what it holds stays, and what is new is 0.

    Raises InputError that names the file and the missing space; then the file is gone.
    """
    path = Path(path)
    try:
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            for start in range(file.seek(0, os.SEEK_END), size, 1 << 24):  # macOS has no fallocate
                file.write(bytes(min(1 << 24, size - start)))
    except OSError as error:
        path.unlink(missing_ok=True)  # first, so that what it held counts as free
        raise write_error(path, error, size) from None


def create_npy(path, dtype, shape):
    """A new .npy file of zeros, opened as a memory map to write to.

    Its space is reserved: a sparse file would end the process (SIGBUS) when the disk is full.
    Raises InputError as `reserve`.
    """
    dtype = np.dtype(dtype)
    try:
        with open(path, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": tuple(shape)})
            size = file.tell() + dtype.itemsize * math.prod(shape)
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise write_error(path, error) from None
    reserve(path, size)
    return np.load(path, mmap_mode="r+", allow_pickle=False)


@contextmanager
def lock_folder(folder, seconds=0.0):
    """Keep other runs from writing into a folder. Raises InputError where one does already.

    seconds: how long to wait for it; the loader workers of a killed run hold it for a few more.
    """
    handle, start = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while not _is_locked(handle):
            if time.monotonic() - start > seconds:
                raise InputError(
                    f"{folder}: found another run that writes there, wanted to wait until it ends"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _is_locked(handle):
    """Take the lock of a folder; whether that worked, or the file system (a network's) has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


# ---- maps of one tile ----------------------------------------------------------------------------


class MapWriter:
    """Maps of one tile, filled from north to south; what is written outlives the process.

    Blocks of rows go to hidden files beside the maps. `.progress.part.json` tells what they are
    made from and how many rows are safely on the disk: a run that makes the same goes on there.

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
        """Whether a run that was killed while it published had come to this map."""
        return not self._part(name).exists()

    def _path(self, name):
        return self.folder / f"{name}.npy" if self.is_published(name) else self._part(name)

    def _rows_of_earlier_run(self):
        """How many rows are on the disk already; 0 where there is nothing to go on with."""
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
