"""Where on Earth: boxes in degrees, outlines of rasters, MGRS tiles; also across 180 degrees.

A box is (west, south, east, north) in degrees, -180 <= west < 180 and west < east: one across 180
degrees, from 179 to -179, is 179 .. 181, so that it stays in one piece.
"""

import functools
import math
import re

from running.errors import InputError

from preparation import need

TILE_SIZE, MARGIN = 109_800, 100  # metres: a tile, and how far its corner may lie off the square
DEGREES = "EPSG:4326"
TILE = r"(\d{1,2})([C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])"  # zone, latitude band and square: 33UUP


def parse_tile(text):
    """An MGRS tile like 09VWK of text like T09VWK, 9vwk or MGRS-09VWK; other text in capitals."""
    text = text.strip().upper().removeprefix("MGRS-")
    found = re.fullmatch(f"T?{TILE}", text)
    return found[1].zfill(2) + found[2] if found else text


def parse_bbox(text):
    """The box of text like 12.3,48.6,12.5,48.7, or None for an empty one.

    West may be larger than east, as in GeoJSON: the box then lies across 180 degrees.
    """
    if not text:
        return None
    try:
        west, south, east, north = (float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"bbox={text}: wanted west,south,east,north in degrees") from None
    if -180 <= east < west <= 180 and east + 360 - west < 180:  # else west and east are swapped
        east += 360
    if not (-180 <= west < east <= west + 360 <= 540 and -90 <= south < north <= 90):
        raise InputError(
            f"bbox={text}: wanted west < east (or a box across 180 degrees) and south < north, "
            "in degrees"
        )
    return west, south, east, north


def tile_bounds(mgrs_tile):
    """The box that holds a whole MGRS tile."""
    mgrs = need("mgrs")
    geometry = need("odc.geo.geom")
    try:
        zone, hemisphere, east, north = mgrs.MGRS().MGRSToUTM(mgrs_tile)  # of the square's middle
    except mgrs.core.MGRSError:
        raise InputError(f"mgrs_tile={mgrs_tile}: wanted a tile like 33UUP") from None
    left, top = east - 50_000 - MARGIN, north + 50_000 + MARGIN
    size = TILE_SIZE + 2 * MARGIN
    crs = f"EPSG:{326 if hemisphere == 'N' else 327}{zone:02d}"
    return tuple(outline(geometry.box(left, top - size, left + size, top, crs)).boundingbox)


def split_at_180(box):
    """A box as those of -180 to 180 degrees that a catalogue takes: one, or two across 180."""
    west, south, east, north = box
    turns = 360 * math.floor((west + 180) / 360)
    west, east = west - turns, east - turns
    if east <= 180:
        return [(west, south, east, north)]
    return [(west, south, 180.0, north), (-180.0, south, east - 360, north)]


def outline(polygon, middle=None):
    """A polygon (odc.geo Geometry) of any coordinate system in degrees, in one piece.

    middle: the longitude near which it should lie, whole turns away from where it comes out.
    Raises InputError where it has no place in degrees.
    """
    points = polygon.to_crs(DEGREES).exterior.points
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        raise InputError(f"found corners that have no place on Earth in {polygon.crs}, wanted some")
    start = points[0][0]
    if not polygon.crs.geographic:  # whose longitudes do not jump at 180
        jumps = [round((x - start) / 360) for x, _ in points]
        points = [(x - 360 * jump, y) for (x, y), jump in zip(points, jumps, strict=True)]
    if middle is not None:
        turns = 360 * round((middle - start) / 360)
        points = [(x + turns, y) for x, y in points]
    return need("odc.geo.geom").polygon(points, DEGREES)


def box_near(box, place):
    """A box as a polygon in degrees, whole turns moved so that it lies near another polygon."""
    west, south, east, north = box
    left, _, right, _ = place.boundingbox
    turns = 360 * round((left + right - west - east) / 720)
    return need("odc.geo.geom").box(west + turns, south, east + turns, north, DEGREES)


def check_place(source):
    """Raise InputError where an open raster does not say where on Earth it lies."""
    wanted = "wanted a coordinate system of the Earth, like EPSG:32633"
    if source.crs is None:
        raise InputError(f"found no coordinate system, {wanted}")
    if not _is_of_the_earth(source.crs.to_wkt()):
        name = (re.findall(r'"([^"]*)"', source.crs.to_wkt()) or ["without a name"])[0]
        raise InputError(f"found the coordinate system {name}, {wanted}")
    if source.transform.is_identity:
        raise InputError("found no position of its pixels (no geotransform), wanted one")


@functools.lru_cache(maxsize=256)
def _is_of_the_earth(wkt):
    """Whether a coordinate system can be transformed to degrees: those of an engineer cannot."""
    pyproj = need("pyproj")
    try:
        pyproj.Transformer.from_crs(wkt, DEGREES)
    except pyproj.exceptions.ProjError:
        return False
    return True
