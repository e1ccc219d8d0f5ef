"""Simulated Sentinel-2 tiles.

Fields, woods, a river and a town with phenology of their own, irregular dates, swath edges, and
clouds that are connected areas, some of which the mask misses. As on the ground, fields of one
class differ more than classes do (season, vigour, soil, leaf colour), and some classes differ for a
few weeks or in two bands only. In another year the same ground has other weather, dates, clouds
and seasons, and some fields another cover. SIMULATED: good for trying things out, not for saying
anything about the Earth.
"""

import json
import os
import shutil
from datetime import date, timedelta
from pathlib import Path

from running.errors import InputError
from running.files import create_npy, make_output_dir, write_error

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from maps.land_cover import WORLDCOVER
from preparation.band_statistics import add_counts, count_block, statistics

BANDS = ["B04", "B02", "B03", "B08", "B8A", "B09", "B05", "B06", "B07", "B11", "B12"]
# reflectance x 10000 in the order of BANDS
SPECTRA = {
    "leaf": [350, 250, 600, 4200, 4400, 4300, 1000, 3200, 4000, 1900, 850],
    "needle": [280, 200, 400, 2700, 2900, 2900, 650, 1900, 2500, 1200, 550],
    "soil": [1700, 900, 1300, 2500, 2700, 2800, 2000, 2200, 2400, 3300, 2800],
    "shrub": [400, 270, 580, 3700, 3900, 3900, 1050, 2800, 3500, 2200, 1050],
    "straw": [1900, 950, 1500, 3000, 3200, 3200, 2200, 2500, 2800, 3700, 2600],
    "roof": [1800, 1500, 1600, 2200, 2300, 2300, 1900, 2000, 2100, 2400, 2200],
    "water": [350, 550, 500, 200, 180, 200, 300, 250, 230, 100, 80],
}
CLOUD = np.array([6500, 7000, 6700, 6900, 6800, 3000, 6700, 6800, 6900, 4500, 3500])
# land cover: WorldCover code, growing and bare spectrum, min and max green, rise and fall (doy)
COVERS = {
    "broadleaf wood": (10, "leaf", "straw", 0.30, 0.95, 115, 300),
    "needle wood": (10, "needle", "soil", 0.80, 0.92, 110, 310),
    "heath": (20, "shrub", "straw", 0.35, 0.85, 110, 295),
    "pasture": (30, "leaf", "straw", 0.35, 0.80, 85, 290),
    "mown meadow": (30, "leaf", "straw", 0.35, 0.80, 85, 290),
    "clover": (40, "leaf", "straw", 0.35, 0.80, 85, 290),
    "winter cereal": (40, "leaf", "straw", 0.10, 0.95, 95, 185),
    "maize": (40, "leaf", "soil", 0.02, 0.95, 165, 265),
    "rapeseed": (40, "leaf", "soil", 0.15, 0.90, 75, 175),
    "fallow": (60, "leaf", "soil", 0.10, 0.45, 95, 230),
    "wet meadow": (90, "leaf", "straw", 0.35, 0.80, 85, 290),
    "town": (50, "leaf", "roof", 0.10, 0.25, 110, 290),
    "river": (80, "water", "water", 1.00, 1.00, 100, 200),
}
FIELD_SHARES = {"broadleaf wood": 3, "needle wood": 2, "heath": 3, "pasture": 2, "mown meadow": 2}
FIELD_SHARES |= {"clover": 2, "winter cereal": 2, "maize": 2, "rapeseed": 1, "fallow": 3}
FIELD_SHARES |= {"wet meadow": 3}
PEAK_BIOMASS, BIOMASS_NOISE = 25, 1.0  # t/ha, of a year of full green; deviation of a measurement
FIRST_YEAR = 2024  # other years change it
CHANGED = 0.15  # share of the fields that have another cover in another year
# first day, last day, and factors on bands: where some covers differ from the others
EVENTS = {
    "mown meadow": (160, 185, {"B08": 0.7, "B8A": 0.7, "B07": 0.7, "B04": 1.5}),
    # mown 12 days before
    "clover": (148, 173, {"B08": 0.7, "B8A": 0.7, "B07": 0.7, "B04": 1.5}),
    "rapeseed": (105, 130, {"B03": 1.4, "B04": 1.5}),  # in flower
    "wet meadow": (50, 110, {"B11": 0.75, "B12": 0.75}),  # under water
}


