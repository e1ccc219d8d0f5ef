"""Make one HTML page in which to explore representation maps: no server, nothing fetched.

    python explore.py representation_path=outputs/MGRS-SIM1/representation_map.npy
    python explore.py output_dir=outputs max_mb=100 \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy,outputs/MGRS-SIM2/representation_map.npy

Copy explore.html wherever you like and open it in a browser: click a pixel to see its year and what
is like it, drop a few labels, and a classifier maps all the rest at once. What infer.py wrote
beside a map (classes, confidence, clear observations) goes in, and so does the tile where it is at
hand (labels, median colour, series).

Shapes: H x W pixels of the page's grid, T dates, B bands, D dimensions of a representation, K of
them kept by the PCA.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from rasterio._err import CPLE_BaseError  # GDAL's errors, which have no public name
from rasterio.crs import CRS
from rasterio.warp import transform as reproject
from sklearn.decomposition import PCA

import false_color
from files import make_output_dir
from land_cover import WORLDCOVER, class_legend, row_hectares
from maps import (
    check_same_checkpoint,
    check_same_place,
    check_together,
    is_georeferenced,
    open_representations,
    quantise,
    read_codes,
    read_map,
    read_provenance,
)
from pages import Blobs, write_page
from runlog import refuse_training_folder, start_log
from runtime import InputError, check, refuse_torchrun, run_script, start_runtime
from tiles import Tile

run_config = {
    # input
    "representation_path": "",  # representation_map.npy of infer.py; several divided by commas
    "tile_path": "",  # the tiles of the maps, divided by commas; empty: where infer.py found them
    "basis_path": "",  # .npz of create_false_color_map.py; empty: false colour fitted to these maps
    # page
    "title": "",  # empty: the names of the tiles
    "dimensions": 32,  # most principal components that the page keeps ..
    "variance": 0.999,  # .. and fewer where they hold this share of the variance
    "bands": "",  # of the series, divided by commas; empty: those of BANDS that the tile has
    "max_mb": 200.0,  # most megabytes (10^6 bytes) of the page; series take what maps leave over
    "stride": 0,  # every so many-th row and column of a map; 0: the smallest that max_mb allows
    # output
    "output_dir": "",  # receives explore.html; empty: beside the first map
    # running
    "sample_pixels": 50_000,  # valid pixels that PCA and false colour are fitted to
    "seed": 0,  # of the sample
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")  # blue, green, red, NIR, two of SWIR
# for classes without one: Okabe and Ito's, then Tol's, safe for the colour-blind; as in colors.js
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#882255")
COLORS += ("#44aa99", "#999933", "#332288", "#dddddd")
BLOCK_BYTES = 1 << 26  # of a map or tile in memory at a time
LAYER_BYTES = 16  # a pixel, at most, beside the representation: colours, classes, counts, scale


# ---- maps and tiles ------------------------------------------------------------------------------


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


def open_scenes(config):
    """The maps of the config and their tiles. Raises InputError for none or unequal ones."""
    paths = [Path(path) for path in config["representation_path"].split(",") if path]
    if not paths:
        raise InputError("representation_path: found none, wanted a map of infer.py")
    tiles = config["tile_path"].split(",") if config["tile_path"] else [""] * len(paths)
    if len(tiles) != len(paths):
        raise InputError(f"tile_path: found {len(tiles)} tiles, wanted {len(paths)}, one a map")
    scenes = [open_scene(path, tile) for path, tile in zip(paths, tiles, strict=True)]
    check_together(scenes)
    return scenes


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


def choose_stride(scenes, config):
    """Set the scenes' stride. Returns the bytes of the page that the maps leave for the series.

    Raises InputError where the stride that was asked for makes more than `max_mb`.
    """
    allowed = config["max_mb"] * 1e6 * 3 / 4 - 2e6  # base64; page, numbers and names
    depth = min(config["dimensions"], scenes[0].shape[2]) + LAYER_BYTES

    def needed(stride):
        for scene in scenes:
            scene.stride = stride
        return sum(int(np.prod(scene.grid)) for scene in scenes) * depth

    fits, largest = 1, max(max(scene.shape[:2]) for scene in scenes)
    while needed(fits) > allowed and fits < largest:
        fits += 1
    stride = config["stride"] or fits
    if needed(stride) > allowed:
        larger = f", or stride={fits}" if needed(fits) <= allowed else ""
        raise InputError(
            f"max_mb={config['max_mb']:g}: found maps that need {needed(stride) / 0.75e6 + 3:.0f} "
            f"MB at stride={stride}, wanted so much{larger}"
        )
    if stride > 1:
        print(f"thinned to every {stride}. row and column (max_mb={config['max_mb']:g})")
    return allowed - needed(stride)


# ---- the representation --------------------------------------------------------------------------


def draw_sample(scenes, config):
    """At most `sample_pixels` valid representations (N, D) of all maps, in bounded memory."""
    blocks = (block for scene in scenes for block in scene.blocks())
    return false_color.draw_sample(blocks, config, scenes[0].path)


def find_basis(sample, scenes, config):
    """The false-colour basis of basis_path, or one fitted to the sample."""
    if not config["basis_path"]:
        return false_color.fit_basis(sample)
    basis, made_by = false_color.load_basis(config["basis_path"], scenes[0].shape[2])
    check_same_checkpoint(config["basis_path"], "a basis", made_by, scenes[0])
    return basis


def fit_components(sample, config):
    """Principal components that hold `variance`, but no more than `dimensions` of them.

    sample: (N, D). Returns mean (D,), components (K, D) float32, and facts for the page, with which
    it gets back the cosines of the representations themselves: offset (K,), the mean along the
    components; rest, the squared length of what of the mean lies across them; deviation, the root
    mean square of all D dimensions, by which the classifier divides.
    """
    pca = PCA(random_state=0).fit(sample.astype(np.float64))
    held = np.nan_to_num(np.cumsum(pca.explained_variance_ratio_), nan=1.0)  # all pixels equal
    kept = min(config["dimensions"], 1 + int(np.searchsorted(held, config["variance"])), len(held))
    components = pca.components_[:kept]
    offset = components @ pca.mean_
    facts = {
        "dimensions": kept,
        "of": sample.shape[1],
        "variance": float(held[kept - 1]),
        "offset": offset.tolist(),
        "rest": max(0.0, float(pca.mean_ @ pca.mean_ - offset @ offset)),
        "deviation": float(np.sqrt(pca.explained_variance_.sum() / sample.shape[1])) or 1.0,
    }
    return pca.mean_.astype(np.float32), components.astype(np.float32), facts


# ---- layers of a scene ---------------------------------------------------------------------------


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


def median_color(scene):
    """Median red, green and blue over the clear dates, (H, W, 3) uint8; None without such bands.

    Stretched between the percentiles 2 and 98 of each band; 0 where no date is clear.
    """
    names = scene.tile.band_names
    if not {"B02", "B03", "B04"} <= set(names):
        return None
    bands, medians = [names.index(name) for name in ("B04", "B03", "B02")], []
    for first, last in row_blocks(scene, scene.stride):
        part = slice(None), slice(first, last, scene.stride), slice(None, None, scene.stride)
        clear = np.asarray(scene.tile.masks[part]) > 0
        values = np.where(clear[..., None], scene.tile.bands[part][..., bands], np.uint16(65535))
        values.sort(0)  # what is not clear goes to the end
        middle = ((clear.sum(0) - 1).clip(0) // 2)[None, ..., None]
        medians.append(np.take_along_axis(values, middle, 0)[0] * clear.any(0)[..., None])
    median = np.concatenate(medians).astype(np.float32)
    seen = median.any(-1)
    if not seen.any():
        return None
    low, high = np.percentile(median[seen], (2, 98), axis=0)
    color = ((median - low) / np.maximum(high - low, 1)).clip(0, 1) * 254 + 1
    return (color.round() * seen[..., None]).astype(np.uint8)


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


# ---- the page ------------------------------------------------------------------------------------


def pack_scene(scene, projection, basis, config, blobs, allowed):
    """Everything of one scene: its arrays go to the blobs, returned are its facts for the page."""
    values, scales, color = embed(scene, *projection, basis)
    layers = map_layers(scene)
    facts = {
        "name": scene.name,
        "title": scene.title,
        "height": scene.grid[0],
        "width": scene.grid[1],
        "fullHeight": scene.shape[0],
        "fullWidth": scene.shape[1],
        "stride": scene.stride,
        "place": place(scene),
        "classes": legend_of(scene, layers),
        "tileInfo": scene.tile.info if scene.tile else {},
        "embedding": blobs.add(values),
        "scales": blobs.add(scales),
    }
    layers = {"falseColor": color} | layers
    if scene.tile and (median := median_color(scene)) is not None:
        layers["median"] = median
    facts["layers"] = {name: blobs.add(array) for name, array in layers.items()}
    if scene.tile and (series := read_series(scene, config, allowed)):
        about, values, clear = series
        facts["series"] = about | {"values": blobs.add(values), "clear": blobs.add(clear)}
    return facts


def main(config):
    """Write the page. Returns its path."""
    limits = {"dimensions": (1, 65536), "variance": (0.01, 1), "stride": (0, 10_980)}
    config = check(config, max_mb=(4, math.inf), **limits)  # the page itself takes 3
    refuse_torchrun()

    # maps
    scenes = open_scenes(config)
    allowed = choose_stride(scenes, config)
    sample = draw_sample(scenes, config)
    basis = find_basis(sample, scenes, config)
    mean, components, embedding = fit_components(sample, config)
    folder = config["output_dir"] or scenes[0].path.parent
    refuse_training_folder(folder)
    output_dir = make_output_dir(folder)
    log = start_log(config, "explore", output_dir, start_runtime("cpu"))

    # page
    blobs = Blobs()
    each = allowed / len(scenes)
    pixels = [pack_scene(s, (mean, components), basis, config, blobs, each) for s in scenes]
    title = config["title"] or ", ".join(scene.title for scene in scenes)
    facts = {"format": 1, "title": title, "embedding": embedding, "scenes": pixels}
    facts["hash"] = blobs.digest.hexdigest()[:32]
    path = output_dir / "explore.html"
    write_page(path, facts, blobs)

    # wrap up
    megabytes = path.stat().st_size / 1e6
    log.line({"step": 0, "megabytes": megabytes, "variance": embedding["variance"]})
    log.finish()
    print(
        f"{path}: {megabytes:.1f} MB, {embedding['dimensions']} of {embedding['of']} dimensions "
        f"with {100 * embedding['variance']:.1f} % of the variance; open it in a browser"
    )
    return path


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
