"""quick_look.png of a tile: what to look at before training on it."""

from datetime import datetime
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.dates import DateFormatter

from maps.land_cover import class_legend
from tiles import Tile
from utils import median_color, new_figure, save_figure

MAX_PIXELS = 400  # along the longer edge of a picture


def plot_quick_look(folder):
    """Plot median colours, clear dates, labels, and the clear share of each date to quick_look.png.

    folder: of a finished tile. Of a large tile every N-th row and column is read. Returns what
    `utils.median_color` returns for it. Raises InputError for a tile that is not in the contract.
    """
    tile = Tile(folder)
    stride = -(-max(tile.shape[1:3]) // MAX_PIXELS)
    clear = np.stack([mask[::stride, ::stride] for mask in tile.masks])
    color = median_color(tile, stride)
    figure = new_figure(figsize=(12, 6))
    parts = [["color", "clear", "labels"], ["dates", "dates", "dates"]]
    axes = figure.subplot_mosaic(parts, height_ratios=(3, 1))
    if color is not None:
        high = np.nanpercentile(color, 98) if np.isfinite(color).any() else 1
        axes["color"].imshow(np.nan_to_num(color / max(high, 1)).clip(0, 1))
    axes["color"].set_title("median of the clear dates")
    image = axes["clear"].imshow(clear.sum(0), vmin=0)
    axes["clear"].set_title("clear dates")
    figure.colorbar(image, ax=axes["clear"])
    _plot_labels(axes["labels"], tile, stride)
    _plot_dates(axes["dates"], tile, clear)
    for name in ("color", "clear", "labels"):
        axes[name].set_axis_off()
    figure.suptitle(tile.title)
    save_figure(figure, Path(folder) / "quick_look.png")
    return color


def _plot_labels(axes, tile, stride):
    axes.set_title("labels" if tile.has_labels else "no labels")
    if not tile.has_labels:
        return
    labels = np.asarray(tile.labels[::stride, ::stride])
    legend = class_legend(np.unique(labels), tile.info.get("classes", {}))
    rgba = np.zeros((*labels.shape, 4))
    for code, entry in legend.items():
        rgba[labels == code] = to_rgba(entry["color"])
        axes.scatter([], [], marker="s", color=entry["color"], label=f"{code} {entry['name']}")
    axes.imshow(rgba, interpolation="none")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _plot_dates(axes, tile, clear):
    """Plot the clear share of each date, over the calendar where tile.json has the dates."""
    share, days = clear.mean((1, 2)), tile.doys
    if tile.info.get("dates"):
        days = [datetime.fromisoformat(day).date() for day in tile.info["dates"]]
        axes.xaxis.set_major_formatter(DateFormatter("%Y-%m-%d"))
    else:
        axes.set_xlabel("day of year")
    axes.vlines(days, 0, share, color="tab:blue")
    axes.plot(days, share, "o", color="tab:blue", markersize=3)
    axes.set(ylim=(0, 1), ylabel="clear share", title=f"{len(days)} dates")
