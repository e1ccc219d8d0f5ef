"""One layout for every picture of a map: title, scale bar, coordinates, legend.

Shapes: H x W pixels of a map, h x w pixels of it that are drawn: every step-th row and column.
"""

import math
import textwrap
from typing import NamedTuple

from running.files import atomic_write
from running.tile_json import find_years, is_georeferenced

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from rasterio.crs import CRS

from maps.land_cover import count_classes, to_degrees
from utils import new_figure

DPI = 100
MIN_SIDE, MAX_SIDE = 512, 2000  # pixels of a picture along the edges of a map
# pixels around the maps of a picture; the footer has the ticks, the scale bar and the notes
LEFT, TOP, GAP, RIGHT, FOOTER = 90, 60, 30, 20, 110
BAR_WIDTH = 110  # pixels of a colour bar with its numbers
COLORS = "viridis"  # of a quantity; safe for the colour-blind
LEGEND_WIDTH = 36  # characters of a line of the legend
RIGHT_COLOR, WRONG_COLOR = "#dcdcdc", "#000000"  # no class has them
NO_VALUE = "white: no value"
NO_PLACE = "tile.json names no place (crs, transform): no scale, and neighbours may lie far apart"


class Frame(NamedTuple):
    """Where a map (H, W) lies in its picture, in pixels from the upper left corner."""

    step: int  # every step-th row and column of the map is drawn
    factor: int  # pixels of the picture along a drawn pixel of the map
    height: int
    width: int

    def thin(self, array):
        """The drawn pixels (h, w, ..) of a map (H, W, ..)."""
        return np.asarray(array[:: self.step, :: self.step])

    def left(self, number):
        """Where the map with this number begins, of several side by side."""
        return LEFT + number * (self.width + GAP)


