"""Labels in the page, by hand: brush, undo, keys, fingers; sessions, files, hostile names."""

import io
import json
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser import (
    HOSTILE,
    SIZE,
    WKT,
    draw_clicks,
    label_count,
    make_page,
    random_map,
    save_map,
    truth,
)
from helpers import make_tile, run
from rasterio.warp import transform as reproject

import train_classification
from tiles import Tile

pytest_plugins = ["browser"]  # its fixtures
pytestmark = pytest.mark.slow


def test_brush_erase_delete_and_undo(page):
    page.js("explore.view.auto = false")
    page.label([(10, 10, 1), (12, 40, 2)])
    page.page.keyboard.press("b")
    page.js("explore.chooseClass(1)")
    page.page.keyboard.press("[")  # radius 1: a plus of five pixels
    left, top = page.js("explore.map.toScreen(20.5, 30.5)")
    box = page.page.locator("#map").bounding_box()
    step = page.js("explore.map.zoom")
    page.page.mouse.move(box["x"] + left, box["y"] + top)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + left + 10 * step, box["y"] + top, steps=3)
    page.page.mouse.up()
    counts = page.js(
        "[...explore.labels.counts()].map(([code, one]) => [code, one.clicks, one.pixels])"
    )
    painted = 13 + 2 * 11  # a plus of five pixels along ten
    assert counts == [[1, 2, 1 + painted], [2, 1, 1]]
    page.page.keyboard.press("Control+z")
    assert label_count(page) == 2
    page.page.keyboard.press("Control+Shift+z")
    assert label_count(page) == 2 + painted
    page.page.keyboard.press("e")
    page.click(30, 25)
    assert label_count(page) == 2 + painted - 5
    page.page.click("#classes li:nth-child(2) button")
    assert label_count(page) == 1 + painted - 5
    assert page.page.locator("#classes li").count() == 1
    for _ in range(3):
        page.page.click("#undo")
    assert label_count(page) == 2
    assert page.page.locator("#classes li").count() == 2
    page.page.click("#clearLabels")
    assert label_count(page) == 0
    page.page.click("#undo")
    assert label_count(page) == 2


def test_keys_alone_do_it_all(page):
    page.page.locator("#map").focus()
    for key in ("l", "ArrowLeft", "Enter", "Shift+ArrowRight", "Enter"):
        page.page.keyboard.press(key)
    assert label_count(page) == 2
    rows = page.js("[...explore.labels.byPixel.keys()]")
    assert rows[1] - rows[0] == 10
    page.page.keyboard.press("v")
    page.page.keyboard.press("Enter")
    page.until("explore.found.similarity")
    zoom = page.js("explore.map.zoom")
    page.page.keyboard.press("+")
    assert page.js("explore.map.zoom") > zoom
    page.page.keyboard.press("h")
    assert page.js("explore.map.layers.length") == 1
    page.page.keyboard.press("?")
    assert page.page.is_visible("#help")


