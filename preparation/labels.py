"""labels.npy and splits.npy of a tile, from a raster or from polygons and points.

Codes, names and colours of classes, and the split of each polygon, are decided once for all tiles
of a call, on the whole label file: a class has one code in all tiles, and a field one split.

Shapes: H x W pixels, N features (polygons or points).
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.features import rasterize
from rasterio.transform import array_bounds
from rasterio.warp import Resampling, reproject, transform_bounds

from maps.land_cover import WORLDCOVER, class_legend
from preparation.items import need
from preparation.pixels import NETWORK
from running.errors import InputError
from running.files import atomic_write, write_json
from tiles import (
    TEST,
    TRAIN,
    VALIDATION,
    is_class_table,
    is_georeferenced,
    read_tile_json,
    split_blocks,
)

WORLDCOVER_URL = (  # 2021; for 2020 put v100/2020 and 2020_v100 in it
    "https://esa-worldcover.s3.eu-central-1.amazonaws.com/v200/2021/map/"
    "ESA_WorldCover_10m_2021_v200_{place}_Map.tif"
)
GROUND = "EPSG:6933"  # EASE-Grid 2.0: the whole Earth, equal-area, in metres
BLOCK_PIXELS = 1 << 20  # pixels whose split is found at a time
SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION, "test": TEST}
SPLIT_NAMES |= {str(split): split for split in (0, TRAIN, VALIDATION, TEST)} | {"": 0}


@dataclass
class Labels:
    """Where labels come from. Either files (rasters; {place} is filled in) or features.

    features: geopandas GeoDataFrame with the column code and, where polygons have one, split.
    classes: {code: {"name": .., "color": ..}}, of rasters as far as it is known.
    """

    origin: str
    classes: dict = field(default_factory=dict)
    features: object = None


def open_labels(config):
    """The Labels that the config asks for, or None. Raises InputError for what does not fit."""
    if not config["labels"]:
        if config["splits"]:
            raise InputError(f"splits={config['splits']}: found no labels, wanted labels=..")
        return None
    classes = _read_classes(config["classes_path"])
    if config["labels"] == "worldcover":
        labels = Labels(config["worldcover_url"], classes or WORLDCOVER)
    elif _is_raster(config["labels"]):
        labels = Labels(config["labels"], classes)
    else:
        return _open_features(config, classes)
    if config["splits"] not in ("", "blocks"):
        raise InputError(f"splits={config['splits']}: wanted blocks, as the labels are a raster")
    return labels


def _read_classes(path):
    if not path:
        return {}
    wanted = 'wanted JSON like {"10": {"name": "maize", "color": "#ffbb22"}}, codes 1 to 255'
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        line = f"found {type(error).__name__} {error}"
        raise InputError(f"classes_path={path}: {line}, {wanted}") from None
    if not is_class_table(content):
        raise InputError(f"classes_path={path}: found {str(content)[:200]}, {wanted}")
    return {int(code): entry for code, entry in content.items()}


def _is_raster(path):
    try:
        with rasterio.open(path):
            return True
    except RasterioError:
        if "://" not in path and not Path(path).exists():
            raise InputError(
                f"labels={path}: found no file, wanted worldcover, a raster or a vector file"
            ) from None
        return False


# ---- polygons and points -------------------------------------------------------------------------


def _open_features(config, classes):
    geopandas = need("geopandas")
    path, column, splits = config["labels"], config["class_column"], config["splits"]
    try:
        features = geopandas.read_file(path)
    except (RuntimeError, OSError, ValueError) as error:  # pyogrio's errors are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"labels={path}: found no readable file ({reason})") from None
    if features.crs is None:
        raise InputError(f"labels={path}: found no coordinate system, wanted one in the file")
    columns = [name for name in features.columns if name != "geometry"]
    wanted = {"class_column": column} | (
        {"splits": splits} if splits not in ("", "polygons", "blocks") else {}
    )
    for key, name in wanted.items():
        if name not in columns:
            raise InputError(f"{key}={name}: wanted a column of {path}: {', '.join(columns)}")
    whole = features[column].notna() & features.geometry.notna() & ~features.geometry.is_empty
    if not whole.all():
        print(f"{path}: {(~whole).sum()} features without class or geometry are left out")
    features = features[whole].reset_index(drop=True)
    if not len(features):
        raise InputError(f"labels={path}: found no feature with a class, wanted some")
    features["code"], classes = _number_classes(features[column], classes, path)
    if splits == "polygons":
        features["split"] = choose_splits(features, config["seed"])
    elif splits not in ("", "blocks"):
        features["split"] = _read_splits(features[splits], splits)
    return Labels(path, classes, features)


def _number_classes(values, classes, path):
    """Codes (N,) uint8 of class names or codes, and {code: entry}.

    Names that classes (of classes_path) knows get its codes; else they are numbered by the
    alphabet, from 1.
    """
    if values.dtype.kind in "iuf":
        codes = values.to_numpy()
        wrong = codes[(codes != np.round(codes)) | (codes < 1) | (codes > 255)]
        if len(wrong):
            raise InputError(f"{path}: found class {wrong[0]}, wanted names or codes 1 to 255")
        return codes.astype(np.uint8), classes
    names = values.astype(str)
    known = {entry["name"]: code for code, entry in classes.items()}
    if not known:
        known = {name: code for code, name in enumerate(sorted(names.unique()), 1)}
        classes = {code: {"name": name} for name, code in known.items()}
    unknown = sorted(set(names) - set(known))
    if unknown or len(known) > 255:
        raise InputError(
            f"{path}: found the classes {unknown[:5] or len(known)}, wanted those of "
            f"classes_path, at most 255"
        )
    return names.map(known).to_numpy(np.uint8), classes


def _read_splits(values, column):
    splits = values.fillna("").map(lambda value: str(value).strip().lower().removesuffix(".0"))
    unknown = sorted(set(splits) - set(SPLIT_NAMES))
    if unknown:
        raise InputError(f"splits={column}: found {unknown[0]}, wanted train, validation or test")
    return splits.map(SPLIT_NAMES).to_numpy(np.uint8)


def choose_splits(features, seed):
    """The split of each feature, (N,) uint8: a fifth of each class validates and a fifth tests.

    Chosen by the geometry and the seed: the order of the file and the tile do not matter, and one
    polygon that is listed twice has one split. A class of two features has no validation; one
    feature alone trains.
    """
    keys = [
        hashlib.sha256(f"{seed} ".encode() + shape.normalize().wkb).hexdigest()
        for shape in features.geometry
    ]
    groups = defaultdict(set)
    for key, code in zip(keys, features["code"], strict=True):
        groups[code].add(key)
    split_of = {}
    for code in sorted(groups):
        fresh = sorted(groups[code] - set(split_of))
        fifth = max(round(len(fresh) / 5), len(fresh) >= 2)
        for place, key in enumerate(fresh):
            validates = fifth <= place < 2 * fifth and len(fresh) > 2
            split_of[key] = TEST if place < fifth else VALIDATION if validates else TRAIN
    return np.array([split_of[key] for key in keys], np.uint8)


# ---- blocks of the ground ------------------------------------------------------------------------


def block_splits(x, y, crs, size, seed):
    """The split of places by the square block of `size` metres they lie in, as `split_blocks`.

    x, y: arrays of one shape, map coordinates in crs. Blocks lie in one projection of the whole
    Earth, so that the same ground has the same split in every tile, of whatever zone.
    """
    to_ground = need("pyproj").Transformer.from_crs(crs, GROUND, always_xy=True)
    column, row = (np.floor(part / size).astype(np.int64) for part in to_ground.transform(x, y))
    return split_blocks(column, row, seed)


def _map_splits(transform, shape, crs, config):
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

    They take the place of what was there. Returns whether any label lies inside the tile; where
    none does, nothing is written (see `forget_labels`). Raises InputError for a tile without crs
    and transform.
    """
    info = read_tile_json(folder / "tile.json")
    if not is_georeferenced(info):
        raise InputError(f"{folder / 'tile.json'}: found no crs and transform, wanted both")
    shape = np.load(folder / "masks.npy", mmap_mode="r", allow_pickle=False).shape[1:]
    transform = rasterio.Affine(*info["transform"])
    splits = None
    if labels.features is not None:
        codes, splits = burn_features(labels.features, transform, shape, info["crs"], config)
    else:
        codes = warp_rasters(labels.origin, transform, shape, info["crs"])
        if config["splits"]:
            splits = _map_splits(transform, shape, info["crs"], config) * (codes > 0)
    present = [int(code) for code in np.unique(codes) if code]
    if not present:
        print(f"{folder}: no label of {labels.origin} lies inside")
        return False
    known = {str(code): entry for code, entry in labels.classes.items()}
    legend = class_legend({*labels.classes, *present}, known)  # the same colours in all tiles
    keys = ("labels", "class_column", "splits", "split_block", "seed")
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
    """Remove what an earlier call labelled in a tile that the labels of this one do not reach.

    In one data set the labels of two files would mean two things by one code.
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
    here = features.to_crs(crs)
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
        bounds = transform_bounds(crs, "EPSG:4326", *array_bounds(*shape, transform))
        files = [origin.format(place=place) for place in worldcover_places(bounds)]
    codes = np.zeros(shape, np.uint8)
    retries = {"GDAL_HTTP_MAX_RETRY": "5", "GDAL_HTTP_RETRY_DELAY": "1"}
    for file in files:
        try:
            with rasterio.Env(**NETWORK, **retries), rasterio.open(file) as source:
                _check_raster(source, file)
                found = np.zeros(shape, np.int32)
                reproject(
                    rasterio.band(source, 1),
                    found,
                    src_nodata=source.nodata,
                    dst_transform=transform,
                    dst_crs=crs,
                    resampling=Resampling.nearest,
                )
                if source.nodata is not None:
                    found[found == source.nodata] = 0
        except RasterioError as error:
            reason = str(error).splitlines()[0]
            if len(files) > 1 and "404" in reason.split(": ")[-1]:  # a square of open sea
                print(f"{file}: no such file, so no labels there")
                continue
            raise InputError(f"labels={file}: cannot be read ({reason}), wanted a raster") from None
        if found.min() < 0 or found.max() > 255:
            raise InputError(
                f"labels={file}: found codes {found.min()} to {found.max()}, wanted 0 to 255"
            )
        np.copyto(codes, found.astype(np.uint8), where=codes == 0)
    return codes


def _check_raster(source, file):
    if source.crs is None or not np.issubdtype(source.dtypes[0], np.integer):
        raise InputError(
            f"labels={file}: found {source.dtypes[0]}, {source.crs}, wanted whole numbers and a "
            "coordinate system"
        )


def worldcover_places(bounds):
    """Names like N48E012 of the 3 x 3 degree squares under (west, south, east, north) degrees."""
    west, south, east, north = (int(np.floor(edge / 3)) * 3 for edge in bounds)
    return [
        f"{'N' if y >= 0 else 'S'}{abs(y):02d}{'E' if x >= 0 else 'W'}{abs(x):03d}"
        for y in range(south, north + 1, 3)
        for x in range(west, east + 1, 3)
    ]