def find_frame(shape):
    """The Frame of a map (H, W): whole factors, up to MIN_SIDE, of which a large map needs none."""
    step = -(-max(shape) // MAX_SIDE)
    height, width = (-(-size // step) for size in shape)
    factor = min(-(-MIN_SIDE // min(height, width)), MAX_SIDE // max(height, width))
    return Frame(step, factor, factor * height, factor * width)


# ---- place ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What a picture says about the place of a map."""

    text: str
    metres: float = math.nan  # along a row, of a pixel in the middle
    extent: tuple | None = None  # left, right, bottom, top in map coordinates, if rows run east


def thin_place(info, step):
    """The info of a map of which every step-th row and column is left."""
    if not is_georeferenced(info):
        return info
    a, b, c, d, e, f = info["transform"]
    return {**info, "transform": [a * step, b * step, c, d * step, e * step, f]}


def find_place(info, shape):
    """The Place of a map (H, W). info: with crs and transform, as in tile.json, or without."""
    if not is_georeferenced(info):
        return Place(NO_PLACE)
    crs, (height, width) = CRS.from_user_input(info["crs"]), shape
    a, b, c, d, e, f = info["transform"]
    column, row = np.array([width / 2, width / 2 + 1]), height / 2
    x, y = a * column + b * row + c, d * column + e * row + f
    longitude, latitude = to_degrees(crs, x, y)
    metres, text = _distance(longitude, latitude), crs.to_string().split("[")[0]
    if metres > 0:
        north, east = "S" if latitude[0] < 0 else "N", "W" if longitude[0] < 0 else "E"
        middle = f"{abs(latitude[0]):.4f}° {north}, {abs(longitude[0]):.4f}° {east}"
        text = f"middle of the map: {middle}; coordinates: {text}"
    elif crs.is_projected:
        metres = math.hypot(a, d) * crs.linear_units_factor[1]
    extent = (c, c + a * width, f + e * height, f) if b == d == 0 else None
    return Place(text, metres, extent)


def _distance(longitude, latitude):
    """Metres between two points near each other, on a sphere; NaN where they are not on it.

    longitude, latitude: degrees, (2,).
    """
    if not np.isfinite([longitude, latitude]).all():
        return math.nan
    east = np.radians((np.diff(longitude)[0] + 180) % 360 - 180)
    east *= np.cos(np.radians(latitude.mean()))
    return 6_371_000 * math.hypot(east, np.radians(np.diff(latitude)[0]))


# ---- layout --------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A colour bar: values between low and high get the colours of COLORS."""

    low: float
    high: float
    label: str

    def color(self, values):
        """RGBA (h, w, 4) uint8 of values (h, w); NaN is transparent."""
        share = (values - self.low) / max(self.high - self.low, np.finfo(np.float32).tiny)
        rgba = colormaps[COLORS](np.nan_to_num(share), bytes=True)
        rgba[np.isnan(values)] = 0
        return rgba


def draw_maps(panels, shape, info, title, legend=(), notes="", figure=None, bar=None):
    """Draw maps (H, W) of one place side by side, small ones enlarged without smoothing.

    panels: {title: (h, w, 4) uint8 of `Frame.thin`}; alpha 0 is no data, and white. info: of a
    tile.json or infer.json, for place and year where it has them. legend: (colour, text) of its
    entries. figure: to draw on, of DPI; None for a new one, which is returned. bar: a Bar, in place
    of a legend.
    """
    frame, place = find_frame(shape), find_place(info, shape)
    title = ", ".join(filter(None, (title, find_years(info))))
    figure = figure or new_figure(dpi=DPI, layout="none")
    width = max(frame.left(len(panels)) - GAP, LEFT + MIN_SIDE) + RIGHT  # the title needs room
    box = Rectangle((0, 0), BAR_WIDTH, 0).get_bbox() if bar else _draw_legend(figure, legend, width)
    height = max(TOP + frame.height + FOOTER, TOP + box.height)
    pixels = np.array([width + box.width, height])
    figure.set_size_inches(*pixels / DPI)
    if legend:
        figure.legends[0].set_bbox_to_anchor((width / pixels[0], 1 - TOP / height))
    for number, (name, rgba) in enumerate(panels.items()):
        corner = frame.left(number), height - TOP - frame.height
        axes = figure.add_axes([*(corner / pixels), *((frame.width, frame.height) / pixels)])
        _draw_panel(axes, rgba, place, name if len(panels) > 1 else "", is_first=number == 0)
    if bar:
        corner, size = (width, height - TOP - frame.height), (20, frame.height)
        axes = figure.add_axes([*(corner / pixels), *(size / pixels)])
        scale = ScalarMappable(Normalize(bar.low, bar.high), COLORS)
        figure.colorbar(scale, cax=axes, label=bar.label, extend="both")
    figure.text(LEFT / pixels[0], 1 - 8 / height, title, va="top", fontsize=12)
    axes = figure.add_axes([0, 0, 1, (height - TOP - frame.height) / height])
    axes.set(xlim=(0, pixels[0]), ylim=(height - TOP - frame.height, 0))  # in pixels
    axes.set_axis_off()
    _draw_footer(axes, frame, place, notes)
    return figure


def _draw_panel(axes, rgba, place, name, is_first):
    """One map, with coordinates along its edges where rows run east."""
    axes.imshow(rgba, interpolation="none", extent=place.extent, aspect="auto")
    axes.set_title(name, fontsize=10)
    if not place.extent:
        axes.set(xticks=[], yticks=[])
        return
    for axis, turn in ((axes.xaxis, 0), (axes.yaxis, 90)):
        axis.set_major_locator(MaxNLocator(4, prune="both"))
        axis.get_major_formatter().set_useOffset(False)
        axis.get_major_formatter().set_scientific(False)
        axis.set_tick_params(labelsize=8, labelrotation=turn)
    axes.tick_params(labelleft=is_first)


def _draw_legend(figure, entries, left):
    """The legend, right of the maps. Returns its size in pixels, with a margin."""
    if not entries:
        return Rectangle((0, 0), 0, 0).get_bbox()
    handles = [
        Patch(
            facecolor=color,
            edgecolor="gray" if color in ("white", "none") else color,
            label=textwrap.fill(text, LEGEND_WIDTH),
        )
        for color, text in entries
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    legend = figure.legend(handles=handles, frameon=False, fontsize=10, **place)
    return legend.get_window_extent().padded(RIGHT / 2)


def _draw_footer(axes, frame, place, notes):
    """Scale bar, place and notes, below the maps; axes in pixels."""
    left, low = LEFT, 42
    if math.isfinite(place.metres):
        per_pixel = place.metres * frame.step / frame.factor
        metres = _round_length(per_pixel * frame.width / 3)
        axes.add_patch(Rectangle((left, low - 4), metres / per_pixel, 6, color="black"))
        text = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m"
        axes.text(left + metres / per_pixel + 6, low, text, va="center", fontsize=9)
        low += 22
    for line in textwrap.wrap(place.text, max(frame.width, MIN_SIDE) // 6) + notes.splitlines():
        axes.text(left, low, line, va="center", fontsize=8, color="0.3")
        low += 15


def _round_length(metres):
    """The longest of 1, 2, 5, 10, 20, .. (or a tenth of these, ..) that is not longer."""
    power = 10.0 ** math.floor(math.log10(metres))
    return max(part * power for part in (1, 2, 5) if part * power <= metres)


def save_picture(figure, path):
    """Write a figure of `draw_maps` to a PNG, pixel for pixel."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=DPI)


# ---- class maps ----------------------------------------------------------------------------------


def color_classes(codes, legend):
    """RGBA (.., 4) uint8 of class codes (..), uint8; 0, no data, is transparent."""
    rgba = np.zeros((256, 4), np.uint8)
    for code, entry in legend.items():
        rgba[code] = np.multiply(to_rgba(entry["color"]), 255).round()
    return rgba[codes]


def legend_entries(legend, pixels, sizes=None):
    """(colour, text) of the classes that a map has, for `draw_maps`.

    pixels: (256,) of each code, in the whole map; sizes: {code: text} to write after the names.
    """
    entries = [
        (entry["color"], f"{code} {entry['name']}" + (f": {sizes[code]}" if sizes else ""))
        for code, entry in legend.items()
        if pixels[code]
    ]
    return entries + [("white", "no data")] * bool(pixels[0])


def mark_errors(labels, class_map):
    """RGBA: black where labels and a class map (..) differ, grey where not, clear if one is 0."""
    rgba = np.zeros((*labels.shape, 4), np.uint8)
    both = (labels > 0) & (class_map > 0)
    for color, where in ((RIGHT_COLOR, labels == class_map), (WRONG_COLOR, labels != class_map)):
        rgba[both & where] = np.multiply(to_rgba(color), 255).round()
    return rgba


def plot_class_map(class_map, legend, path, title, info):
    """Plot a map of class codes (H, W) with its legend to a PNG; info: as for `draw_maps`."""
    rgba = color_classes(find_frame(class_map.shape).thin(class_map), legend)
    entries = legend_entries(legend, count_classes(class_map).sum(0))
    save_picture(draw_maps({"": rgba}, class_map.shape, info, title, entries), path)


def plot_false_color(rgba, shape, path, title, info):
    """Plot false colour (h, w, 4) of a map (H, W) to a PNG; info: as for `draw_maps`."""
    notes = "similar colours: similar embeddings (three principal components); white: no data"
    save_picture(draw_maps({"": rgba}, shape, info, title, notes=notes), path)


def find_bar(values, label):
    """The Bar of a map of a quantity: from its percentile 2 to its percentile 98."""
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, (2, 98)) if len(known) else (0, 1)
    return Bar(float(low), float(high), label)


def plot_values(values, label, path, title, info):
    """Plot a map of a quantity (H, W) with a colour bar to a PNG; info: as for `draw_maps`."""
    thin = find_frame(values.shape).thin(values)
    bar = find_bar(thin, label)
    figure = draw_maps({"": bar.color(thin)}, values.shape, info, title, notes=NO_VALUE, bar=bar)
    save_picture(figure, path)
