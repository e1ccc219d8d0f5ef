"""Pixels of an item's assets, read again after an error of the network."""

import logging
import re
import time
import warnings

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from preparation import sentinel2
from preparation.items import ItemError, need
from running.errors import InputError

NETWORK = {  # settings of GDAL: no listing of folders, patience, and a bounded cache
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_MULTIRANGE": "YES",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "CPL_VSIL_CURL_CACHE_SIZE": str(128 << 20),  # bytes
    "GDAL_CACHEMAX": 256 << 20,  # bytes of decoded pixels
}
PAUSE = 1.0  # seconds before the second attempt
PERMANENT = re.compile(r"response code: 40[134]\b")  # answers that no second attempt changes
OUTAGE = re.compile(r"(?i)curl error|response code: (5\d\d|429)|timed? ?out|resolve host")


def set_up_reading():
    """Leave the telling of errors to us; once, before any read."""
    # spurious: https://github.com/opendatacube/odc-geo/issues/131
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.warp")
    logging.getLogger("odc.loader").setLevel(logging.CRITICAL)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)


def sign(href):
    """An href that may be read now: Planetary Computer's need a signature, which runs out."""
    if ".blob.core.windows.net/" in href:
        return need("planetary_computer").sign_url(href)
    return href


def with_retries(read, item, name, retries, stop=None):
    """The answer of read(href) for an item's asset, tried again on errors of the network.

    retries: attempts after the first, 1, 2, 4 .. seconds apart. stop: a threading.Event that ends
    the waiting. Raises InputError that names item, asset and reason; where the item is at fault,
    and not the network, an ItemError.
    """
    href = sentinel2.find_asset(item, name).href
    attempts = retries + 1 if "://" in href and not href.startswith("vrt://") else 1
    for attempt in range(attempts):
        try:
            with rasterio.Env(**NETWORK, **_fresh(href, attempt)):
                return read(sign(href))
        except (RasterioError, OSError) as error:  # OSError: of a signature
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            reason = re.sub(r"\?\S*", "", reason)  # without the signature
            if attempt == attempts - 1 or PERMANENT.search(reason):
                line = f"asset {name} cannot be read ({reason}; {attempt + 1} attempts), wanted "
                if OUTAGE.search(reason) or not isinstance(error, RasterioError):
                    # no fault of the item, which must not be left out for it
                    raise InputError(f"{item.id}: {line}a network that works") from None
                raise ItemError(item.id, f"{line}a whole image at {href}") from None
        if stop is None:
            time.sleep(PAUSE * 2**attempt)
        elif stop.wait(PAUSE * 2**attempt):
            raise InputError(f"{item.id}: stopped while waiting for asset {name}")


def _fresh(href, attempt):
    """What makes GDAL ask the server again after a failure, whose answer it has kept."""
    return {"CPL_VSIL_CURL_NON_CACHED": f"/vsicurl/{href}"} if attempt else {}


def source_grid(item, name, retries):
    """The pixel grid of an item's asset, an odc.geo GeoBox: the truth is in the file."""
    geobox = need("odc.geo.geobox")

    def read(href):
        with rasterio.open(href) as source:
            return geobox.GeoBox.from_rio(source)

    return with_retries(read, item, name, retries)


def read_band(item, name, geobox, resampling, retries, stop=None):
    """Pixels of one asset of an item on a grid, (H, W) uint16; 0 where it has none.

    Where the grid is the asset's own, pixels are copied. Overviews are never read: nobody knows how
    they were made. This is the reader inside odc.stac.load, which would also choose among items.
    Raises ItemError as `with_retries`.
    """
    loader = need("odc.loader")
    how = loader.RasterLoadParams(
        dtype="uint16",
        fill_value=0,
        src_nodata_override=0,
        use_overviews=False,
        resampling=resampling,
    )

    def read(href):
        if resampling == "nearest":
            with rasterio.open(href) as source:
                if (found := _read_larger(source, geobox)) is not None:
                    return found
        found = np.zeros(geobox.shape, np.uint16)
        loader.RioReader(loader.RasterSource(href), None).read(how, geobox, dst=found)
        return found

    return with_retries(read, item, name, retries, stop)


def _read_larger(source, geobox):
    """Pixels of an open raster, each repeated over the smaller pixels of the grid that it holds.

    What resampling by nearest pixel gives, several times as fast. None where the grid's pixels do
    not fit into the raster's so, or where it reaches over its edge.
    """
    if geobox.crs != source.crs or source.dtypes[0] not in ("uint8", "uint16"):
        return None
    a, b, column, d, e, row = tuple(~source.transform * geobox.transform)[:6]
    factor = round(1 / a) if 0 < a <= 1 else 0
    first = round(row * factor), round(column * factor)  # in the grid's pixels
    exact = np.allclose((a * factor, b, d, e * factor), (1, 0, 0, 1), atol=1e-6)
    if not (factor and exact and np.allclose((row * factor, column * factor), first, atol=1e-3)):
        return None
    last = [start + size for start, size in zip(first, geobox.shape, strict=True)]
    outer = [(start // factor, -(-stop // factor)) for start, stop in zip(first, last, strict=True)]
    if min(first) < 0 or outer[0][1] > source.height or outer[1][1] > source.width:
        return None
    found = source.read(1, window=Window.from_slices(*outer)).astype(np.uint16, copy=False)
    found = found.repeat(factor, 1).repeat(factor, 0) if factor > 1 else found
    skipped = [start % factor for start in first]
    return found[skipped[0] :, skipped[1] :][: geobox.shape[0], : geobox.shape[1]]
