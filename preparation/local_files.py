"""Sentinel-2 in files of one's own: GeoTIFFs, of all bands of a date or of one, and .SAFE folders.

Each date becomes a pystac item, as those of a catalogue; an asset is a band of a file.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from running.errors import InputError, what_is_there

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from preparation import need, place, sentinel2

FIRST_DAY = datetime(2015, 6, 23, tzinfo=UTC)  # of Sentinel-2: its launch
DAY = re.compile(r"(?<!\d)(\d{4})([-_.]?)(\d{2})\2(\d{2})(?!\d)")  # 2018-04-15, 20180415T105031
DAY_OF_YEAR = re.compile(r"(?<!\d)(\d{4})-?(\d{3})(?!\d)")  # 2018105
BAND = re.compile(  # B04, B4, B8A, SCL; what is called cloud_mask may be 1 where MASK is 0
    r"(?<![a-z0-9])(?:B0?(\d{1,2}|8A)|(SCL|(?<!cloud[-_])MASK))(?![a-z0-9])", re.IGNORECASE
)
COLOURS = {  # red, nir08 ..: names of earth-search
    name: band for band, names in sentinel2.ALIASES.items() for name in names if name.islower()
}
COLOUR = re.compile(rf"(?:^|\d[-_. ])({'|'.join(COLOURS)})$", re.IGNORECASE)  # 2018-04-15_red
SAFE = re.compile(r"S2[A-D]_MSIL2A_(\d{8}T\d{6})_N(\d{2})(\d{2})_R\d{3}_T(\w{5})_.*\.SAFE")
IMAGE = re.compile(r"[^.].*_(B\w\w|SCL)_\d0m\.jp2")  # of a .SAFE folder; hidden ones are no images


def local_items(request):
    """Items of a folder of .SAFE folders or GeoTIFFs.

    GeoTIFFs lie in the folder, or, where it has none, in folders below it. Raises InputError for
    the first that cannot be used (skip_bad_items=true: leaves it out).
    """
    folder = Path(request.local_path)
    if not folder.is_dir():
        wanted = f"wanted one of GeoTIFFs or .SAFE{what_is_there(folder)}"
        raise InputError(f"local_path={folder}: found no folder, {wanted}")
    products = [path for path in _shown(folder) if path.suffix == ".SAFE"]
    products = [folder] if folder.suffix == ".SAFE" else products
    if products:
        return [*_usable(safe_item, products, request)]
    files = _geotiffs(_shown(folder)) or _geotiffs(sorted(folder.rglob("*")))
    if not files:
        raise InputError(f"local_path={folder}: found no .tif and no .SAFE, wanted some")
    return geotiff_items(files, folder, request)


def _shown(folder):
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _geotiffs(paths):
    return [
        path
        for path in paths
        if path.suffix.lower() in (".tif", ".tiff") and not path.name.startswith(".")
    ]


def _usable(work, things, request):
    """What work(thing) returns for each thing; one that cannot be used ends it, or is left out."""
    for thing in things:
        try:
            yield work(thing)
        except InputError as error:
            if not request.skip_bad_items:
                raise
            print(f"left out: {error}")


# ---- GeoTIFFs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raster:
    """A GeoTIFF, and what its name and its tags say.

    bands: {name: number in the file} of those that are named. shape: (rows, columns). offset: to
    subtract, None where its tags declare none.
    """

    path: Path
    moment: datetime
    bands: dict
    shape: tuple
    crs: rasterio.crs.CRS
    transform: rasterio.Affine
    bounds: tuple
    outline: object  # in degrees
    baseline: str | None
    offset: int | None

    @property
    def grid(self):
        return self.shape, self.crs, self.transform

    @property
    def pixel(self):
        return abs(self.transform.a)


def geotiff_items(files, folder, request):
    """Items of GeoTIFFs, one a date: a file of all its bands, or all files of the date together.

    Of a band with several pixel sizes the finest is taken. Several files of all bands of a date are
    several items.
    """
    by_day, grids = defaultdict(list), {}

    def read(path):
        raster = _read_geotiff(path, folder, request)
        for band in raster.bands:
            _check_grid(raster, grids.setdefault((band, raster.pixel), raster))
        return raster

    for raster in _usable(read, files, request):
        by_day[raster.moment.date()].append(raster)
    if not by_day:
        return []
    _drop_nameless(by_day)
    bands = ", ".join(sorted({band for band, _ in grids}))
    print(f"{folder}: {len(files)} files, {min(by_day)} to {max(by_day)}, with {bands}")
    if request.local_mask == "none":
        print(
            "local_mask=none: every pixel with data counts as clear, so clouds, their shadows and "
            "snow are learnt as if they were ground; leave cloudy dates out with skip_items="
        )
    tile = request.mgrs_tile or folder.resolve().name
    scenes = [scene for day in _usable(_scenes_of_day, by_day.values(), request) for scene in day]
    first = _main_raster(scenes[0]) if scenes else None

    def make_item(scene):
        for raster in scene.values():
            _check_extent(raster, first)
        return _scene_item(scene, folder, tile, request.local_scale)

    return [*_usable(make_item, scenes, request)]


def _read_geotiff(path, folder, request):
    """The Raster of a file. Raises InputError for one without a date or a place, or unreadable."""
    parents = path.relative_to(folder).parts[:-1][::-1]
    moment = day_in((path.stem, *parents))
    if moment is None:
        raise InputError(
            f"{path}: found no date of Sentinel-2 (from 20150623 on) in the name, wanted one like "
            "20210605, 2021-06-05 or 2021156, in the name of the file or of its folder"
        )
    try:
        with rasterio.open(path) as source:
            outline = _outline(source)
            bands = _name_bands(source, (path.stem, *parents), request.local_bands)
            return Raster(
                path,
                moment,
                bands,
                shape=source.shape,
                crs=source.crs,
                transform=source.transform,
                bounds=tuple(source.bounds),
                outline=outline,
                baseline=source.tags().get("PROCESSING_BASELINE"),
                offset=_check_numbers(source, bands, request.local_scale),
            )
    except RasterioError as error:
        raise InputError(f"{path}: found no readable GeoTIFF ({error})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def day_in(texts):
    """Noon of the first date in some texts that Sentinel-2 can have seen, or None.

    A day of the year, 2018105, counts where there is no other date and no second one like it.
    """
    found = [year + month + day for text in texts for year, _, month, day in DAY.findall(text)]
    days = [*filter(None, (_parse_day(text, "%Y%m%d") for text in found))]
    if days:
        return days[0]
    found = {year + day for text in texts for year, day in DAY_OF_YEAR.findall(text)}
    days = [*filter(None, (_parse_day(text, "%Y%j") for text in found))]
    return days[0] if len(days) == 1 else None


def _parse_day(text, form):
    try:
        moment = datetime.strptime(text, form).replace(hour=12, tzinfo=UTC)
    except ValueError:  # digits that are no date
        return None
    return moment if FIRST_DAY <= moment <= datetime.now(UTC) + timedelta(1) else None


def band_in(text):
    """The band that a text names, as B04 of b4, T33UUP_B04_10m or red; "" for none or several."""
    found = {(name or f"B{number.zfill(2)}").upper() for number, name in BAND.findall(text)}
    if not found and (word := COLOUR.search(text)):
        found = {COLOURS[word[1].lower()]}
    return found.pop() if len(found) == 1 and found <= {*sentinel2.ALIASES} else ""


def _name_bands(source, places, local_bands):
    """{band: its number} of an open file, by its name and folders (places) if it has one band.

    Else by local_bands, or by its descriptions.
    """
    given = local_bands.split(",") if local_bands else []
    own = next(filter(None, map(band_in, places)), "")
    if source.count == 1 and own:
        return {own: 1}
    if given and source.count > 1 and len(given) != source.count:
        raise InputError(f"found {source.count} bands, wanted {len(given)} as in local_bands")
    texts = given if len(given) == source.count else source.descriptions
    names = [band_in(text or "") for text in texts]
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise InputError(f"found {min(twice)} twice among its bands, wanted it once")
    return {name: number for number, name in enumerate(names, 1) if name}


def _check_numbers(source, bands, scale):
    """The offset that the tags of the bands of reflectance declare, or None.

    scale: as the key local_scale; where it is given, no tag counts. Refuses reflectance of 0 to 1,
    which would become 0, nodata, in whole numbers, and numbers that are too large.
    """
    offsets = set()
    for name, number in bands.items():
        if name in ("SCL", "MASK"):
            continue
        factor, offset = scale, None
        if not scale:
            try:
                tags = source.scales[number - 1], source.offsets[number - 1]
                factor, offset = sentinel2.read_tags(*tags)
            except InputError as error:
                raise InputError(f"{name}: {error}, or local_scale= in their place") from None
        offsets.add(offset)
        if not scale and not np.issubdtype(source.dtypes[number - 1], np.floating):
            continue
        shape = tuple(min(size, 512) for size in source.shape)
        seen = source.read(number, out_shape=shape, masked=True).filled(0) * factor
        seen = seen[np.isfinite(seen) & (seen > 0)]
        made = f" x local_scale={scale:g}" if scale else ""
        if len(seen) and seen.max() < 10:
            hint = "" if scale else " (local_scale=10000 multiplies 0 to 1 into it)"
            raise InputError(
                f"found {name} up to {seen.max():.3g}{made}, wanted reflectance x 10000{hint}"
            )
        if len(seen) and seen.min() > 65535:
            raise InputError(
                f"found {name} from {seen.min():.3g} on{made}, wanted reflectance x 10000"
            )
    if len(offsets) > 1:
        raise InputError("found bands with different offset tags, wanted one offset")
    return offsets.pop() if offsets else None


def _check_grid(raster, first):
    """Raise InputError where a raster has other pixels than the first one of its band."""
    if raster.grid == first.grid:
        return
    found, wanted = (
        f"{rows} x {columns} pixels of {at.a:g} from {at.c:.10g}, {at.f:.10g} in {crs}"
        for (rows, columns), crs, at in (raster.grid, first.grid)
    )
    raise InputError(f"{raster.path}: found {found}, wanted {wanted} as {first.path.name} has")


def _drop_nameless(by_day):
    """Take the files that name no band out of {day: rasters}, where others of the day do."""
    unread = []
    for day, rasters in by_day.items():
        named = [raster for raster in rasters if raster.bands]
        unread += [raster.path for raster in rasters if not raster.bands] if named else []
        by_day[day] = named or rasters
    if unread:
        print(f"not read: {len(unread)} files that name no band, like {unread[0]}")


def _scenes_of_day(rasters):
    """The scenes of a day, {band: Raster} each. Raises InputError for a band that is there twice.

    The finest pixels come first. Only files of all bands may be of several scenes.
    """
    scenes = []
    for raster in sorted(rasters, key=lambda raster: (raster.pixel, raster.path)):
        if not raster.bands:
            raise InputError(
                f"{raster.path}: found no name of a band, wanted one in the file's name "
                "(2018-04-15_B04.tif), in the descriptions of its bands, or local_bands=B02,B03,.."
            )
        for scene in scenes:
            if all(scene[band].pixel < raster.pixel for band in raster.bands if band in scene):
                scene |= {band: raster for band in raster.bands if band not in scene}
                break
        else:
            scenes.append(dict.fromkeys(raster.bands, raster))
    is_whole = [len(scene) > 1 and len(_rasters(scene)) == 1 for scene in scenes]
    if len(scenes) > 1 and not all(is_whole):
        band = next(band for band in scenes[1] if band in scenes[0])
        first, second = (scene[band].path for scene in scenes[:2])
        raise InputError(f"{second}: found {band} of this date in {first} too, wanted it once")
    return scenes


def _rasters(scene):
    return [*{raster.path: raster for raster in scene.values()}.values()]


def _main_raster(scene):
    """The raster that the grid of a tile is taken from, if the scene is its first."""
    return next((scene[b] for b in sentinel2.NATIVE_10M if b in scene), _rasters(scene)[0])


def _scene_item(scene, folder, tile, scale):
    """The item of a scene, {band: Raster}. scale: as the key local_scale."""
    rasters, first = _rasters(scene), _main_raster(scene)
    reflectance = [raster for band, raster in scene.items() if band not in ("SCL", "MASK")]
    baselines = {raster.baseline for raster in rasters} - {None}
    offsets = {raster.offset for raster in reflectance}
    for found, words in ((baselines, "baselines"), (offsets, "offset tags")):
        if len(found) > 1:
            raise InputError(f"{first.path}: found files of other {words} beside it, wanted one")
    name = first.path.relative_to(folder).with_suffix("").as_posix()
    name = name if len(rasters) == 1 else str(first.moment.date())
    item = _new_item(first.path, name, first.moment, first.outline, tile)
    item.properties["title"] = first.path.stem  # which may name a tile and a baseline
    item.datetime += item.datetime.date() - sentinel2.solar_date(item)  # so that it is the day
    stats = [raster.path.stat() for raster in rasters]
    item.properties[sentinel2.FILE_KEY] = [n for s in stats for n in (s.st_size, s.st_mtime_ns)]
    if baselines:
        item.properties["s2:processing_baseline"] = baselines.pop()
    if offsets - {None}:
        item.properties[sentinel2.OFFSET_KEY] = offsets.pop()
    for band, raster in scene.items():
        fields = {sentinel2.BAND_KEY: raster.bands[band]}
        if scale and band not in ("SCL", "MASK"):
            fields[sentinel2.SCALE_KEY] = scale
        _add_asset(item, band, raster.path, fields)
    return item


def _check_extent(raster, first):
    """Raise InputError where a raster does not cover the first one, to a pixel."""
    left, bottom, right, top = raster.bounds
    inner = first.bounds
    gaps = left - inner[0], bottom - inner[1], inner[2] - right, inner[3] - top
    if raster.crs != first.crs or max(gaps) > raster.pixel * 1.001:
        found, wanted = (
            f"{', '.join(f'{number:.10g}' for number in one.bounds)} in {one.crs}"
            for one in (raster, first)
        )
        raise InputError(
            f"{raster.path}: found it at {found}, wanted it to cover {first.path.name} at {wanted}"
        )


# ---- .SAFE folders -------------------------------------------------------------------------------


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
            outline = _outline(source)
    except RasterioError as error:
        raise InputError(f"{images['SCL']}: found no readable image ({error})") from None
    except InputError as error:
        raise InputError(f"{images['SCL']}: {error}") from None
    item = _new_item(product, product.stem, moment, outline, named[4])
    item.properties["s2:processing_baseline"] = f"{named[2]}.{named[3]}"
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


# ---- items ---------------------------------------------------------------------------------------


def _outline(source):
    """The outline of an open raster in degrees. Raises InputError for one without a place."""
    place.check_place(source)
    return place.outline(need("odc.geo.geom").box(*source.bounds, source.crs))


def _new_item(file, name, moment, outline, tile):
    """An item without assets."""
    properties = {"grid:code": f"MGRS-{tile}", sentinel2.LOCAL_KEY: str(file)}
    return need("pystac").Item(name, outline.json, list(outline.boundingbox), moment, properties)


def _add_asset(item, name, file, fields=None):
    asset = need("pystac").Asset(str(file.resolve()), roles=["data"], extra_fields=fields)
    item.add_asset(name, asset)
