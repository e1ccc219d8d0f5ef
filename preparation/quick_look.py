"""quick_look.png of a tile: what to look at before training on it."""

import math
from datetime import datetime
from pathlib import Path

from running.tile_json import describe_target, find_years

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.dates import DateFormatter
from matplotlib.ticker import MaxNLocator
from rasterio.crs import CRS

from maps.land_cover import class_legend
from maps.pictures import COLORS, find_bar
from tiles import Tile
from utils import median_color, new_figure, save_figure

MAX_PIXELS = 400  # along the longer edge of a picture


def plot_quick_look(folder):
    """Plot median colours, clear dates, labels, targets, and the clear share of each date to a PNG.

    folder: of a finished tile, which gets quick_look.png. Of a large tile every N-th row and column
    is read. Returns what `utils.median_color` returns for it. Raises InputError for a tile that is
    not in the contract.
    """
    tile = Tile(folder)
    stride = -(-max(tile.shape[1:3]) // MAX_PIXELS)
    clear = np.stack([mask[::stride, ::stride] for mask in tile.masks])
    color = median_color(tile, stride)
    rows = [["color", "clear", *tile.answers], ["dates"] * (2 + len(tile.answers))]
    if len(tile.answers) == 2:  # of both, side by side, the maps would be small
        rows = [["color", "clear"], tile.answers, ["dates", "dates"]]
    figure = new_figure(figsize=(12, 1.5 + 4.5 * (len(rows) - 1)))
    axes = figure.subplot_mosaic(rows, height_ratios=(*[3] * (len(rows) - 1), 1))
    extent, unit = _extent(tile)
    title = "no true colour:\ntile.json names no B04, B03, B02"
    if color is not None:
        high = np.nanpercentile(color, 98) if np.isfinite(color).any() else 1
        axes["color"].imshow(np.nan_to_num(color / max(high, 1)).clip(0, 1), extent=extent)
        title = f"median of the clear dates,\nreflectance 0 to {high / 10_000:.2g}"
    axes["color"].set_title(title)
    image = axes["clear"].imshow(clear.sum(0), vmin=0, extent=extent)
    axes["clear"].set_title("clear dates")
    bar = figure.colorbar(image, ax=axes["clear"], shrink=0.7, ticks=MaxNLocator(integer=True))
    bar.set_label(f"clear dates of {len(clear)}")
    if "labels" in tile.answers:
        _plot_labels(axes["labels"], tile, stride, extent)
    if "targets" in tile.answers:
        _plot_targets(axes["targets"], tile, stride, extent)
    _plot_dates(axes["dates"], tile, clear)
    for name in ("color", "clear", *tile.answers):
        axes[name].set(xlabel=unit, ylabel=unit, xlim=extent[:2], ylim=extent[2:], aspect="equal")
    figure.suptitle(", ".join(filter(None, (tile.title, find_years(tile.info)))))
    path = Path(folder) / "quick_look.png"
    save_figure(figure, path)
    print(f"{path}: {', '.join(['median colours', 'clear dates', *tile.answers])}")
    return color


def _extent(tile):
    """Left, right, bottom, top of a tile, from its north-western corner, and their unit."""
    height, width = tile.shape[1:3]
    crs = CRS.from_user_input(tile.info["crs"]) if "crs" in tile.info else None
    if crs is None or not crs.is_projected:
        return (0, width, height, 0), "pixels"
    a, b, _, d, e, _ = tile.info["transform"]
    km = crs.linear_units_factor[1] / 1000
    return (0, width * math.hypot(a, d) * km, height * math.hypot(b, e) * km, 0), "km"


def _plot_labels(axes, tile, stride, extent):
    axes.set_title("labels")
    labels = np.asarray(tile.labels[::stride, ::stride])
    legend = class_legend(np.unique(labels), tile.info.get("classes", {}))
    rgba = np.zeros((*labels.shape, 4))
    for code, entry in legend.items():
        rgba[labels == code] = to_rgba(entry["color"])
        axes.scatter([], [], marker="s", color=entry["color"], label=f"{code} {entry['name']}")
    axes.imshow(rgba, interpolation="none", extent=extent)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _plot_targets(axes, tile, stride, extent):
    bar = find_bar(tile.targets[::stride, ::stride], describe_target(tile.info.get("target", {})))
    axes.set_title("targets")
    limits = {"vmin": bar.low, "vmax": bar.high, "cmap": COLORS, "interpolation": "none"}
    image = axes.imshow(tile.targets[::stride, ::stride], extent=extent, **limits)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label=bar.label, extend="both")


def _plot_dates(axes, tile, clear):
    """Plot the clear share of each date, over the calendar where tile.json has the dates."""
    share, days = clear.mean((1, 2)), tile.doys
    if tile.info.get("dates"):
        days = [datetime.fromisoformat(day).date() for day in tile.info["dates"]]
        axes.xaxis.set_major_formatter(DateFormatter("%Y-%m-%d"))
    else:
        axes.set_xlabel("day of year")
    axes.vlines(days, 0, 100 * share, color="tab:blue")
    axes.plot(days, 100 * share, "o", color="tab:blue", markersize=3, clip_on=False)
    axes.set(ylim=(0, 100), ylabel="clear pixels (%)", title=f"{len(days)} dates")
