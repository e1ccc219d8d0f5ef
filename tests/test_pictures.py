"""Pictures of maps: large enough, exact colours, scale and place; one class has one colour."""

import json
import re

from running.errors import InputError

import matplotlib.pyplot as plt
import numpy as np
import pytest
from map_helpers import GEO, make_place, make_tile, map_in, map_tile, run
from matplotlib.transforms import Bbox

import create_false_color_map
import explore
import read_inference_map
from maps.land_cover import PALETTE, class_legend
from maps.pictures import (
    LEFT,
    RIGHT_COLOR,
    TOP,
    WRONG_COLOR,
    color_classes,
    draw_maps,
    find_bar,
    find_frame,
    find_place,
    list_classes,
    plot_class_map,
    plot_false_color,
    save_picture,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("shape", [(9, 14), (64, 64), (300, 700), (2500, 1201)])
def test_a_map_is_drawn_large_and_no_colour_is_mixed(tmp_path, shape):
    """Each pixel is a square of whole picture pixels; of a large map every N-th is one."""
    codes = np.random.default_rng(0).integers(0, 6, shape).astype(np.uint8)
    legend = class_legend(range(1, 6), {"0": {}})
    plot_class_map(codes, legend, tmp_path / "map.png", "title", {})
    frame, table = find_frame(shape), np.array([(255, 255, 255), *map(rgb, PALETTE[:5])])
    step = -(-max(shape) // 2000)
    assert min(frame.height, frame.width) >= min(1200, min(shape) // step * (2000 // max(shape)))
    edge = np.s_[3:-3, 3:-3]  # a line around the map covers the rest of it
    drawn = map_in(tmp_path / "map.png", shape)[edge]
    np.testing.assert_array_equal(drawn, table[codes[::step, ::step]][edge])
    image = plt.imread(tmp_path / "map.png")[..., :3]
    whole = image[TOP : TOP + frame.height, LEFT : LEFT + frame.width][3:-3, 3:-3]
    found = {tuple(color) for color in (whole * 255).round().astype(int).reshape(-1, 3)}
    assert found <= {tuple(color) for color in table.tolist()}


def bar_length(image, frame):
    """Pixels of the scale bar, the longest black line from the left edge of the map on."""
    below = image[TOP + frame.height + 100 :, LEFT : LEFT + frame.width, :3].max(-1) > 0.5
    return below.argmax(1).max()


def texts(figure):
    lines = [text.get_text() for axes in (figure, *figure.axes) for text in axes.texts]
    return " ".join(lines).replace("\n", " ")


UTM, DEGREES = GEO["transform"], [1e-4, 0, 16, 0, -1e-4, 48]
TURNED = [7.07, 7.07, 500000, 7.07, -7.07, 5400000]


@pytest.mark.parametrize(
    ("crs", "transform", "metres"),
    [
        ("EPSG:32631", UTM, 10),
        ("EPSG:32631", TURNED, 10),
        ("EPSG:4326", DEGREES, 7.44),
        # Mercator stretches: 10 m of its plane are 6.6 m at 48.6 degrees north
        ("EPSG:3857", [10, 0, 0, 0, -10, 6200000], 6.58),
    ],
)
def test_the_scale_bar_is_as_long_as_it_says(tmp_path, crs, transform, metres):
    info = {"crs": crs, "transform": transform}
    figure = draw_maps({"": np.zeros((100, 120, 4), np.uint8)}, (100, 120), info, "title")
    save_picture(figure, tmp_path / "map.png")
    number, unit = re.search(r"(\d+) (k?m)", texts(figure)).groups()
    length = int(number) * (1000 if unit == "km" else 1)
    image, frame = plt.imread(tmp_path / "map.png")[..., :3], find_frame((100, 120))
    bar = bar_length(image, frame)
    assert bar / frame.factor * metres == pytest.approx(length, rel=0.015)
    assert length * 2 > frame.width / frame.factor * metres / 6
    assert f"coordinates: {crs}" in texts(figure)
    assert "° N" in texts(figure)
    assert texts(figure).endswith(" N") == (transform == TURNED), "an arrow where north is not up"


@pytest.mark.parametrize(
    ("info", "ticks", "labels"),
    [
        ({"crs": "EPSG:32631", "transform": UTM}, {"5399.75"}, ("easting [km]", "northing [km]")),
        ({"crs": "EPSG:4326", "transform": [1e-4, 0, 16, 0, -1e-4, -48]}, {"48.0025° S"}, ("", "")),
        ({"crs": "EPSG:32631", "transform": TURNED}, {"50"}, ("column", "row")),
        ({}, {"50"}, ("column", "row")),
    ],
)
def test_coordinates_along_the_edges(info, ticks, labels):
    figure = draw_maps({"": np.zeros((100, 120, 4), np.uint8)}, (100, 120), info, "title")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert ticks <= {label.get_text() for label in axes.get_yticklabels()}
    assert (axes.get_xlabel(), axes.get_ylabel()) == labels


def test_north_is_found_from_the_ground():
    """South up, and far from the middle of a polar projection."""
    flipped = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, 10, 5400000]}
    assert abs(find_place(flipped, (9, 9)).north) == pytest.approx(180, abs=0.1)
    polar = {"crs": "EPSG:3413", "transform": [10, 0, 500000, 0, -10, 900000]}
    wanted = np.degrees(np.arctan2(-500000, -900000))  # the pole is at 0, 0
    assert find_place(polar, (9, 9)).north == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("shape", [(5, 7), (40, 40)])
def test_a_map_without_a_place_says_so(shape):
    """Scattered pixels that are laid out as a raster look like a landscape."""
    figure = draw_maps({"": np.zeros((*shape, 4), np.uint8)}, shape, {}, "title")
    assert "names no place" in texts(figure)
    assert "neighbours may lie far apart" in texts(figure)
    assert re.search(r"\d pixels", texts(figure))


SHAPES = [(120, 500), (500, 90), (20, 25), (384, 1), (60, 60)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_overlaps_or_is_cut(shape, count):
    """Of wide, tall and tiny maps with 20 classes of long names, and a title longer than they."""
    codes = np.resize(np.arange(21, dtype=np.uint8), shape)
    names = {str(code): {"name": f"forest {code} with " + "much " * code} for code in range(1, 21)}
    legend = class_legend(range(1, 21), names)
    panels = {f"errors of {i}": color_classes(codes, legend) for i in range(count)}
    info = {"crs": "EPSG:32631", "transform": TURNED}
    entries = list_classes(codes, legend, info)
    figure = draw_maps(panels, shape, info, "a long title " * 9, entries, "a note")
    figure.canvas.draw()
    maps = [axes for axes in figure.axes if axes.images]
    boxes = [one.get_tightbbox() for one in maps]
    boxes += [text.get_window_extent() for text in figure.texts]
    boxes += [one.get_window_extent() for one in figure.axes[-1].texts if one.get_text()]
    boxes.append(figure.legends[0].get_window_extent())
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert not Bbox.intersection(box.padded(-1), other.padded(-1)), (box, other)


def test_a_legend_is_ordered_by_area(tmp_path):
    codes = np.repeat(np.array([3, 2, 1, 0], np.uint8), (1, 5, 3, 1)).reshape(1, 10)
    entries = list_classes(codes, class_legend(range(1, 5), {"0": {}}), GEO)
    texts = [text.replace("\u00a0", " ") for _, text in entries]
    sizes = ["class 2: 55.6%, 0.05 ha", "class 1: 33.3%, 0.03 ha", "class 3: 11.1%, 0.01 ha"]
    assert texts == [*sizes, "no data"]
    assert [color for color, _ in entries] == [PALETTE[1], PALETTE[0], PALETTE[2], "white"]


def test_a_pdf_has_text_and_all_pixels_of_the_map(place, tmp_path, capsys):
    (folder,) = map_tile(place, tmp_path / "out", format="pdf")
    pictures = {path.name for path in folder.glob("*.pdf")}
    assert pictures == {"classification_map.pdf", "confidence.pdf"}
    content = (folder / "classification_map.pdf").read_bytes()
    assert b"/Width 16" in content and b"/Height 24" in content, "not resampled"
    assert b"/FontType 42" in content or b"/Subtype /CIDFontType2" in content
    before = (folder / "infer.json").read_bytes()
    map_tile(place, folder, format="svg")  # a map that is done gets another format
    assert "drawn: classification_map.svg, confidence.svg" in capsys.readouterr().out
    assert "easting [km]" in (folder / "classification_map.svg").read_text()
    assert (folder / "infer.json").read_bytes() == before
    run(read_inference_map, map_path=folder / "classification_map.npy", format="pdf")
    assert (folder / "inference_map.pdf").exists() and not (folder / "inference_map.png").exists()
    with pytest.raises(InputError, match="format=gif: wanted one of png, pdf, svg"):
        run(read_inference_map, map_path=folder / "classification_map.npy", format="gif")


def test_a_class_has_one_colour_whatever_classes_are_beside_it():
    """Regression: a colour was given by the place in the list, and other pictures had others."""
    few, many = class_legend([2, 7], {"2": {"name": "Corn"}}), class_legend(range(1, 30), {"0": {}})
    assert {code: few[code]["color"] for code in few} == {2: PALETTE[1], 7: PALETTE[6]}
    assert all(few[code]["color"] == many[code]["color"] for code in few)


def test_pictures_and_page_show_a_class_in_one_colour(place, tmp_path):
    tile = make_tile(tmp_path / "MGRS-B", classes={"40": {"name": "Cropland"}, "95": {"name": "X"}})
    (folder,) = map_tile(place, tmp_path / "out", tile_path=tile)
    picture, shape = folder / "classification_map.png", (24, 16)
    run(explore, representation_path=folder / "representation_map.npy")
    page = (folder / "explore.html").read_text()
    facts = json.loads(re.search(r'id="facts-json">(.*?)</script>', page, re.S)[1])
    (scene,) = facts["scenes"]
    run(read_inference_map, map_path=folder / "classification_map.npy")
    codes = np.load(folder / "classification_map.npy")
    for code in np.unique(codes[codes > 0]):
        (color,) = {tuple(one) for one in map_in(picture, shape)[codes == code].tolist()}
        assert rgb(scene.get("mapClasses", scene["classes"])[str(code)]["color"]) == color
        (beside,) = {
            tuple(one)
            for one in map_in(folder / "inference_map.png", shape, 1, 3)[codes == code].tolist()
        }
        assert beside == color
    assert f'"{" ".join(PALETTE)}"' in page, "for classes that are made in the page"


def test_the_inference_map_shows_labels_and_errors_beside_the_map(place, tmp_path):
    """Regression: it was the same picture as classification_map.png."""
    (folder,) = map_tile(place, tmp_path / "out")
    run(read_inference_map, map_path=folder / "classification_map.npy")
    codes, shape = np.load(folder / "classification_map.npy"), (24, 16)
    labels = np.load(place / "MGRS-A/labels.npy")
    errors = map_in(folder / "inference_map.png", shape, 2, 3)
    both = codes > 0
    assert (errors[both & (codes == labels)] == rgb(RIGHT_COLOR)).all()
    assert (errors[both & (codes != labels)] == rgb(WRONG_COLOR)).all()
    assert (errors[~both] == 255).all()
    drawn = map_in(folder / "inference_map.png", shape, 0, 3)
    assert len({tuple(color) for color in drawn[labels == 40].tolist()}) == 1


def test_false_colour_has_the_scale_of_the_tile(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out", checkpoint="pretrained")
    (picture,) = run(create_false_color_map, representation_path=folder / "representation_map.npy")
    image = plt.imread(picture)
    assert min(image.shape[:2]) > 512
    frame = find_frame((24, 16))
    assert bar_length(image, frame) / frame.factor * 10 == pytest.approx(50, rel=0.02)


def test_a_map_of_one_column_is_a_picture_that_can_be_read(tmp_path):
    """Regression: of a table's N x 1 pixels the title was cut off, and a training ended."""
    for shape in ((384, 1), (1, 384), (5000, 1)):
        rgba = np.zeros((*shape, 4), np.uint8)
        plot_false_color(rgba, shape, tmp_path / "map.png", "MGRS-points, step 4", {})
        height, width = plt.imread(tmp_path / "map.png").shape[:2]
        assert width > 512
        assert height > 100


def test_the_pictures_of_two_years_have_other_titles(place, tmp_path):
    """Regression: those of one place were called alike; infer.json keeps the year for all."""
    titles = []
    for year in (2018, 2019):
        tile = make_tile(tmp_path / str(year) / "MGRS-A")
        days = np.load(tile / "doys.npy")
        dates = [str(np.datetime64(f"{year}-01-01") + int(day) - 1) for day in days]
        info = json.loads((tile / "tile.json").read_text()) | {"dates": dates}
        (tile / "tile.json").write_text(json.dumps(info))
        (folder,) = map_tile(place, tmp_path / f"out{year}", tile_path=tile)
        info = json.loads((folder / "infer.json").read_text())
        figure = draw_maps({"": np.zeros((16, 16, 4), np.uint8)}, (16, 16), info, info["tile"])
        titles.append(figure.texts[0].get_text())
    assert titles == ["MGRS-A, 2018", "MGRS-A, 2019"]


def test_the_colours_of_a_quantity_lie_between_its_percentiles():
    values = np.append(np.arange(101.0), np.nan)
    assert find_bar(values, "height [m]")[:3] == (2, 98, "height [m]")
    assert find_bar(values[-1:], "height [m]")[:2] == (0, 1), "of no value"


def test_the_arrow_points_to_the_north():
    """Turned clockwise by 30 degrees, north lies to the left of up or to the right."""
    cosine, sine = np.cos(np.radians(30)), np.sin(np.radians(30))
    for sign in (1, -1):
        turned = [10 * cosine, sign * 10 * sine, 500000, sign * 10 * sine, -10 * cosine, 5400000]
        info = {"crs": "EPSG:32631", "transform": turned}
        figure = draw_maps({"": np.zeros((100, 120, 4), np.uint8)}, (100, 120), info, "title")
        (arrow,) = (text for text in figure.axes[-1].texts if hasattr(text, "xyann"))
        across, down = np.subtract(arrow.xy, arrow.xyann)
        north = find_place(info, (100, 120)).north
        assert abs(abs(north) - 30) < 1
        assert np.degrees(np.arctan2(across, -down)) == pytest.approx(north, abs=0.1)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_map_is_the_same_file(tmp_path, kind):
    """No time and no random number: a picture under version control changes with its map."""
    paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
    for path in paths:
        figure = draw_maps({"": np.zeros((9, 9, 4), np.uint8)}, (9, 9), {}, "title")
        save_picture(figure, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    content = paths[0].read_bytes()
    assert b"CreationDate" not in content and b"<dc:date>" not in content


def test_a_bar_has_the_colours_and_numbers_of_its_values():
    values = np.array([[np.nan, 20.0], [30.0, 40.0]])
    bar = find_bar(values, "height [m]")
    rgba = bar.color(values)
    assert (rgba[..., 3] == [[0, 255], [255, 255]]).all(), "no value is transparent"
    figure = draw_maps({"": rgba}, (2, 2), {}, "title", bar=bar)
    limits = [axes.get_ylim() for axes in figure.axes if axes.get_ylabel() == "height [m]"]
    np.testing.assert_allclose(limits, [(bar.low, bar.high)])


def test_all_scripts_that_draw_have_the_format(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out")
    keys = {"representation_path": folder / "representation_map.npy", "format": "svg"}
    run(create_false_color_map, **keys)
    assert (folder / "false_color.svg").exists() and not (folder / "false_color.png").exists()
    map_tile(place, folder, overwrite=True, format="png", min_valid=4)
    assert not (folder / "false_color.svg").exists(), "of the map that was replaced"
