"""What lies on disk beside a map, and its pictures.

Representation maps (H, W, D) and class maps (H, W), int8 with scales, infer.json, which tells what
a map was made from, legends, false-colour bases, GeoTIFFs and drawings.
"""

import math
import zipfile
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import rasterio
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points
from rasterio.windows import Window
from sklearn.decomposition import PCA

from files import atomic_write
from runtime import InputError, notice
from storage import describe_files
from tiles import open_npy, read_tile_json
from utils import save_figure

WORLDCOVER = {  # classes of ESA WorldCover and their official colours; 0, no data, is no class
    10: {"name": "Tree cover", "color": "#006400"},
    20: {"name": "Shrubland", "color": "#ffbb22"},
    30: {"name": "Grassland", "color": "#ffff4c"},
    40: {"name": "Cropland", "color": "#f096ff"},
    50: {"name": "Built-up", "color": "#fa0000"},
    60: {"name": "Bare / sparse vegetation", "color": "#b4b4b4"},
    70: {"name": "Snow and ice", "color": "#f0f0f0"},
    80: {"name": "Permanent water bodies", "color": "#0064c8"},
    90: {"name": "Herbaceous wetland", "color": "#0096a0"},
    95: {"name": "Mangroves", "color": "#00cf75"},
    100: {"name": "Moss and lichen", "color": "#fae6a0"},
}

FIGURE_SIZE = (8.5, 6)  # inches, of a drawn class map
PICTURE_PIXELS = 2000  # most pixels along a side of a class map that is drawn
ROWS = 64  # of a representation map, in memory at a time
BLOCK_PIXELS = 1 << 22  # of a class map, in memory at a time
PRODUCTS = [  # all files that we write beside the maps of a tile, GDAL's sidecars aside
    *("representation_map.npy", "representation_map_scales.npy"),
    *("valid_count.npy", "valid_count.tif", "confidence.npy", "confidence.tif"),
    *("classification_map.npy", "classification_map.png", "classification_map.tif"),
    *("false_color.png", "false_color.tif"),
    *("inference_map.png", "inference_map.json", "agreement.png"),
]


# ---- files ---------------------------------------------------------------------------------------


