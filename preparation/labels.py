"""labels.npy and splits.npy of a tile, from a raster or from polygons and points.

Codes, names and colours of classes, and the split of each polygon, are decided once for all tiles
of a call, on the whole label file: a class has one code in all tiles, and a field one split.

Shapes: H x W pixels, N features (polygons or points).
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from running.errors import InputError, what_is_there
from running.files import atomic_write, write_json
from running.tile_json import is_class_table, is_georeferenced, read_tile_json

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.features import rasterize
from rasterio.transform import array_bounds
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from maps.land_cover import WORLDCOVER, class_legend
from preparation import need
from preparation.features import is_vector_name, read_features
from preparation.pixels import NETWORK
from tiles import Tile, split_blocks

GROUND = "EPSG:6933"  # EASE-Grid 2.0: the whole Earth, equal-area, in metres
BLOCK_PIXELS = 1 << 20  # pixels whose label or split is found at a time


@dataclass
class Labels:
    """Where labels come from: a raster, or features.

    origin: path or URL of the file; {place} in it stands for squares like N48E012, a raster each.
    classes: {code: {"name": .., "color": ..}}; of a raster, not always of all its codes.
    features: geopandas GeoDataFrame with the column code and, where splits are asked for by
    polygon or column, split; None for a raster.
    """

    origin: str
    classes: dict = field(default_factory=dict)
    features: object = None


def open_labels(config):
    """The Labels that the config asks for, or None. Raises InputError for what does not fit."""
    origin, layer, splits = config["labels"], config["labels_layer"], config["splits"]
    if not origin:
        for key in ("labels_layer", "splits"):
            if config[key] and not (key == "splits" and config["targets"]):
                raise InputError(f"{key}={config[key]}: found no labels, wanted labels=..")
        return None
    classes = _read_classes(config["classes_path"])
    if origin == "worldcover":
        labels, crs = Labels(config["worldcover_url"], classes or WORLDCOVER), None
    elif not layer and (crs := _raster_crs(origin)):
        labels = Labels(origin, classes)
    else:
        features, classes = read_features(config, classes)
        labels, crs = Labels(origin, classes, features), features.crs
    if labels.features is None and (layer or splits not in ("", "blocks")):
        key, wanted = ("labels_layer", "none") if layer else ("splits", "blocks")
        raise InputError(f"{key}={config[key]}: wanted {wanted}, as the labels are a raster")
    if crs and not config["statistics_only"]:  # before anything is fetched; tiles have a place
        find_transform(crs, "EPSG:4326", f"labels={origin}")
    return labels


def _read_classes(path):
    if not path:
        return {}
    wanted = 'wanted JSON like {"10": {"name": "maize", "color": "#ffbb22"}}, codes 1 to 255'
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        near = what_is_there(path)
        raise InputError(f"classes_path={path}: found no file, {wanted}{near}") from None
    except (OSError, ValueError) as error:
        line = f"found {type(error).__name__} {error}"
        raise InputError(f"classes_path={path}: {line}, {wanted}") from None
    if not is_class_table(content):
        raise InputError(f"classes_path={path}: found {str(content)[:200]}, {wanted}")
    return {int(code): entry for code, entry in content.items()}


def _raster_crs(path):
    """The coordinate system of a raster of labels, which is checked; None for another file."""
    if is_vector_name(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # becomes an error below
            with rasterio.open(path) as source:
                _check_raster(source, path)
                return source.crs
    except RasterioError:
        if "://" not in path and not Path(path).exists():
            raise InputError(
                f"labels={path}: found no file, wanted worldcover, a raster, a table of points or "
                f"a vector file{what_is_there(path)}"
            ) from None
        return None


def find_transform(crs, target, file):
    """pyproj's Transformer from one coordinate system to another, longitude before latitude.

    None where both are the same local plane, as the map of a drone may have. Raises InputError that
    names the file where there is no transformation.
    """
    pyproj = need("pyproj")
    source, target = (pyproj.CRS.from_user_input(one) for one in (crs, target))
    try:
        return pyproj.Transformer.from_crs(source, target, always_xy=True)
    except pyproj.exceptions.ProjError:
        if source.name == target.name and source.equals(target, ignore_axis_order=True):
            return None
        raise InputError(
            f"{file}: found the coordinate system {source.name!r}, which cannot be transformed to "
            f"{target.name!r}, wanted two with a place on the Earth"
        ) from None


# ---- blocks of the ground ------------------------------------------------------------------------


def block_splits(x, y, crs, size, seed):
    """The split of places by the square block of `size` metres they lie in, as `split_blocks`.

    x, y: arrays of one shape, map coordinates in crs. Blocks lie in one projection of the whole
    Earth, so that the same ground has the same split in every tile, of whatever zone. Raises
    InputError for a crs without a place on the Earth.
    """
    if to_ground := find_transform(crs, GROUND, "tile.json, for splits=blocks"):
        x, y = to_ground.transform(x, y)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(f"splits=blocks: found a place of {crs} that is not on the Earth")
    column, row = (np.floor(np.asarray(part) / size).astype(np.int64) for part in (x, y))
    return split_blocks(column, row, seed)


def map_splits(transform, shape, crs, config):
    """`block_splits` of each pixel's middle, (H, W) uint8, some rows at a time."""
    splits, step = np.empty(shape, np.uint8), max(1, BLOCK_PIXELS // shape[1])
    columns = np.arange(shape[1]) + 0.5
    for first in range(0, shape[0], step):
        rows = np.arange(first, min(first + step, shape[0]))[:, None] + 0.5
        x, y = transform * np.broadcast_arrays(columns, rows)
        block = block_splits(x, y, crs, config["split_block"], config["seed"])
        splits[first : first + step] = block
    return splits


# ---- onto a tile ---------------------------------------------------------------------------------


def write_labels(folder, labels, config):
    """labels.npy, splits.npy where asked for, and the classes in tile.json.

    They replace those of an earlier call. Returns whether any label lies inside the tile; where
    none does, nothing is written (see `forget_labels`). Raises InputError for a tile without crs
    and transform, and for labels that cannot be put on its grid.
    """
    tile = Tile(folder)
    info = tile.info
    if not is_georeferenced(info):
        raise InputError(f"{folder / 'tile.json'}: found no crs and transform, wanted both")
    shape = tile.shape[1:3]
    transform = rasterio.Affine(*info["transform"])
    splits = None
    if labels.features is not None:
        codes, splits = burn_features(labels.features, transform, shape, info["crs"], config)
    else:
        codes = warp_rasters(labels.origin, transform, shape, info["crs"])
        if config["splits"]:
            splits = map_splits(transform, shape, info["crs"], config) * (codes > 0)
    present = [int(code) for code in np.unique(codes) if code]
    if not present:
        print(f"{folder}: no label of {labels.origin} lies inside")
        return False
    known = {str(code): entry for code, entry in labels.classes.items()}
    legend = class_legend({*labels.classes, *present}, known)  # the same colours in all tiles
    keys = ("labels", "labels_layer", "class_column", "splits", "split_block", "seed")
    added = {
        "classes": {str(code): legend[code] for code in present},
        "labels_from": {key: config[key] for key in keys},
    }
    for name, array in (("labels", codes), ("splits", splits)):
        if array is None:
            (folder / f"{name}.npy").unlink(missing_ok=True)
            continue
        with atomic_write(folder / f"{name}.npy") as part:
            np.save(part, array.astype(np.uint8))
    write_json(folder / "tile.json", info | added)
    print(f"{folder / 'labels.npy'}: {len(present)} classes on {(codes > 0).mean():.1%} of pixels")
    return True


def forget_labels(folder):
    """Remove the labels of an earlier call from a tile where those of this call have none.

    Else one code could mean two classes in one data set.
    """
    info = read_tile_json(folder / "tile.json")
    if "labels_from" not in info:
        return
    for name in ("labels.npy", "splits.npy"):
        (folder / name).unlink(missing_ok=True)
    kept = {key: value for key, value in info.items() if key not in ("classes", "labels_from")}
    write_json(folder / "tile.json", kept)
    print(f"{folder}: labels of {info['labels_from']['labels']} removed")


def burn_features(features, transform, shape, crs, config):
    """Codes and splits of the features that hold each pixel's middle, (H, W) uint8 each.

    A point fills its pixel; of overlapping features the last one counts. Splits are None where none
    are asked for. With splits=blocks a whole feature has the split of its middle.
    """
    to_tile = find_transform(features.crs, crs, f"labels={config['labels']}")
    here = features.to_crs(crs) if to_tile else features
    west, south, east, north = array_bounds(*shape, transform)
    here = here.cx[west:east, south:north]
    codes, splits = np.zeros(shape, np.uint8), None
    if config["splits"]:
        splits = np.zeros(shape, np.uint8)
    if not len(here):
        return codes, splits
    numbers = np.zeros(shape, np.int32)
    burnt = zip(here.geometry, range(1, len(here) + 1), strict=True)
    rasterize(burnt, out=numbers, transform=transform)
    lost = len(here) - len(np.unique(numbers[numbers > 0]))
    if lost:
        print(f"{lost} of {len(here)} features hold no pixel's middle, or lie under others")
    codes = np.append(np.uint8(0), here["code"].to_numpy(np.uint8))[numbers]
    if config["splits"] == "blocks":
        middle = here.representative_point()
        split = block_splits(middle.x, middle.y, crs, config["split_block"], config["seed"])
    elif config["splits"]:
        split = here["split"].to_numpy(np.uint8)
    if splits is not None:
        splits = np.append(np.uint8(0), split)[numbers]
    return codes, splits


def warp_rasters(origin, transform, shape, crs):
    """A raster of class codes on a tile's grid by nearest pixel, (H, W) uint8, 0 for no label.

    origin: path or URL; with {place} in it, the files of 3 x 3 degrees that the tile touches.
    """
    files = [origin]
    if "{place}" in origin:
        bounds = array_bounds(*shape, transform)
        if to_degrees := find_transform(crs, "EPSG:4326", "tile.json, for labels=worldcover"):
            bounds = to_degrees.transform_bounds(*bounds)
        files = [origin.format(place=place) for place in worldcover_places(bounds)]
    codes = np.zeros(shape, np.uint8)
    retries = {"GDAL_HTTP_MAX_RETRY": "5", "GDAL_HTTP_RETRY_DELAY": "1"}
    for file in files:
        try:
            with rasterio.Env(**NETWORK, **retries), rasterio.open(file) as source:
                _check_raster(source, file)
                found = _warp_raster(source, file, transform, shape, crs)
        except RasterioError as error:
            reason = str(error).splitlines()[0]
            if len(files) > 1 and "404" in reason.split(": ")[-1]:  # a square of open sea
                print(f"{file}: no such file, so no labels there")
                continue
            raise InputError(f"labels={file}: cannot be read ({reason}), wanted a raster") from None
        np.copyto(codes, found, where=codes == 0)
    return codes


def _check_raster(source, file):
    kind, place = source.dtypes[0], source.crs
    if place is None or source.transform.is_identity or kind.startswith("complex"):
        raise InputError(
            f"labels={file}: found {kind}, coordinate system {place}, transform "
            f"{tuple(source.transform)[:6]}, wanted whole numbers and a place on the Earth"
        )
    bands = sum(meaning != ColorInterp.alpha for meaning in source.colorinterp)
    if bands != 1:
        raise InputError(
            f"labels={file}: found {bands} bands, wanted one of class codes "
            f"(labels=vrt://{file}?bands=1 takes the first)"
        )


def _warp_raster(source, file, transform, shape, crs):
    """Codes of an open raster on a tile's grid; 0 where it has nodata, a mask, or no pixel."""
    find_transform(source.crs, crs, f"labels={file}")
    grid = {"crs": crs, "transform": transform, "height": shape[0], "width": shape[1]}
    # where the source has a mask, or no pixel, the view is 0, or the source's nodata
    codes, rows = np.zeros(shape, np.uint8), max(1, BLOCK_PIXELS // shape[1])
    with WarpedVRT(source, resampling=Resampling.nearest, **grid) as view:
        for first in range(0, shape[0], rows):
            window = Window(0, first, shape[1], min(rows, shape[0] - first))
            found = view.read(1, window=window)
            found[np.isnan(found) | (found == source.nodata)] = 0
            wrong = found[(found < 0) | (found > 255) | (found != np.round(found))]
            if len(wrong):
                raise InputError(
                    f"labels={file}: found code {wrong[0]:.15g}, wanted whole numbers 0 to 255"
                )
            codes[first : first + rows] = found
    return codes


def worldcover_places(bounds):
    """Names like N48E012 of the 3 x 3 degree squares under (west, south, east, north) degrees.

    west > east: bounds across 180 degrees.
    """
    if not np.isfinite(bounds).all():
        raise InputError(f"labels=worldcover: found a tile at {bounds} degrees, wanted the Earth")
    west, south, east, north = (int(np.floor(edge / 3)) * 3 for edge in bounds)
    columns = range(west, east + (360 if bounds[0] > bounds[2] else 0) + 1, 3)
    return [
        f"{'N' if y >= 0 else 'S'}{abs(y):02d}{'E' if x >= 0 else 'W'}{abs(x):03d}"
        for y in range(south, north + 1, 3)
        for x in ((column + 180) % 360 - 180 for column in columns)
    ]
