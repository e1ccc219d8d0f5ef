"""Pictures of maps: large enough, exact colours, scale and place; one class has one colour."""

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from map_helpers import GEO, make_place, make_tile, map_in, map_tile, run

import create_false_color_map
import explore
import read_inference_map
from maps.land_cover import PALETTE, class_legend
from maps.pictures import (
    LEFT,
    RIGHT_COLOR,
    TOP,
    WRONG_COLOR,
    draw_maps,
    find_bar,
    find_frame,
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
    assert min(frame.height, frame.width) >= min(512, min(shape) // step * (2000 // max(shape)))
    edge = np.s_[2:-2, 2:-2]  # a line around the map covers the rest of it
    drawn = map_in(tmp_path / "map.png", shape)[edge]
    np.testing.assert_array_equal(drawn, table[codes[::step, ::step]][edge])
    image = plt.imread(tmp_path / "map.png")[..., :3]
    whole = image[TOP : TOP + frame.height, LEFT : LEFT + frame.width][2:-2, 2:-2]
    found = {tuple(color) for color in (whole * 255).round().astype(int).reshape(-1, 3)}
    assert found <= {tuple(color) for color in table.tolist()}


def bar_length(image, frame):
    """Pixels of the scale bar, the longest black line from the left edge of the map on."""
    below = image[TOP + frame.height + 30 :, LEFT : LEFT + frame.width, :3].max(-1) > 0.5
    return below.argmax(1).max()


def texts(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


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
    ticks = figure.axes[0].get_xticks()
    assert bool(len(ticks)) == (transform != TURNED), "coordinates along the edges"


@pytest.mark.parametrize("shape", [(5, 7), (40, 40)])
def test_a_map_without_a_place_says_so(shape):
    """Scattered pixels that are laid out as a raster look like a landscape."""
    figure = draw_maps({"": np.zeros((*shape, 4), np.uint8)}, shape, {}, "title")
    assert "names no place" in texts(figure)
    assert "neighbours may lie far apart" in texts(figure)
    assert not len(figure.axes[0].get_xticks())


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
            for one in map_in(folder / "inference_map.png", shape, 1)[codes == code].tolist()
        }
        assert beside == color
    assert f'"{" ".join(PALETTE)}"' in page, "for classes that are made in the page"


def test_the_inference_map_shows_labels_and_errors_beside_the_map(place, tmp_path):
    """Regression: it was the same picture as classification_map.png."""
    (folder,) = map_tile(place, tmp_path / "out")
    run(read_inference_map, map_path=folder / "classification_map.npy")
    codes, shape = np.load(folder / "classification_map.npy"), (24, 16)
    labels = np.load(place / "MGRS-A/labels.npy")
    errors = map_in(folder / "inference_map.png", shape, 2)
    both = codes > 0
    assert (errors[both & (codes == labels)] == rgb(RIGHT_COLOR)).all()
    assert (errors[both & (codes != labels)] == rgb(WRONG_COLOR)).all()
    assert (errors[~both] == 255).all()
    drawn = map_in(folder / "inference_map.png", shape, 0)
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
