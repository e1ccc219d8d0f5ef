"""What is special about Sentinel-2 level 2A: bands, scene classes, baselines, offsets, tiles, days.

Pure rules on the metadata of one item (a scene of one tile; anything with `id`, `datetime`,
`properties` and `assets`, as a pystac.Item has) and on arrays of its pixels. Nothing here reads a
file or a network.

Sources: Sentinel-2 products specification (SCL classes, processing baseline 04.00); the band names
of Element 84's earth-search, Microsoft's Planetary Computer and the Copernicus Data Space.
"""

import math
import re
from datetime import date, timedelta
from pathlib import Path

from running.errors import InputError

import numpy as np

from preparation.place import TILE, parse_tile

TESSERA_BANDS = ["B04", "B02", "B03", "B08", "B8A", "B05", "B06", "B07", "B11", "B12"]
ANCESTOR_BANDS = ["B04", "B02", "B03", "B08", "B8A", "B09", "B05", "B06", "B07", "B11", "B12"]
BAND_LISTS = {"tessera": TESSERA_BANDS, "ancestor": ANCESTOR_BANDS}
NATIVE_10M = ("B02", "B03", "B04", "B08")

# names of the same band elsewhere: earth-search, then the Copernicus Data Space (native pixels)
ALIASES = {
    "B01": ("coastal", "B01_60m"),
    "B02": ("blue", "B02_10m"),
    "B03": ("green", "B03_10m"),
    "B04": ("red", "B04_10m"),
    "B05": ("rededge1", "B05_20m"),
    "B06": ("rededge2", "B06_20m"),
    "B07": ("rededge3", "B07_20m"),
    "B08": ("nir", "B08_10m"),
    "B8A": ("nir08", "B8A_20m"),
    "B09": ("nir09", "B09_60m"),
    "B11": ("swir16", "B11_20m"),
    "B12": ("swir22", "B12_20m"),
    "SCL": ("scl", "SCL_20m"),
    "MASK": ("mask",),  # of local GeoTIFFs: 1 clear, 0 not
}
MAX_SCL, SNOW = 11, 11
OFFSET = 1000  # of the digital numbers of baseline 04.00 and later
OFFSET_BASELINE = 4.0
TOOLBOX_BASELINE = 90.0  # 99.99 and its kin: made by a user's sen2cor, with or without the offset
# of items of local files: properties, then fields of an asset
LOCAL_KEY = "local:path"  # one of its files, or the .SAFE folder
OFFSET_KEY = "local:offset"  # to subtract, as the files themselves declare
FILE_KEY = "local:file"  # size and time of the last change of each file
BAND_KEY = "local:band"  # the number of the band in its file; 1 where it is missing
SCALE_KEY = "local:scale"  # what makes its numbers reflectance x 10000, in place of its tags
# properties of items, in the order in which they are believed
TILE_KEYS = ("grid:code", "s2:mgrs_tile", "odc:region_code")
TILE_PARTS = ("utm_zone", "latitude_band", "grid_square")  # after mgrs: or sentinel:
BASELINE_KEYS = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
NAME_KEYS = ("s2:product_uri", "sentinel:product_id", "title")  # that hold a product's name
APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_bands(text):
    """Band names of `tessera` (10), `ancestor` (11, with B09) or a list like B02,B03,B04."""
    bands = BAND_LISTS.get(text) or [name.strip().upper() for name in text.split(",")]
    unknown = [name for name in bands if name not in ALIASES or name in ("SCL", "MASK")]
    if unknown or len(set(bands)) < len(bands):
        raise InputError(f"bands={text}: wanted tessera, ancestor or different names like B02,B8A")
    return list(bands)


def parse_clear_scl(text):
    """The scene classes that count as clear, sorted, from a list like 4,5,6."""
    try:
        classes = sorted({int(number) for number in text.split(",")})
    except ValueError:
        classes = []
    if not classes or classes[0] < 1 or classes[-1] > MAX_SCL:
        raise InputError(f"clear_scl={text}: wanted classes 1 to {MAX_SCL} like 4,5,6,7,10,11")
    return classes


def year_window(text):
    """First and last date of a calendar year (2021) or of 12 months from a first one (2020-10)."""
    found = re.fullmatch(r"(\d{4})(?:-(\d{2}))?", text)
    if not found or not 1 <= int(found[1]) < 9999 or not 1 <= int(found[2] or 1) <= 12:
        raise InputError(
            f"year={text}: wanted a year like 2021, or the first of 12 months: 2020-10"
        )
    year, month = int(found[1]), int(found[2] or 1)
    return date(year, month, 1), date(year + 1, month, 1) - timedelta(1)


