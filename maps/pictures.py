"""One layout for every picture of a map: title, scale bar, coordinates, north, legend.

Shapes: H x W pixels of a map, h x w pixels of it that are drawn: every step-th row and column.
Lengths are in pixels of a PNG, DPI to the inch; a PDF or SVG has the same size.
"""

import math
import re
import textwrap
from typing import NamedTuple

from running.files import atomic_write
from running.tile_json import find_years, is_georeferenced

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from rasterio.crs import CRS

from maps.land_cover import class_areas, describe_size, to_degrees
from utils import new_figure

DPI = 300
MIN_SIDE, MIN_BESIDE = 1200, 750  # along the edges of a map; of one of several
MAX_SIDE = 2000
LEFT, TOP, RIGHT = 270, 180, 60  # around the maps; TOP has a title of one line
GAP, ROW_GAP = 90, 110  # between maps, side by side and one below another
MIN_WIDTH = 450  # of a map with the room for its title
TICKS, SCALE, LINE, TITLE_LINE = 180, 76, 46, 62  # heights: coordinates, scale bar, lines of text
LEGEND_WIDTH = 900  # of an entry of the legend
BAR_SIZE, BAR_WIDTH = 60, 300  # of a colour bar across, and with its numbers
LOW = 1.5  # maps this many times as wide as high lie one below another, legends below them
NORTH_IS_UP = 5  # degrees off which no arrow says so
COLORS = "viridis"  # of a quantity; safe for the colour-blind
RIGHT_COLOR, WRONG_COLOR = "#dcdcdc", "#000000"  # no class has them
ROWS = ("column", "row")
NO_VALUE = "white: no value"
NO_PLACE = (
    "tile.json names no place (crs, transform): rows and columns, and neighbours may lie far apart"
)
# text stays text that can be searched and edited; the same picture has the same bytes
VECTOR = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "map"}
DATES = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


class Frame(NamedTuple):
    """Where a map (H, W) lies in its picture, in pixels from the upper left corner."""

    step: int  # every step-th row and column of the map is drawn
    factor: int  # pixels of the picture along a drawn pixel of the map
    height: int
    width: int
    is_stacked: bool = False  # several maps lie one below another, else side by side

    def thin(self, array):
        """The drawn pixels (h, w, ..) of a map (H, W, ..)."""
        return np.asarray(array[:: self.step, :: self.step])

    def corner(self, number):
        """Left and top edge of the map with this number, below a title of one line."""
        if self.is_stacked:
            return LEFT, TOP + number * (self.height + ROW_GAP)
        return LEFT + number * (max(self.width, MIN_WIDTH) + GAP), TOP


