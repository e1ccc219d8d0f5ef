"""Statistics of a tile: exact sums over its clear pixels, checks on them, and tiles that lack them.

Shapes: h x w pixels of a block, B bands.
"""

import numpy as np
from tqdm import tqdm

from preparation import sentinel2
from running.errors import InputError
from running.files import atomic_write, write_json
from tiles import Tile

EXACT_PIXELS = 1 << 16  # pixels that are summed at once: few enough for a core's cache
BRIGHT, DARK = 3000, 1000  # reflectance x 10000 of blue, for `check_reflectance`


def count_block(bands, mask, blue):
    """Exact sums over the clear pixels of a block, for statistics and checks.

    bands (h, w, B) uint16, mask (h, w) uint8; blue: index of the band to check, or -1.
    Returns a dict of integers and lists of B integers.
    """
    series, clear = bands.reshape(-1, bands.shape[-1]), mask.ravel() > 0
    totals, squares = np.zeros(series.shape[1]), np.zeros(series.shape[1])
    for first in range(0, len(series), EXACT_PIXELS):
        part = slice(first, first + EXACT_PIXELS)
        # float64 is exact here: all sums are whole numbers below 2^53
        values, weights = series[part].astype(np.float64), clear[part].astype(np.float64)
        totals += weights @ values
        squares += weights @ np.square(values, out=values)
    counted = {
        "count": int(clear.sum()),
        "pixels": clear.size,
        "sum": [int(total) for total in totals],
        "squares": [int(total) for total in squares],
    }
    if blue >= 0:
        column = np.ascontiguousarray(series[:, blue])
        looks = {"floored": column == 1, "dark": column < DARK, "bright": column > BRIGHT}
        counted |= {name: int((seen & clear).sum()) for name, seen in looks.items()}
    return counted


def add_counts(total, part):
    """The sums of two dicts of `count_block`; an empty one counts nothing."""
    if not total:
        return part
    return {
        key: [a + b for a, b in zip(value, part[key], strict=True)]
        if isinstance(value, list)
        else value + part[key]
        for key, value in total.items()
    }


def statistics(counted):
    """Mean and standard deviation of each band, (B,) float32, from exact sums."""
    count = counted["count"]
    mean = [total / count for total in counted["sum"]]
    pairs = zip(counted["sum"], counted["squares"], strict=True)
    variance = [(count * squares - total * total) / (count * count) for total, squares in pairs]
    return np.array(mean, np.float32), np.sqrt(variance).astype(np.float32)


def check_reflectance(counts):
    """Warnings about a tile from its sums by date; an empty list where nothing is strange.

    counts: {date: sums of `count_block`}. Looks at the clear pixels' blue reflectance: floored at 1
    in many pixels, the offset was subtracted twice; never below 0.1, it was perhaps not subtracted
    at all; above 0.3 in many, the mask takes cloud, or snow, for clear.
    """
    looks = {
        "the offset may have been subtracted twice": lambda c: c["floored"] > 0.1 * c["count"],
        "the offset may not have been subtracted": lambda c: c["dark"] < 0.01 * c["count"],
        "the mask calls bright pixels clear (cloud, or snow)": lambda c: (
            c["bright"] > 0.05 * c["count"]
        ),
    }
    warnings = []
    for text, is_strange in looks.items():
        seen = {day: c for day, c in counts.items() if c["count"] >= 100 and "dark" in c}
        strange = sorted(day for day, c in seen.items() if is_strange(c))
        if strange:
            days = ", ".join(strange[:5]) + (" .." if len(strange) > 5 else "")
            warnings.append(f"{text} on {len(strange)} of {len(seen)} dates: {days}")
    return warnings


# ---- tiles of others -----------------------------------------------------------------------------


def complete_tiles(processed, config):
    """Add what the tiles in a folder lack: band_mean.npy, band_std.npy, and tile.json with bands.

    So TESSERA's own tiles (bands.npy, masks.npy, doys.npy) can be used. Returns their folders.
    Raises InputError where there is none, or one is not in the contract.
    """
    folders = sorted(file.parent for file in processed.glob("MGRS-*/bands.npy"))
    if not folders:
        raise InputError(f"{processed}: found no MGRS-*/bands.npy, wanted a tile to complete")
    names = sentinel2.parse_bands(config["bands"])
    for folder in folders:
        tile = Tile(folder, statistics=False)
        if not all((folder / name).exists() for name in ("band_mean.npy", "band_std.npy")):
            _add_statistics(tile)
        if not (folder / "tile.json").exists() and len(names) == tile.shape[3]:
            write_json(folder / "tile.json", {"bands": names})
            print(f"{folder / 'tile.json'}: names the bands as bands={config['bands']} says")
        Tile(folder)  # checks the statistics, too
    return folders


def _add_statistics(tile):
    num_dates, height, width, _ = tile.shape
    counted, step = {}, max(1, (1 << 22) // width)
    for index in tqdm(range(num_dates), tile.name, unit="date"):
        for row in range(0, height, step):
            block = index, slice(row, row + step)
            counted = add_counts(counted, count_block(tile.bands[block], tile.masks[block], -1))
    if not counted["count"]:
        raise InputError(f"{tile.path / 'masks.npy'}: found no clear observation, wanted some")
    for name, values in zip(("band_mean", "band_std"), statistics(counted), strict=True):
        with atomic_write(tile.path / f"{name}.npy") as part:
            np.save(part, values)
    print(f"{tile.path}: band_mean.npy, band_std.npy over {counted['count']} clear observations")
