"""targets.npy of a tile: a quantity from a raster, or from a numeric column of polygons and points.

A pixel gets the mean of what lies in it: of the raster's pixels, of the polygons that hold its
middle, of the points inside. Numbers stay what they are: neither rounded nor clipped.

Shapes: H x W pixels, N features (polygons or points).
"""

from dataclasses import dataclass
from pathlib import Path

from running.errors import InputError
from running.files import atomic_write, write_json
from running.tile_json import is_georeferenced

import numpy as np
import rasterio
from rasterio.enums import MergeAlg, Resampling
from rasterio.errors import RasterioError
from rasterio.features import rasterize
from rasterio.transform import array_bounds
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from preparation.features import find_whole, is_vector_name, keep_features, read_file
from preparation.labels import BLOCK_PIXELS, burn_features, find_transform, map_splits
from tiles import Tile

KEYS = ("targets", "targets_layer", "target_column", "target_name", "target_unit")


@dataclass
class Targets:
    """Where a quantity comes from: a raster, or features.

    origin: path of the file. target: {"name", "unit"}, as in tile.json. features: geopandas
    GeoDataFrame with the columns value and, where splits are asked for by polygon or column, split;
    None for a raster.
    """

    origin: str
    target: dict
    features: object = None


def open_targets(config):
    """The Targets that the config asks for, or None. Raises InputError for what does not fit."""
    origin, column = config["targets"], config["target_column"]
    if not origin:
        for key in KEYS[1:]:
            if config[key]:
                raise InputError(f"{key}={config[key]}: found no targets, wanted targets=..")
        return None
    name = config["target_name"] or column or Path(origin).stem
    target = {"name": name, "unit": config["target_unit"]}
    if not column:
        if is_vector_name(origin):
            raise InputError(f"target_column: found none, wanted the column of numbers of {origin}")
        if config["splits"] not in ("", "blocks"):
            raise InputError(f"splits={config['splits']}: wanted blocks, as targets is a raster")
        read_raster(origin, None)
        return Targets(origin, target)
    splits, wanted = config["splits"], {"target_column": column}
    if splits not in ("", "polygons", "blocks"):
        wanted["splits"] = splits
    features = read_file("targets", origin, config["targets_layer"], wanted)
    return Targets(origin, target, _choose_features(features, config))


def _choose_features(features, config):
    """The features that have a number and a geometry, with columns value, code and split."""
    origin, column = config["targets"], config["target_column"]
    values = features[column]
    if values.dtype.kind not in "iuf":
        found = f"{values.dtype} like {str(values.dropna().tolist()[:3])[:40]}"
        raise InputError(f"target_column={column}: found {found} in {origin}, wanted numbers")
    if np.isinf(values.to_numpy(float)).any():
        raise InputError(f"target_column={column}: found an infinite number, wanted finite ones")
    whole = find_whole(features, values, f"targets={origin}", "number")
    columns = {"value": values[whole].to_numpy(float), "code": 1}
    return keep_features(features[whole], columns, config["splits"], config["seed"])


# ---- onto a tile ---------------------------------------------------------------------------------


def write_targets(folder, targets, config):
    """targets.npy, splits.npy where asked for and no labels have it, and the name in tile.json.

    They replace those of an earlier call, which are removed where no target lies inside. Returns
    whether one does. Raises InputError for a tile without crs and transform.
    """
    tile = Tile(folder)
    info, shape = tile.info, tile.shape[1:3]
    if not is_georeferenced(info):
        raise InputError(f"{folder / 'tile.json'}: found no crs and transform, wanted both")
    grid = rasterio.Affine(*info["transform"]), shape, info["crs"]
    splits, has_splits = None, config["splits"] and not config["labels"]
    if targets.features is None:
        values = read_raster(targets.origin, grid)
        if has_splits:
            splits = map_splits(*grid, config) * np.isfinite(values)
    else:
        values = burn_values(targets, *grid)
        if has_splits:
            keys = {**config, "labels": targets.origin}
            splits = burn_features(targets.features, *grid, keys)[1]
    known = np.isfinite(values)
    forget_targets(folder, info)
    if not known.any():
        print(f"{folder}: no target of {targets.origin} lies inside")
        return False
    for name, array in (("targets", values), ("splits", splits)):
        if array is not None:
            with atomic_write(folder / f"{name}.npy") as part:
                np.save(part, array)
    keys = (*KEYS, "splits", "split_block", "seed")
    made_from = {key: config[key] for key in keys}
    write_json(folder / "tile.json", info | {"target": targets.target, "targets_from": made_from})
    low, high = np.nanmin(values), np.nanmax(values)
    about = f"{targets.target['name']} {low:.4g} to {high:.4g} {targets.target['unit']}".strip()
    print(f"{folder / 'targets.npy'}: {about} on {known.mean():.1%} of pixels")
    return True


