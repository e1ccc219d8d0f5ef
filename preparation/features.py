"""Polygons and points of a label file: read, classes numbered, splits chosen.

A label file is what GDAL reads as vectors, GeoParquet, or a table with longitudes and latitudes.

Shapes: N features (polygons or points).
"""

import hashlib
import warnings
from collections import defaultdict
from pathlib import Path

from running.errors import InputError

import numpy as np

from preparation import need
from tiles import TEST, TRAIN, VALIDATION

TABLES, PARQUET = (".csv", ".tsv", ".psv"), (".parquet", ".geoparquet", ".pq")
# columns of a table's points, in any case of letters; as degrees of WGS84
LON_LAT = (("lon", "lat"), ("long", "lat"), ("lng", "lat"), ("longitude", "latitude"))
LON_LAT += (("decimallongitude", "decimallatitude"),)  # of GBIF
SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION, "test": TEST}
SPLIT_NAMES |= {str(split): split for split in (0, TRAIN, VALIDATION, TEST)} | {"": 0}


def read_features(config, classes):
    """The features of labels= that have a class and a geometry, and the table of their classes.

    classes: {code: entry} of classes_path, or empty.
    Returns a geopandas GeoDataFrame with the column code, and split where polygons have one, and
    {code: {"name": .., "color": ..}}. Raises InputError for what does not fit.
    """
    path, column, splits = config["labels"], config["class_column"], config["splits"]
    wanted = {"class_column": column}
    if splits not in ("", "polygons", "blocks"):
        wanted["splits"] = splits
    features = read_file("labels", path, config["labels_layer"], wanted)
    values = clean_classes(features[column], path)
    whole = find_whole(features, values, f"labels={path}", "class")
    codes, classes = number_classes(values[whole], classes, path)
    return keep_features(features[whole], {"code": codes}, splits, config["seed"]), classes


def find_whole(features, values, origin, what):
    """Which features have a value and a geometry, (N,) bool; says how many have not.

    values: pandas Series (N,); origin, what: words for the file and the value. Raises InputError
    where none has both.
    """
    has_place = features.geometry.notna() & ~features.geometry.is_empty
    for found, word in ((values.notna(), what), (has_place, "geometry")):
        if not found.all():
            print(f"{origin}: {(~found).sum()} features without a {word} are left out")
    whole = values.notna() & has_place
    if not whole.any():
        raise InputError(f"{origin}: found no feature with {what} and geometry, wanted some")
    return whole


def keep_features(features, columns, splits, seed):
    """A GeoDataFrame of the geometries of features with columns, and split where polygons have one.

    columns: {name: (N,)}, code among them. splits: polygons, blocks, a column, or empty.
    """
    kept = need("geopandas").GeoDataFrame(columns, geometry=[*features.geometry])
    kept = kept.set_crs(features.crs)
    if splits == "polygons":
        kept["split"] = choose_splits(kept, seed)
    elif splits not in ("", "blocks"):
        kept["split"] = _read_splits(features[splits], splits)
    return kept


# ---- files ---------------------------------------------------------------------------------------


def is_vector_name(path):
    """Whether a file is one of vectors by its name; GDAL can take a table for a raster."""
    return Path(path).suffix.lower() in TABLES + PARQUET


def read_file(key, path, layer, wanted):
    """A GeoDataFrame of all features of a file; warnings of the libraries become one line each.

    key: that names the file, for messages, as is {key}_layer. wanted: {key: column that must be
    there}. Raises InputError for another file, and for one without a coordinate system.
    """
    features = _read_any(key, path, layer)
    if features.crs is None:
        raise InputError(f"{key}={path}: found no coordinate system, wanted one in the file")
    columns = [name for name in features.columns if name != features.geometry.name]
    for column_key, name in wanted.items():
        if name not in columns:
            found = ", ".join(columns)
            raise InputError(f"{column_key}={name}: wanted a column of {path}: {found}")
    return features


def _read_any(key, path, layer):
    geopandas, suffix = need("geopandas"), Path(path).suffix.lower()
    options = {"AUTODETECT_TYPE": "YES", "AUTODETECT_SIZE_LIMIT": "0"} if suffix in TABLES else {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if suffix in PARQUET:
                features = _read_parquet(key, path, layer)
            else:
                layer = _choose_layer(key, path, layer)
                features = geopandas.read_file(path, layer=layer, **options)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError) as error:  # pyogrio's errors are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{key}={path}: found no readable file ({reason})") from None
    for line in sorted({str(one.message).splitlines()[0] for one in caught}):
        print(f"{path}: {line}")
    is_spatial = isinstance(features, geopandas.GeoDataFrame)
    return features if is_spatial else _points(key, features, path)