def read_map(path, shape=()):
    """A (H, W) array of a .npy file, memory-mapped; InputError for another shape than wanted."""
    array = open_npy(path, "a map (.npy)")
    if array.ndim != 2 or 0 in array.shape or (shape and array.shape != shape):
        raise InputError(f"{path}: found shape {array.shape}, wanted {shape or '(H, W)'}")
    return array


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
    scales = read_map(scales_path(path), array.shape[:2]) if array.dtype == np.int8 else None
    return array, scales


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
    """
    if not labels_path:
        path = Path(info.get("tile_path", "")) / "labels.npy"
        if not info.get("tile_path") or not path.exists():
            return "", {}
        files = info.get("tile_files", {})
        if files != describe_files(path.parent, files):
            notice(f"{path.parent}: has changed since it was mapped; its labels may not fit")
        labels_path = str(path)
    return labels_path, read_tile_json(Path(labels_path).parent / "tile.json")


def read_labels(path, shape):
    """Labels (H, W) of class codes, memory-mapped; InputError for another type or shape."""
    labels = read_map(path, shape)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: found {labels.dtype}, wanted class codes (integers)")
    for _, block in row_blocks(labels):
        if block.min() < 0 or block.max() > 255:
            raise InputError(f"{path}: found codes {block.min()} to {block.max()}, wanted 0 to 255")
    return labels


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
    with atomic_write(path) as part, rasterio.open(part, "w", **profile) as file:
        for first in range(0, height, 256):  # a row of blocks at a time
            block = np.moveaxis(bands[first : first + 256], -1, 0)
            file.write(block, window=Window(0, first, width, block.shape[1]))
        if legend:
            rgba = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
            colors = {code: tuple(round(255 * c) for c in color) for code, color in rgba.items()}
            file.write_colormap(1, {0: (0, 0, 0, 0)} | colors)
    remove_sidecars(path)
    if legend:
        _write_category_names(path, legend)


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


# ---- legends and pictures ------------------------------------------------------------------------


def merge_classes(sources, refuse=True):
    """The classes of several tile.json or infer.json in one, {"10": {"name": .., "color": ..}}.

    sources: (path, content) of each; the first that tells of a class counts. Another name for one
    code raises InputError that names both files (or, without `refuse`, prints it); another colour
    is printed.
    """
    merged, origin = {}, {}
    for path, info in sources:
        for code, entry in info.get("classes", {}).items():
            first = merged.setdefault(code, entry)
            origin.setdefault(code, path)
            for key in ("name", "color"):
                if entry.get(key, first.get(key)) == first.get(key, entry.get(key)):
                    continue
                line = (
                    f"{path}: found {key} {entry[key]!r} for class {code}, wanted {first[key]!r} "
                    f"as in {origin[code]}"
                )
                if key == "name" and refuse:
                    raise InputError(line)
                notice(f"{line}, which is used")
    return merged


def class_legend(codes, classes):
    """{code: {"name", "color"}} of class codes, in order; 0 is no class.

    classes: {"10": {"name": .., "color": ..}} as in tile.json, or empty. A name or colour that it
    lacks comes from WorldCover where `classes` is empty, else it is made up.
    """
    legend = {}
    for index, code in enumerate(sorted(int(code) for code in codes if int(code) > 0)):
        known = classes.get(str(code), {}) if classes else WORLDCOVER.get(code, {})
        legend[code] = {"name": f"class {code}", "color": _made_up_color(index)} | known
    return legend


def _made_up_color(index):
    """Twenty well-known colours; after these hues a golden ratio apart, which never meet."""
    if index < 20:
        return to_hex(matplotlib.colormaps["tab20"](index))
    hue = index * (5**0.5 - 1) / 2 % 1
    return to_hex(hsv_to_rgb((hue, (0.9, 0.5, 0.7)[index % 3], (0.7, 0.9)[index % 2])))


def row_blocks(class_map):
    """(first row, rows in memory) of a map (H, W), from north to south."""
    rows = max(1, BLOCK_PIXELS // class_map.shape[1])
    for first in range(0, len(class_map), rows):
        yield first, np.asarray(class_map[first : first + rows])


def count_classes(class_map):
    """Pixels of each code in each row of a map of codes 0..255, (H, 256)."""
    counts = np.empty((len(class_map), 256), np.int64)
    for first, block in row_blocks(class_map):
        place = np.arange(len(block))[:, None] * 256 + block
        rows = np.bincount(place.ravel(), minlength=256 * len(block)).reshape(-1, 256)
        counts[first : first + len(block)] = rows
    return counts


def class_areas(class_map, legend, info):
    """{code: {"name", "pixels", "share" of the pixels with data, "hectares" or None}}.

    class_map: (H, W) codes; info: of the map (`read_provenance`).
    """
    counts = count_classes(class_map)
    hectares = row_hectares(info, len(class_map))
    with_data = max(1, int(counts[:, 1:].sum()))
    areas = {}
    for code in legend:
        pixels = int(counts[:, code].sum())
        areas[str(code)] = {
            "name": legend[code]["name"],
            "pixels": pixels,
            "share": pixels / with_data,
            "hectares": None if hectares is None else float(counts[:, code] @ hectares),
        }
    return areas


def row_hectares(info, height):
    """Hectares of a pixel in each row of a map, (H,), or None where they cannot be told.

    info: with "crs" and "transform", as in tile.json. In a projection the unit of the CRS counts.
    In degrees, and in Mercator projections, which stretch the north, it is the area on the WGS84
    ellipsoid.
    """
    if not is_georeferenced(info):
        return None
    crs, (a, b, c, d, e, f) = CRS.from_user_input(info["crs"]), info["transform"]
    is_mercator = 'PROJECTION["Mercator' in crs.to_wkt()
    if crs.is_projected and not is_mercator:
        metres = crs.linear_units_factor[1]
        return np.full(height, abs(a * e - b * d) * metres**2 / 1e4)
    if b or d or not (crs.is_geographic or crs.is_projected):
        return None
    edges = f + e * np.arange(height + 1)
    _, latitude = transform_points(crs, "EPSG:4326", np.full(height + 1, c), edges)
    longitude, _ = transform_points(crs, "EPSG:4326", [c, c + a], edges[:1].repeat(2))
    south_of = [_area_south_of(min(max(degrees, -90), 90)) for degrees in latitude]
    width = abs(math.radians(longitude[1] - longitude[0]))
    return np.array([abs(lower - upper) for upper, lower in pairwise(south_of)]) * width / 1e4


def _area_south_of(latitude):
    """Square metres of the WGS84 ellipsoid from the equator to a latitude, a radian wide."""
    radius, flattening = 6_378_137.0, 1 / 298.257223563
    e2 = flattening * (2 - flattening)
    e, sine = math.sqrt(e2), math.sin(math.radians(latitude))
    return radius**2 * (1 - e2) / 2 * (sine / (1 - e2 * sine**2) + math.atanh(e * sine) / e)


def draw_class_map(figure, class_map, legend, title=""):
    """Draw a map of class codes (H, W) with its legend; 0 is no data and transparent.

    A large map is drawn with every second, third, .. pixel: a picture of all would need more memory
    than a screen can show.
    """
    pixels = count_classes(class_map).sum(0)
    step = -(-max(class_map.shape) // PICTURE_PIXELS)
    rgba = np.zeros((256, 4), np.uint8)
    for code, entry in legend.items():
        rgba[code] = np.multiply(to_rgba(entry["color"]), 255).round()
    axes = figure.subplots()
    axes.imshow(rgba[class_map[::step, ::step]], interpolation="none")
    axes.set_title(title)
    axes.set_axis_off()
    handles = [
        Patch(color=entry["color"], label=f"{code} {entry['name']}")
        for code, entry in legend.items()
        if pixels[code]
    ]
    if pixels[0]:
        handles.append(Patch(fc="none", ec="gray", label="no data"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def plot_class_map(class_map, legend, path, title=""):
    """`draw_class_map` to a PNG."""
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    draw_class_map(figure, class_map, legend, title)
    save_figure(figure, path)


# ---- false colour --------------------------------------------------------------------------------


def fit_basis(pixels):
    """False-colour basis: three principal components and the percentiles 2 and 98 along each.

    pixels: (N, D) representations, N > 3 of valid pixels. Returns a dict of float32 arrays: mean
    (D,), components (3, D), low (3,), high (3,).
    """
    pca = PCA(3, random_state=0).fit(pixels)
    low, high = np.percentile(pca.transform(pixels), (2, 98), axis=0)
    basis = {"mean": pca.mean_, "components": pca.components_, "low": low, "high": high}
    return {name: np.asarray(values, np.float32) for name, values in basis.items()}


def apply_basis(basis, representations):
    """Representations (.., D), NaN where there is no data, to RGBA (.., 4) uint8.

    A pixel's colour depends on its representation and the basis alone; no data is transparent.
    """
    valid = np.isfinite(representations).all(-1)
    pixels = representations[valid].astype(np.float32)
    places = (pixels - basis["mean"]) @ basis["components"].T
    places = (places - basis["low"]) / np.maximum(basis["high"] - basis["low"], 1e-12)
    rgba = np.zeros((*valid.shape, 4), np.uint8)
    rgba[valid, :3] = (places.clip(0, 1) * 255).round()
    rgba[valid, 3] = 255
    return rgba


BASIS_BYTES = 1 << 24  # most that a file of a basis can hold: 65536 dimensions need a megabyte


def save_basis(basis, checkpoint_sha256, path):
    """Write a basis of the representations of a checkpoint ("" where that is not known)."""
    with atomic_write(path) as part:
        np.savez(part, checkpoint_sha256=np.array(checkpoint_sha256), **basis)


def load_basis(path, num_dimensions):
    """A basis (`fit_basis`) on disk and the hash of its checkpoint, "" where that is not told.

    Raises InputError for anything else, before memory is asked for.
    """
    wanted = {
        "mean": (num_dimensions,),
        "components": (3, num_dimensions),
        "low": (3,),
        "high": (3,),
    }
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > BASIS_BYTES:
                raise ValueError("too large")
            basis = {name: _read_member(archive, name) for name in wanted}
            has_hash = "checkpoint_sha256.npy" in archive.namelist()
            told = str(_read_member(archive, "checkpoint_sha256")) if has_hash else ""
    except Exception as error:  # damage shows itself in many kinds, according to the byte it hits
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: found no basis ({line}), wanted one of this script") from None
    for name, shape in wanted.items():
        found = basis[name]
        if name == "mean" and found.ndim == 1 and len(found) != num_dimensions:
            raise InputError(
                f"{path}: found {len(found)} dimensions, wanted {num_dimensions} of the map"
            )
        if found.dtype != np.float32 or found.shape != shape or not np.isfinite(found).all():
            raise InputError(f"{path}: found no usable {name}, wanted finite float32 {shape}")
    return basis, told


def _read_member(archive, name):
    """One array of an .npz; ValueError where its header tells of more bytes than the file has."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(content):
        raise ValueError(f"{name} is cut off")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
