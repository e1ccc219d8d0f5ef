"""A random sample of the pixels of class maps, to be labelled as reference.

Sample size and allocation as in Olofsson et al. (2014, 10.1016/j.rse.2014.02.015, section 5.1).

Shapes: S strata, n points, H x W pixels of a map. Several maps are sampled as one.
"""

import math

from running.errors import notice
from running.tile_json import is_georeferenced

import numpy as np
from rasterio.crs import CRS

from maps.land_cover import count_classes

SPARE = 30  # pixels of a stratum that are tried for each point, where points keep a distance


def find_sample_size(sizes, users, error):
    """Points of a stratified sample for a wanted standard error of overall accuracy, eq. 13.

    sizes: (S,) pixels; users: (S,) expected user's accuracies, 0 to 1; error: the standard error.
    """
    weights = np.asarray(sizes) / np.sum(sizes)
    variance = np.asarray(users) * (1 - np.asarray(users))
    finite = (weights @ variance) / np.sum(sizes)
    return max(1, math.ceil((weights @ np.sqrt(variance)) ** 2 / (error**2 + finite)))


def allocate(count, sizes, least):
    """Points of each stratum, (S,) int: in proportion to sizes, but `least` in each, or all of it.

    The sum is `count`, or more where `least` in each stratum asks for more.
    """
    sizes = np.asarray(sizes)
    points = np.minimum(least, sizes)
    small = np.zeros(len(sizes), bool)
    while not small.all():  # what the small ones get beyond their share, the others give
        left = max(0, count - points[small].sum())
        share = left * sizes / sizes[~small].sum()
        if not (more := ~small & (share < points)).any():
            break
        small |= more
    if not small.all():
        points[~small] = np.minimum(np.floor(share[~small]).astype(int), sizes[~small])
        order = np.argsort(np.where(small, 1, np.floor(share) - share), kind="stable")
        for place in order[: max(0, count - points.sum())]:
            points[place] += not small[place] and points[place] < sizes[place]
    return points


def draw_points(maps, strata, points, distance=0.0, seed=0):
    """Draw points at random from each stratum, without repeating a pixel.

    maps: ClassMaps; strata: S lists of class codes; points: (S,) int, how many; distance: between
    any two of them at least, in metres, or in pixels of maps without CRS. Where there is no room,
    fewer are drawn, which is printed. Returns (n, 4) int: stratum, number of the map, row, column;
    in random order.
    """
    rng = np.random.default_rng(seed)
    counts = [count_classes(one.codes) for one in maps]
    drawn, places = [], np.empty((0, 2))
    for stratum in np.argsort([sum(c[:, codes].sum() for c in counts) for codes in strata]):
        codes, wanted = strata[stratum], int(points[stratum])
        ends = np.cumsum(np.concatenate([count[:, codes].sum(1) for count in counts]))
        tried = min(int(ends[-1]), wanted * SPARE if distance else wanted)
        ranks = rng.choice(int(ends[-1]), tried, replace=False)
        found = _find_pixels(maps, codes, ends, ranks)
        kept = []
        for row, place in zip(found, _place(maps, found), strict=True):
            if len(kept) == wanted:
                break
            if not distance or (np.hypot(*(places - place).T) >= distance).all():
                kept.append([stratum, *row])
                places = np.vstack([places, place])
        if len(kept) < wanted:
            notice(
                f"distance={distance:g}: found room for {len(kept)} of {wanted} points of class "
                f"{', '.join(map(str, codes))}; a smaller distance= gives more"
            )
        drawn += kept
    return rng.permutation(np.array(drawn, int).reshape(-1, 4))


def _find_pixels(maps, codes, ends, ranks):
    """(n, 3) int: map, row, column of the pixels with these ranks among those of some codes.

    ends: how many there are up to the end of each row of the maps, one after the other.
    """
    first_rows = np.cumsum([0] + [len(one.codes) for one in maps])
    lines = np.searchsorted(ends, ranks, "right")
    numbers = np.searchsorted(first_rows, lines, "right") - 1
    found = np.stack([numbers, lines - first_rows[numbers], np.zeros_like(lines)], 1)
    for place in np.argsort(lines, kind="stable"):
        number, row, _ = found[place]
        columns = np.flatnonzero(np.isin(maps[number].codes[row], codes))
        found[place, 2] = columns[ranks[place] - ends[lines[place]]]  # counted from the row's end
    return found


def _place(maps, found):
    """Where pixels lie, (n, 2): in metres; in pixels of maps without CRS or with one in degrees.

    found: (n, 3) map, row, column. Maps that share no plane are far apart.
    """
    places, groups = np.empty((len(found), 2)), {}
    for number, one in enumerate(maps):
        own = found[:, 0] == number
        row, column = found[own, 1] + 0.5, found[own, 2] + 0.5
        key, crs = number, CRS.from_user_input(one.info["crs"]) if is_georeferenced(one.info) else 0
        if crs and crs.is_projected:
            a, b, c, d, e, f = one.info["transform"]
            unit, key = crs.linear_units_factor[1], one.info["crs"]
            row, column = (
                (d * column + e * row + f) * unit,
                (a * column + b * row + c) * unit,
            )
        places[own] = np.stack([row, column + 1e9 * groups.setdefault(key, len(groups))], 1)
    return places
