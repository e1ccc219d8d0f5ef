"""Map files: read, and compared with what they were made from."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from running.errors import InputError, notice
from running.files import Watch, describe_files, open_npy
from running.tile_json import is_georeferenced, read_tile_json

import numpy as np

BLOCK_BYTES = 1 << 26  # of a representation map as float32, in memory at a time
BLOCK_PIXELS = 1 << 22  # of a map (H, W), in memory at a time
KINDS = {"iu": "integers", "f": "floating-point numbers"}  # of a map's type, and the words for it


# ---- maps (H, W) ---------------------------------------------------------------------------------


def read_map(path, shape=(), kind="iu"):
    """An array (H, W) of a .npy file, memory-mapped, or the band of a GeoTIFF.

    kind: one of KINDS. Raises InputError for another shape or kind.
    """
    array = _read_geotiff(path) if is_geotiff(path) else open_npy(path, "a map (.npy)")
    if array.ndim != 2 or 0 in array.shape or (shape and array.shape != shape):
        raise InputError(f"{path}: found shape {array.shape}, wanted {shape or '(H, W)'}")
    if array.dtype.kind not in kind:
        raise InputError(f"{path}: found {array.dtype}, wanted {KINDS[kind]}")
    return array


def is_geotiff(path):
    """Whether a map is a GeoTIFF by its name."""
    return Path(path).suffix.lower() in (".tif", ".tiff")


@contextmanager
def _open_geotiff(path):
    """A GeoTIFF of one band, open; InputError for another file."""
    import rasterio  # takes a while, and most maps are .npy

    try:
        with rasterio.open(path) as file:
            if file.count != 1:
                raise InputError(f"{path}: found {file.count} bands, wanted a map of one band")
            yield file
    except rasterio.errors.RasterioError as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{path}: found no readable GeoTIFF ({line}), wanted a map") from None


def _read_geotiff(path):
    """The band (H, W) of a GeoTIFF, with 0 for its nodata; uint8 where numbers are 0 to 255."""
    with _open_geotiff(path) as file:
        array = file.read(1)
        if file.nodata is not None and array.dtype.kind in "iu":
            array[array == file.nodata] = 0
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    return array


def _read_place(path):
    """The crs and transform of a GeoTIFF, as in tile.json; {} where it has none."""
    with _open_geotiff(path) as file:
        crs, transform = file.crs, list(file.transform)[:6]
    return {"crs": crs.to_string(), "transform": transform} if crs else {}


def read_codes(path, shape=(), max_code=255):
    """A map (H, W) of integers 0 .. max_code, memory-mapped; InputError for anything else."""
    codes = read_map(path, shape)
    for _, block in row_blocks(codes):
        if block.min() < 0 or block.max() > max_code:
            found = f"{block.min()} to {block.max()}"
            raise InputError(f"{path}: found codes {found}, wanted 0 to {max_code}")
    return codes


def row_blocks(array):
    """Yield (first row, rows in memory) of a map (H, W), from north to south."""
    rows = max(1, BLOCK_PIXELS // array.shape[1])
    for first in range(0, len(array), rows):
        yield first, np.asarray(array[first : first + rows])


class ClassMap(NamedTuple):
    """A map of class codes (H, W) uint8, 0 for no data, and what is known of it."""

    path: Path
    codes: np.ndarray
    info: dict


def find_maps(path, name):
    """Paths of maps: the path itself, or of a folder the file of this name in it or its folders.

    Raises InputError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    paths = [path / name] if (path / name).exists() else sorted(path.glob(f"*/{name}"))
    if not paths:
        raise InputError(f"{path}: found no {name} in it or its folders, wanted a map of infer.py")
    return paths


def open_class_maps(path):
    """The ClassMaps of a path, see `find_maps`: of a .npy file, a GeoTIFF, or of infer.py.

    Raises InputError where there is none, or one has no class.
    """
    paths = find_maps(path, "classification_map.npy")
    maps = [ClassMap(one, read_codes(one), read_provenance(one)) for one in paths]
    empty = [one.path for one in maps if not any(block.any() for _, block in row_blocks(one.codes))]
    if empty:
        raise InputError(f"{empty[0]}: found no pixel with a class, wanted some")
    return maps


# ---- representation maps (H, W, D) ---------------------------------------------------------------


def scales_path(path):
    """Where the scales of an int8 representation map lie: beside it, <name>_scales.npy."""
    path = Path(path)
    return path.with_name(f"{path.stem}_scales.npy")


def open_representations(path):
    """A representation map on disk: memory map (H, W, D), and the scales (H, W) of int8 or None.

    Raises InputError for anything else.
    """
    array = open_npy(path, "a representation map (.npy)")
    if array.ndim != 3 or array.dtype not in (np.float32, np.float16, np.int8):
        raise InputError(
            f"{path}: found {array.dtype} {array.shape}, wanted float32, float16 or int8 (H, W, D)"
        )
    if 0 in array.shape:
        raise InputError(f"{path}: found shape {array.shape}, wanted (H, W, D), none of them 0")
    if array.dtype != np.int8:
        return array, None
    return array, read_map(scales_path(path), array.shape[:2], kind="f")


