"""Where Sentinel-2 comes from: a STAC API, a saved search, GeoTIFFs or .SAFE folders.

All sources become lists of pystac items, one a scene and tile, whose assets rasterio opens; so all
that follows is the same for them. The libraries of requirements-prepare.txt are imported where they
are used, so that this module can be imported without them.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from pathlib import Path

from running.errors import InputError
from running.files import what_is_there

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from preparation import need, place, sentinel2

SECONDS = (30, 60)  # time limits of a search: to connect, and to wait for a part of an answer
FILE_KEY = "local:file"  # of an item's properties: size and time of the last change of its file
BAND_KEY = "local:band"  # of an asset: the number of its band in the file; 1 where it is missing
DAY = re.compile(r"(?<!\d)(\d{4})-?(\d{2})-?(\d{2})(?!\d)")
FIRST_DAY = datetime(2015, 6, 23, tzinfo=UTC)  # of Sentinel-2: its launch
SAFE = re.compile(r"S2[A-D]_MSIL2A_(\d{8}T\d{6})_N(\d{2})(\d{2})_R\d{3}_T(\w{5})_.*\.SAFE")
IMAGE = re.compile(r"[^.].*_(B\w\w|SCL)_\d0m\.jp2")  # of a .SAFE folder; hidden ones are no images


class ItemError(InputError):
    """One item is at fault: it could be left out. item_id names it."""

    def __init__(self, item_id, message):
        super().__init__(f"{item_id}: {message}")
        self.item_id = item_id


def find_items(request):
    """All items of the source that a Request names, unsorted and as they come.

    Raises InputError for a source that cannot be read.
    """
    if request.local_path:
        return local_items(request)
    if request.items_path:
        return saved_items(request.items_path)
    return search_items(request)


# ---- a search ------------------------------------------------------------------------------------


def search_items(request):
    """Items of a STAC API at a place, from a day before the first date to a day after the last."""
    client, pystac = need("pystac_client"), need("pystac")
    first, last = request.first - timedelta(1), request.last + timedelta(1)
    box = request.bbox or place.tile_bounds(request.mgrs_tile)
    items = []
    try:
        catalog = client.Client.open(
            request.stac_url, stac_io=_retrying_reader(request.retries), timeout=SECONDS
        )
        for part in place.split_at_180(box):
            search = catalog.search(
                collections=[request.collection],
                bbox=part,
                datetime=f"{first}T00:00:00Z/{last}T23:59:59Z",
                limit=100,
            )
            items += search.items()
    except (client.exceptions.APIError, pystac.STACError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"stac_url={without_secrets(request.stac_url)}: the search failed "
            f"({without_secrets(reason)}), wanted a STAC API"
        ) from None
    return items


def _retrying_reader(retries):
    """What asks a STAC API, again after errors of the network."""
    retry = need("urllib3").Retry(
        total=retries,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
    )
    return need("pystac_client.stac_api_io").StacApiIO(max_retries=retry)


def without_secrets(text):
    """A text whose addresses have lost their queries, where signatures are, and passwords."""
    text = re.sub(r"//[^/\s@]*@", "//", text)
    return re.sub(r"\?\S*", "", text)


# ---- files ---------------------------------------------------------------------------------------


def saved_items(path):
    """Items of a saved ItemCollection; hrefs that are not absolute start at its folder."""
    pystac, path = need("pystac"), Path(path)
    try:
        items = list(pystac.ItemCollection.from_dict(json.loads(path.read_text())))
    except FileNotFoundError:
        wanted = f"wanted an ItemCollection{what_is_there(path)}"
        raise InputError(f"items_path={path}: found no file, {wanted}") from None
    except Exception as error:  # what is no collection raises many kinds inside pystac
        reason = without_secrets(f"{type(error).__name__} {error}".splitlines()[0])
        raise InputError(
            f"items_path={path}: found no ItemCollection ({reason}), wanted one as JSON"
        ) from None
    for item in items:
        for asset in item.assets.values():
            if "://" not in asset.href and not asset.href.startswith("/"):
                asset.href = str((path.resolve().parent / asset.href).resolve())
    return items


def local_items(request):
    """Items of a folder of .SAFE folders, or of GeoTIFFs, one a date.

    Raises InputError for the first that cannot be used (skip_bad_items=true: leaves it out).
    """
    folder = Path(request.local_path)
    if not folder.is_dir():
        raise InputError(f"local_path={folder}: found no folder, wanted one of GeoTIFFs or .SAFE")
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    products = [path for path in shown if path.suffix == ".SAFE"]
    products = [folder] if folder.suffix == ".SAFE" else products
    files = [path for path in shown if path.suffix.lower() in (".tif", ".tiff")]
    if not products and not files:
        raise InputError(f"local_path={folder}: found no .tif and no .SAFE, wanted one a date")
    tile = request.mgrs_tile or folder.resolve().name
    items, grids = [], {}
    for path in products or files:
        try:
            if products:
                items.append(safe_item(path))
                continue
            item, grid = geotiff_item(path, tile, request.local_bands)
            first = next(iter(grids), grid)
            if grid != first:
                raise InputError(f"{path}: found the grid {grid}, wanted that of {grids[first]}")
        except InputError as error:
            if not request.skip_bad_items:
                raise
            print(f"left out: {error}")
            continue
        items.append(item)
        grids.setdefault(grid, path.name)
    return items


def geotiff_item(file, tile, local_bands):
    """An item of a GeoTIFF, and its grid. Its name holds the date; its bands are named.

    local_bands: names of the bands where the file's descriptions name none, like B02,B03,SCL.
    A tag PROCESSING_BASELINE of the file is passed on.
    """
    moment = _day_of(file)
    try:
        with rasterio.open(file) as source:
            names = local_bands.split(",") if local_bands else source.descriptions
            names = [(name or "").strip() for name in names]
            if len(names) != source.count:
                raise InputError(
                    f"{file}: found {source.count} bands, wanted {len(names)} as in local_bands"
                )
            grid = (str(source.crs), tuple(source.transform)[:6], source.shape)
            offset = _check_numbers(file, source, names)
            item = _new_item(file, moment, source, tile, source.tags().get("PROCESSING_BASELINE"))
    except RasterioError as error:
        raise InputError(f"{file}: found no readable GeoTIFF ({error})") from None
    item.datetime += item.datetime.date() - sentinel2.solar_date(item)  # so that it is the day
    stat = file.stat()
    item.properties[FILE_KEY] = [stat.st_size, stat.st_mtime_ns]
    if offset is not None:
        item.properties[sentinel2.OFFSET_KEY] = offset
    for number, name in enumerate(names, 1):
        if name:
            _add_asset(item, name, file, {BAND_KEY: number})
    return item, grid


def _day_of(file):
    """Noon of the first date in a file's name that Sentinel-2 can have seen."""
    for parts in DAY.findall(file.stem):
        try:
            moment = datetime(*(int(part) for part in parts), 12, tzinfo=UTC)
        except ValueError:  # eight digits that are no date
            continue
        if FIRST_DAY <= moment <= datetime.now(UTC) + timedelta(1):
            return moment
    raise InputError(
        f"{file}: found no date of Sentinel-2 (from 20150623 on) in the name, wanted one like "
        "20210605"
    )


