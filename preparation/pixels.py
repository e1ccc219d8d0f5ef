"""Pixels of an item's assets, read again after an error of the network.

What a file declares of its numbers (nodata, a mask, a scale) is applied here: the rest of the
program sees whole numbers, reflectance x 10000 or classes, of which 0 is nodata.
"""

import contextlib
import logging
import re
import threading
import time
import warnings

from running.errors import InputError

import numpy as np
import rasterio
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window

from preparation import need, sentinel2
from preparation.items import ItemError, without_secrets
from preparation.place import check_place, outline

NETWORK = {  # settings of GDAL: no listing of folders, time limits, and a bounded cache
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_MULTIRANGE": "YES",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "CPL_VSIL_CURL_CACHE_SIZE": str(128 << 20),  # bytes
    "GDAL_CACHEMAX": 256 << 20,  # bytes of decoded pixels
}
DISK = NETWORK | {"GDAL_DISABLE_READDIR_ON_OPEN": "FALSE"}  # masks may lie in a file beside
SIGN_SECONDS = 120  # to wait for a signature
PAUSE = 1.0  # seconds before the second attempt
REASONS = {  # what a failed read says, by what is at fault; None of them: perhaps the image
    "network": r"curl error|response code: (5\d\d|408|429)|timed? ?out|resolve host"
    r"|signing service",
    "item": r"response code: (404|410)\b",
    "access": r"response code: 4\d\d\b|AWS_|access ?denied|credential|expired|signature"
    r"|InvalidAccessKey|permission denied",
}


def set_up_reading():
    """Leave it to us to report errors; once, before any read."""
    # of rasters without a place, which we refuse; and spurious ones, see
    # https://github.com/opendatacube/odc-geo/issues/131
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    logging.getLogger("odc.loader").setLevel(logging.CRITICAL)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)


