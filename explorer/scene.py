"""One map of the page and what is known of its pixels: layers, series, place, legend.

Shapes: H x W pixels of the page's grid, T dates, B bands, D dimensions of a representation, K of
them kept by the PCA.
"""

from datetime import datetime
from pathlib import Path

from running.errors import InputError
from running.files import Watch
from running.tile_json import (
    band_key,
    describe_target,
    find_bands,
    find_years,
    is_georeferenced,
)

import numpy as np
from rasterio._err import CPLE_BaseError  # GDAL's errors, which have no public name
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from maps.false_color import apply_basis
from maps.land_cover import class_legend, row_hectares
from maps.reader import RepresentationMap, check_same_place, read_codes, read_map
from maps.writer import quantise
from tiles import Tile
from utils import median_color

BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")  # blue, green, red, NIR, two of SWIR
HECTARE_SPREAD = 0.1  # relative difference of rows; where it is larger, the page counts pixels
BLOCK_BYTES = 1 << 26  # of a tile in memory at a time
# what the page holds of a map beside its representations, and of its tile
MAP_FILES = ("classification_map.npy", "confidence.npy", "regression_map.npy", "valid_count.npy")
MAP_FILES += ("applicability.npy",)
TILE_FILES = ("bands.npy", "masks.npy", "doys.npy", "labels.npy", "tile.json")


