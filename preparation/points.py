"""Points to label as reference: written for the interpreter, and read again with their labels.

A GeoPackage, or a CSV where the map has no CRS, with an empty column for the label. Beside it a
JSON of the same name keeps the design, which the estimates need and the interpreter must not see.
"""

import csv
from pathlib import Path

from running.errors import InputError, notice
from running.files import atomic_write, file_hash, read_json
from running.tile_json import fold_name, is_class_table, is_georeferenced

import numpy as np
from rasterio import Affine
from rasterio.transform import rowcol, xy

from preparation import need
from preparation.features import read_file

LABEL = "reference"  # the column that the interpreter fills with class names or codes
KEYS = {"design": str, "strata": list, "maps": list, "points": list, "classes": dict}
POINT = {"id", "map", "row", "column", "stratum"}  # of each point


def describe_maps(maps):
    """Which ClassMaps a sample was drawn from, for the JSON of its design."""
    return [
        {
            "path": str(one.path),
            "sha256": file_hash(one.path),
            "shape": list(one.codes.shape),
            **{key: one.info[key] for key in ("crs", "transform") if key in one.info},
        }
        for one in maps
    ]


def refuse_earlier(folder):
    """Raise InputError where a sample lies: its points may have labels."""
    for path in (folder / "points.gpkg", folder / "points.csv"):
        if path.exists():
            raise InputError(
                f"{path}: found an earlier sample, which may have labels; wanted another output_dir"
            )


def write_table(path, columns, maps, found, shapes=None):
    """Write features with columns and places: path.gpkg, or path.csv where a map has no CRS.

    path: without suffix; columns: {name: (n,)}; found: (n, 3) int: map, row, column; shapes: n
    geometries in the CRS of their map, or None: points in the middle of the pixels. Of maps of
    several CRS, all are in WGS84. Raises InputError where geopandas is missing. Returns the path.
    """
    is_placed = all(is_georeferenced(one.info) for one in maps)
    path = Path(f"{path}.{'gpkg' if is_placed else 'csv'}")
    names = np.array([one.path.parent.name for one in maps])
    columns = columns | {"tile": names[found[:, 0]], "row": found[:, 1], "column": found[:, 2]}
    with atomic_write(path) as part:
        if is_placed:
            _to_features(columns, maps, found, shapes).to_file(part, layer=path.stem)
        else:
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
    return path


def _to_features(columns, maps, found, shapes):
    """A GeoDataFrame of `write_table`."""
    geopandas, pandas = need("geopandas"), need("pandas")
    parts, systems = [], {one.info["crs"] for one in maps}
    for number, one in enumerate(maps):
        own = np.flatnonzero(found[:, 0] == number)
        x, y = xy(Affine(*one.info["transform"]), found[own, 1], found[own, 2])
        geometry = geopandas.points_from_xy(x, y)
        if shapes:
            geometry = [need("shapely").geometry.shape(shapes[place]) for place in own]
        part = {name: np.asarray(values)[own] for name, values in columns.items()}
        part = geopandas.GeoDataFrame(part, index=own, geometry=geometry, crs=one.info["crs"])
        parts.append(part.to_crs("EPSG:4326") if len(systems) > 1 else part)
    return pandas.concat(parts).sort_index()


# ---- the labelled file ---------------------------------------------------------------------------


def read_points(path):
    """The design of a sample, and the labels of its points: (design, {id: text}).

    Labels are codes or names as text, "" where there is none. Raises InputError for a file without
    the JSON of its design beside it, without ids or labels, or with points that were moved.
    """
    path = Path(path)
    design = read_json(path.with_suffix(".json"))
    is_right = all(isinstance(design.get(key), kind) for key, kind in KEYS.items())
    is_right = is_right and all(set(point) >= POINT for point in design["points"])
    if not is_right or not is_class_table(design["classes"]):
        found = f"no design in {path.stem}.json" if design else f"no {path.stem}.json"
        raise InputError(
            f"{path}: found {found} beside it, wanted the file that sampling_design.py wrote with "
            "the points: without the design of the sample no estimate is possible"
        )
    rows = _read_rows(path)
    known = {str(point["id"]): point for point in design["points"]}
    for row in rows:
        if row["id"] not in known:
            raise InputError(f"{path}: found a point with id {row['id']}, wanted those of its JSON")
        _check_place(path, row, known[row["id"]], design["maps"])
    if len({row["id"] for row in rows}) < len(rows):
        raise InputError(f"{path}: found an id of several points, wanted each point once")
    missing = len(known) - len(rows)
    if missing:
        notice(f"{path}: found {missing} of {len(known)} points missing, which count as unlabelled")
    return design, {row["id"]: row[LABEL] for row in rows}


def _read_rows(path):
    """[{"id", "reference", and "geometry" with "crs", or "row", "column"}] of a file of points."""
    if path.suffix.lower() == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: found no readable CSV ({error})") from None
        columns = set(rows[0]) if rows else set()
    else:
        features = read_file("sample_path", path, None, {})
        columns = set(features.columns)
        rows = features.to_dict("records")
        with np.errstate(invalid="ignore"):  # of an empty geometry, which is refused below
            points = features.geometry.representative_point()  # some software makes multipoints
        for row, *place in zip(rows, points.x, points.y, strict=True):
            row["place"], row["crs"] = place, features.crs.to_string()
    if lost := {"id", LABEL} - columns:
        raise InputError(f"{path}: found no column {min(lost)}, wanted id and {LABEL}")
    return [row | {key: _text(row[key]) for key in ("id", LABEL)} for row in rows]


def _text(value):
    """A cell as text: "" for none, and a whole number without a decimal point."""
    text = "" if value is None or value != value else " ".join(str(value).split())
    return text.removesuffix(".0") if text.replace(".", "", 1).isdigit() else text


def _check_place(path, row, point, maps):
    """InputError for a point that was moved to another pixel, or off the map."""
    info = maps[point["map"]]
    height, width = info["shape"]
    if "place" in row:
        x, y = row["place"]
        if row["crs"] != info["crs"]:
            from rasterio.warp import transform

            (x,), (y,) = transform(row["crs"], info["crs"], [x], [y])
        line, column = -1, -1
        if np.isfinite([x, y]).all():
            line, column = map(int, rowcol(Affine(*info["transform"]), x, y))
    else:
        texts = (str(row.get(key)) for key in ("row", "column"))
        line, column = (int(text) if text.isdigit() else -1 for text in texts)
    if not (0 <= line < height and 0 <= column < width):
        raise InputError(f"{path}: found point {row['id']} outside the map {info['path']}")
    if (line, column) != (point["row"], point["column"]):
        raise InputError(
            f"{path}: found point {row['id']} in row {line}, column {column}, wanted row "
            f"{point['row']}, column {point['column']}: its place must stay"
        )


def match_labels(path, labels, classes):
    """The class code of each label, {id: code}, of names or codes; unlabelled ones are left out.

    classes: {code: {"name"}} as in tile.json. Raises InputError for names that are no class.
    """
    codes = {fold_name(entry): int(code) for code, entry in classes.items()}
    codes |= {code: int(code) for code in classes}
    folded = {key: fold_name({"name": text}) for key, text in labels.items() if text}
    unknown = sorted({labels[key] for key, text in folded.items() if text not in codes})
    if unknown:
        names = ", ".join(entry["name"] for entry in classes.values())
        raise InputError(
            f"{path}: found the class {', '.join(unknown[:5])}, wanted {names}, or a code (a class "
            "that the map lacks can be added to classes of the JSON beside it)"
        )
    return {key: codes[text] for key, text in folded.items()}
