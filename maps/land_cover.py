"""Land-cover classes: their names and colours, their areas, and plots of class maps."""

import math
import textwrap
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points

from maps.reader import row_blocks
from tile_json import is_georeferenced
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
FIGURE_SIZE = (8.5, 6)  # inches, of a plot; higher where its legend needs more
LEGEND_WIDTH = 36  # characters of a line of the legend
LINE_HEIGHT = 0.22  # inches, of a line of the legend
PICTURE_PIXELS = 2000  # at most, along the longer edge of a class map in a plot


# ---- legends -------------------------------------------------------------------------------------


def class_legend(codes, classes):
    """{code: {"name", "color"}} of class codes, in ascending order; 0 is no class.

    classes: {"10": {"name": .., "color": ..}} as in tile.json. Where it is empty, names and colours
    are WorldCover's. A name or colour that is still missing is made up.
    """
    legend = {}
    for index, code in enumerate(sorted(int(code) for code in codes if int(code) > 0)):
        known = classes.get(str(code), {}) if classes else WORLDCOVER.get(code, {})
        legend[code] = {"name": f"class {code}", "color": _made_up_color(index)} | known
    return legend


def _made_up_color(index):
    """Twenty well-known colours, then hues a golden ratio apart, of which no two are equal."""
    if index < 20:
        return to_hex(matplotlib.colormaps["tab20"](index))
    hue = index * (5**0.5 - 1) / 2 % 1
    return to_hex(hsv_to_rgb((hue, (0.9, 0.5, 0.7)[index % 3], (0.7, 0.9)[index % 2])))


# ---- areas ---------------------------------------------------------------------------------------


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


# ---- pictures ------------------------------------------------------------------------------------


def fill_figure(figure, class_map, legend, title=""):
    """Plot a map of class codes (H, W) with its legend; 0 is no data and transparent.

    Of a large map only every second, third, .. pixel is plotted, to save memory.
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
    axes.set_anchor("N")
    handles = [
        Patch(color=entry["color"], label=textwrap.fill(f"{code} {entry['name']}", LEGEND_WIDTH))
        for code, entry in legend.items()
        if pixels[code]
    ]
    if pixels[0]:
        handles.append(Patch(fc="none", ec="gray", label="no data"))
    lines = sum(1 + handle.get_label().count("\n") for handle in handles)
    figure.set_figheight(max(FIGURE_SIZE[1], LINE_HEIGHT * (lines + 1)))  # no entry is cut off
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def plot_class_map(class_map, legend, path, title=""):
    """Plot a map of class codes (H, W) with its legend to a PNG."""
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    fill_figure(figure, class_map, legend, title)
    save_figure(figure, path)
