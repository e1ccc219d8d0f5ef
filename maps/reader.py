"""Map files: read, and compared with what they were made from."""

from pathlib import Path

import numpy as np

from running.errors import InputError, notice
from running.files import describe_files, open_npy
from tiles import is_georeferenced, read_tile_json

ROWS = 64  # of a representation map, in memory at a time
BLOCK_PIXELS = 1 << 22  # of a class map, in memory at a time
KINDS = {"iu": "integers", "f": "floating-point numbers"}  # of a map's type, and the words for it


# ---- maps (H, W) ---------------------------------------------------------------------------------


def read_map(path, shape=(), kind="iu"):
    """A (H, W) array of a .npy file, memory-mapped; InputError for another shape or kind.

    kind: one of KINDS.
    """
    array = open_npy(path, "a map (.npy)")
    if array.ndim != 2 or 0 in array.shape or (shape and array.shape != shape):
        raise InputError(f"{path}: found shape {array.shape}, wanted {shape or '(H, W)'}")
    if array.dtype.kind not in kind:
        raise InputError(f"{path}: found {array.dtype}, wanted {KINDS[kind]}")
    return array


def read_codes(path, shape=(), most=255):
    """A (H, W) map of integers from 0 to `most`, memory-mapped; InputError for anything else."""
    codes = read_map(path, shape)
    for _, block in row_blocks(codes):
        if block.min() < 0 or block.max() > most:
            found = f"{block.min()} to {block.max()}"
            raise InputError(f"{path}: found codes {found}, wanted 0 to {most}")
    return codes


def row_blocks(class_map):
    """(first row, rows in memory) of a map (H, W), from north to south."""
    rows = max(1, BLOCK_PIXELS // class_map.shape[1])
    for first in range(0, len(class_map), rows):
        yield first, np.asarray(class_map[first : first + rows])


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
    if array.dtype != np.int8:
        return array, None
    return array, read_map(scales_path(path), array.shape[:2], kind="f")


def check_together(opened):
    """Refuse maps that cannot be shown together, by their shape (H, W, D), made_by and path.

    made_by: hash of a map's checkpoint, or "" where it is not known. Raises InputError for fewer
    than three dimensions, which false colour needs, for maps of different ones, and for maps of
    different checkpoints.
    """
    first, *others = opened
    if first.shape[2] < 3:
        raise InputError(f"{first.path}: found {first.shape[2]} dimensions, wanted 3 or more")
    for other in others:
        if other.shape[2] != first.shape[2]:
            raise InputError(
                f"{other.path}: found {other.shape[2]} dimensions, wanted {first.shape[2]} "
                f"({first.path})"
            )
        check_same_checkpoint(other.path, "a map", other.made_by, first)


def check_same_checkpoint(path, kind, made_by, wanted):
    """Refuse a map or a basis of another checkpoint; say so where that cannot be told.

    made_by: hash of its checkpoint, or "".
    """
    if not (made_by and wanted.made_by):
        print(f"{path}: not known whether it is of the checkpoint that {wanted.path} is of")
    elif made_by != wanted.made_by:
        raise InputError(
            f"{path}: found {kind} of checkpoint {made_by[:12]}, wanted one of "
            f"{wanted.made_by[:12]} as {wanted.path}"
        )


def read_representations(path, rows=slice(None)):
    """Rows of a representation map as float32 (rows, W, D), NaN where there is no data."""
    array, scales = open_representations(path)
    values = array[rows].astype(np.float32)
    return values if scales is None else values * scales[rows, :, None]


def representation_blocks(path):
    """Yield (first row, `read_representations` of some rows) from north to south."""
    for first in range(0, len(open_representations(path)[0]), ROWS):
        yield first, read_representations(path, slice(first, first + ROWS))


# ---- what a map was made from --------------------------------------------------------------------


def read_provenance(map_path):
    """What infer.json beside a map tells of it, or {} where there is none.

    Raises InputError for another file than infer.py writes.
    """
    path = Path(map_path).parent / "infer.json"
    info = read_tile_json(path)  # has crs, transform and classes as a tile.json
    for key in ("tile", "tile_path", "checkpoint_sha256"):
        if not isinstance(info.get(key, ""), str):
            raise InputError(f"{path}: found {key} {info[key]!r}, wanted text")
    if not isinstance(info.get("tile_files", {}), dict):
        raise InputError(f"{path}: found tile_files {info['tile_files']!r}, wanted an object")
    return info


def find_labels(labels_path, info):
    """Where labels lie, and the content of the tile.json beside them: (path or "", {..}).

    labels_path: empty for labels.npy of the tile that infer.json, `info`, names, where it has one.
    Raises InputError for labels of another place.
    """
    if not labels_path:
        path = Path(info.get("tile_path", "")) / "labels.npy"
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
    """Refuse what lies in a tile, at `path`, for a map of another place; say where it may be one.

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