def solar_date(item):
    """The calendar day of an item by the sun over the middle of its tile's UTM zone."""
    zone = re.match(r"\d{2}", tile_of(item))
    if zone:
        middle = int(zone[0]) * 6 - 183  # degrees east
    elif item.bbox:
        west, east = item.bbox[0], item.bbox[len(item.bbox) // 2]
        middle = (west + east + 360 * (west > east)) / 2  # across 180 degrees, west is larger
    else:
        raise InputError(f"{item.id}: found no bbox in the item, wanted one")
    moment = item.datetime or item.common_metadata.start_datetime
    if moment is None:
        raise InputError(f"{item.id}: found no datetime in the item, wanted one")
    return (moment + timedelta(hours=middle / 15)).date()


def tile_of(item):
    """The MGRS tile of an item, like 33UUP. Raises InputError where the item names none."""
    found = item.properties
    texts = [found.get(key, "") for key in TILE_KEYS]
    for prefix in ("mgrs", "sentinel"):
        texts.append("".join(str(found.get(f"{prefix}:{part}", "")) for part in TILE_PARTS))
    for text in texts:
        tile = parse_tile(str(text))
        if re.fullmatch(TILE, tile):
            return tile
    for name in [*(found.get(key, "") for key in NAME_KEYS), item.id]:
        tile = re.search(rf"(?:^|[_.])T?{TILE}(?=[_.]|$)", str(name).upper())
        if tile:
            return tile[1].zfill(2) + tile[2]
    if str(found.get("grid:code", "")).startswith("MGRS-"):
        return found["grid:code"][5:]  # of local files: the name of their folder
    raise InputError(f"{item.id}: found no MGRS tile in the item, wanted grid:code or s2:mgrs_tile")


def number_of(item, key):
    """A number of an item's properties, which may be written as a text; 0 where it is missing."""
    value = item.properties.get(key)
    try:
        number = float(0 if value is None else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{item.id}: found {key} {value!r}, wanted a number")
    return number


def find_asset(item, band):
    """The asset of a band (or SCL, MASK) under any of its names, or None."""
    for name in (band, *ALIASES[band]):
        if name in item.assets:
            return item.assets[name]
    return None


def check_assets(item, bands, mask="auto"):
    """The names of the assets to read: the bands, then SCL or MASK, or "" where none is wanted.

    mask: as the key local_mask. Raises InputError where one is missing: without its mask, an item
    is not taken for clear.
    """
    masks = {"auto": ["SCL", "MASK"], "none": []}.get(mask, [mask])
    missing = [name for name in bands if not find_asset(item, name)]
    found = [name for name in masks if find_asset(item, name)]
    if masks and not found:
        missing.append(masks[0])
    if not missing:
        return [*bands, *found[:1]] if masks else [*bands, ""]
    there = ", ".join(sorted(item.assets)) or "none"
    if LOCAL_KEY not in item.properties:
        raise InputError(f"{item.id}: found the assets {there}, wanted {', '.join(missing)} too")
    usable = ",".join(sorted({*item.assets} - {"SCL", "MASK"}))
    if missing == masks[:1]:
        hint = "local_mask=none: every pixel with data counts as clear"
        missing = [" or ".join(masks)]
    else:
        hint = f"bands={usable} takes what is there, skip_items={item.id} leaves the date out"
    raise InputError(
        f"{item.id}: found the bands {there}, wanted {', '.join(missing)} too ({hint})"
    )


def asset_words(item, name):
    """An asset as messages name it: that of a local file by band and file."""
    if LOCAL_KEY in item.properties:
        return f"{name} ({Path(find_asset(item, name).href).name})"
    return f"asset {name}"


def baseline_of(item):
    """Processing baseline of an item, like 5.0. Raises InputError where the item names none."""
    found = item.properties
    texts = [str(found.get(key, "")) for key in BASELINE_KEYS]
    names = [*(found.get(key, "") for key in NAME_KEYS), found.get("s2:datatake_id", ""), item.id]
    texts += [re.sub(r".*_N(\d{2})\.?(\d{2}).*", r"\1.\2", str(name)) for name in names]
    for text in texts:
        text = re.sub(r"^N?(\d{2})(\d{2})$", r"\1.\2", text.strip())  # 0500, N0500
        if re.fullmatch(r"\d{1,2}(\.\d{1,2})?", text):
            return float(text)
    place = (
        "the tag PROCESSING_BASELINE of its file"
        if LOCAL_KEY in found
        else "s2:processing_baseline"
    )
    raise InputError(
        f"{item.id}: found no processing baseline, wanted {place} or the key offset=applied "
        "(the values are reflectance x 10000 already, nothing is subtracted) or offset=raw "
        "(the values still hold the 1000 that ESA adds since 2022, it is subtracted)"
    )


def applied_of(item):
    """Whether an item says that its offset is subtracted already; None where it does not say."""
    answers = []
    for key in APPLIED_KEYS:
        value = item.properties.get(key)
        if value is None or value == "":
            continue
        text = str(value).strip().lower()
        if text not in FLAGS:
            raise InputError(f"{item.id}: found {key} {value!r}, wanted true or false")
        answers.append(FLAGS[text])
    return any(answers) if answers else None


def offset_of(item, setting="auto"):
    """What to subtract from the digital numbers of an item, mostly 0 or 1000.

    What the files themselves declare comes first. Else by baseline: 04.00 and later add 1000, which
    some providers subtract again and say so in `boa_offset_applied`. The date decides nothing: old
    dates are reprocessed. setting: auto; applied (0) or raw (1000, or 0 of a baseline before 04.00)
    whatever the files and the item say. Raises InputError where auto finds no answer.
    """
    if setting == "applied":
        return 0
    if setting == "auto" and OFFSET_KEY in item.properties:
        return int(item.properties[OFFSET_KEY])
    if setting == "auto" and applied_of(item):
        return 0
    try:
        baseline = baseline_of(item)
    except InputError:
        if setting == "raw":
            return OFFSET
        raise
    if setting == "auto" and baseline >= TOOLBOX_BASELINE:
        raise InputError(
            f"{item.id}: found the baseline {baseline:05.2f} of the sen2cor toolbox, wanted its "
            "MTD_MSIL2A.xml (or offset=applied, offset=raw where you know)"
        )
    return OFFSET if baseline >= OFFSET_BASELINE else 0


def read_tags(scale, offset):
    """What the scale and offset tags of a raster of reflectance mean: (factor, offset or None).

    Reflectance is scale * number + offset, from 0 to 1; without a scale (1) it is number + offset,
    x 10000. factor: of the numbers, to be x 10000. offset: to subtract from them then; None where
    the tags declare none. Raises InputError for tags that cannot be those of reflectance.
    """
    factor, unit = (1.0, 1) if scale == 1 else (scale * 10_000, 10_000)
    number = -offset * unit
    if not (0.01 <= factor <= 10 and 0 <= number <= 10_000 and abs(number - round(number)) < 0.01):
        raise InputError(
            f"found the tags scale {scale:g} and offset {offset:g}, wanted those of reflectance "
            "(scale 0.0001 and offset 0 or -0.1, or none)"
        )
    return round(factor, 12), round(number) if offset else None


def to_reflectance(numbers, offset):
    """Reflectance x 10000 (uint16) of digital numbers: 0 stays nodata, the rest is 1 or more."""
    if not offset:
        return numbers
    return np.where(numbers > 0, np.maximum(numbers, offset + 1) - np.uint16(offset), 0)


def rank_pixels(classes, mask_name, clear_scl):
    """How good an observation is, uint8 of the same shape: 0 nodata, 1 data, 2 clear.

    classes: SCL, or MASK (1 clear, 0 not). Raises ValueError for values that neither has.
    """
    table = np.full(256, 255, np.uint8)
    if mask_name == "MASK":
        table[:2] = 1, 2
    else:
        table[: MAX_SCL + 1] = 1
        table[0] = 0
        table[clear_scl] = 2
    rank = table[classes]
    if rank.size and rank.max() > 2:
        wanted = "0 or 1" if mask_name == "MASK" else f"classes 0 to {MAX_SCL}"
        raise ValueError(f"found the value {classes[rank > 2][0]}, wanted {wanted}")
    return rank


def origin_of(item):
    """What an item says of its processing, for the record: baseline and whether it is harmonised.

    None for what it does not say.
    """
    try:
        baseline = f"{baseline_of(item):05.2f}"
    except InputError:
        baseline = None
    return {"baseline": baseline, "provider_applied_offset": applied_of(item)}
