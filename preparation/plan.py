"""What is asked for, and which items make which tile: chosen, put in order, on a grid of pixels."""

import datetime
from dataclasses import dataclass, fields

from running.config import ALL_YEAR, find_season, in_season, name_season
from running.errors import InputError

from preparation import pixels, place, sentinel2
from preparation.items import ItemError

BLOCK = 2048  # pixels along an edge of a block: two internal blocks of the usual files
# settings that change what is in a tile, in the order of run_config
RESULT_KEYS = (
    "stac_url",
    "collection",
    "items_path",
    "local_path",
    "local_bands",
    "local_scale",
    "local_mask",
    "mgrs_tile",
    "bbox",
    "year",
    "start",
    "end",
    "max_cloud_cover",
    "skip_items",
    "bands",
    "resolution",
    "stride",
    "resampling",
    "clear_scl",
    "offset",
)
# keys that older tiles lack, with what those were made with
LATER_KEYS = {"local_scale": 0.0, "local_mask": "auto", "start": "", "end": ""}
REASONS = ("skip_items", "of another tile", "of other dates", "too cloudy", "bad")  # to leave out


@dataclass(frozen=True)
class Request:
    """What prepare_tiles.py is asked for: its config, parsed and checked once.

    Fields have the names of the config's keys, where run_config explains them.
    """

    stac_url: str
    collection: str
    items_path: str
    local_path: str
    local_bands: str
    local_scale: float
    local_mask: str
    mgrs_tile: str
    bbox: tuple | None  # a box of preparation/place.py
    first: datetime.date  # of the year
    last: datetime.date
    season: tuple  # first and last day of year, see running/config.py
    max_cloud_cover: float
    skip_items: frozenset
    bands: list
    resolution: float
    stride: int
    resampling: str
    clear_scl: list  # of whole numbers
    offset: str
    overwrite: bool
    threads: int
    retries: int
    skip_bad_items: bool
    made_with: dict  # the keys of RESULT_KEYS as they are in the config, kept with a tile


def parse_request(config):
    """The Request of a config of prepare_tiles.py. Raises InputError that names the key."""
    first, last = sentinel2.year_window(config["year"])
    parsed = {
        "bbox": place.parse_bbox(config["bbox"]),
        "first": first,
        "last": last,
        "season": find_season(config),
        "skip_items": frozenset(name.strip() for name in config["skip_items"].split(",")) - {""},
        "bands": sentinel2.parse_bands(config["bands"]),
        "clear_scl": sentinel2.parse_clear_scl(config["clear_scl"]),
        "made_with": {key: config[key] for key in RESULT_KEYS},
    }
    same = {field.name: config[field.name] for field in fields(Request) if field.name in config}
    return Request(**same | parsed)


