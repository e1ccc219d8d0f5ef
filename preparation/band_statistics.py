"""Statistics of a tile: exact sums over its clear pixels, checks on them, tiles that lack them.

Shapes: h x w pixels of a block, B bands.
"""

from running.errors import InputError, what_is_there
from running.files import atomic_write, open_npy, write_json
from running.log import ProgressBar
from running.tile_json import find_bands

import numpy as np

from preparation import sentinel2
from tiles import OBSERVATIONS, Tile

STATISTICS = ("band_mean.npy", "band_std.npy")
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
    """Warnings about a tile whose reflectance looks strange; an empty list where it does not.

    counts: {date: sums of `count_block`}. Of the clear pixels' blue reflectance: where many values
    are the floor of 1, the offset was perhaps subtracted twice; where none is below 0.1, perhaps
    not at all; where many are above 0.3, the mask takes cloud or snow for clear.
    """
    looks = {
        "the offset may have been subtracted twice": (
            lambda c: c["floored"] > 0.1 * c["count"],
            "if so: offset=applied overwrite=true",
        ),
        "the offset may not have been subtracted": (
            lambda c: c["dark"] < 0.01 * c["count"],
            "if so: offset=raw overwrite=true; haze and level 1C look so too",
        ),
        "the mask calls bright pixels clear (cloud, or snow)": (
            lambda c: c["bright"] > 0.05 * c["count"],
            "if it is cloud: clear_scl=, or leave out by skip_items=",
        ),
    }
    warnings = []
    for text, (is_strange, hint) in looks.items():
        seen = {day: c for day, c in counts.items() if c["count"] >= 100 and "dark" in c}
        strange = sorted(day for day, c in seen.items() if is_strange(c))
        if strange:
            days = ", ".join(strange[:5]) + (" .." if len(strange) > 5 else "")
            warnings.append(f"{text} on {len(strange)} of {len(seen)} dates: {days} ({hint})")
    return warnings


# ---- tiles of others -----------------------------------------------------------------------------


def complete_tiles(processed, config):
    """Add what the tiles in a folder lack: band_mean.npy, band_std.npy, and tile.json with bands.

    So TESSERA's own tiles (bands.npy, masks.npy, doys.npy) can be used. Statistics that do not fit
    the observations, which may have been corrected since, are renewed. Returns the tiles' folders.
    Raises InputError where there is none, or one is not in the contract: then it stays as it was.
    """
    folders = sorted(file.parent for file in processed.glob("MGRS-*/bands.npy"))
    if not folders:
        wanted = f"wanted a tile to complete{what_is_there(processed)}"
        raise InputError(f"{processed}: found no MGRS-*/bands.npy, {wanted}")
    names = sentinel2.parse_bands(config["bands"])
    for folder in folders:
        tile = Tile(folder, statistics=False)
        tile.clear_counts()  # refuses masks that hold other values than 0 and 1
        info = dict(tile.info)
        if not (folder / "tile.json").exists() and len(names) == tile.shape[3]:
            info["bands"] = names
            print(f"{folder / 'tile.json'}: names the bands as bands={config['bands']} says")
        info["statistics_of"] = tile.fingerprint()
        if not _has_statistics(tile, info["statistics_of"]):
            counts = _renew_statistics(tile)
            if "made_with" in info:  # by prepare_tiles.py, with counts for `check_reflectance`
                info["counts"] = dict(zip(info["dates"], counts, strict=True))
        if info != tile.info:
            write_json(folder / "tile.json", info)
        Tile(folder)  # checks the statistics, too
    return folders


def _has_statistics(tile, fingerprint):
    """Whether a tile has statistics that were made from the observations it has now.

    That is so where tile.json has their fingerprint (of a sample of the observations) and no file
    of observations was written, or put in place, after the statistics.
    """
    if not all((tile.path / name).exists() for name in STATISTICS):
        return False
    made = min((tile.path / name).stat().st_ctime_ns for name in STATISTICS)
    is_newer = any((tile.path / name).stat().st_ctime_ns > made for name in OBSERVATIONS)
    return tile.info.get("statistics_of") == fingerprint and not is_newer


def _renew_statistics(tile):
    """Write band_mean.npy and band_std.npy, unless they are right to a ten-thousandth.

    Returns the sums of `count_block` of each date.
    """
    counts, counted = _count_dates(tile), {}
    for count in counts:
        counted = add_counts(counted, count)
    if not counted["count"]:
        raise InputError(f"{tile.path / 'masks.npy'}: found no clear observation, wanted some")
    tile.watch.check()
    files, right = [tile.path / name for name in STATISTICS], statistics(counted)
    there = [open_npy(file, "an array (B,)") for file in files if file.exists()]
    label = f"{tile.path}: band_mean.npy, band_std.npy"
    if len(there) == 2 and all(map(_is_close, there, right)):
        for file in files:
            file.touch()  # so that the next run need not check them again
        print(f"{label} checked: they are those of the {counted['count']} clear observations")
        return counts
    for file, values in zip(files, right, strict=True):
        with atomic_write(file) as part:
            np.save(part, values)
    reason = "renewed, as the old ones were others: they are now" if there else "made"
    print(f"{label} {reason} over {counted['count']} clear observations")
    return counts


def _is_close(found, right):
    return found.shape == right.shape and np.allclose(found, right, rtol=1e-4, atol=0.01)


def _count_dates(tile):
    """The sums of `count_block` over each date of a tile, some rows at a time."""
    num_dates, height, width, _ = tile.shape
    blue = -1 if (found := find_bands(tile.band_names, ["B02"])[0]) is None else found
    counts, step = [{} for _ in range(num_dates)], max(1, (1 << 22) // width)
    for date in ProgressBar(range(num_dates), desc=tile.name, unit="date"):
        for row in range(0, height, step):
            block = date, slice(row, row + step)
            part = count_block(tile.bands[block], tile.masks[block], blue)
            counts[date] = add_counts(counts[date], part)
    return counts