def test_fingers_tap_move_and_zoom(opened, place):
    page = opened(place / "explore.html", has_touch=True, viewport={"width": 400, "height": 800})
    box = page.page.locator("#map").bounding_box()
    assert box["height"] > 250
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.touchscreen.tap(x, y)
    page.until("explore.found.similarity")
    touch = page.context.new_cdp_session(page.page)
    pixel = page.js("explore.pixel")
    zoom = page.js("explore.map.zoom")

    def fingers(kind, *places):
        points = [{"x": x + dx, "y": y + dy, "id": i} for i, (dx, dy) in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", (-20, 0), (20, 0))
    fingers("touchMove", (-60, 0), (60, 0))
    fingers("touchEnd")
    assert page.js("explore.map.zoom") == pytest.approx(3 * zoom, rel=0.05)
    center = page.js("explore.map.x")
    fingers("touchStart", (30, 30))
    fingers("touchMove", (80, 30))
    fingers("touchEnd")
    assert page.js("explore.map.x") < center
    assert page.js("explore.pixel") == pixel  # neither was a tap
    assert page.js("document.documentElement.scrollWidth") <= 400


def test_a_map_that_is_ready_leaves_a_name_that_is_being_typed(page):
    page.label([(2, 3, 1), (5, 8, 2)])
    name = "#classes li:nth-child(1) input[type=text]"
    page.page.fill(name, "maize")
    page.learned()
    page.js("explore.refresh()")
    assert page.page.input_value(name) == "maize"
    page.page.fill(name, "  ")  # no name at all becomes one when the field is left
    page.page.keyboard.press("Tab")
    assert page.page.input_value(name) == page.js("explore.labels.classes[0].name") == "Class 1"
    page.page.fill(name, " maize ")
    page.page.keyboard.press("Enter")
    assert page.page.input_value(name) == page.js("explore.labels.classes[0].name") == "maize"


def test_sessions_stay_in_the_browser_and_in_files(page, opened, place, tmp_path):
    page.label([(5, 5, 1), (8, 40, 2)])
    page.page.fill("#classes li:nth-child(1) input[type=text]", "Maïs <b>")
    page.page.keyboard.press("Tab")
    page.until("localStorage.getItem(explore.storage.key)?.includes('Maïs')")
    page.reload()
    assert label_count(page) == 2
    page.page.click("#tabFiles")
    name, content = page.download("#saveSession")
    assert name == "session.json"
    other = opened(place / "explore.html")
    assert label_count(other) == 0
    file = tmp_path / "session.json"
    file.write_bytes(content)
    other.page.set_input_files("#sessionFile", file)
    other.until("explore.labels.byPixel.size === 2")
    assert other.js("explore.labels.classes[0].name") == "Maïs <b>"
    assert page.js("[...explore.labels.byPixel.keys()]") == other.js(
        "[...explore.labels.byPixel.keys()]"
    )
    more = json.loads(content)
    more["labels"] += [{**more["labels"][0], "row": 9999}, {**more["labels"][0], "code": 77}]
    file.write_text(json.dumps(more))
    other.page.set_input_files("#sessionFile", file)
    other.until("document.getElementById('status').textContent.startsWith('2 labels loaded; 2')")
    for wrong, message in (
        ("{", "no JSON"),
        ("[1]", "no session"),
        ('{"format": 1}', "no session"),
    ):
        file.write_text(wrong)
        other.page.set_input_files("#sessionFile", file)
        other.until(f"document.getElementById('status').textContent.includes('{message}')")
    assert label_count(other) == 2


HOSTILE_VIEWS = [
    {"background": "toString", "overlay": "constructor", "method": "valueOf"},
    {"background": "__proto__", "overlay": ["none"], "k": [5], "brush": "3", "opacity": True},
    {"background": None, "overlay": 7, "k": 0, "brush": 1e9, "opacity": -1, "images": {}},
    {"k": 2.5, "brush": 2.5, "hidden": "yes", "auto": {}},
    "text",
    7,
]
HOSTILE_PARTS = {
    "classes": [None, 7, {}, {"code": "1"}, {"code": [2]}, {"code": 0}, {"code": 256}]
    + [{"code": 1, "name": {"toString": 1}, "color": ["#ff0000"]}, {"code": 1, "name": "twice"}],
    "labels": [None, 7, {}, {"tile": "toString", "row": 0, "column": 0, "code": 1, "click": 0}]
    + [{"tile": "out", "row": "1", "column": [1], "code": 1, "click": 0}]
    + [{"tile": "out", "row": 1, "column": 1, "code": "1", "click": 0}]
    + [{"tile": "out", "row": 2, "column": 3, "code": 1, "click": 0}],
}


def test_a_hostile_session_leaves_a_page_that_works(opened, tmp_path):
    """Regression: view.background="toString" stopped the page for good, also after a reload."""
    page = opened(make_page(representation_path=save_map(tmp_path / "out", random_map())))
    for view in HOSTILE_VIEWS:
        session, before = {"format": 1, "view": view, **HOSTILE_PARTS}, page.js("explore.view")
        assert page.js("one => explore.restore(one)", session) == {"taken": 1, "left": 6}
        assert page.js("explore.view") == before
        assert page.js("explore.labels.classes") == [
            {"code": 1, "name": "Class 1", "color": page.js("explore.labels.classes[0].color")}
        ]
        page.reload()
        page.look(5, 5)
        assert label_count(page) == 1
    for odd in (None, [], 7, {"format": 1, "classes": {}, "labels": []}):
        caught = "one => { try { explore.restore(one); } catch (error) { return error.message; } }"
        assert page.js(caught, odd).startswith("This file is no session of this page")
    assert label_count(page) == 1
    page.js("localStorage.setItem('explore:theme', 'toString')")
    page.open()
    assert page.js("document.documentElement.dataset.theme") in ("dark", "light")


@pytest.mark.parametrize("how", ["clear", "undo", "erase", "session"])
def test_the_map_goes_with_its_labels(opened, tmp_path, how):
    """Regression: after Clear the page kept the old map, and Save wrote it."""
    page = opened(make_page(representation_path=save_map(tmp_path / "out", random_map())))
    page.label([(5, 5, 1), (15, 25, 2)])
    page.learned()
    page.page.uncheck("#auto")
    assert page.js("explore.view.overlay") == "map"
    if how == "clear":
        page.page.click("#clearLabels")
    elif how == "undo":
        page.page.click("#undo")
    elif how == "erase":
        page.js("explore.labels.set([15 * 30 + 25], 0)")
    else:
        page.js("explore.restore(explore.session())")
    assert page.js("explore.found.prediction") is None
    assert page.js("explore.view.overlay") == "none"
    page.page.click("#tabFiles")
    assert page.page.is_disabled("#saveMap")
    assert page.page.is_disabled("#savePicture")


def test_a_map_that_is_being_made_of_labels_that_are_gone_is_not_shown(opened, tmp_path):
    page = opened(make_page(representation_path=save_map(tmp_path / "out", random_map())))
    page.js("explore.view.auto = false")
    page.label([(5, 5, 1), (15, 25, 2)])
    page.js("(explore.learn(), explore.labels.clear())")
    page.until("!explore.learning")
    assert page.js("explore.found.prediction") is None
    page.page.click("#undo")
    page.page.click("#learn")
    page.learned()
    assert "changed" not in page.page.inner_text("#learned")
    page.js("explore.labels.set([7], 1)")
    assert "The labels have changed since then" in page.page.inner_text("#learned")


def test_classes_of_two_tiles_are_joined_by_name(opened, tmp_path):
    """Regression: labels of a tile went to the class of the page that has the same code."""
    paths = []
    for number, names in enumerate((["maize", "wheat"], ["wheat", "maize"])):
        classes = {str(code): {"name": name} for code, name in enumerate([*names, "other"], 1)}
        tile = make_tile(tmp_path / f"MGRS-{number}", (4, 20, 30, 4), classes=classes)
        labels = np.full((20, 30), 1 + (number == 1), np.uint8)
        labels[10:], labels[15:] = 2 - (number == 1), 3
        np.save(tile / "labels.npy", labels)  # maize in the north, wheat, and other in the south
        folder = tmp_path / f"out{number}"
        made = {"1": {"name": "of the map"}} if number else classes
        paths.append(save_map(folder, random_map(), tile_path=str(tile), classes=made))
        np.save(folder / "classification_map.npy", np.ones((20, 30), np.uint8))
    page = opened(make_page(representation_path=f"{paths[0]},{paths[1]}"))
    page.page.click("#tabLabels")
    page.page.click("#drawTen")
    page.page.select_option("#scene", label="MGRS-1")
    page.page.click("#drawTen")
    assert "maize is 2 in this tile and 1 in the page" in page.page.inner_text("#status")
    assert page.js("explore.labels.classes.map(one => one.name)") == ["maize", "wheat", "other"]
    found = page.js("[...explore.labels.byPixel].map(([pixel, {code}]) => [pixel, code])")
    assert len(found) == 60
    for pixel, code in found:
        row = pixel % 600 // 30
        assert code == (1 if row < 10 else 2 if row < 15 else 3)
    page.learned()
    page.js("explore.setTool('look')")
    page.look(1, 1)
    shown = page.page.inner_text("#pixelFacts")
    assert "Class map\nof the map" in shown
    assert "Tile's label\nmaize" in shown
    assert "Your label\nmaize" in shown or "Your map\nmaize" in shown
    page.page.click("#tabFiles")
    labels = np.load(io.BytesIO(page.download("#saveLabels")[1]), allow_pickle=False)
    names = json.loads(page.download("#saveTileJson")[1])["classes"]
    assert {names[str(code)]["name"] for code in np.unique(labels[:10])[1:]} == {"maize"}


def test_two_classes_of_one_name_stay_two(opened, tmp_path):
    page = opened(make_page(representation_path=save_map(tmp_path / "out", random_map())))
    take = "classes => [...explore.labels.takeClasses(classes)]"
    one = {"name": "other", "color": "#ff0000"}
    page.js("explore.labels.addClass({code: 2, name: 'other'})")
    assert page.js(take, {"1": one, "2": one}) == [[2, 2], [1, 1]]
    assert page.js(take, {"1": one, "7": one, "9": one}) == [[1, 1], [7, 2], [9, 9]]
    full = "explore.labels.replace(Array.from({length: 255}, (_, i) => ({code: i + 1})), [])"
    page.js(full)
    assert page.js(take, {"1": {"name": "new", "color": "#ff0000"}}) == [[1, 0]]


def test_exported_labels_read_back_and_train(page, place, tmp_path):
    clicks = draw_clicks(place, 40)
    page.js("explore.view.auto = false")
    page.page.click("#tabLabels")
    page.page.click("#takeClasses")
    codes = page.js("explore.labels.classes.map(one => one.code)")
    _, tile = truth(place)
    assert codes == np.unique(tile.labels).tolist()
    labels = [
        {"pixel": row * SIZE + column, "code": codes[code - 1]} for row, column, code in clicks
    ]
    page.js("labels => explore.labels.setMany(labels)", labels)
    page.page.click("#tabFiles")
    data = tmp_path / "data/clicked/processed"
    shutil.copytree(tile.path, data / "MGRS-SIM1")
    for button in ("#saveLabels", "#saveTileJson"):
        name, content = page.download(button)
        (data / "MGRS-SIM1" / name).write_bytes(content)
    wanted = np.zeros((SIZE, SIZE), np.uint8)
    for row, column, code in clicks:
        wanted[row, column] = codes[code - 1]
    found = Tile(data / "MGRS-SIM1")
    np.testing.assert_array_equal(found.labels, wanted)
    assert found.info["classes"] == tile.info["classes"]
    assert found.info["crs"] == tile.info["crs"]
    scores = run(
        train_classification,
        checkpoint_path=place / "encoder/last.pt",
        base_path=tmp_path,
        dataset_name="clicked",
        output_dir=tmp_path / "out",
        block_size=4,
        epochs=2,
    )
    assert {entry["name"] for entry in scores["classes"].values()} == {
        entry["name"] for entry in tile.info["classes"].values()
    }


def test_geojson_and_picture(page, place):
    clicks = [(3, 5, 1), (40, 60, 2), (41, 60, 2)]
    page.label(clicks)
    page.learned()
    page.page.click("#tabFiles")
    _, content = page.download("#saveGeojson")
    features = json.loads(content)["features"]
    _, tile = truth(place)
    a, _, c, _, e, f = tile.info["transform"]
    for (row, column, code), feature in zip(clicks, features, strict=True):
        lon, lat = reproject(
            tile.info["crs"], "EPSG:4326", [a * (column + 0.5) + c], [e * (row + 0.5) + f]
        )
        found = feature["geometry"]["coordinates"]
        assert 111_320 * np.hypot(found[0] - lon[0], found[1] - lat[0]) < 0.1
        assert feature["properties"]["code"] == code
        assert (feature["properties"]["row"], feature["properties"]["column"]) == (row, column)
    _, content = page.download("#savePicture")
    picture = plt.imread(io.BytesIO(content))
    zoom = round(900 / SIZE)
    codes = page.array("explore.found.prediction.classes").reshape(SIZE, SIZE)
    colors = page.js("explore.labels.classes.map(one => one.color)")
    for row, column in ((3, 5), (40, 60), (20, 20)):
        drawn = picture[24 + row * zoom + zoom // 2, 24 + column * zoom + zoom // 2, :3]
        if codes[row, column] < 255:
            assert plt.matplotlib.colors.to_hex(drawn) == colors[int(codes[row, column])]


def test_areas_are_of_the_ground(opened, tmp_path):
    """Regression: in Web Mercator at 60 degrees north areas were four times too large."""
    info = {"crs": "EPSG:3857", "transform": [20, 0, 0, 0, -20, 8399738]}
    page = opened(make_page(representation_path=save_map(tmp_path, random_map(), **info)))
    page.look(5, 5)
    hectares = page.js("explore.scene.place.hectares")
    assert hectares == pytest.approx(0.01, rel=0.01)
    text = page.page.inner_text("#similarFacts")
    pixels = 20 * 30
    assert " ha of this map" in text
    share = float(re.search(r"\(([\d.]+) %", text)[1]) / 100
    assert float(text.split(" ha")[0]) == pytest.approx(share * pixels * 0.01, abs=0.1)


def test_hostile_names_do_not_run(opened, tmp_path):
    legend = {"1": {"name": HOSTILE, "color": "#ff0000"}, "2": {"name": "{{SCRIPT}}{{BLOBS}}"}}
    tile = make_tile(
        tmp_path / "MGRS-<img src=x onerror=hacked=1>", (20, 20, 30, 4), classes=legend
    )
    info = json.loads((tile / "tile.json").read_text())
    hostile = {"bands": ["B04", "B08", HOSTILE, "X"], "crs": WKT}
    (tile / "tile.json").write_text(
        json.dumps({**info, **hostile, "transform": [1, 0, 0, 0, -1, 0]})
    )
    np.save(tile / "labels.npy", np.random.default_rng(0).integers(1, 3, (20, 30), np.uint8))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile), tile=HOSTILE)
    page = opened(make_page(representation_path=path, title=HOSTILE, bands=f"B04,B08,{HOSTILE}"))
    page.look(5, 5)
    page.js("explore.setOverlay('labels')")
    page.page.mouse.move(0, 0)
    page.js("explore.date = 3; explore.drawYear()")
    page.page.click("#tabLabels")
    page.page.click("#drawTen")
    page.page.fill("#classes li:nth-child(2) input[type=text]", HOSTILE)
    page.page.keyboard.press("Tab")
    page.learned()
    page.reload()
    assert page.js("typeof hacked") == "undefined"
    assert page.js("document.querySelectorAll('img, aside script, header script').length") == 0
    assert page.page.inner_text("#title") == HOSTILE
    assert HOSTILE[:60] in page.js("explore.labels.classes.map(one => one.name)")


def test_what_is_unlike_the_training_is_shown(opened, tmp_path):
    far = np.linspace(0, 2, 600, dtype=np.float32).reshape(20, 30)
    far[:2] = np.nan
    path = save_map(tmp_path, random_map(), applicability_threshold=0.8)
    np.save(tmp_path / "applicability.npy", far)
    page = opened(make_page(representation_path=path))
    page.js("explore.setOverlay('applicability')")
    share = (far > 0.8).sum() / np.isfinite(far).sum()
    assert f"{100 * share:.1f} %" in page.page.inner_text("#legend")
    painted = """[...explore.map.layers[1].image.getContext('2d')
        .getImageData(0, 0, 30, 20).data.filter((_, i) => i % 4 === 3)]"""
    assert (np.reshape(page.js(painted), far.shape) > 0).tolist() == (far > 0.8).tolist()
    for row, words in ((5, "yes"), (15, "no: outside")):
        page.look(row, 7)
        assert f"Like the training\n{words}" in page.page.inner_text("#pixelFacts")