def forget_targets(folder, info):
    """Remove the targets of an earlier call from a tile and its tile.json, `info`, and its splits.

    Else those of another quantity, or of other places, would be left. Splits of labels stay.
    """
    before = info.pop("targets_from", None)
    if not before:
        return
    info.pop("target", None)
    had_splits = before["splits"] and not info.get("labels_from", {}).get("splits")
    for name in ("targets", "splits")[: 2 if had_splits else 1]:
        (folder / f"{name}.npy").unlink(missing_ok=True)
    write_json(folder / "tile.json", info)


def burn_values(targets, transform, shape, crs):
    """The mean of the features of each pixel, (H, W) float32, NaN where there is none."""
    features = targets.features
    to_tile = find_transform(features.crs, crs, f"targets={targets.origin}")
    here = features.to_crs(crs) if to_tile else features
    west, south, east, north = array_bounds(*shape, transform)
    here = here.cx[west:east, south:north]
    sums, counts = np.zeros(shape), np.zeros(shape, np.float32)
    for array, numbers in ((sums, here["value"]), (counts, np.ones(len(here)))):
        if len(here):
            pairs = zip(here.geometry, numbers, strict=True)
            rasterize(pairs, out=array, transform=transform, merge_alg=MergeAlg.add)
    np.divide(sums, counts, out=sums, where=counts > 0)
    sums[counts == 0] = np.nan
    return sums.astype(np.float32)


def read_raster(file, grid):
    """A raster on a tile's grid by the mean of its pixels, (H, W) float32; NaN where it has none.

    grid: transform, shape (H, W) and crs; None: only look at the file. Scale and offset of the
    raster are applied. Raises InputError for a file that is no raster of one band with a place.
    """
    try:
        with rasterio.open(file) as source:
            if source.count != 1 or source.crs is None or source.dtypes[0].startswith("complex"):
                found = (
                    f"{source.count} bands of {source.dtypes[0]}, coordinate system {source.crs}"
                )
                raise InputError(f"targets={file}: found {found}, wanted one band with a place")
            return _warp(source, file, *grid) if grid else None
    except RasterioError as error:
        reason = str(error).splitlines()[0]
        mend = "a raster, or target_column= of a file of polygons or points"
        raise InputError(f"targets={file}: cannot be read ({reason}), wanted {mend}") from None


def _warp(source, file, transform, shape, crs):
    find_transform(source.crs, crs, f"targets={file}")
    view_of = {"crs": crs, "transform": transform, "height": shape[0], "width": shape[1]}
    # as float32 from the start: the mean of whole numbers is none
    view_of |= {"dtype": "float32", "nodata": np.nan, "resampling": Resampling.average}
    values, rows = np.empty(shape, np.float32), max(1, BLOCK_PIXELS // shape[1])
    with WarpedVRT(source, **view_of) as view:
        for first in range(0, shape[0], rows):
            window = Window(0, first, shape[1], min(rows, shape[0] - first))
            block = view.read(1, window=window, masked=True).filled(np.nan)
            values[first : first + rows] = block * source.scales[0] + source.offsets[0]
    if np.isinf(values).any():
        raise InputError(f"targets={file}: found an infinite value, wanted numbers and nodata")
    return values
