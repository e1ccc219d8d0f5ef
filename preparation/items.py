"""Where Sentinel-2 comes from: a STAC API, a saved search, GeoTIFFs or .SAFE folders.

All sources become lists of pystac items, one a scene and tile, whose assets rasterio opens; so the
rest of the way is the same for all of them. The libraries of requirements-prepare.txt are imported
where they are used, so that this module can be imported without them.
"""

import importlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from preparation import sentinel2
from running.errors import InputError

TILE_SIZE, MARGIN = 109_800, 100  # metres: a tile, and how far its corner may lie off the square
FILE_KEY = "local:file"  # of an item's properties: size and time of the last change of its file
DAY = re.compile(r"(?<!\d)(\d{4})-?(\d{2})-?(\d{2})(?!\d)")
SAFE = re.compile(r"S2[A-D]_MSIL2A_(\d{8}T\d{6})_N(\d{2})(\d{2})_R\d{3}_T(\w{5})_.*\.SAFE")


class ItemError(InputError):
    """One item is at fault: it could be left out. item_id names it."""

    def __init__(self, item_id, message):
        super().__init__(f"{item_id}: {message}")
        self.item_id = item_id


def need(module):
    """Import a module of requirements-prepare.txt; InputError that names the file without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{module}: not installed, wanted pip install -r requirements-prepare.txt"
        ) from None


# ---- a search ------------------------------------------------------------------------------------


def parse_bbox(text):
    """(west, south, east, north) in degrees of text, or None for an empty one."""
    if not text:
        return None
    try:
        west, south, east, north = (float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"bbox={text}: wanted west,south,east,north in degrees") from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise InputError(f"bbox={text}: wanted west < east and south < north, in degrees")
    return west, south, east, north


def tile_bounds(mgrs_tile):
    """(west, south, east, north) in degrees that hold a whole MGRS tile."""
    mgrs = need("mgrs")
    geometry = need("odc.geo.geom")
    try:
        zone, hemisphere, east, north = mgrs.MGRS().MGRSToUTM(mgrs_tile)  # of the square's middle
    except mgrs.core.MGRSError:
        raise InputError(f"mgrs_tile={mgrs_tile}: wanted a tile like 33UUP") from None
    left, top = east - 50_000 - MARGIN, north + 50_000 + MARGIN
    size = TILE_SIZE + 2 * MARGIN
    crs = f"EPSG:{326 if hemisphere == 'N' else 327}{zone:02d}"
    box = geometry.box(left, top - size, left + size, top, crs)
    return tuple(box.to_crs("EPSG:4326").boundingbox)


def find_items(config, window):
    """All items of the source that the config names, unsorted and as they come.

    window: first and last date. Raises InputError for a source that cannot be read.
    """
    if config["local_path"]:
        return local_items(config)
    if config["items_path"]:
        return saved_items(config["items_path"])
    return search_items(config, window)


def search_items(config, window):
    """Items of a STAC API at a place, from a day before the window to a day after it."""
    client, api_io = need("pystac_client"), need("pystac_client.stac_api_io")
    pystac, urllib3 = need("pystac"), need("urllib3")
    bounds = parse_bbox(config["bbox"]) or tile_bounds(config["mgrs_tile"])
    first, last = window[0] - timedelta(1), window[1] + timedelta(1)
    retry = urllib3.Retry(
        total=config["retries"],
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
    )
    try:
        catalog = client.Client.open(
            config["stac_url"], stac_io=api_io.StacApiIO(max_retries=retry)
        )
        search = catalog.search(
            collections=[config["collection"]],
            bbox=bounds,
            datetime=f"{first}T00:00:00Z/{last}T23:59:59Z",
            limit=100,
        )
        return list(search.items())
    except (client.exceptions.APIError, pystac.STACError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"stac_url={config['stac_url']}: the search failed ({reason}), wanted a STAC API"
        ) from None


# ---- files ---------------------------------------------------------------------------------------


def saved_items(path):
    """Items of a saved ItemCollection; hrefs that are not absolute start at its folder."""
    pystac = need("pystac")
    try:
        items = list(pystac.ItemCollection.from_file(str(path)))
    except FileNotFoundError:
        raise InputError(f"items_path={path}: found no file, wanted an ItemCollection") from None
    except Exception as error:  # what is no collection raises many kinds inside pystac
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(
            f"items_path={path}: found no ItemCollection ({reason}), wanted one as JSON"
        ) from None
    for item in items:
        for asset in item.assets.values():
            if "://" not in asset.href and not asset.href.startswith("/"):
                asset.href = str((Path(path).resolve().parent / asset.href).resolve())
    return items


def local_items(config):
    """Items of a folder of .SAFE folders, or of GeoTIFFs, one a date."""
    folder = Path(config["local_path"])
    if not folder.is_dir():
        raise InputError(f"local_path={folder}: found no folder, wanted one of GeoTIFFs or .SAFE")
    products = [folder] if folder.suffix == ".SAFE" else sorted(folder.glob("*.SAFE"))
    if products:
        return [safe_item(product) for product in products]
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".tif", ".tiff"))
    if not files:
        raise InputError(f"local_path={folder}: found no .tif and no .SAFE, wanted one a date")
    tile = config["mgrs_tile"] or folder.resolve().name
    items, grids = [], {}
    for file in files:
        try:
            item, grid = geotiff_item(file, tile, config["local_bands"])
            first = next(iter(grids), grid)
            if grid != first:
                raise InputError(f"{file}: found the grid {grid}, wanted that of {grids[first]}")
        except InputError as error:
            if not config["skip_bad_items"]:
                raise
            print(f"left out: {error}")
            continue
        items.append(item)
        grids.setdefault(grid, file.name)
    return items


def geotiff_item(file, tile, local_bands):
    """An item of a GeoTIFF, and its grid. Its name holds the date; its bands are named.

    local_bands: names of the bands where the file's descriptions do not tell, like B02,B03,SCL.
    A tag PROCESSING_BASELINE of the file is passed on.
    """
    found = DAY.search(file.stem)
    try:
        moment = datetime(*(int(part) for part in found.groups()), 12, tzinfo=UTC)
    except (AttributeError, ValueError):
        raise InputError(f"{file}: found no date in the name, wanted one like 20210605") from None
    try:
        with rasterio.open(file) as source:
            names = local_bands.split(",") if local_bands else source.descriptions
            names = [(name or "").strip() for name in names]
            if len(names) != source.count:
                raise InputError(
                    f"{file}: found {source.count} bands, wanted {len(names)} as in local_bands"
                )
            grid = (str(source.crs), tuple(source.transform)[:6], source.shape)
            _check_scale(file, source, names)
            baseline = source.tags().get("PROCESSING_BASELINE")
            item = _new_item(file.stem, moment, source.crs, source.bounds, tile, baseline)
    except RasterioError as error:
        raise InputError(f"{file}: found no readable GeoTIFF ({error})") from None
    item.datetime += item.datetime.date() - sentinel2.solar_date(item)  # so that it is the day
    stat = file.stat()
    item.properties[FILE_KEY] = [stat.st_size, stat.st_mtime_ns]
    for number, name in enumerate(names, 1):
        if name:
            _add_asset(item, name, f"vrt://{file.resolve()}?bands={number}")
    return item, grid


def _check_scale(file, source, names):
    """Refuse reflectance of 0 to 1, which would become 0, nodata, in whole numbers."""
    for number, (name, kind) in enumerate(zip(names, source.dtypes, strict=True), 1):
        if name in ("", "SCL", "MASK") or not np.issubdtype(kind, np.floating):
            continue
        seen = source.read(number, out_shape=tuple(min(size, 512) for size in source.shape))
        highest = np.max(seen, initial=0, where=np.isfinite(seen))
        if 0 < highest < 10:
            raise InputError(f"{file}: found {name} up to {highest:.3g}, wanted values x 10000")


def safe_item(product):
    """An item of a .SAFE folder of level 2A: the finest image of each band."""
    told = SAFE.fullmatch(product.resolve().name)
    if not told:
        raise InputError(f"{product}: found another name than S2?_MSIL2A_*.SAFE, wanted level 2A")
    images = {}
    for file in sorted(product.glob("GRANULE/*/IMG_DATA/R*m/*.jp2")):  # R10m, R20m, R60m
        images.setdefault(file.stem.split("_")[-2], file)
    if "SCL" not in images:
        raise InputError(f"{product}: found no SCL among its images, wanted a whole product")
    try:
        with rasterio.open(images["SCL"]) as source:
            crs, bounds = source.crs, source.bounds
    except RasterioError as error:
        raise InputError(f"{images['SCL']}: found no readable image ({error})") from None
    moment = datetime.strptime(told[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    item = _new_item(product.stem, moment, crs, bounds, told[4], f"{told[2]}.{told[3]}")
    for name, file in images.items():
        _add_asset(item, name, str(file.resolve()))
    return item


def _new_item(name, moment, crs, bounds, tile, baseline):
    if crs is None:
        raise InputError(f"{name}: found no coordinate system in the file, wanted one")
    box = need("odc.geo.geom").box(*bounds, crs).to_crs("EPSG:4326")
    told = {"grid:code": f"MGRS-{tile}"}
    told |= {"s2:processing_baseline": baseline} if baseline else {}
    return need("pystac").Item(name, box.json, list(box.boundingbox), moment, told)


def _add_asset(item, name, href):
    item.add_asset(name, need("pystac").Asset(href, roles=["data"]))
