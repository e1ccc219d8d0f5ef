"""quick_look.png of a tile: what to look at before training on it."""

from datetime import datetime

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure

from maps.land_cover import class_legend
from preparation.band_statistics import read_info
from utils import save_figure

SIDE = 400  # pixels along a picture's longer side, at most
PARTS = 16  # of the rows: so much of a tile is in memory at a time


def plot_quick_look(folder):
    """Draw median colours, clear dates, the line of dates, and labels, to quick_look.png.

    Reads every so many-th pixel of a large tile. Returns the median of the clear observations of
    red, green and blue (h, w, 3) float32, NaN where there is none, or None without these bands.
    """
    info = read_info(folder)
    masks = np.load(folder / "masks.npy", mmap_mode="r", allow_pickle=False)
    step = max(1, -(-max(masks.shape[1:]) // SIDE))
    clear = np.stack([mask[::step, ::step] for mask in masks])
    names = info.get("bands", [])
    figure = Figure(figsize=(12, 6), layout="constrained")
    rooms = [["color", "clear", "labels"], ["line", "line", "line"]]
    axes = figure.subplot_mosaic(rooms, height_ratios=(3, 1))
    color = None
    if {"B04", "B03", "B02"} <= set(names):
        chosen = [names.index(name) for name in ("B04", "B03", "B02")]
        color = _median(folder / "bands.npy", clear, step, chosen)
        high = np.nanpercentile(color, 98) if np.isfinite(color).any() else 1
        axes["color"].imshow(np.nan_to_num(color / max(high, 1)).clip(0, 1))
    axes["color"].set_title("median of the clear dates")
    image = axes["clear"].imshow(clear.sum(0), vmin=0)
    axes["clear"].set_title("clear dates")
    figure.colorbar(image, ax=axes["clear"])
    _draw_labels(axes["labels"], folder, info, step)
    _draw_dates(axes["line"], folder, info, clear)
    for name in ("color", "clear", "labels"):
        axes[name].set_axis_off()
    figure.suptitle(folder.name)
    save_figure(figure, folder / "quick_look.png")
    return color


def _median(path, clear, step, chosen):
    """Median over the dates of some bands of the clear pixels, (h, w, 3).

    A part of the rows at a time, each opened anew: pages read before no longer count as memory.
    """
    height = clear.shape[1]
    color = np.full((*clear.shape[1:], len(chosen)), np.nan, np.float32)
    size = max(1, -(-height // PARTS))
    for row in range(0, height, size):
        rows = slice(row * step, (row + size) * step, step)
        bands = np.load(path, mmap_mode="r", allow_pickle=False)
        seen = np.stack([date_bands[rows, ::step][..., chosen] for date_bands in bands])
        hidden = np.broadcast_to(clear[:, row : row + size, :, None] == 0, seen.shape)
        values = np.ma.masked_array(seen, hidden)
        color[row : row + size] = np.ma.median(values, axis=0).astype(np.float32).filled(np.nan)
    return color


def _draw_labels(axes, folder, info, step):
    axes.set_title("labels")
    if not (folder / "labels.npy").exists():
        axes.set_title("no labels")
        return
    labels = np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False)[::step, ::step]
    legend = class_legend(np.unique(labels), info.get("classes", {}) or {})
    rgba = np.zeros((*labels.shape, 4))
    for code, entry in legend.items():
        rgba[labels == code] = to_rgba(entry["color"])
        axes.scatter([], [], marker="s", color=entry["color"], label=f"{code} {entry['name']}")
    axes.imshow(rgba, interpolation="none")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_dates(axes, folder, info, clear):
    """The clear share of each date, over the calendar where tile.json tells it."""
    share = clear.mean((1, 2))
    if info.get("dates"):
        days = [datetime.fromisoformat(day).date() for day in info["dates"]]
        axes.xaxis.set_major_formatter(DateFormatter("%Y-%m-%d"))
    else:
        days = np.load(folder / "doys.npy", allow_pickle=False)
        axes.set_xlabel("day of year")
    axes.vlines(days, 0, share, color="tab:blue")
    axes.plot(days, share, "o", color="tab:blue", markersize=3)
    axes.set(ylim=(0, 1), ylabel="clear share", title=f"{len(days)} dates")
