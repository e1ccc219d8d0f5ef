"""What makes the maps of a tile doubtful: where it is unlike the tiles of the training."""

from running.errors import notice
from running.tile_json import fold_name

import numpy as np

from maps.land_cover import count_classes

# how far a tile may be from the training's tiles before its maps are called doubtful
FAR_MEAN = 0.5  # between means of a band, in the training's deviations
FAR_SPREAD = 2  # between deviations of a band, as a ratio
FAR_DAYS = 30  # between a day of year and the nearest one


def notice_doubts(tiles, model):
    """Say where tiles are unlike those that the checkpoint was trained on: another year, say.

    tiles: for which bands were chosen; model: an Encoder. Compares means and deviations of bands,
    days of year, and names of classes where both have them.
    """
    for describe in (unlike_bands, unlike_days, unlike_classes):
        found = [(tile, text) for tile in tiles if (text := describe(tile, model))]
        if found:
            tile, text = found[0]
            notice(f"{tile.path}: doubtful: {text} (so {len(found)} of {len(tiles)} tiles)")


def unlike_bands(tile, model):
    """The bands of a tile whose statistics are far from the training's, in words; "" for none."""
    mean, std = (model.checkpoint[key].numpy() for key in ("mean", "std"))
    shift = (tile.band_mean[tile.order] - mean) / std
    spread = tile.band_std[tile.order]
    spread = np.where(spread < 1e-6, 1, spread) / std  # of a constant band 1, as in training
    far = (np.abs(shift) > FAR_MEAN) | (np.abs(np.log(spread)) > np.log(FAR_SPREAD))
    names = tile.read_names or [f"band {number}" for number in range(len(mean))]
    words = [f"{names[i]} {shift[i]:+.1f} (x {spread[i]:.1f})" for i in np.flatnonzero(far)]
    if not words:
        return ""
    return (
        "bands differ from the training's, their means by deviations of these (x: ratio of the "
        f"deviations): {', '.join(words)}"
    )


def unlike_days(tile, model):
    """Days of year that only a tile or only the training has, in words; "" for none."""
    here, there = tile.doys.astype(int), np.array(model.checkpoint.get("days", []), int)
    if not len(there):  # an older checkpoint
        return ""
    apart = np.abs(here[:, None] - there)
    apart = np.minimum(apart, 365 - apart)  # the year is a circle
    words = [
        f"{text} of days {days.min()} to {days.max()}"
        for text, days in (
            ("it lacks dates", there[apart.min(0) > FAR_DAYS]),
            ("the training lacked dates", here[apart.min(1) > FAR_DAYS]),
        )
        if len(days)
    ]
    return ", and ".join(words)


def unlike_classes(tile, model):
    """Classes of a tile's labels that the checkpoint does not know, in words; "" for none."""
    classes = tile.info.get("classes", {})
    if not (model.classes and classes and "labels" in tile.answers):
        return ""
    occurs = count_classes(tile.labels).sum(0) > 0
    here, there = (
        {fold_name(entry): entry["name"] for entry in table.values()}
        for table in ({c: e for c, e in classes.items() if occurs[int(c)]}, model.classes)
    )
    unknown, missing = (
        ", ".join(one[key] for key in one if key not in other)
        for one, other in ((here, there), (there, here))
    )
    words = f"classes that the checkpoint lacks: {unknown:.200}; that it lacks: {missing:.200}"
    return words if unknown else ""
