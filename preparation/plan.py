"""Which items make which tile: chosen, put in order, and laid on a grid of pixels."""

from dataclasses import dataclass

from preparation import items as sources
from preparation import pixels, sentinel2
from running.errors import InputError

BLOCK = 2048  # pixels along a block's side: two internal blocks of the usual files
# settings that change what is in a tile, in the order of run_config
RESULT_KEYS = (
    "stac_url",
    "collection",
    "items_path",
    "local_path",
    "local_bands",
    "mgrs_tile",
    "bbox",
    "year",
    "max_cloud_cover",
    "skip_items",
    "bands",
    "resolution",
    "stride",
    "resampling",
    "clear_scl",
    "offset",
)


@dataclass(frozen=True)
class Plan:
    """What a tile is made of.

    name: of the tile, MGRS-<id>. grid: odc.geo GeoBox of the pixels that are read; every stride-th
    of its rows and columns is kept. days: (date, items) in the order of the tile's dates; a pixel
    is taken from the first item that has it.
    """

    name: str
    grid: object
    stride: int
    days: list
    config: dict  # the keys of RESULT_KEYS

    @property
    def shape(self):
        """(T, H, W, B) of the tile."""
        height, width = (size // self.stride for size in self.grid.shape)
        bands = sentinel2.parse_bands(self.config["bands"])
        return len(self.days), height, width, len(bands)

    @property
    def transform(self):
        """(a, b, c, d, e, f) of the tile's pixels."""
        a, b, c, d, e, f = tuple(self.grid.transform)[:6]
        return [a * self.stride, b * self.stride, c, d * self.stride, e * self.stride, f]

    @property
    def crs(self):
        return f"EPSG:{self.grid.crs.epsg}" if self.grid.crs.epsg else self.grid.crs.to_wkt()

    def blocks(self):
        """(rows, columns) slices of the tile's blocks, from north-west to south-east."""
        size = max(1, BLOCK // self.stride)
        _, height, width, _ = self.shape
        return [
            (slice(row, min(row + size, height)), slice(column, min(column + size, width)))
            for row in range(0, height, size)
            for column in range(0, width, size)
        ]


def check_same(file, before, config):
    """Raise InputError where a tile was made, or begun, with other settings."""
    differ = [key for key in RESULT_KEYS if before.get(key) != config[key]]
    if differ:
        raise InputError(
            f"{file}: was made with another {', '.join(differ)}; wanted another dataset_name or "
            "overwrite=true"
        )


REASONS = ("of another tile", "of other dates", "too cloudy", "skip_items", "bad")


def choose_items(items, config):
    """The items to use, {tile: {date: items}}; prints how many are left out, and why.

    Raises InputError where nothing is left, or where an item lacks a band, its mask or its baseline
    (skip_bad_items=true: says so and leaves it out).
    """
    first, last = sentinel2.year_window(config["year"])
    bands = sentinel2.parse_bands(config["bands"])
    skipped, chosen = parse_skipped(config["skip_items"], items), {}
    reasons = dict.fromkeys(REASONS, 0)
    for item in {item.id: item for item in items}.values():  # a catalogue may tell one twice
        tile = sentinel2.tile_of(item)
        day = sentinel2.solar_date(item)
        if config["mgrs_tile"] and tile != config["mgrs_tile"]:
            reasons["of another tile"] += 1
        elif not first <= day <= last:
            reasons["of other dates"] += 1
        elif (item.properties.get("eo:cloud_cover") or 0) > config["max_cloud_cover"]:
            reasons["too cloudy"] += 1
        elif item.id in skipped:
            reasons["skip_items"] += 1
        elif not is_usable(item, bands, config):
            reasons["bad"] += 1
        else:
            chosen.setdefault(tile, {}).setdefault(day, []).append(item)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    print(f"found {len(items)} items" + (f"; left out: {told}" if told else ""))
    if not chosen:
        raise InputError(
            f"year={config['year']}: found no item to use among {len(items)} ({told or 'none'}), "
            "wanted some; look at mgrs_tile, bbox, year and max_cloud_cover"
        )
    return chosen


def parse_skipped(text, items):
    """The ids of skip_items; InputError for one that no item has."""
    skipped = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(skipped - {item.id for item in items}):
        raise InputError(f"skip_items: found {unknown[0]}, wanted ids of the {len(items)} items")
    return skipped


def is_usable(item, bands, config):
    """Whether an item has all that is needed; InputError if not, unless skip_bad_items=true."""
    try:
        sentinel2.check_assets(item, bands)
        sentinel2.offset_of(item, config["offset"])
    except InputError as error:
        if not config["skip_bad_items"]:
            raise
        print(f"left out: {error}")
        return False
    return True


def order_days(days):
    """(date, items) of {date: items} by day of year, as the contract wants.

    Of a day, the item of the newest baseline comes first, and of these the least cloudy one.
    """

    def first_choice(item):
        baseline = float(sentinel2.origin_of(item)["baseline"] or 0)
        return -baseline, item.properties.get("eo:cloud_cover") or 0, item.id

    by_doy = sorted(days, key=lambda day: (day.timetuple().tm_yday, day))
    return [(day, sorted(days[day], key=first_choice)) for day in by_doy]


def first_grid(items, bands, config):
    """The grid of the first of a tile's items that can be read (without skip_bad_items: the first).

    Of one of its 10 m bands where it has one.
    """
    item, *others = items
    name = next((b for b in sentinel2.NATIVE_10M if sentinel2.find_asset(item, b)), bands[0])
    try:
        return pixels.source_grid(item, name, config["retries"])
    except sources.ItemError as error:
        if not (config["skip_bad_items"] and others):
            raise
        print(f"not looked at for the grid: {error}")
        return first_grid(others, bands, config)


def tile_grid(days, config):
    """The pixels of a tile to read, an odc.geo GeoBox: the 10 m pixels of its source, or coarser.

    Cut to bbox, on pixel edges; None where bbox lies outside.
    """
    bands = sentinel2.parse_bands(config["bands"])
    grid = first_grid([item for _, items in days for item in items], bands, config)
    if config["resolution"]:
        grid = grid.zoom_to(resolution=config["resolution"])
    if config["bbox"]:
        geometry = sources.need("odc.geo.geom")
        box = geometry.box(*sources.parse_bbox(config["bbox"]), "EPSG:4326")
        if not grid.extent.to_crs("EPSG:4326").intersects(box):
            return None
        grid = grid[grid.overlap_roi(grid.enclosing(box.to_crs(grid.crs)))]
    return grid if min(grid.shape) >= config["stride"] else None


def make_plans(chosen, config):
    """A Plan for each tile that is needed: with bbox, none that others cover already."""
    kept = {key: config[key] for key in RESULT_KEYS}
    plans, covered = [], None
    for tile, days in sorted(chosen.items()):
        ordered = order_days(days)
        grid = tile_grid(ordered, config)
        if grid is not None:
            plans.append(Plan(f"MGRS-{tile}", grid, config["stride"], ordered, kept))
    if not config["bbox"]:
        return plans
    box = sources.need("odc.geo.geom").box(*sources.parse_bbox(config["bbox"]), "EPSG:4326")
    needed = []
    for plan in sorted(
        plans, key=lambda plan: (-plan.grid.shape[0] * plan.grid.shape[1], plan.name)
    ):
        place = plan.grid.extent.to_crs("EPSG:4326") & box  # of two zones, rectangles lie askew
        if covered is not None and covered.buffer(1e-6).contains(place):
            print(f"{plan.name}: not made, its part of bbox is covered by the others")
            continue
        covered = place if covered is None else covered | place
        needed.append(plan)
    return needed