def find_frame(shape, count=1):
    """The Frame of a map (H, W), of `count` in a picture; `step` is the same for any count.

    Whole factors, up to MIN_SIDE or MIN_BESIDE, of which a large map needs none.
    """
    step = -(-max(shape) // MAX_SIDE)
    height, width = (-(-size // step) for size in shape)
    side = MIN_SIDE if count == 1 else MIN_BESIDE
    factor = min(-(-side // min(height, width)), MAX_SIDE // max(height, width))
    is_stacked = count > 1 and width > LOW * height
    return Frame(step, factor, factor * height, factor * width, is_stacked)


# ---- place ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What a picture says about the place of a map."""

    text: str
    extent: tuple  # left, right, bottom, top in the numbers along the edges
    labels: tuple | None = ROWS  # of these; None: degrees, which have their directions
    metres: float = math.nan  # along a row, of a pixel in the middle
    north: float = math.nan  # degrees clockwise from up


def thin_place(info, step):
    """The info of a map of which every step-th row and column is left."""
    if not is_georeferenced(info):
        return info
    a, b, c, d, e, f = info["transform"]
    return {**info, "transform": [a * step, b * step, c, d * step, e * step, f]}


def find_place(info, shape):
    """The Place of a map (H, W). info: with crs and transform, as in tile.json, or without."""
    height, width = shape
    if not is_georeferenced(info):
        return Place(NO_PLACE, (0, width, height, 0))
    crs, (a, b, c, d, e, f) = CRS.from_user_input(info["crs"]), info["transform"]
    column, row = width / 2 + np.array([0, 1, 0]), height / 2 + np.array([0, 0, 1])
    longitude, latitude = to_degrees(crs, a * column + b * row + c, d * column + e * row + f)
    metres, north = _measure(longitude, latitude)
    name = re.match(r'\w+\["([^"]+)"', crs.to_wkt())
    text, name = crs.to_string().split("[")[0], f" ({name[1]})" if name else ""
    text = f"coordinates: {text}{name}"
    if metres > 0:
        side = "S" if latitude[0] < 0 else "N", "W" if longitude[0] < 0 else "E"
        middle = f"{abs(latitude[0]):.4f}° {side[0]}, {abs(longitude[0]):.4f}° {side[1]}"
        text = f"middle of the map: {middle}; {text}"
    elif crs.is_projected:
        metres = math.hypot(a, d) * crs.linear_units_factor[1]
    if b or d:  # rows run in no direction of the CRS
        return Place(text, (0, width, height, 0), metres=metres, north=north)
    in_metres = crs.is_projected and crs.linear_units_factor[1] == 1
    scale = 1000 if in_metres else 1
    extent = tuple(edge / scale for edge in (c, c + a * width, f + e * height, f))
    labels = ("easting [km]", "northing [km]") if in_metres else ("x", "y")
    return Place(text, extent, None if crs.is_geographic else labels, metres, north)


def _measure(longitude, latitude):
    """Length of a pixel along its row in metres, and north in degrees clockwise from up.

    longitude, latitude: degrees, (3,), of a point, a column further and a row further. On a sphere;
    NaN where they are not on it.
    """
    if not np.isfinite([longitude, latitude]).all():
        return math.nan, math.nan
    east = np.radians((longitude[1:] - longitude[0] + 180) % 360 - 180)
    east *= np.cos(np.radians(latitude[0]))
    north = np.radians(latitude[1:] - latitude[0])
    turn = math.copysign(1, east[0] * north[1] - east[1] * north[0])
    # the step (columns, rows) that leads north, up to its length
    across, down = -turn * east[1], turn * east[0]
    return 6_371_000 * math.hypot(east[0], north[0]), math.degrees(math.atan2(across, -down))


class _Degrees(ScalarFormatter):
    """Degrees with their direction. signs: of those above and below 0."""

    def __init__(self, signs):
        super().__init__(useOffset=False)
        self.signs = signs

    def __call__(self, value, position=None):
        value = (value + 180) % 360 - 180 if abs(value) > 180 else value
        return f"{super().__call__(abs(value), position)}° {self.signs[int(value < 0)]}"


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


class _Canvas(NamedTuple):
    """A figure whose places are pixels from its upper left corner."""

    figure: object
    width: int
    height: int

    def axes(self, left, top, width, height):
        low = self.height - top - height
        part = np.divide([left, low, width, height], [self.width, self.height] * 2)
        return self.figure.add_axes(part)

    def share(self, left, top):
        return left / self.width, 1 - top / self.height

    def text(self, left, top, lines, **style):
        where = self.share(left, top)
        self.figure.text(*where, "\n".join(lines), va="top", linespacing=1.2, **style)


def draw_maps(panels, shape, info, title, legend=(), notes="", figure=None, bar=None):
    """Draw maps (H, W) of one place side by side, small ones enlarged without smoothing.

    panels: {title: (h, w, 4) uint8 of `Frame.thin`}; alpha 0 is no data, and white. info: of a
    tile.json or infer.json, for place and year where it has them. legend: (colour, text) of its
    entries. figure: to draw on; None for a new one, which is returned. bar: a Bar, in place of a
    legend.
    """
    count = len(panels)
    frame, place = find_frame(shape, count), find_place(info, shape)
    figure = figure or new_figure(dpi=DPI, layout="none")
    edge, low = np.add(frame.corner(count - 1), (max(frame.width, MIN_WIDTH), frame.height))
    is_below = edge > LOW * max(low - TOP, MIN_WIDTH)
    room = max(edge, LEFT + MIN_SIDE) - LEFT  # of lines of text
    if bar:
        size = edge - LEFT if is_below else BAR_WIDTH, BAR_WIDTH if is_below else low - TOP
    else:
        size = _add_legend(figure, legend, room if is_below else low - TOP, is_below)
    width = max(LEFT + room, (LEFT if is_below else edge + RIGHT) + size[0]) + RIGHT
    title = _wrap(", ".join(filter(None, (title, find_years(info)))), width - LEFT - RIGHT, 12)
    more = TITLE_LINE * (len(title) - 1)
    if not is_below and size[1] > low - TOP + TICKS:  # the legend reaches down beside the notes
        room = edge - LEFT
    lines = [line for text in (place.text, notes) for line in _wrap(text, room, 8)]
    foot = low + more + TICKS
    end = foot + SCALE + LINE * len(lines) + 30
    corner = (LEFT, end) if is_below else (edge + RIGHT, TOP + more)
    height = max(end, corner[1] + size[1] + 30)
    canvas = _Canvas(figure, math.ceil(width), math.ceil(height))
    figure.set_size_inches(canvas.width / DPI, canvas.height / DPI)
    _draw_panels(canvas, panels, frame, place, more)
    if bar:
        _draw_bar(canvas, bar, corner, size, is_below)
    elif legend:
        figure.legends[0].set_bbox_to_anchor(canvas.share(*corner))
    canvas.text(LEFT, 26, title, fontsize=12)
    canvas.text(LEFT, foot + SCALE, lines, fontsize=8, color="0.3")
    _draw_scale(canvas, foot, frame, place, edge)
    return figure


def _wrap(text, room, size):
    """The lines of a text, none wider than `room`; size: of the font, in points."""
    font, letters = FontProperties(size=size), max(1, len(text))
    while True:
        lines = textwrap.wrap(text, letters)
        sizes = [text_to_path.get_text_width_height_descent(line, font, False) for line in lines]
        widest = max((width for width, *_ in sizes), default=0) * DPI / 72
        if widest <= room or letters <= 4:
            return lines
        letters = min(letters - 1, int(letters * room / widest) + 1)


def _draw_panels(canvas, panels, frame, place, more):
    """The maps, with coordinates along the outer edges. more: height of a title's further lines."""
    for number, (name, rgba) in enumerate(panels.items()):
        left, top = frame.corner(number)
        axes = canvas.axes(left, top + more, frame.width, frame.height)
        axes.imshow(rgba, interpolation="none", extent=place.extent, aspect="auto")
        axes.set_title(name if len(panels) > 1 else "", fontsize=10, loc="left")
        is_low = number == len(panels) - 1 or not frame.is_stacked
        is_left = number == 0 or frame.is_stacked
        _label_edge(axes.xaxis, frame.width, 0, place, is_low)
        _label_edge(axes.yaxis, frame.height, 1, place, is_left)


def _label_edge(axis, size, number, place, is_outer):
    """Coordinates along an edge of a map; number: 0 of columns, 1 of rows."""
    is_degrees, count = place.labels is None, min(4, size // 240)
    formatter = _Degrees(("EW", "NS")[number]) if is_degrees else ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)
    labels = {"labelbottom" if number == 0 else "labelleft": is_outer}
    axis.set_tick_params(labelsize=8, labelrotation=90 * number, **labels)
    if count < 2:
        axis.set_ticks([])
        return
    are_pixels = place.labels == ROWS
    axis.set_major_locator(MaxNLocator(count, prune="both", integer=are_pixels))
    if is_outer and not is_degrees:
        axis.set_label_text(place.labels[number], fontsize=8)


def _add_legend(figure, entries, room, is_below):
    """Add a legend, in columns below maps of a width or beside maps of a height. Returns its size.

    (width, height), (0, 0) without entries.
    """
    if not entries:
        return 0, 0
    handles = [
        Patch(
            facecolor=color,
            edgecolor="gray" if color in ("white", "none") else color,
            label="\n".join(_wrap(text, LEGEND_WIDTH, 9)),
        )
        for color, text in entries
    ]
    style = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "borderpad": 0}

    def add(columns):
        figure.legends.clear()
        legend = figure.legend(handles=handles, frameon=False, fontsize=9, ncols=columns, **style)
        return np.array(legend.get_window_extent().size) * DPI / figure.dpi

    size = add(1)
    columns = room // size[0] if is_below else np.ceil(size[1] / max(room, MIN_SIDE))
    columns = min(max(1, int(columns)), len(entries))
    return add(columns) if columns > 1 else size


def _draw_bar(canvas, bar, corner, size, is_below):
    """The colour bar in a box of the canvas."""
    size = (size[0], BAR_SIZE) if is_below else (BAR_SIZE, size[1])
    axes = canvas.axes(*corner, *size)
    scale = ScalarMappable(Normalize(bar.low, bar.high), COLORS)
    label = "\n".join(_wrap(bar.label, max(size), 9))
    way = "horizontal" if is_below else "vertical"
    drawn = canvas.figure.colorbar(scale, cax=axes, orientation=way, extend="both")
    drawn.set_label(label, fontsize=9)
    drawn.locator = MaxNLocator(max(2, min(6, max(size) // 200)))
    axes.tick_params(labelsize=8)


def _draw_scale(canvas, top, frame, place, right):
    """Scale bar, and an arrow to the north where it is not up, below the maps."""
    axes = canvas.axes(0, 0, canvas.width, canvas.height)
    axes.set(xlim=(0, canvas.width), ylim=(canvas.height, 0))
    axes.set_axis_off()
    is_known = math.isfinite(place.metres)
    per_pixel = (place.metres if is_known else 1) * frame.step / frame.factor
    length = _round_length(per_pixel * max(frame.width, MIN_WIDTH) / 3)
    length = length if is_known else max(1, length)
    axes.add_patch(Rectangle((LEFT, top), length / per_pixel, 16, color="black", linewidth=0))
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    text = text if is_known else f"{length:g} pixel{'s' * (length != 1)}"
    axes.text(LEFT + length / per_pixel + 18, top + 8, text, va="center", fontsize=9)
    if abs(place.north) > NORTH_IS_UP:
        angle, middle = math.radians(place.north), np.array([right - 60, top - 10])
        way = np.array([math.sin(angle), -math.cos(angle)])
        style = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", middle + 32 * way, middle - 32 * way, arrowprops=style)
        axes.text(*(middle + 54 * way), "N", ha="center", va="center", fontsize=9)


def _round_length(length):
    """The longest of 1, 2, 5, 10, 20, .. (or a tenth of these, ..) that is not longer."""
    power = 10.0 ** math.floor(math.log10(length))
    return max(part * power for part in (1, 2, 5) if part * power <= length)


def save_picture(figure, path):
    """Write a figure of `draw_maps` to a PNG, pixel for pixel, a PDF or an SVG."""
    with atomic_write(path) as part, rc_context(VECTOR):
        figure.savefig(part, dpi=DPI, metadata=DATES.get(path.suffix))


# ---- class maps ----------------------------------------------------------------------------------


def color_classes(codes, legend):
    """RGBA (.., 4) uint8 of class codes (..), uint8; 0, no data, is transparent."""
    rgba = np.zeros((256, 4), np.uint8)
    for code, entry in legend.items():
        rgba[code] = np.multiply(to_rgba(entry["color"]), 255).round()
    return rgba[codes]


def legend_entries(legend, areas, has_gaps):
    """(colour, text) of classes for `draw_maps`, the largest first.

    areas: of `class_areas`, of the classes that are wanted; has_gaps: whether pixels have none.
    """
    rows = sorted(areas.items(), key=lambda item: -item[1]["pixels"])
    entries = []
    for code, row in rows:
        size = describe_size(row).replace(" ", "\u00a0")  # on one line
        entries.append((legend[int(code)]["color"], f"{row['name']}: {row['share']:.1%}, {size}"))
    return entries + [("white", "no data")] * bool(has_gaps)


def list_classes(class_map, legend, info):
    """The `legend_entries` of the classes that a map (H, W) has."""
    areas = class_areas(class_map, legend, info)
    areas = {code: row for code, row in areas.items() if row["pixels"]}
    pixels = sum(row["pixels"] for row in areas.values())
    return legend_entries(legend, areas, has_gaps=pixels < class_map.size)


def mark_errors(labels, class_map):
    """RGBA: black where labels and a class map (..) differ, grey where not, clear if one is 0."""
    rgba = np.zeros((*labels.shape, 4), np.uint8)
    both = (labels > 0) & (class_map > 0)
    for color, where in ((RIGHT_COLOR, labels == class_map), (WRONG_COLOR, labels != class_map)):
        rgba[both & where] = np.multiply(to_rgba(color), 255).round()
    return rgba


def plot_class_map(class_map, legend, path, title, info):
    """Plot a map of class codes (H, W) with its legend; info: as for `draw_maps`."""
    rgba = color_classes(find_frame(class_map.shape).thin(class_map), legend)
    entries = list_classes(class_map, legend, info)
    save_picture(draw_maps({"": rgba}, class_map.shape, info, title, entries), path)


def plot_false_color(rgba, shape, path, title, info):
    """Plot false colour (h, w, 4) of a map (H, W); info: as for `draw_maps`."""
    notes = "similar colours: similar embeddings (three principal components); white: no data"
    save_picture(draw_maps({"": rgba}, shape, info, title, notes=notes), path)


def find_bar(values, label):
    """The Bar of a map of a quantity: from its percentile 2 to its percentile 98."""
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, (2, 98)) if len(known) else (0, 1)
    return Bar(float(low), float(high), label)


def plot_values(values, label, path, title, info):
    """Plot a map of a quantity (H, W) with a colour bar; info: as for `draw_maps`."""
    thin = find_frame(values.shape).thin(values)
    bar = find_bar(thin, label)
    figure = draw_maps({"": bar.color(thin)}, values.shape, info, title, notes=NO_VALUE, bar=bar)
    save_picture(figure, path)