def simulate_covers(size, rng):
    """Index of the cover (in COVERS) and of the field of each pixel: two (size, size) arrays."""
    names = list(COVERS)
    points = rng.uniform(0, size, (max(4, size * size // 120), 2))
    points[:, 0] *= 0.7  # fields longer than wide
    row, column = np.mgrid[:size, :size] + rng.normal(0, 0.6, (2, size, size))
    field = cKDTree(points).query(np.stack([row * 0.7, column], -1))[1]
    shares = np.array(list(FIELD_SHARES.values()), float)
    kinds = [names.index(name) for name in FIELD_SHARES]
    cover = rng.choice(kinds, len(points), p=shares / shares.sum())[field]
    middle = size * (0.5 + 0.25 * np.sin(np.arange(size) / size * 5 + rng.uniform(0, 6)))
    cover[np.abs(column - middle[:, None]) < size / 30] = names.index("river")
    town = np.hypot(*(np.mgrid[:size, :size] - rng.uniform(0.2, 0.8, (2, 1, 1)) * size)) < size / 8
    cover[town & (cover != names.index("river"))] = names.index("town")
    return cover, field


def vary(field, spread, rng, shape=()):
    """Deviations (.., H, W): one for each field, plus a smaller one that varies within fields."""
    by_field = rng.normal(0, spread, (*shape, field.max() + 1))[..., field]
    by_pixel = gaussian_filter(rng.normal(size=(*shape, *field.shape)), (*[0] * len(shape), 1, 1))
    return by_field + by_pixel / by_pixel.std() * spread / 2


def grow(cover, field, rng):
    """Properties of each pixel that are the same on every date: a dict of arrays (.., H, W)."""
    return {
        "cover": cover,
        "season": vary(field, 8, rng),  # days late
        "rise and fall": vary(field, 5, rng, (2,)),  # days late, added to season
        "strength": 1 + vary(field, 0.12, rng),
        "soil": np.exp(vary(field, 0.25, rng)),  # brightness
        "colour": np.exp(vary(field, 0.05, rng, (len(BANDS),))),  # of the leaves
    }


def grow_in(year, pixels, field, seed, rng):
    """The properties of `grow` in another year: the soil stays.

    Fields have a season and vigour of that year, and of its weather, which is the same in all tiles
    of a seed; some have another cover.
    """
    weather = np.random.default_rng([seed, year])
    spring, autumn = weather.uniform(6, 14, 2) * weather.choice([-1, 1], 2)  # days late
    grown = grow(change_fields(pixels["cover"], field, rng), field, rng)
    grown["season"] += spring
    grown["rise and fall"][1] += autumn - spring
    grown["strength"] *= weather.uniform(0.85, 1.1)
    return grown | {"soil": pixels["soil"]}


def change_fields(cover, field, rng):
    """Cover of each pixel, (H, W), after a share CHANGED of the fields got another one."""
    kinds = np.array([list(COVERS).index(name) for name in FIELD_SHARES])
    shares = np.array(list(FIELD_SHARES.values()), float)
    is_field = np.isin(cover, kinds)  # neither river nor town
    of_field = np.zeros(field.max() + 1, cover.dtype)
    of_field[field[is_field]] = cover[is_field]
    fields = np.unique(field[is_field])
    for one in rng.choice(fields, round(CHANGED * len(fields)), replace=False):
        others = shares * (kinds != of_field[one])
        of_field[one] = rng.choice(kinds, p=others / others.sum())
    return np.where(is_field, of_field[field], cover)


def greenness(pixels, doy):
    """Share of the growing spectrum in each pixel on a day: a double logistic."""
    low, high, rise, fall = (
        np.array(values)[pixels["cover"]] for values in list(zip(*COVERS.values(), strict=True))[3:]
    )
    late = pixels["season"] + pixels["rise and fall"]
    rising = 1 / (1 + np.exp(-(doy - rise - late[0]) / 9))
    falling = 1 / (1 + np.exp((doy - fall - late[1]) / 9))
    return np.clip((low + (high - low) * rising * falling) * pixels["strength"], 0, 1)


def simulate_biomass(pixels, rng):
    """Biomass of the year in t/ha, (H, W) float32: measured with noise, and the truth.

    In proportion to the mean greenness of the year; NaN in the river and the town.
    """
    truth = PEAK_BIOMASS * np.mean([greenness(pixels, doy) for doy in range(5, 366, 10)], axis=0)
    grows = ~np.isin(pixels["cover"], [list(COVERS).index(name) for name in ("river", "town")])
    truth = np.where(grows, truth, np.nan)
    measured = truth + rng.normal(0, BIOMASS_NOISE, truth.shape)
    return measured.astype(np.float32), truth.astype(np.float32)


def add_events(surface, pixels, doy):
    """Change the bands (H, W, B) of covers that have an event on a day, gradually."""
    day = doy - pixels["season"]
    for name, (begin, end, change) in EVENTS.items():
        here = pixels["cover"] == list(COVERS).index(name)
        share = here / (1 + np.exp(-(day - begin) / 3)) / (1 + np.exp((day - end) / 3))
        for band, factor in change.items():
            surface[..., BANDS.index(band)] *= 1 + (factor - 1) * share


def simulate_date(pixels, doy, config, rng):
    """Bands (H, W, B) uint16 and mask (H, W) uint8 of one overpass."""
    cover = pixels["cover"]
    size = len(cover)
    grown, bare = (np.array([SPECTRA[kind[i]] for kind in COVERS.values()]) for i in (1, 2))
    green = greenness(pixels, doy)[..., None]
    wet = 1 - 0.25 * rng.beta(2, 4)  # soil moisture of the day
    leaves = grown[cover] * np.moveaxis(pixels["colour"], 0, -1)
    surface = green * leaves + (1 - green) * bare[cover] * wet * pixels["soil"][..., None]
    add_events(surface, pixels, doy)
    surface = gaussian_filter(surface, (0.8, 0.8, 0), mode="nearest")  # pixels mix at edges
    surface = surface * rng.normal(1, 0.05) + rng.normal(0, 150, surface.shape)

    cloudiness = rng.beta(0.5, 0.7)  # most days are clear or overcast
    noise = gaussian_filter(rng.normal(size=(size, size)), size / 10, mode="wrap")
    height = noise - np.quantile(noise, 1 - cloudiness)
    opacity = np.clip(height / noise.std() * 2.5, 0, 1)[..., None]
    shadow = 1 - 0.5 * np.roll(opacity, (size // 16, size // 12), (0, 1)) * (1 - opacity)
    bands = (1 - opacity) * surface * shadow + opacity * CLOUD * rng.normal(1, 0.05)

    hidden = (opacity[..., 0] > 0.1) | (shadow[..., 0] < 0.9)
    missed = gaussian_filter(rng.normal(size=(size, size)), 2, mode="wrap")
    missed = missed > np.quantile(missed, 1 - config["missed_clouds"])
    mask = ~hidden | (missed & (opacity[..., 0] < 0.6))
    bands = np.clip(bands, 1, 65535)
    if rng.random() < 0.15:  # the swath ends inside the tile
        edge = rng.uniform(0.2, 0.8) * size + np.arange(size)[:, None] * 0.2
        outside = np.arange(size)[None] > edge
        bands[outside], mask[outside] = 0, False
    return bands.round().astype(np.uint16), mask.astype(np.uint8)


def draw_overpasses(num_dates, rng):
    """Days of year (num_dates,), ascending: some of the 73 overpasses of a year."""
    return np.sort(rng.choice(73, num_dates, replace=False)) * 5 + rng.integers(1, 5)


def simulate_year(number, config):
    """What a tile's year is like: days of overpasses, properties of pixels, changed (H, W), rng.

    changed: where the cover is not that of FIRST_YEAR. rng: for what is drawn next.
    """
    seed, year, num_dates = config["seed"], config["year"], config["num_dates"]
    rng = np.random.default_rng([seed, number])
    overpasses = draw_overpasses(num_dates, rng)
    cover, field = simulate_covers(config["size"], rng)
    pixels = grow(cover, field, rng)
    if year != FIRST_YEAR:
        rng = np.random.default_rng([seed, number, year])
        overpasses = draw_overpasses(num_dates, rng)
        pixels = grow_in(year, pixels, field, seed, rng)
    return overpasses, pixels, pixels["cover"] != cover, rng


def write_tile(folder, number, config):
    """Write one simulated tile of the tile contract; tiles lie side by side from west to east."""
    folder.mkdir(parents=True)
    size, num_dates = config["size"], config["num_dates"]
    seed, year = config["seed"], config["year"]
    shape = (num_dates, size, size, len(BANDS))
    bands = create_npy(folder / "bands.npy", np.uint16, shape)
    masks = create_npy(folder / "masks.npy", np.uint8, shape[:3])
    overpasses, pixels, changed, rng = simulate_year(number, config)
    if year != FIRST_YEAR:
        np.save(folder / "changed.npy", changed)
    counted = {}
    for index, doy in enumerate(overpasses):
        bands[index], masks[index] = simulate_date(pixels, doy, config, rng)
        counted = add_counts(counted, count_block(bands[index], masks[index], -1))
    if not counted["count"]:
        keys = f"num_dates={num_dates} seed={seed}"
        raise InputError(f"{keys}: found no clear observation in tile {number + 1}, wanted another")
    mean, std = statistics(counted)
    np.save(folder / "doys.npy", overpasses.astype(np.int16))
    np.save(folder / "band_mean.npy", mean)
    np.save(folder / "band_std.npy", std)
    codes = np.array([kind[0] for kind in COVERS.values()], np.uint8)
    np.save(folder / "labels.npy", codes[pixels["cover"]])
    biomass = simulate_biomass(pixels, np.random.default_rng([seed, number, 1]))
    for name, values in zip(("targets", "targets_truth"), biomass, strict=True):
        np.save(folder / f"{name}.npy", values)
    info = {
        "simulated": True,
        "bands": BANDS,
        "dates": [str(date(year - 1, 12, 31) + timedelta(int(doy))) for doy in overpasses],
        "crs": "EPSG:32633",
        "transform": [10, 0, 500000 + 10 * size * number, 0, -10, 5400000],
        "classes": {str(code): WORLDCOVER[code] for code in sorted(set(codes.tolist()))},
        "target": {"name": "biomass", "unit": "t/ha"},
        "boa_offset_applied": True,
    }
    (folder / "tile.json").write_text(json.dumps(info, indent=1))


def simulate_dataset(
    folder, *, num_tiles=3, size=96, year=FIRST_YEAR, num_dates=60, missed_clouds=0.1, seed=0
):
    """Write a data set of simulated tiles at `folder`; the keys are make_demo_data.py's.

    Raises InputError where the folder exists already, or cannot be written.
    """
    folder, config = Path(folder), {"size": size, "num_dates": num_dates, "seed": seed}
    config |= {"missed_clouds": missed_clouds, "year": year}
    if folder.exists():
        raise InputError(f"{folder}: exists already, wanted a new dataset_name (or remove it)")
    make_output_dir(folder.parent)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")  # two runs may start together
    shutil.rmtree(part, ignore_errors=True)
    try:
        for number in range(num_tiles):
            write_tile(part / "processed" / f"MGRS-SIM{number + 1}", number, config)
        is_first = move_folder(part, folder)
    except OSError as error:
        raise write_error(part, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(
        f"{folder}: {num_tiles} simulated tiles of {size} x {size} pixels, {num_dates} dates, "
        f"{len(BANDS)} bands"
        if is_first
        else f"{folder}: another process has made it meanwhile; its tiles stay"
    )


def move_folder(part, folder):
    """Rename a finished folder; False where another process has made one of that name meanwhile."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return False
    return True