def _check_numbers(file, source, names):
    """The offset that the tags of the bands of reflectance declare, or None.

    Refuses reflectance of 0 to 1, which would become 0, nodata, in whole numbers.
    """
    offsets = set()
    for number, name in enumerate(names, 1):
        if name in ("", "SCL", "MASK"):
            continue
        try:
            tags = source.scales[number - 1], source.offsets[number - 1]
            factor, offset = sentinel2.read_tags(*tags)
        except InputError as error:
            raise InputError(f"{file}: {name}: {error}") from None
        offsets.add(offset)
        if not np.issubdtype(source.dtypes[number - 1], np.floating):
            continue
        shape = tuple(min(size, 512) for size in source.shape)
        seen = source.read(number, out_shape=shape, masked=True).filled(0) * factor
        highest = np.max(seen, initial=0, where=np.isfinite(seen))
        if 0 < highest < 10:
            raise InputError(f"{file}: found {name} up to {highest:.3g}, wanted values x 10000")
    if len(offsets) > 1:
        raise InputError(f"{file}: found bands with different offset tags, wanted one offset")
    return offsets.pop() if offsets else None


def safe_item(product):
    """An item of a .SAFE folder of level 2A: the finest image of each band."""
    named = SAFE.fullmatch(product.resolve().name)
    if not named:
        raise InputError(f"{product}: found another name than S2?_MSIL2A_*.SAFE, wanted level 2A")
    images = {}
    for file in sorted(product.glob("GRANULE/*/IMG_DATA/R*m/*.jp2")):  # R10m, R20m, R60m
        if found := IMAGE.fullmatch(file.name):
            images.setdefault(found[1], file)
    if "SCL" not in images:
        raise InputError(f"{product}: found no SCL among its images, wanted a whole product")
    moment = datetime.strptime(named[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    try:
        with rasterio.open(images["SCL"]) as source:
            item = _new_item(product, moment, source, named[4], f"{named[2]}.{named[3]}")
    except RasterioError as error:
        raise InputError(f"{images['SCL']}: found no readable image ({error})") from None
    offset = _safe_offset(product / "MTD_MSIL2A.xml")
    if offset is not None:
        item.properties[sentinel2.OFFSET_KEY] = offset
    for name, file in images.items():
        _add_asset(item, name, file)
    return item


def _safe_offset(file):
    """What to subtract from a product's numbers, as its metadata says; None where it is missing.

    Products of before baseline 04.00, and of older sen2cor toolboxes, declare no offset: 0.
    """
    if not file.exists():
        return None
    try:
        numbers = {"BOA_ADD_OFFSET": set(), "BOA_QUANTIFICATION_VALUE": set()}
        for element in ElementTree.parse(file).iter():
            numbers.get(element.tag.split("}")[-1], set()).add(element.text)
        offsets = {-int(text) for text in numbers["BOA_ADD_OFFSET"]} or {0}
        scales = {float(text) for text in numbers["BOA_QUANTIFICATION_VALUE"]} or {10_000}
    except (ElementTree.ParseError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{file}: found no readable metadata ({error}), wanted it whole") from None
    if len(offsets) > 1 or min(offsets) < 0 or scales != {10_000}:
        raise InputError(
            f"{file}: found the offsets {sorted(offsets)} and values x {sorted(scales)}, wanted "
            "one offset of all bands and values x 10000"
        )
    return offsets.pop()


def _new_item(file, moment, source, tile, baseline):
    try:
        place.check_place(source)
        bounds = need("odc.geo.geom").box(*source.bounds, source.crs)
        outline = place.outline(bounds)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    properties = {"grid:code": f"MGRS-{tile}"}
    properties |= {"s2:processing_baseline": baseline} if baseline else {}
    box = list(outline.boundingbox)
    return need("pystac").Item(file.stem, outline.json, box, moment, properties)


def _add_asset(item, name, file, fields=None):
    asset = need("pystac").Asset(str(file.resolve()), roles=["data"], extra_fields=fields)
    item.add_asset(name, asset)
