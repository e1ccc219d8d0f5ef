"""tile.json: what it may say of a tile, checked; the classes and the quantity of several tiles.

Shapes: H x W pixels, T dates, B bands.
"""

import json
import math
import re
from datetime import datetime

from running.errors import InputError, notice
from running.files import read_json


def read_tile_json(path, shape=()):
    """The content of a tile.json, checked against the tile's shape (T, H, W, B); {} for none.

    shape: () where it is not known; then bands and dates, which depend on it, are not checked.
    The CRS is returned in GDAL's short form, such as EPSG:32633.
    """
    info = read_json(path)
    for key, (is_right, wanted) in TILE_JSON.items():
        is_known = shape or key not in ("bands", "dates")
        if key in info and is_known and not is_right(info[key], shape):
            found = json.dumps(info[key])[:200]
            raise InputError(f"{path}: found {key} {found}, wanted {wanted}")
    if ("crs" in info) != ("transform" in info):
        raise InputError(f"{path}: found one of crs and transform, wanted both or none")
    if "crs" in info:
        info["crs"] = _check_crs(path, info["crs"])
    return info


def _check_crs(path, text):
    from rasterio.crs import CRS  # takes a while, and most unlabelled toys have none
    from rasterio.errors import CRSError

    try:
        return CRS.from_user_input(text).to_string()
    except (CRSError, ValueError) as error:
        line = (str(error).splitlines() or ["unknown"])[0]
        found = f"found crs {text!r} ({line})"
        raise InputError(f"{path}: {found}, wanted one like EPSG:32633") from None


def _is_band_list(value, shape):
    names = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return names and len(value) in (0, shape[3]) and len({*map(band_key, value)}) == len(value)


def _is_date_list(value, shape):
    try:
        return isinstance(value, list) and len([*map(datetime.fromisoformat, value)]) == shape[0]
    except (TypeError, ValueError):
        return False


def _is_transform(value, shape):
    """Six numbers with which neither coordinates of pixels nor indices of blocks overflow."""
    numbers = isinstance(value, list) and len(value) == 6
    if not numbers or not all(type(n) in (int, float) and abs(n) <= 1e9 for n in value):
        return False
    a, b, _, d, e, _ = value
    sizes = math.hypot(a, d), math.hypot(b, e)  # of a pixel, along a row and along a column
    return all(1e-9 <= size <= 1e7 for size in sizes) and abs(a * e - b * d) > 0


def is_class_table(value, shape=None):
    """Whether a value is a class table of tile.json: {code: {"name": .., "color": ..}}."""
    return isinstance(value, dict) and all(
        isinstance(code, str)
        and re.fullmatch(r"[1-9][0-9]{0,2}", code)
        and int(code) <= 255
        and isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and re.fullmatch(r"#[0-9a-fA-F]{6}", str(entry.get("color", "#000000")))
        for code, entry in value.items()
    )


def _is_target(value, shape=None):
    """Whether a value describes the quantity of targets.npy: {"name": .., "unit": ..}."""
    keys = isinstance(value, dict) and {"name", "unit"} <= set(value)
    return keys and bool(value["name"]) and all(isinstance(value[key], str) for key in TARGET)


TARGET = {"name": "quantity", "unit": ""}  # of targets.npy, where tile.json does not describe it
TILE_JSON = {  # what is checked of tile.json, and the words of the error; other keys are free
    "bands": (_is_band_list, "a list of as many different names as there are bands"),
    "dates": (_is_date_list, "as many dates like 2021-06-05 as there are days"),
    "crs": (lambda value, shape: isinstance(value, str), "text like EPSG:32633"),
    "transform": (_is_transform, "six numbers a, b, c, d, e, f up to 1e9 that span an area"),
    "classes": (is_class_table, 'codes 1 to 255 with "name" and a "color" like #00aa00'),
    "target": (_is_target, 'a "name" and a "unit", both texts, like "biomass" and "t/ha"'),
    "simulated": (lambda value, shape: isinstance(value, bool), "true or false"),
}


def band_key(name):
    """A band's name in one spelling: B4, b04 and B04 are the same band, and so are b8a and B8A."""
    name = name.strip().upper()
    number = re.fullmatch(r"B0*([0-9]+A?)", name, re.ASCII)
    return f"B{number[1]:0>2}" if number else name