def block_rows(shape, stride=1, start=0):
    """Yield (first row, last row + 1) of blocks of a map (H, W, D), from north to south.

    stride: of which every stride-th row is read; start: the first row.
    """
    height, width, size = shape
    rows = max(1, BLOCK_BYTES // (4 * width * size)) * stride
    for first in range(start, height, rows):
        yield first, min(first + rows, height)


class RepresentationMap:
    """A representation map on disk, read in blocks of rows, and what is known of it.

    shape: (H, W, D). info: the content of infer.json beside it. made_by: its MADE_BY, None where
    not known. name: of its folder; title: of its tile, for pictures.
    Raises InputError for another file, and where it changes while it is read.
    """

    def __init__(self, path):
        self.path, folder = Path(path), Path(path).absolute().parent
        names = [self.path.name, scales_path(path).name, "infer.json"]
        self.watch = Watch(folder, names)
        self.shape = open_representations(path)[0].shape
        self.info = read_provenance(path)
        self.made_by = {key: self.info.get(key) for key in MADE_BY}
        if self.made_by["draws"]:  # they read all dates
            self.made_by["dates"] = None
        self.name, self.title = folder.name, self.info.get("tile", folder.name)

    def blocks(self, stride=1, start=0):
        """Yield (first row, values (rows, W, D) float32) from north to south, NaN for no data.

        stride: only every stride-th row and column is read, and rows are counted among them. start:
        the first row that is read, a multiple of stride. The file is opened again for each block,
        so that the memory of pages already read is freed.
        """
        for first, last in block_rows(self.shape, stride, start):
            part = slice(first, last, stride), slice(None, None, stride)
            array, scales = open_representations(self.path)
            values = array[part].astype(np.float32)
            if scales is not None:
                values = values * scales[part][..., None]
            self.watch.check()
            yield first // stride, values


# ---- what a map was made from --------------------------------------------------------------------

# what representations depend on beside their tile, and the types in infer.json
MADE_BY = {"checkpoint_sha256": str, "dates": int, "draws": int, "representation_format": str}
MADE_BY |= {"season": str}
PROVENANCE = {"tile": str, "tile_path": str, "tile_files": dict, **MADE_BY}
TYPES = {str: "text", int: "a whole number", dict: "an object"}  # and the words for them


def check_together(maps):
    """Refuse representation maps that cannot be shown together.

    maps: each with shape (H, W, D), made_by and path. Raises InputError for fewer than three
    dimensions, which false colour needs, for maps of different ones and of different checkpoints.
    """
    first, *others = maps
    if first.shape[2] < 3:
        raise InputError(f"{first.path}: found {first.shape[2]} dimensions, wanted 3 or more")
    for other in others:
        if other.shape[2] != first.shape[2]:
            raise InputError(
                f"{other.path}: found {other.shape[2]} dimensions, wanted {first.shape[2]} "
                f"({first.path})"
            )
        check_made_alike(other.path, "a map", other.made_by, first)


def check_made_alike(path, kind, made_by, other):
    """Refuse a map or a basis of another checkpoint; say where its values may differ otherwise.

    path, kind, made_by: of the map or basis, made_by as a `RepresentationMap` has it. other: a map.
    """
    pairs = {key: (made_by.get(key), other.made_by.get(key)) for key in MADE_BY}
    found, wanted = pairs.pop("checkpoint_sha256")
    if not (found and wanted):
        print(f"{path}: not known whether it is of the same checkpoint as {other.path}")
    elif found != wanted:
        raise InputError(
            f"{path}: found {kind} of checkpoint {found[:12]}, wanted one of {wanted[:12]} as "
            f"{other.path}"
        )
    differ = {key: pair for key, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    if differ:
        found, wanted = (
            ", ".join(f"{key}={pair[number]}" for key, pair in differ.items()) for number in (0, 1)
        )
        notice(
            f"{path}: found {kind} of {found}, wanted {wanted} as {other.path}: equal places may "
            "look different (infer.py overwrite=true maps anew)"
        )


def read_provenance(map_path):
    """The content of infer.json beside a map, or {} where there is none.

    Raises InputError for another file than infer.py writes.
    """
    path = Path(map_path).parent / "infer.json"
    info = read_tile_json(path)  # has crs, transform and classes as a tile.json
    for key, kind in PROVENANCE.items():
        if not isinstance(info.get(key, kind()), kind):
            raise InputError(f"{path}: found {key} {info[key]!r}, wanted {TYPES[kind]}")
    return info | _read_place(map_path) if is_geotiff(map_path) else info


def find_labels(labels_path, info, name="labels.npy"):
    """Where labels lie, and the content of the tile.json beside them: (path or "", {..}).

    labels_path: empty for those of the tile that infer.json, `info`, names, where it has some.
    name: of their file there.
    Raises InputError for labels of another place.
    """
    if not labels_path:
        path = Path(info.get("tile_path", "")) / name
        if not info.get("tile_path") or not path.exists():
            return "", {}
        files = info.get("tile_files", {})
        if files != describe_files(path.parent, files):
            notice(f"{path.parent}: has changed since it was mapped; its labels may not fit")
        labels_path = str(path)
    folder = Path(labels_path).parent
    tile_info = read_tile_json(folder / "tile.json")
    check_same_place(labels_path, tile_info, info)
    return labels_path, tile_info


def check_same_place(path, tile_info, info):
    """Refuse a file of a tile, at `path`, for a map of another place; say where it may be one.

    tile_info: of its tile.json; info: of the map (`read_provenance`).
    """
    if is_georeferenced(tile_info) and is_georeferenced(info):
        found, wanted = ((one["crs"], one["transform"]) for one in (tile_info, info))
        if found[0] != wanted[0] or not np.allclose(found[1], wanted[1], rtol=1e-9, atol=1e-9):
            raise InputError(f"{path}: found {_place(*found)}, wanted {_place(*wanted)} of the map")
        return
    folder, mapped = Path(path).resolve().parent, Path(info.get("tile_path", ""))
    if (folder / "bands.npy").exists() and mapped.name not in ("", folder.name):
        notice(f"{path}: not known whether it shows the place of {mapped.name}, which was mapped")


def _place(crs, transform):
    return f"{crs} {tuple(transform)}"
