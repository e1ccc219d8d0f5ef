"""Land-cover classes: their names, colours and areas."""

import math

from running.tile_json import is_georeferenced

import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex
from rasterio._err import CPLE_AppDefinedError, CPLE_BaseError  # GDAL's, without a public name
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points

from maps.reader import row_blocks

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
# of classes without a colour, codes 1 .. 12: Okabe and Ito's palette, then more of Tol's "muted";
# safe for the colour-blind. In pictures and in the page of explore.py.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#882255")
PALETTE += ("#44aa99", "#999933", "#332288", "#dddddd")
KEEPS_AREAS = 0.003  # largest relative error of areas that is ignored; in UTM it is 0.001
ROW_SPREAD = 0.02  # largest relative difference of areas within a row


# ---- legends -------------------------------------------------------------------------------------


def class_legend(codes, classes):
    """{code: {"name", "color"}} of class codes, in ascending order; 0 is no class.

    classes: {"10": {"name": .., "color": ..}} as in tile.json. Where it is empty, names and colours
    are WorldCover's. A name or colour that is still missing is made up.
    """
    legend = {}
    for code in sorted(int(code) for code in codes if int(code) > 0):
        known = classes.get(str(code), {}) if classes else WORLDCOVER.get(code, {})
        legend[code] = {"name": f"class {code}", "color": _made_up_color(code)} | known
    return legend


def _made_up_color(code):
    """A colour of a code, whatever other codes there are; no two of the codes 1 .. 255 are equal.

    Of PALETTE, then hues a golden ratio apart.
    """
    if code <= len(PALETTE):
        return PALETTE[code - 1]
    hue = code * (5**0.5 - 1) / 2 % 1
    return to_hex(hsv_to_rgb((hue, (0.9, 0.5, 0.7)[code % 3], (0.7, 0.9)[code % 2])))


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
    hectares = row_hectares(info, *class_map.shape)
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


def describe_size(row):
    """The size of a class, of a row of `class_areas`."""
    return f"{row['pixels']} pixels" if row["hectares"] is None else f"{row['hectares']:.2f} ha"


def row_hectares(info, height, width=1):
    """Hectares of a pixel in each row of a map, (height,), or None where the area is not known.

    info: with "crs" and "transform", as in tile.json. In a projection that keeps areas the unit of
    the CRS counts, else the area on the WGS84 ellipsoid, as the mean over a row. None for a CRS
    that is not of the Earth, and where areas differ within a row.
    """
    crs = CRS.from_user_input(info["crs"]) if is_georeferenced(info) else None
    if not crs or not (crs.is_geographic or crs.is_projected):
        return None
    rows = np.arange(height)
    some = rows if crs.is_geographic else np.unique(np.linspace(0, height - 1, 257).round())
    columns = np.unique(np.linspace(0, width - 1, 9).round())
    areas = np.ma.masked_invalid(_pixel_areas(crs, info["transform"], some, columns))
    if areas.mask.all():
        return None
    if crs.is_projected:
        a, b, _, d, e, _ = info["transform"]
        plane = abs(a * e - b * d) * crs.linear_units_factor[1] ** 2
        if _most(np.abs(areas / plane - 1)) < KEEPS_AREAS:
            return np.full(height, plane / 1e4)
    if _most(areas.max(1) / areas.min(1) - 1) > ROW_SPREAD:
        return None
    return np.interp(rows, some, areas.mean(1).filled(0)) / 1e4


def _most(values):
    """The value that 95 % of the known ones do not exceed: pixels around a pole are left out."""
    return np.quantile(values.compressed(), 0.95)


def _pixel_areas(crs, transform, rows, columns):
    """Square metres on the WGS84 ellipsoid of pixels (rows, columns); NaN off the Earth."""
    a, b, c, d, e, f = transform
    corners = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])[:, :, None, None]  # around the pixel
    row, column = corners[:, 0] + rows[:, None], corners[:, 1] + columns
    x, y = a * column + b * row + c, d * column + e * row + f
    longitude, latitude = to_degrees(crs, x.ravel(), y.ravel()).reshape(2, *x.shape)
    with np.errstate(invalid="ignore"):  # of infinite coordinates
        longitude = np.radians((longitude - longitude[0] + 180) % 360 - 180)
    south_of = _area_south_of(np.radians(latitude.clip(-90, 90)))
    after = np.roll(longitude, -1, 0), np.roll(south_of, -1, 0)
    return np.abs((longitude * after[1] - after[0] * south_of).sum(0)) / 2


def to_degrees(crs, x, y):
    """Longitudes and latitudes of map coordinates, (2, N); NaN where there are none."""
    try:
        return np.array(transform_points(crs, "EPSG:4326", x, y))
    except CPLE_AppDefinedError:  # of a point outside of the projection's domain
        if len(x) == 1:
            return np.full((2, 1), np.nan)
        half = len(x) // 2
        parts = [to_degrees(crs, x[part], y[part]) for part in (slice(half), slice(half, None))]
        return np.concatenate(parts, 1)
    except CPLE_BaseError:  # of another planet
        return np.full((2, len(x)), np.nan)


def _area_south_of(latitude):
    """Square metres of the WGS84 ellipsoid from the equator to latitudes, a radian wide.

    In a plane of longitudes and these areas, polygons have their area on the ellipsoid.
    """
    radius, flattening = 6_378_137.0, 1 / 298.257223563
    e2 = flattening * (2 - flattening)
    e, sine = math.sqrt(e2), np.sin(latitude)
    return radius**2 * (1 - e2) / 2 * (sine / (1 - e2 * sine**2) + np.arctanh(e * sine) / e)