class Scene(RepresentationMap):
    """A map of the page and its tile.

    tile: the Tile, or None where it is not at hand. stride: the page's grid holds every stride-th
    row and column. Raises InputError where map and tile have other pixels.
    """

    def __init__(self, path, tile_path=""):
        super().__init__(path)
        self.stride, self.tile = 1, None
        self.watches = [self.watch, Watch(self.path.parent, MAP_FILES)]
        folder = Path(tile_path or self.info.get("tile_path", ""))
        if not tile_path and not (self.info.get("tile_path") and folder.exists()):
            where = self.info.get("tile_path", "no infer.json names it")
            print(f"{path}: found no tile ({where}), so the page has no series and no labels")
            return
        self.watches.append(Watch(folder, TILE_FILES))
        self.tile = Tile(folder)
        if self.tile.shape[1:3] != self.shape[:2]:
            raise InputError(
                f"{path}: found {self.shape[0]} x {self.shape[1]} pixels, wanted "
                f"{self.tile.shape[1]} x {self.tile.shape[2]} of {folder}"
            )
        check_same_place(folder / "tile.json", self.tile.info, self.info)
        self.name, self.title = self.tile.name, self.tile.title

    @property
    def grid(self):
        """(H, W) of the page's grid: every stride-th row and column."""
        return tuple(-(-size // self.stride) for size in self.shape[:2])

    def thin(self, array):
        """A map (H, W, ..) on disk, on the page's grid."""
        return np.asarray(array[:: self.stride, :: self.stride])


# ---- several maps --------------------------------------------------------------------------------


def distinguish_titles(scenes):
    """Add to titles that are equal what differs: the year, else the folders, else a number."""
    groups = {}
    for scene in scenes:
        groups.setdefault(scene.title, []).append(scene)
    for group in (group for group in groups.values() if len(group) > 1):
        numbers = [str(number) for number in range(1, 1 + len(group))]
        years = [find_years(scene.tile.info) if scene.tile else "" for scene in group]
        for names in (years, _other_folders(group), numbers):
            if all(names) and len(set(names)) == len(group):
                break
        for scene, name in zip(group, names, strict=True):
            scene.title = f"{scene.title} {name}"


def _other_folders(scenes):
    """The parts of each map's folder that are not of all the maps' folders."""
    folders = [scene.path.absolute().parent.parts for scene in scenes]
    common = set.intersection(*map(set, folders))
    return ["/".join(part for part in folder if part not in common) for folder in folders]


def same_grid(one, other):
    """Whether two maps are known to have the same pixels: of one shape, CRS and transform."""
    infos = [scene.tile.info if scene.tile else scene.info for scene in (one, other)]
    if one.shape[:2] != other.shape[:2] or not all(map(is_georeferenced, infos)):
        return False
    crs, transforms = zip(*((info["crs"], info["transform"]) for info in infos), strict=True)
    return crs[0] == crs[1] and np.allclose(*transforms, rtol=1e-9, atol=1e-9)


# ---- layers --------------------------------------------------------------------------------------


def embed(scene, mean, components, basis):
    """Representation and false colour: int8 (H, W, K), scales (H, W) float32, RGB (H, W, 3)."""
    values = np.empty((*scene.grid, len(components)), np.int8)
    scales = np.empty(scene.grid, np.float32)
    color = np.empty((*scene.grid, 3), np.uint8)
    for first, block in scene.blocks(scene.stride):
        rows = slice(first, first + len(block))
        values[rows], scales[rows] = quantise((block - mean) @ components.T)
        color[rows] = apply_basis(basis, block)[..., :3]
    return values, scales, color


def map_layers(scene):
    """Maps that infer.py wrote beside the representations, and the tile's: {name: (H, W) array}.

    Also what `number_values` says of the map of a quantity, {} where there is none.
    """
    folder, shape, layers, quantity = scene.path.parent, scene.shape[:2], {}, {}
    if (folder / "classification_map.npy").exists():
        classes = read_codes(folder / "classification_map.npy", shape)
        layers["classes"] = scene.thin(classes).astype(np.uint8)
    if (folder / "confidence.npy").exists():
        confidence = scene.thin(read_map(folder / "confidence.npy", shape, kind="f"))
        layers["confidence"] = (np.nan_to_num(confidence).clip(0, 1) * 255).round().astype(np.uint8)
    if (folder / "regression_map.npy").exists():
        layers["quantity"], quantity = number_values(scene)
    if (folder / "applicability.npy").exists():
        layers["applicability"] = number_dissimilarity(scene)
    if (folder / "valid_count.npy").exists():
        count = read_codes(folder / "valid_count.npy", shape, max_code=65535)
        layers["count"] = scene.thin(count).astype(np.uint16)
    elif scene.tile:
        layers["count"] = scene.thin(scene.tile.clear_counts())
    if scene.tile and "labels" in scene.tile.answers:
        layers["labels"] = scene.thin(scene.tile.labels)
    return layers, quantity


def number_values(scene):
    """The map of a quantity in steps of 1 / 65534 of its range: (H, W) uint16, 0 where it has none.

    Also facts for the page: name and unit, the values low and high of the steps 1 and 65535, and
    the steps between which the colours lie, the percentiles 2 and 98.
    """
    file = scene.path.parent / "regression_map.npy"
    values = scene.thin(read_map(file, scene.shape[:2], kind="f"))
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0, 0)
    steps = np.zeros(values.shape, np.uint16)
    steps[known] = 1 + ((values[known] - low) / ((high - low) or 1) * 65534).round()
    colors = np.percentile(steps[known], (2, 98)).tolist() if known.any() else [1, 1]
    label = describe_target(scene.info.get("target", {}))
    return steps, {"label": label, "low": low, "high": high, "colors": colors}


def number_dissimilarity(scene):
    """applicability.npy in steps of 1 / 127 of its threshold, (H, W) uint8; 0 where it has none.

    1 .. 128 lie in the area of applicability, 129 .. 255 outside of it, 255 at twice the threshold
    or more. Raises InputError where infer.json has no threshold.
    """
    file = scene.path.parent / "applicability.npy"
    threshold = scene.info.get("applicability_threshold")
    if not (type(threshold) in (int, float) and 0 < threshold < np.inf):
        raise InputError(
            f"{file}: found {threshold!r:.40} as applicability_threshold in infer.json, wanted a "
            "number above 0; infer.py overwrite=true writes both"
        )
    far = scene.thin(read_map(file, scene.shape[:2], kind="f")) / threshold
    steps = np.where(far <= 1, np.minimum(far, 1) * 127 + 1, 129 + (far - 1) * 126)
    return np.nan_to_num(np.floor(steps)).clip(0, 255).astype(np.uint8)


def row_ranges(scene, step):
    """Yield (first row, last row + 1) of blocks of a tile, each from a multiple of `step` on."""
    tile_bytes = scene.tile.shape[0] * scene.tile.shape[2] * scene.tile.shape[3] * 2
    rows = max(1, BLOCK_BYTES // tile_bytes) * step
    for first in range(0, scene.shape[0], rows):
        yield first, min(first + rows, scene.shape[0])


def median_layer(scene):
    """Median red, green and blue over the clear dates, (H, W, 3) uint8; None without such bands.

    Stretched between the percentiles 2 and 98 of each band to 1 .. 255; 0 where no date is clear.
    """
    median = median_color(scene.tile, scene.stride)
    if median is None or not np.isfinite(median).any():
        return None
    low, high = np.nanpercentile(median.reshape(-1, 3), (2, 98), axis=0)
    color = ((median - low) / np.maximum(high - low, 1)).clip(0, 1) * 254 + 1
    return np.nan_to_num(color.round()).astype(np.uint8)


def series_bands(tile, wanted):
    """Numbers and names of the bands of the series.

    wanted: names divided by commas; empty: those of BANDS. Raises InputError for a missing one.
    """
    names = tile.band_names or [f"band {number + 1}" for number in range(tile.shape[3])]
    chosen = [name.strip() for name in wanted.split(",") if name.strip()]
    places = find_bands(names, chosen)
    if None in places:
        name = chosen[places.index(None)]
        raise InputError(f"bands={wanted}: found no {name}, wanted of {', '.join(names)}")
    places = places or [place for place in find_bands(names, BANDS) if place is not None]
    places = places or list(range(min(5, len(names))))
    keys = [band_key(names[place]) for place in places]  # the page makes NDVI of B04 and B08
    spelled = zip(places, keys, strict=True)
    return places, [key if key in BANDS else names[place] for place, key in spelled]


def read_series(scene, config, allowed):
    """The series of every N-th row and column of the page's grid, N as small as `allowed` permits.

    allowed: bytes. Returns facts for the page, values (N, T, B) uint16 and clear (N, T) uint8; or
    None where a single series is too large.
    """
    dates = scene.tile.shape[0]
    bands, names = series_bands(scene.tile, config["bands"])
    each, step = dates * (2 * len(bands) + 1), 1
    while np.prod([-(-size // step) for size in scene.grid]) * each > allowed:
        step += 1
        if step > max(scene.grid):
            return None
    skip, values, clear = step * scene.stride, [], []
    for first, last in row_ranges(scene, skip):
        part = slice(None), slice(first, last, skip), slice(None, None, skip)
        block = np.asarray(scene.tile.bands[part])[..., bands]
        values.append(np.moveaxis(block, 0, 2).reshape(-1, dates, len(bands)))
        clear.append(np.moveaxis(np.asarray(scene.tile.masks[part]), 0, 2).reshape(-1, dates))
    facts = {"step": step, "bands": names, "doys": scene.tile.doys.tolist()}
    dates = scene.tile.info.get("dates", [])
    facts["dates"] = [str(datetime.fromisoformat(day).date()) for day in dates]
    return facts, np.concatenate(values), np.concatenate(clear)


# ---- place and legend ----------------------------------------------------------------------------


def describe_place(info, shape):
    """Where the pixels of a map (H, W) are: crs, transform, unit, hectares, and a geographic grid.

    info: with crs and transform, as in tile.json; without them {}. epsg: 0 where the CRS has none.
    hectares: of a pixel, where all rows have nearly the same.
    """
    if not is_georeferenced(info):
        return {}
    crs = CRS.from_user_input(info["crs"])
    a, b, c, d, e, f = transform = [float(number) for number in info["transform"]]
    unit = crs.linear_units if crs.is_projected else "degree" if crs.is_geographic else ""
    facts = {"crs": str(info["crs"]), "transform": transform, "unit": unit, "epsg": epsg_code(crs)}
    hectares = row_hectares(info, *shape)
    if hectares is not None and np.ptp(hectares) < HECTARE_SPREAD * hectares.mean():
        facts["hectares"] = float(hectares.mean())
    row, column = np.meshgrid(
        *(np.linspace(0, size, min(65, 2 + size // 128)) for size in shape), indexing="ij"
    )
    return facts | geographic_grid(crs, a * column + b * row + c, d * column + e * row + f)


def epsg_code(crs):
    """The EPSG code of a projected or geographic CRS, as GeoTIFFs hold it (16 bits), or 0."""
    code = crs.to_epsg() if crs.is_projected or crs.is_geographic else None
    return code if code and code < 65536 and CRS.from_epsg(code) == crs else 0


def geographic_grid(crs, x, y):
    """Longitudes and latitudes at even steps from corner to corner of a map, {"grid": ..} or {}.

    The page interpolates between them, with an error of less than a metre for a UTM tile. {} for a
    CRS that cannot be transformed. x, y: (rows, columns) map coordinates of the grid's points.
    """
    try:
        lon, lat = reproject(crs, "EPSG:4326", x.ravel(), y.ravel())
    except CPLE_BaseError as error:  # a plane of its own, or another planet
        print(f"no longitude and latitude: {str(error).splitlines()[0][:200]}")
        return {}
    if not np.isfinite([lon, lat]).all():
        return {}
    lon = np.unwrap(lon, period=360)  # no jump where the map crosses the date line
    lon, lat = (np.round(values, 8).tolist() for values in (lon, lat))
    return {"grid": {"rows": x.shape[0], "columns": x.shape[1], "lon": lon, "lat": lat}}


def legends_of(scene, layers):
    """Names and colours of classes for the page: {"classes": {code: {"name", "color"}}}.

    Of all codes that occur or have a name. Where the classifier names a code otherwise than the
    tile, "classes" are those of the labels, and "mapClasses" those of the class map.
    """
    tile = (scene.tile.info.get("classes") if scene.tile else None) or {}
    classifier = scene.info.get("classes") or {}
    labels, class_map = (layers.get(key, np.zeros(0, np.uint8)) for key in ("labels", "classes"))
    both = tile.keys() & classifier.keys()
    if all(tile[code]["name"] == classifier[code]["name"] for code in both):
        codes = np.union1d(labels, class_map)
        named = {code: classifier.get(code, {}) | tile.get(code, {}) for code in classifier | tile}
        return {"classes": _legend(codes, named)}
    return {"classes": _legend(labels, tile), "mapClasses": _legend(class_map, classifier)}


def _legend(codes, named):
    """{code: {"name", "color"}} of an array of codes and of the classes `named` in tile.json."""
    return class_legend({*np.unique(codes).tolist(), *map(int, named)}, named)