def sign(href):
    """An href that may be read now: Planetary Computer's need a signature, which expires.

    Raises OSError where none comes within SIGN_SECONDS: the library that asks has no time limit.
    """
    if ".blob.core.windows.net/" not in href:
        return href
    sign_url, answers = need("planetary_computer").sign_url, []

    def ask():
        try:
            answers.append(sign_url(href))
        except Exception as error:  # whatever the library raises
            answers.append(OSError(f"the signing service failed: {error}"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SIGN_SECONDS)
    answer = answers[0] if answers else OSError("the signing service timed out")
    if isinstance(answer, OSError):
        raise answer
    return answer


def with_retries(read, item, name, retries, stop=None):
    """The answer of read(href) for an item's asset, tried again on errors of the network.

    retries: attempts after the first, 1, 2, 4 .. seconds apart. stop: a threading.Event that ends
    the waiting. Raises InputError that names item, asset and reason; where the item is at fault,
    and neither the network nor the access to it, an ItemError.
    """
    href = sentinel2.find_asset(item, name).href
    attempts = retries + 1 if _is_remote(href) else 1
    for attempt in range(attempts):
        try:
            with rasterio.Env(**(NETWORK if _is_remote(href) else DISK), **_fresh(href, attempt)):
                return read(sign(href))
        except (RasterioError, OSError) as error:  # OSError: of a signature
            reason = _reason(error, href)
            if attempt == attempts - 1 or _blame(reason) in ("item", "access"):
                raise _read_error(item, name, href, reason, attempt + 1) from None
        if stop is None:
            time.sleep(PAUSE * 2**attempt)
        elif stop.wait(PAUSE * 2**attempt):
            raise InputError(f"{item.id}: stopped while waiting for {name}")


def _is_remote(href):
    return not href.startswith("vrt://") and ("://" in href or href.startswith("/vsi"))


def _fresh(href, attempt):
    """What makes GDAL ask the server again after a failure, whose answer it has kept."""
    if not attempt or not _is_remote(href):
        return {}
    kept = f"/vsicurl/{href}" if href.startswith("http") else href.replace("s3:/", "/vsis3")
    return {"CPL_VSIL_CURL_NON_CACHED": kept}


def _reason(error, href):
    """The line of an error of rasterio, without the address and what is secret in it."""
    line = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
    line = without_secrets(line) if _is_remote(href) else line
    return line.replace(_shown(href), "it")


def _shown(href):
    """An address as messages may show it."""
    return without_secrets(href) if _is_remote(href) else href


def _blame(reason):
    """What is at fault by the reason of an error: network, item, access, or None: it is unknown."""
    kinds = (kind for kind, words in REASONS.items() if re.search(f"(?i){words}", reason))
    return next(kinds, None)


def _read_error(item, name, href, reason, attempts):
    """An ItemError where an asset itself is at fault; else an InputError, that no item is left out.

    A read that fails in the middle of a file does not say why, so the file is opened once more.
    """
    if _is_remote(href) and not _blame(reason):
        try:
            with rasterio.Env(**NETWORK, **_fresh(href, 1)), rasterio.open(sign(href)):
                pass
        except (RasterioError, OSError) as error:
            reason = _reason(error, href)
    tried = f"; {attempts} attempts" if _is_remote(href) else ""
    line = f"{sentinel2.asset_words(item, name)} cannot be read ({reason}{tried}), wanted "
    if _blame(reason) == "network":
        return InputError(f"{item.id}: {line}a network that works")
    if _blame(reason) == "access":
        return InputError(
            f"{item.id}: {line}access to {_shown(href)} (keys, or a new search where signatures "
            "have expired; skip_items= leaves the item out)"
        )
    return ItemError(item.id, f"{line}a whole image at {_shown(href)}")


@contextlib.contextmanager
def _open_asset(item, name, href):
    """(open raster, number of its band, factor of its numbers, offset that it declares or None).

    Raises ItemError for a raster that lies nowhere, or whose numbers are not those of reflectance.
    """
    fields = sentinel2.find_asset(item, name).extra_fields
    number = fields.get(sentinel2.BAND_KEY, 1)
    with rasterio.open(href) as source:
        try:
            check_place(source)
            factor, offset = fields.get(sentinel2.SCALE_KEY, 1.0), None
            if name not in ("SCL", "MASK") and sentinel2.SCALE_KEY not in fields:
                tags = source.scales[number - 1], source.offsets[number - 1]
                factor, offset = sentinel2.read_tags(*tags)
            yield source, number, factor, offset
        except InputError as error:
            words = sentinel2.asset_words(item, name)
            raise ItemError(item.id, f"{words}: {error}") from None


def source_grid(item, name, retries):
    """The pixel grid of an item's asset, an odc.geo GeoBox: the truth is in the file."""
    geobox = need("odc.geo.geobox")

    def read(href):
        with _open_asset(item, name, href) as (source, *_):
            grid = geobox.GeoBox.from_rio(source)
            outline(grid.extent)  # which is on Earth
            return grid

    return with_retries(read, item, name, retries)


def read_band(item, name, geobox, resampling, retries, stop=None):
    """Pixels of one asset of an item on a grid: ((H, W) uint16, offset that its tags declare).

    0 where it has none. A scale tag has been applied, the offset has not; None where there is none.
    Where the grid is the asset's own, pixels are copied. Overviews are never read: nobody knows how
    they were made. Raises ItemError as `with_retries`.
    """
    loader = need("odc.loader")  # the reader inside odc.stac.load, which would also choose items
    how = loader.RasterLoadParams(
        dtype="uint16",
        fill_value=0,
        src_nodata_override=0,
        use_overviews=False,
        resampling=resampling,
    )

    def read(href):
        with _open_asset(item, name, href) as (source, number, factor, offset):
            if not _is_plain(source, number, factor):
                return _read_declared(source, number, factor, geobox, resampling), offset
            if resampling == "nearest":
                found = _read_larger(source, number, geobox)
                if found is not None:
                    return found, offset
        found = np.zeros(geobox.shape, np.uint16)
        source = loader.RasterSource(href, band=number)
        loader.RioReader(source, None).read(how, geobox, dst=found)
        return found, offset

    return with_retries(read, item, name, retries, stop)


def _is_plain(source, number, factor):
    """Whether a band is of whole numbers of which 0, and nothing else, is nodata."""
    flags = set(source.mask_flag_enums[number - 1])
    return (
        source.dtypes[number - 1] in ("uint8", "uint16")
        and source.nodatavals[number - 1] in (None, 0)
        and flags <= {MaskFlags.all_valid, MaskFlags.nodata}
        and factor == 1
    )


def _read_declared(source, number, factor, geobox, resampling):
    """Pixels of a band that is not plain on a grid, (H, W) uint16; numbers below 0.5 are nodata.

    So is what the file declares: a value, a mask, NaN. None of these is mixed into its neighbours.
    Raises InputError for reflectance of 0 to 1.
    """
    overlap, grids = need("odc.geo.overlap"), need("odc.geo.geobox")
    own = grids.GeoBox.from_rio(source)
    info = overlap.compute_reproject_roi(own, geobox)
    margin = 4 * max(1, round(info.scale))  # pixels that the widest resampling looks at
    info = overlap.compute_reproject_roi(own, geobox, padding=margin)
    if 0 in own[info.roi_src].shape:
        return np.zeros(geobox.shape, np.uint16)
    window = Window.from_slices(*info.roi_src)
    values = source.read(number, window=window, masked=True).astype(np.float32).filled(np.nan)
    values = values * np.float32(factor)
    positive = values[(values > 0) & np.isfinite(values)]
    if len(positive) and positive.min() < 0.5 and positive.max() < 2:
        raise InputError(f"found values up to {positive.max():.3g}, wanted values x 10000")
    values[~((values >= 0.5) & np.isfinite(values))] = np.nan
    found = np.full(geobox.shape, np.nan, np.float32)
    reproject(
        values,
        found,
        src_transform=source.window_transform(window),
        src_crs=source.crs,
        src_nodata=np.nan,
        dst_transform=geobox.transform,
        dst_crs=str(geobox.crs),
        dst_nodata=np.nan,
        resampling=Resampling[resampling],
    )
    return np.nan_to_num(np.rint(found).clip(1, 65535), nan=0).astype(np.uint16)


def _read_larger(source, number, geobox):
    """Pixels of a plain band, each repeated over the smaller pixels of the grid that it holds.

    What resampling by nearest pixel gives, several times as fast. None where the grid's pixels do
    not divide those of the raster, or where the grid reaches over the raster's edge.
    """
    if geobox.crs != source.crs:
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
    found = source.read(number, window=Window.from_slices(*outer)).astype(np.uint16, copy=False)
    found = found.repeat(factor, 1).repeat(factor, 0) if factor > 1 else found
    skipped = [start % factor for start in first]
    return found[skipped[0] :, skipped[1] :][: geobox.shape[0], : geobox.shape[1]]
