"""What is special about Sentinel-2 level 2A: bands, scene classes, baselines, offsets, tiles, days.

Pure rules on the metadata of one item (a scene of one tile; anything with `id`, `datetime`,
`properties` and `assets`, as a pystac.Item has) and on arrays of its pixels. Nothing here reads a
file or a network.

Sources: Sentinel-2 products specification (SCL classes, processing baseline 04.00); the band names
of Element 84's earth-search, Microsoft's Planetary Computer and the Copernicus Data Space.
"""

import re
from datetime import date, timedelta

import numpy as np

from running.errors import InputError

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
    middle = int(zone[0]) * 6 - 183 if zone else (item.bbox[0] + item.bbox[2]) / 2  # degrees east
    moment = item.datetime or item.common_metadata.start_datetime
    if moment is None:
        raise InputError(f"{item.id}: found no datetime in the item, wanted one")
    return (moment + timedelta(hours=middle / 15)).date()


def tile_of(item):
    """The MGRS tile of an item, like 33UUP. Raises InputError where the item does not tell."""
    told = item.properties
    parts = [told.get(f"mgrs:{key}", "") for key in ("utm_zone", "latitude_band", "grid_square")]
    texts = [told.get("grid:code", ""), told.get("s2:mgrs_tile", ""), "".join(map(str, parts))]
    for text in [*texts, item.id]:
        found = re.search(r"(?<![A-Z0-9])T?(\d{1,2})([C-X][A-Z]{2})(?![A-Z0-9])", str(text).upper())
        if found:
            return found[1].zfill(2) + found[2]
    if str(told.get("grid:code", "")).startswith("MGRS-"):
        return told["grid:code"][5:]  # of local files: the name of their folder
    raise InputError(f"{item.id}: found no MGRS tile in the item, wanted grid:code or s2:mgrs_tile")


def find_asset(item, band):
    """The asset of a band (or SCL, MASK) under any of its names, or None."""
    for name in (band, *ALIASES[band]):
        if name in item.assets:
            return item.assets[name]
    return None


def check_assets(item, bands):
    """The names of the assets to read: the bands, then SCL or MASK.

    Raises InputError where one is missing: without its mask, an item is not taken for clear.
    """
    mask = next((name for name in ("SCL", "MASK") if find_asset(item, name)), None)
    missing = [name for name in bands if not find_asset(item, name)]
    if missing or not mask:
        missing += [] if mask else ["SCL"]
        found = ", ".join(sorted(item.assets)) or "none"
        raise InputError(f"{item.id}: found the assets {found}, wanted {', '.join(missing)} too")
    return [*bands, mask]


def baseline_of(item):
    """Processing baseline of an item, like 5.0. Raises InputError where the item does not tell."""
    told = item.properties
    keys = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
    texts = [told.get(key, "") for key in keys]
    names = [told.get("s2:product_uri", ""), told.get("s2:datatake_id", ""), item.id]
    texts += [re.sub(r".*_N(\d{2})\.?(\d{2}).*", r"\1.\2", str(name)) for name in names]
    for text in texts:
        if re.fullmatch(r"\d{1,2}\.\d{1,2}", str(text)):
            return float(text)
    raise InputError(
        f"{item.id}: found no processing baseline, wanted s2:processing_baseline in the item "
        "(or offset=applied, offset=raw where you know)"
    )


def offset_of(item, setting="auto"):
    """What to subtract from the digital numbers of an item: 0 or 1000.

    Baseline 04.00 and later add 1000; some providers subtract it again and say so in
    `boa_offset_applied`. The date tells nothing: old dates are reprocessed. setting: auto; applied
    or raw, whatever the item says (raw: by baseline alone, or 04.00 where it does not tell).
    Raises InputError where auto finds no baseline.
    """
    told = item.properties
    applied = [told.get(f"{name}:boa_offset_applied") for name in ("earthsearch", "sentinel")]
    if setting == "applied" or (setting == "auto" and True in applied):
        return 0
    try:
        return OFFSET if baseline_of(item) >= OFFSET_BASELINE else 0
    except InputError:
        if setting == "raw":
            return OFFSET
        raise


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
    """What an item tells of its processing, for the record: baseline and whether it is harmonised.

    None for what it does not tell.
    """
    told = item.properties
    try:
        baseline = f"{baseline_of(item):05.2f}"
    except InputError:
        baseline = None
    flags = [told.get(f"{name}:boa_offset_applied") for name in ("earthsearch", "sentinel")]
    applied = next((flag for flag in flags if flag is not None), None)
    return {"baseline": baseline, "provider_applied_offset": applied}
