"""One map of the page and what is known of its pixels: layers, series, place, legend.

Shapes: H x W pixels of the page's grid, T dates, B bands, D dimensions of a representation, K of
them kept by the PCA.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from rasterio._err import CPLE_BaseError  # GDAL's errors, which have no public name
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from maps import false_color
from maps.land_cover import WORLDCOVER, class_legend, row_hectares
from maps.reader import (
    check_same_place,
    open_representations,
    read_codes,
    read_map,
    read_provenance,
)
from maps.writer import quantise
from running.errors import InputError
from tiles import Tile, is_georeferenced
from utils import median_color

BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")  # blue, green, red, NIR, two of SWIR
# for classes without one: Okabe and Ito's, then Tol's, safe for the colour-blind; as in colors.js
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#882255")
COLORS += ("#44aa99", "#999933", "#332288", "#dddddd")
BLOCK_BYTES = 1 << 26  # of a map or tile in memory at a time


@dataclass
class Scene:
    """One map and what is known of its pixels.

    shape: (H, W, D) on disk. tile: the Tile or None. stride: rows and columns of the page's grid.
    """

    path: Path
    shape: tuple
    info: dict
    tile: Tile | None
    stride: int = 1
    name: str = field(init=False)

    def __post_init__(self):
        self.name = self.tile.name if self.tile else self.path.resolve().parent.name
        self.made_by = self.info.get("checkpoint_sha256", "")  # "" where it is not known
        self.title = self.tile.title if self.tile else str(self.info.get("tile", self.name))

    @property
    def grid(self):
        """(H, W) of the page's grid: every stride-th row and column."""
        return tuple(-(-size // self.stride) for size in self.shape[:2])

    def thin(self, array):
        """A map (H, W, ..) on disk, on the page's grid."""
        return np.asarray(array[:: self.stride, :: self.stride])

    def blocks(self):
        """Yield representations (rows, W, D) float32 of the page's grid, NaN where no data."""
        array, scales = open_representations(self.path)
        rows = max(1, BLOCK_BYTES // (4 * self.shape[1] * self.shape[2])) * self.stride
        for first in range(0, self.shape[0], rows):
            part = slice(first, first + rows, self.stride), slice(None, None, self.stride)
            values = array[part].astype(np.float32)
            yield values if scales is None else values * scales[part][..., None]


def open_scene(path, tile_path):
    """A map and, where it is at hand, its tile. Raises InputError where their pixels differ."""
    shape = open_representations(path)[0].shape
    if 0 in shape:
        raise InputError(f"{path}: found shape {shape}, wanted (H, W, D), none of them 0")
    info = read_provenance(path)
    folder = Path(tile_path or str(info.get("tile_path", "")))
    tile = None
    if tile_path or (info.get("tile_path") and folder.exists()):
        tile = Tile(folder)
        if tile.shape[1:3] != shape[:2]:
            raise InputError(
                f"{path}: found {shape[0]} x {shape[1]} pixels, wanted "
                f"{tile.shape[1]} x {tile.shape[2]} of {tile.path}"
            )
        check_same_place(tile.path / "tile.json", tile.info, info)
    else:
        where = info.get("tile_path", "no infer.json tells where")
        print(f"{path}: its tile is not at hand ({where}), so the page has no series and labels")
    return Scene(path, shape, info, tile)


# ---- layers --------------------------------------------------------------------------------------


def embed(scene, mean, components, basis):
    """Representation and false colour: int8 (H, W, K), scales (H, W) float32, RGB (H, W, 3)."""
    values = np.empty((*scene.grid, len(components)), np.int8)
    scales = np.empty(scene.grid, np.float32)
    color = np.empty((*scene.grid, 3), np.uint8)
    first = 0
    for block in scene.blocks():
        rows = slice(first, first + len(block))
        values[rows], scales[rows] = quantise((block - mean) @ components.T)
        color[rows] = false_color.apply_basis(basis, block)[..., :3]
        first += len(block)
    return values, scales, color


def map_layers(scene):
    """What infer.py wrote beside the map and what the tile tells, {name: (H, W) array}."""
    folder, shape, layers = scene.path.parent, scene.shape[:2], {}
    if (folder / "classification_map.npy").exists():
        classes = read_codes(folder / "classification_map.npy", shape)
        layers["classes"] = scene.thin(classes).astype(np.uint8)
    if (folder / "confidence.npy").exists():
        confidence = scene.thin(read_map(folder / "confidence.npy", shape, kind="f"))
        layers["confidence"] = (np.nan_to_num(confidence).clip(0, 1) * 255).round().astype(np.uint8)
    if (folder / "valid_count.npy").exists():
        count = read_codes(folder / "valid_count.npy", shape, most=65535)
        layers["count"] = scene.thin(count).astype(np.uint16)
    elif scene.tile:
        layers["count"] = scene.thin(scene.tile.clear_counts())
    if scene.tile and scene.tile.has_labels:
        layers["labels"] = scene.thin(scene.tile.labels)
    return layers


def row_blocks(scene, step):
    """Yield (first row, last row + 1) of blocks of the tile that hold whole multiples of `step`."""
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
    """Numbers and names of the bands of the series. Raises InputError for one that is not there."""
    names = tile.band_names or [f"band {number + 1}" for number in range(tile.shape[3])]
    chosen = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in chosen:
        if name not in names:
            raise InputError(f"bands={wanted}: found no {name}, wanted of {', '.join(names)}")
    chosen = chosen or [name for name in BANDS if name in names] or names[:5]
    return [names.index(name) for name in chosen], chosen


def read_series(scene, config, allowed):
    """The series of every so many-th row and column of the page's grid, as many as are allowed.

    allowed: bytes. Returns facts for the page, values (N, T, B) uint16 and clear (N, T) uint8; or
    None where not even a few fit.
    """
    dates = scene.tile.shape[0]
    bands, names = series_bands(scene.tile, config["bands"])
    each, step = dates * (2 * len(bands) + 1), 1
    while np.prod([-(-size // step) for size in scene.grid]) * each > allowed:
        step += 1
        if step > max(scene.grid):
            return None
    skip, values, clear = step * scene.stride, [], []
    for first, last in row_blocks(scene, skip):
        part = slice(None), slice(first, last, skip), slice(None, None, skip)
        block = np.asarray(scene.tile.bands[part])[..., bands]
        values.append(np.moveaxis(block, 0, 2).reshape(-1, dates, len(bands)))
        clear.append(np.moveaxis(np.asarray(scene.tile.masks[part]), 0, 2).reshape(-1, dates))
    facts = {"step": step, "bands": names, "doys": scene.tile.doys.tolist()}
    told = scene.tile.info.get("dates", [])
    facts["dates"] = [str(datetime.fromisoformat(day).date()) for day in told]
    return facts, np.concatenate(values), np.concatenate(clear)


# ---- place and legend ----------------------------------------------------------------------------


def place(scene):
    """Where the pixels are: crs, transform, unit, hectares, and a grid of longitudes and latitudes.

    hectares: of a pixel, the mean over the rows. {} where nothing tells; no grid (WGS84) where the
    CRS is not one of the Earth.
    """
    source = scene.tile.info if scene.tile else scene.info
    if not is_georeferenced(source):
        return {}
    crs = CRS.from_user_input(source["crs"])
    a, b, c, d, e, f = transform = [float(number) for number in source["transform"]]
    unit = crs.linear_units if crs.is_projected else "degree" if crs.is_geographic else ""
    facts = {"crs": str(source["crs"]), "transform": transform, "unit": unit}
    if (hectares := row_hectares(source, scene.shape[0])) is not None:
        facts["hectares"] = float(hectares.mean())
    row, column = np.meshgrid(
        *(np.linspace(0, size, min(65, 2 + size // 128)) for size in scene.shape[:2]), indexing="ij"
    )
    return facts | geographic_grid(crs, a * column + b * row + c, d * column + e * row + f)


def geographic_grid(crs, x, y):
    """Longitudes and latitudes at even steps from corner to corner of a map, {"grid": ..} or {}.

    The page interpolates between them, which is right to less than a metre for a UTM tile.
    x, y: (rows, columns) map coordinates of the grid's points.
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


def legend_of(scene, layers):
    """{code: {"name", "color"}} of the codes of class map and labels, and of all that are named."""
    codes = {int(c) for key in ("classes", "labels") for c in np.unique(layers.get(key, []))}
    told = scene.tile.info.get("classes") if scene.tile else None
    told = told or scene.info.get("classes") or {}
    legend = class_legend(codes | {int(code) for code in told}, told)
    for index, (code, entry) in enumerate(legend.items()):
        known = told.get(str(code), {}) if told else WORLDCOVER.get(code, {})
        if "color" not in known:
            entry["color"] = COLORS[index % len(COLORS)]
    return legend