@dataclass(frozen=True)
class Plan:
    """What a tile is made of.

    name: of the tile, MGRS-<id>. grid: odc.geo GeoBox of the pixels that are read; every stride-th
    of its rows and columns is kept. days: (date, items) in the order of the tile's dates; a pixel
    is taken from the first item that has it.
    """

    name: str
    grid: object
    days: list
    request: Request

    @property
    def shape(self):
        """(T, H, W, B) of the tile."""
        height, width = (size // self.request.stride for size in self.grid.shape)
        return len(self.days), height, width, len(self.request.bands)

    @property
    def transform(self):
        """(a, b, c, d, e, f) of the tile's pixels."""
        a, b, c, d, e, f = tuple(self.grid.transform)[:6]
        stride = self.request.stride
        return [a * stride, b * stride, c, d * stride, e * stride, f]

    @property
    def crs(self):
        return f"EPSG:{self.grid.crs.epsg}" if self.grid.crs.epsg else self.grid.crs.to_wkt()

    def blocks(self):
        """(rows, columns) slices of the tile's blocks, from north-west to south-east."""
        size = max(1, BLOCK // self.request.stride)
        _, height, width, _ = self.shape
        return [
            (slice(row, min(row + size, height)), slice(column, min(column + size, width)))
            for row in range(0, height, size)
            for column in range(0, width, size)
        ]


def check_same(file, before, made_with):
    """Raise InputError where a tile was made, or begun, with other settings."""
    before = LATER_KEYS | before
    differ = [key for key in RESULT_KEYS if before.get(key) != made_with[key]]
    if differ:
        raise InputError(
            f"{file}: was made with another {', '.join(differ)}; wanted another dataset_name or "
            "overwrite=true"
        )


# ---- which items ---------------------------------------------------------------------------------


def choose_items(items, request):
    """The items to use, {tile: {date: items}}; prints how many are left out, and why.

    Raises InputError where nothing is left, or for an item that lacks its tile, its day, a band,
    its mask or its baseline (skip_bad_items=true: reports it and leaves it out).
    """
    items = {item.id: item for item in items}  # a catalogue may list one twice
    noun = "scenes" if request.local_path else "items"
    if unknown := sorted(request.skip_items - set(items)):
        shown = ", ".join(list(items)[:3]) + (" .." if len(items) > 3 else "")
        raise InputError(
            f"skip_items: found {unknown[0]}, wanted ids of the {len(items)} {noun} ({shown})"
        )
    chosen, counts = {}, dict.fromkeys(REASONS, 0)
    for item in items.values():
        try:
            reason = why_not(item, request)
        except InputError as error:
            if not request.skip_bad_items:
                raise
            print(f"left out: {error}")
            reason = "bad"
        if reason:
            counts[reason] += 1
            continue
        days = chosen.setdefault(sentinel2.tile_of(item), {})
        days.setdefault(sentinel2.solar_date(item), []).append(item)
    counts = {reason: count for reason, count in counts.items() if count}
    counted = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    print(f"found {len(items)} {noun}" + (f"; left out: {counted}" if counted else ""))
    if not chosen:
        raise InputError(describe_empty(items, counts, request))
    return chosen


def describe_empty(items, counts, request):
    """The line that says why none of the items is used.

    items: {id: item}; counts: {reason: how many were left out}.
    """
    year, keys = request.made_with["year"], ""
    if request.season != ALL_YEAR:
        year, keys = f"{year} (days {name_season(request.season)})", "start, end, "
    if request.local_path and "of other dates" in counts:
        days = sorted(map(sentinel2.solar_date, items.values()))
        return (
            f"year={year}: found none of its dates among {len(items)} scenes of {days[0]} to "
            f"{days[-1]}, wanted {keys and 'another start and end, or '}a year like "
            f"year={days[0].year}"
        )
    noun = "scene" if request.local_path else "item"
    counted = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
    return (
        f"year={year}: found no {noun} to use among {len(items)} ({counted}), wanted some; look at "
        f"{keys}mgrs_tile, bbox, year and max_cloud_cover"
    )


def why_not(item, request):
    """Why an item is left out, one of REASONS, or None. Raises InputError for one that is bad."""
    if item.id in request.skip_items:
        return "skip_items"
    if request.mgrs_tile and sentinel2.tile_of(item) != request.mgrs_tile:
        return "of another tile"
    day = sentinel2.solar_date(item)
    in_time = in_season(day.timetuple().tm_yday, *request.season)
    if not (request.first <= day <= request.last and in_time):
        return "of other dates"
    if sentinel2.number_of(item, "eo:cloud_cover") > request.max_cloud_cover:
        return "too cloudy"
    sentinel2.check_assets(item, request.bands, request.local_mask)
    sentinel2.offset_of(item, request.offset)
    return None


def order_days(days):
    """(date, items) of {date: items} by day of year, as the contract wants.

    Of a day, the item of the newest baseline comes first, and of these the least cloudy one.
    """

    def first_choice(item):
        baseline = float(sentinel2.origin_of(item)["baseline"] or 0)
        return -baseline, sentinel2.number_of(item, "eo:cloud_cover"), item.id

    by_doy = sorted(days, key=lambda day: (day.timetuple().tm_yday, day))
    return [(day, sorted(days[day], key=first_choice)) for day in by_doy]


# ---- on which pixels -----------------------------------------------------------------------------


def first_grid(items, request):
    """The grid of the first of a tile's items that can be read (without skip_bad_items: the first).

    Of one of its 10 m bands where it has one.
    """
    for number, item in enumerate(items, 1):
        found = [band for band in sentinel2.NATIVE_10M if sentinel2.find_asset(item, band)]
        try:
            return pixels.source_grid(item, [*found, request.bands[0]][0], request.retries)
        except ItemError as error:
            if not request.skip_bad_items or number == len(items):
                raise
            print(f"the grid is that of another item: {error}")


def tile_grid(days, request):
    """The pixels of a tile to read, an odc.geo GeoBox: the 10 m pixels of its source, or coarser.

    Cut to bbox, on pixel edges; None where bbox lies outside.
    """
    grid = first_grid([item for _, items in days for item in items], request)
    if request.resolution:
        axes = grid.crs.proj.axis_info[:2]
        if grid.crs.geographic or any(axis.unit_conversion_factor != 1 for axis in axes):
            raise InputError(
                f"resolution={request.resolution:g}: is in metres, found files in the unit "
                f"{axes[0].unit_name}, wanted some in metres (or resolution=0, and stride= for "
                "fewer pixels)"
            )
        grid = grid.zoom_to(resolution=request.resolution)
    if request.bbox:
        outline = place.outline(grid.extent)
        box = place.box_near(request.bbox, outline)
        if not outline.intersects(box):
            return None
        grid = grid[grid.overlap_roi(grid.enclosing(box.to_crs(grid.crs)))]
    return grid if min(grid.shape) >= request.stride else None


def make_plans(chosen, request):
    """A Plan for each tile that is needed: with bbox, none that others cover already.

    Raises InputError where there is none.
    """
    plans = []
    for tile, days in sorted(chosen.items()):
        ordered = order_days(days)
        grid = tile_grid(ordered, request)
        if grid is not None:
            plans.append(Plan(f"MGRS-{tile}", grid, ordered, request))
    if not plans:
        raise InputError(
            f"bbox={request.made_with['bbox']}: found no pixel of the items' tiles inside, wanted "
            f"at least {request.stride} rows and columns (stride)"
        )
    return needed_plans(plans, request.bbox) if request.bbox else plans


def needed_plans(plans, bbox):
    """The plans that are needed to cover a box, the largest part of it first."""
    middle, needed, covered = (bbox[0] + bbox[2]) / 2, [], None
    for plan in sorted(
        plans, key=lambda plan: (-plan.grid.shape[0] * plan.grid.shape[1], plan.name)
    ):
        outline = place.outline(plan.grid.extent, middle)
        part = outline & place.box_near(bbox, outline)  # of two zones, rectangles lie askew
        if covered is not None and covered.buffer(1e-6).contains(part):
            print(f"{plan.name}: not made, its part of bbox is covered by the others")
            continue
        covered = part if covered is None else covered | part
        needed.append(plan)
    return needed