def _read_parquet(key, path, layer):
    if layer:
        raise InputError(f"{key}_layer={layer}: found a Parquet file, which has no layers")
    need("pyarrow")
    try:
        return need("geopandas").read_parquet(path)
    except ValueError:  # no geometries in it: a table
        return need("pandas").read_parquet(path)


def _choose_layer(key, path, wanted):
    """The name of the layer to read: the only one, or the only one that has geometries."""
    layers = {name: kind for name, kind in need("pyogrio").list_layers(path)}
    names = [name for name, kind in layers.items() if kind is not None] or list(layers)
    if wanted and wanted not in layers:
        raise InputError(f"{key}_layer={wanted}: wanted a layer of {path}: {', '.join(layers)}")
    if wanted:
        return wanted
    if len(names) != 1:
        found = f"the layers {', '.join(names)}" if names else "no layer"
        raise InputError(f"{key}={path}: found {found}, wanted {key}_layer= one of them")
    if len(layers) > 1:
        print(f"{path}: reading the layer {names[0]}, the only one with geometries")
    return names[0]


def _points(key, table, path):
    """Points of a table without geometries, from its columns of longitudes and latitudes."""
    columns = {str(name).strip().lower(): name for name in table.columns}
    pairs = [pair for pair in LON_LAT if set(pair) <= set(columns)]
    if len(pairs) != 1:
        raise InputError(
            f"{key}={path}: found no geometries and the columns {', '.join(columns.values())}; "
            "wanted geometries, or points in columns lon and lat (degrees, WGS84)"
        )
    numbers = []
    for name, limit in zip((columns[name] for name in pairs[0]), (180, 90), strict=True):
        texts = table[name].where(table[name].astype(str).str.strip() != "")
        degrees = need("pandas").to_numeric(texts, errors="coerce")
        wrong = texts[(degrees.isna() & texts.notna()) | (degrees.abs() > limit)]
        if len(wrong):
            line = f"found {name} {wrong.iloc[0]}, wanted degrees, -{limit} to {limit}"
            raise InputError(f"{key}={path}: {line}")
        numbers.append(degrees)
    geopandas = need("geopandas")
    points = geopandas.points_from_xy(*numbers, crs="EPSG:4326")
    points[(numbers[0].isna() | numbers[1].isna()).to_numpy()] = None
    return geopandas.GeoDataFrame(table, geometry=points)


# ---- classes and splits --------------------------------------------------------------------------


def _clean(text):
    """A class name without blanks around it, and with single ones inside."""
    return " ".join(str(text).split())


def clean_classes(values, path):
    """Numbers as they are; names by `_clean`, and None where nothing is left."""
    if values.dtype.kind in "iuf":
        return values
    names = [
        None if is_missing else _clean(value) or None
        for value, is_missing in zip(values, values.isna(), strict=True)
    ]
    pairs = zip(values, names, strict=True)
    changed = sum(name is not None and name != str(value) for value, name in pairs)
    if changed:
        print(f"{path}: needless blanks removed from the class of {changed} features")
    return need("pandas").Series(names, values.index, dtype=object)


def number_classes(values, classes, path):
    """Codes (N,) uint8 of class names or codes, and {code: entry}.

    Names that classes (of classes_path) has get its codes; without it names are numbered in
    alphabetical order, from 1.
    """
    if values.dtype.kind in "iuf":
        codes = values.to_numpy(float)
        wrong = codes[(codes != np.round(codes)) | (codes < 1) | (codes > 255)]
        if len(wrong):
            raise InputError(f"{path}: found class {wrong[0]:.15g}, wanted names or codes 1 to 255")
        return codes.astype(np.uint8), classes
    known = {_clean(entry["name"]): code for code, entry in classes.items()}
    if len(known) < len(classes):
        raise InputError("classes_path: found one name for two codes, wanted a name for each")
    if not known:
        known = {name: code for code, name in enumerate(sorted(set(values)), 1)}
        classes = {code: {"name": name} for name, code in known.items()}
    unknown = sorted(set(values) - set(known))
    if unknown or len(known) > 255:
        raise InputError(
            f"{path}: found the classes {unknown[:5] or len(known)}, wanted those of "
            f"classes_path, at most 255"
        )
    return values.map(known).to_numpy(np.uint8), classes


def _read_splits(values, column):
    """Splits (N,) uint8 of a column of train, validation and test, or 1, 2 and 3; empty: 0."""
    texts = [
        "" if is_missing else str(value).strip().lower().removesuffix(".0")
        for value, is_missing in zip(values, values.isna(), strict=True)
    ]
    unknown = sorted(set(texts) - set(SPLIT_NAMES))
    if unknown:
        raise InputError(f"splits={column}: found {unknown[0]}, wanted train, validation or test")
    return np.array([SPLIT_NAMES[text] for text in texts], np.uint8)


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