def find_bands(names, wanted):
    """Where each wanted band is among names, in whatever spelling; None for a missing one."""
    places = {band_key(name): place for place, name in enumerate(names)}
    return [places.get(band_key(name)) for name in wanted]


def match_bands(names, wanted, origin, wanted_by, mend=""):
    """The place of each wanted band among names, in whatever spelling: a list of indices.

    origin, wanted_by: whose names they are; mend: what to do, for the message. Raises InputError
    for a band that is missing or there twice.
    """
    keys = [*map(band_key, names)]
    wrong = [name for name in wanted if keys.count(band_key(name)) != 1]
    if wrong:
        number = keys.count(band_key(wrong[0]))
        found = f"band {wrong[0]} {number} times" if number else f"no band {wrong[0]}"
        raise InputError(
            f"{origin}: found {found} among {','.join(names)}, wanted {','.join(wanted)} as "
            f"{wanted_by}{mend}"
        )
    return [keys.index(band_key(name)) for name in wanted]


def is_georeferenced(info):
    """Whether the content of a tile.json or an infer.json has the place of its pixels."""
    return {"crs", "transform"} <= set(info)


def find_years(info):
    """The year of the dates of a tile.json, "2020", or the first and last, "2020-2021".

    Of an infer.json what it says; "" where it is not known.
    """
    dates = info.get("dates")
    if not isinstance(dates, list):  # an infer.json: the key of infer.py
        return str(info.get("years", ""))[:9]
    years = sorted({str(datetime.fromisoformat(day).year) for day in dates})
    return "-".join(years if len(years) < 2 else (years[0], years[-1]))


def merge_classes(sources, refuse=True):
    """The classes of several tile.json or infer.json in one, {"10": {"name": .., "color": ..}}.

    sources: (path, content) of each; the first one that names a class counts. Another name for a
    code raises InputError that names both files (or, without `refuse`, prints it); another colour,
    and with `refuse` a source without classes beside others that have them, is printed.
    """
    merged, origin = {}, {}
    for path, info in sources:
        for code, entry in info.get("classes", {}).items():
            first = merged.setdefault(code, entry)
            origin.setdefault(code, path)
            for key in ("name", "color"):
                if entry.get(key, first.get(key)) == first.get(key, entry.get(key)):
                    continue
                line = (
                    f"{path}: found {key} {entry[key]!r} for class {code}, wanted {first[key]!r} "
                    f"as in {origin[code]}"
                )
                if key == "name" and refuse:
                    raise InputError(line)
                notice(f"{line}, which is used")
    unnamed = [path for path, info in sources if not info.get("classes")]
    if refuse and merged and unnamed:
        notice(
            f"{unnamed[0]}: found no classes (so in {len(unnamed)} of {len(sources)} files); the "
            "codes are taken to mean the same as in the others"
        )
    return merged


def match_classes(classes, others):
    """By name, which code of `classes` each code 0..255 of `others` is: a list of 256 codes.

    classes, others: as in tile.json. A name that `classes` lacks gets a code that neither has.
    Where one of them has no names, codes are taken to mean the same.
    """
    table = list(range(256))
    if classes and others:
        ours = {fold_name(entry): int(code) for code, entry in reversed(classes.items())}
        free = (code for code in range(1, 256) if not {str(code)} & {*classes, *others})
        for code, entry in others.items():
            known = ours.get(fold_name(entry))
            table[int(code)] = next(free, 0) if known is None else known
    return table


def fold_name(entry):
    """The name of a class of tile.json, however it is spaced and capitalised."""
    return " ".join(entry["name"].casefold().split())


def merge_targets(sources):
    """The name and unit of the quantity of several tiles, {"name": .., "unit": ..}.

    sources: (path, content) of each tile.json. Raises InputError that names two files which differ:
    numbers of two units cannot be learned together.
    """
    found = [(path, {**TARGET, **info.get("target", {})}) for path, info in sources]
    first_path, first = found[0]
    for path, target in found:
        if any(target[key] != first[key] for key in TARGET):
            words = [f"target {one['name']!r} in {one['unit']!r}" for one in (target, first)]
            raise InputError(f"{path}: found {words[0]}, wanted {words[1]} as in {first_path}")
    return {key: first[key] for key in TARGET}


def describe_target(target):
    """A quantity in words, as "biomass [t/ha]". target: as in tile.json; {} where it has none."""
    target = {**TARGET, **target}
    return f"{target['name']} [{target['unit']}]" if target["unit"] else target["name"]
