"""What lies on disk beside a map, and its pictures.

Representation maps (H, W, D) and class maps (H, W), int8 with scales, infer.json, which tells what
a map was made from, legends, false-colour bases, GeoTIFFs and drawings.
"""

import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import rasterio
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.decomposition import PCA

from files import atomic_write
from runtime import InputError
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


# ---- files ---------------------------------------------------------------------------------------


def _load_npy(path, wanted):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: found no file, wanted {wanted}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: found no readable array ({error}), wanted {wanted}") from None


def read_map(path, shape=()):
    """A (H, W) array of a .npy file, memory-mapped; InputError for another shape than wanted."""
    array = _load_npy(path, "a map (.npy)")
    if array.ndim != 2 or (shape and array.shape != shape):
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
    array = _load_npy(path, "a representation map (.npy)")
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


def quantise(representations):
    """int8 values and the float32 scale of each pixel: value = int8 * scale; scale NaN: no data.

    representations: (.., D) float32, NaN where there is no data. Returns (.., D) and (..).
    """
    scale = np.abs(representations).max(-1) / 127
    safe = np.where(np.isfinite(scale) & (scale > 0), scale, 1)[..., None]
    values = np.nan_to_num(representations / safe).round().astype(np.int8)
    return values, scale.astype(np.float32)


def read_provenance(map_path):
    """What infer.json beside a map tells of it, or {} where there is none."""
    path = Path(map_path).parent / "infer.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_georeferenced(info):
    """Whether a tile.json or an infer.json tells where its pixels lie."""
    return {"crs", "transform"} <= set(info)


def write_geotiff(path, array, georeference, nodata, legend=None):
    """Write (H, W) or (H, W, bands) as a tiled, compressed GeoTIFF.

    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and the class names in the .aux.xml beside the file.
    """
    bands = array[..., None] if array.ndim == 2 else array
    profile = {
        "driver": "GTiff",
        "height": bands.shape[0],
        "width": bands.shape[1],
        "count": bands.shape[2],
        "dtype": bands.dtype,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
    }
    if bands.shape[2] == 4:
        profile |= {"photometric": "RGB", "ALPHA": "YES"}
    with atomic_write(path) as part, rasterio.open(part, "w", **profile) as file:
        file.write(np.moveaxis(bands, -1, 0))
        if legend:
            rgba = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
            colors = {code: tuple(round(255 * c) for c in color) for code, color in rgba.items()}
            file.write_colormap(1, {0: (0, 0, 0, 0)} | colors)
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


def class_legend(codes, classes):
    """{code: {"name", "color"}} of class codes, in order; 0 is no class.

    classes: {"10": {"name": .., "color": ..}} as in tile.json, or empty. A name or colour that it
    lacks comes from WorldCover where `classes` is empty, else it is made up.
    """
    legend, palette = {}, matplotlib.colormaps["tab20"]
    for index, code in enumerate(sorted(int(code) for code in codes if int(code) > 0)):
        known = classes.get(str(code), {}) if classes else WORLDCOVER.get(code, {})
        legend[code] = {"name": f"class {code}", "color": to_hex(palette(index % 20))} | known
    return legend


def class_areas(class_map, legend, info):
    """{code: {"name", "pixels", "share" of the pixels with data, "hectares" or None}}.

    class_map: (H, W) codes; info: of the map (`read_provenance`).
    """
    transform = info.get("transform")
    hectares = (
        abs(transform[0] * transform[4] - transform[1] * transform[3]) / 1e4 if transform else None
    )
    with_data = max(1, int((class_map > 0).sum()))
    areas = {}
    for code in legend:
        pixels = int((class_map == code).sum())
        areas[str(code)] = {
            "name": legend[code]["name"],
            "pixels": pixels,
            "share": pixels / with_data,
            "hectares": pixels * hectares if hectares else None,
        }
    return areas


def draw_class_map(figure, class_map, legend, title=""):
    """Draw a map of class codes (H, W) with its legend; 0 is no data and transparent."""
    rgba = np.zeros((*class_map.shape, 4))
    for code, entry in legend.items():
        rgba[class_map == code] = to_rgba(entry["color"])
    axes = figure.subplots()
    axes.imshow(rgba, interpolation="none")
    axes.set_title(title)
    axes.set_axis_off()
    handles = [
        Patch(color=entry["color"], label=f"{code} {entry['name']}")
        for code, entry in legend.items()
        if (class_map == code).any()
    ]
    if (class_map == 0).any():
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
