"""Files that are written whole or not at all, locked folders, hashes and memory maps."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from running.errors import InputError, what_is_there

import numpy as np

CACHE_FILES = 2000  # arrays that are kept at most


def make_output_dir(path):
    """Make the folder and check that files can be written there; else InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output_dir={path}: not writable ({error.strerror})") from None
    return path


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to; on success it replaces `path`: an atomic write."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:  # without it a crash of the machine can leave an empty file
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder, kept=()):
    """Remove what killed writes have left in a folder, except the names in `kept`."""
    for pattern in (".*.part.*", ".writable-*"):
        for file in Path(folder).glob(pattern):
            if file.name not in kept:
                file.unlink(missing_ok=True)


def write_error(path, error, size=0):
    """The InputError for a file that could not be written; size: bytes that it needed."""
    if error.errno != errno.ENOSPC:
        reason = error.strerror or error.__cause__ or error  # GDAL's reason is the cause
        return InputError(f"{path}: could not be written ({reason})")
    free = shutil.disk_usage(Path(path).parent).free
    missing = f", {max(1, size - free)} bytes are missing" if size else ""
    return InputError(f"{path}: could not be written: disk full ({free} bytes free{missing})")


def write_json(path, content):
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def file_hash(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder, names):
    """{name: [size in bytes, time of the last change in ns]} of the files that exist."""
    stats = {name: Path(folder, name).stat() for name in names if Path(folder, name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@contextmanager
def read_sparsely(array):
    """While a memory-mapped array is read in few places: nothing beyond them comes from the disk.

    A kernel reads ahead of each place, on some disks and networks by 8 MB, so that a thousand
    places are a whole file.
    """
    mapped = getattr(array, "_mmap", None) if hasattr(mmap, "MADV_RANDOM") else None
    if mapped is None:
        yield
        return
    mapped.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        mapped.madvise(mmap.MADV_NORMAL)


def near_parts(places, size):
    """Slices of at most `size` of some places (N,) int, cut where they jump by more than that.

    Places that jump everywhere, points for example, are cut by their number alone.
    """
    jumps = np.flatnonzero(np.abs(np.diff(places)) > size) + 1
    jumps = jumps if len(jumps) * 128 < len(places) else jumps[:0]
    edges = np.union1d(jumps, np.arange(0, len(places) + size, size)).clip(max=len(places))
    return [slice(*pair) for pair in pairwise(edges.tolist()) if pair[0] < pair[1]]


def fetch_columns(array, low, high):
    """Let the kernel fetch [:, low:high] of a memory-mapped array (T, N, ..): at once, and no more.

    By itself it would read ahead of each of the T places, see `read_sparsely`. The array is a whole
    file of open_npy, whose numbers are the end of it.
    """
    mapped = getattr(array, "_mmap", None) if hasattr(mmap, "MADV_WILLNEED") else None
    if mapped is None:
        return
    mapped.madvise(mmap.MADV_RANDOM)
    size, stride = array[0, low:high].nbytes, array.strides[0]
    first = len(mapped) - array.nbytes + low * array.strides[1]
    for start in range(int(first), len(mapped), stride):
        page = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def open_npy(path, wanted):
    """Memory-map a .npy file, never unpickled; InputError for anything else."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(
            f"{path}: found no such file, wanted {wanted}{what_is_there(path)}"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder, wanted {wanted}{what_is_there(path)}") from None
    except Exception as error:  # a damaged header raises whatever Python's parser does
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: found no readable array ({line}), wanted {wanted}") from None


class Watch:
    """Files that are read block by block and must stay the same until the end.

    A context manager: whatever is raised inside, InputError names a file that has changed.
    """

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), names
        self.before = self._describe()

    def _describe(self):
        """Size, time and number of each file: a file that is renamed to its name has another."""
        paths = {name: self.folder / name for name in self.names}
        stats = {name: path.stat() for name, path in paths.items() if path.exists()}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()}

    def check(self):
        """Raise InputError where a file was written, replaced, added or removed since."""
        now = self._describe()
        for name in self.names:
            if now.get(name) != self.before.get(name):
                raise InputError(
                    f"{self.folder / name}: found that it changed while it was read, wanted the "
                    "same file to the end; run the same command again"
                )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or issubclass(kind, Exception):
            self.check()


def reserve(path, size):
    """Reserve the full size of a file on the disk; its content stays, new bytes are 0.

    Raises InputError that names the file and the missing space; then the file is removed.
    """
    path = Path(path)
    try:
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            for start in range(file.seek(0, os.SEEK_END), size, 1 << 24):  # macOS has no fallocate
                file.write(bytes(min(1 << 24, size - start)))
    except OSError as error:
        path.unlink(missing_ok=True)  # first, so that its space counts as free
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

    seconds: how long to wait; loader workers of a killed run hold the lock a little longer.
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
    """Take the lock of a folder; True also on a (network) file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


def read_json(path):
    """The object in a JSON file; {} for no file, InputError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no readable JSON ({error}), wanted an object") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, wanted a JSON object")
    return content


# ---- arrays kept between runs --------------------------------------------------------------------


def cache_folder():
    """Where arrays are kept between runs: XDG_CACHE_HOME, ~/.cache or, without a home, /tmp."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        home = Path(tempfile.gettempdir())
    return home / "pixel-series"


def cached_array(key, shape, dtype, make):
    """The array that make() gives, from the cache folder where it was kept under this key.

    key: a tuple of text and numbers; shape, dtype: of the array. Beyond CACHE_FILES arrays the
    oldest are removed.
    """
    path = cache_folder() / f"{hashlib.sha256(repr([*key]).encode()).hexdigest()[:32]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(path, allow_pickle=False)
        if (array.shape, array.dtype) == (shape, dtype):
            return array
    array = make()
    with contextlib.suppress(OSError, InputError):  # without a cache only time is lost
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            np.save(part, array)
        files = sorted(path.parent.glob("*.npy"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-CACHE_FILES]:
            file.unlink(missing_ok=True)
    return array
