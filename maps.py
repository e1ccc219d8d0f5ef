"""What lies on disk beside a map.

Representation maps (H, W, D) and class maps (H, W), int8 with scales, infer.json, which tells what
a map was made from, the labels of its tile, and GeoTIFFs.
"""

import errno
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import rasterio
from matplotlib.colors import to_rgba
from rasterio.errors import RasterioError
from rasterio.windows import Window

from files import atomic_write
from runtime import InputError, notice
from storage import describe_files
from tiles import open_npy, read_tile_json

ROWS = 64  # of a representation map, in memory at a time
BLOCK_PIXELS = 1 << 22  # of a class map, in memory at a time
PRODUCTS = [  # all files that we write beside the maps of a tile, GDAL's sidecars aside
    "representation_map.npy",
    "representation_map_scales.npy",
    "representation_map.tif",
    "representation_map_scales.tif",
    "valid_count.npy",
    "valid_count.tif",
    "confidence.npy",
    "confidence.tif",
    "classification_map.npy",
    "classification_map.png",
    "classification_map.tif",
    "false_color.png",
    "false_color.tif",
    "inference_map.png",
    "inference_map.json",
    "agreement.png",
    "explore.html",
]
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


def quantise(representations):
    """int8 values and the float32 scale of each pixel: value = int8 * scale; scale NaN: no data.

    representations: (.., D) float32, NaN where there is no data. Returns (.., D) and (..).
    """
    scale = np.abs(representations).max(-1) / 127
    safe = np.where(np.isfinite(scale) & (scale > 0), scale, 1)[..., None]
    values = np.nan_to_num(representations / safe).round().astype(np.int8)
    return values, scale.astype(np.float32)


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


# ---- products ------------------------------------------------------------------------------------


def remove_products(folder, kept=()):
    """Remove all that we write beside the maps of a tile, but for the file names in `kept`."""
    for name in PRODUCTS:
        if name not in kept:
            (folder / name).unlink(missing_ok=True)
            remove_sidecars(folder / name)


def remove_sidecars(path):
    """Remove what GDAL and QGIS keep beside a picture: names, statistics and smaller copies."""
    for suffix in (".aux.xml", ".ovr", ".msk"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def is_georeferenced(info):
    """Whether a tile.json or an infer.json tells where its pixels lie."""
    return {"crs", "transform"} <= set(info)


def write_geotiff(path, array, georeference, nodata, legend=None):
    """Write (H, W) or (H, W, bands) as a tiled, compressed GeoTIFF.

    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and the class names in the .aux.xml beside the file.
    """
    bands = array[..., None] if array.ndim == 2 else array
    height, width, count = bands.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": bands.dtype,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
    }
    if count == 4:
        profile |= {"photometric": "RGB", "ALPHA": "YES"}
    with atomic_write(path) as part:
        with rasterio.open(part, "w", **profile) as file:
            for first in range(0, height, 256):  # a row of blocks at a time
                block = np.moveaxis(bands[first : first + 256], -1, 0)
                file.write(block, window=Window(0, first, width, block.shape[1]))
            if legend:
                rgba = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
                colors = {code: tuple(round(255 * c) for c in rgb) for code, rgb in rgba.items()}
                file.write_colormap(1, {0: (0, 0, 0, 0)} | colors)
        _check_written(part)
    remove_sidecars(path)
    if legend:
        _write_category_names(path, legend)


def _check_written(path):
    """Read a GeoTIFF through; OSError where it is not whole, of which GDAL says nothing."""
    try:
        with rasterio.open(path) as file:
            for _, window in file.block_windows():
                file.read(window=window)
    except RasterioError:
        raise OSError(errno.EIO, "GDAL wrote no whole file; is the disk full?") from None


def _write_category_names(path, legend):
    """Class names where GDAL and QGIS look for them: <path>.aux.xml, one name a code from 0 up."""
    dataset = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(dataset, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for code in range(max(legend) + 1):
        entry = ElementTree.SubElement(names, "Category")
        entry.text = legend[code]["name"] if code in legend else "no data" if code == 0 else ""
    with atomic_write(f"{path}.aux.xml") as part:
        ElementTree.ElementTree(dataset).write(part)
