"""The page in a browser: what it shows and maps is what numpy and scikit-learn say."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from browser import GEO, WKT, draw_clicks, label_count, make_page, random_map, save_map, truth
from helpers import ENVIRONMENT, ROOT, make_tile
from rasterio.warp import transform as reproject
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tiles import Tile

pytest_plugins = ["browser"]  # its fixtures
pytestmark = pytest.mark.slow


def test_opens_from_a_file_and_asks_for_nothing(page, place):
    assert {url.split(":")[0] for url in page.requests} <= {"file", "blob"}
    assert [url for url in page.requests if url.startswith("file")] == [
        (place / "explore.html").resolve().as_uri()
    ]
    source = (place / "explore.html").read_text()
    assert not re.findall(r"(?:src|href)=.(?!#)|@import|url\(|https?://(?!www.w3.org)", source)
    page.js("fetch('http://127.0.0.1:9/').catch(() => 0)")
    page.js("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}))")
    page.until("document.images[0].complete")
    assert len(page.complaints) >= 2
    assert all("Content Security Policy" in line for line in page.complaints)
    page.complaints.clear()
    assert page.js("explore.times.open") > 0


def test_a_click_shows_that_pixels_values(page, place):
    representations, tile = truth(place)
    row, column = np.argwhere(np.isfinite(representations).all(-1))[1234].tolist()
    page.look(row, column)
    series = page.js("explore.series")
    assert series["bands"][0]["name"] == "B02"
    clear = tile.masks[:, row, column] > 0
    assert series["clear"] == clear.tolist()
    assert series["days"] == tile.doys.tolist()
    for band in series["bands"]:
        wanted = tile.bands[:, row, column, tile.band_names.index(band["name"])] / 10000
        np.testing.assert_allclose(np.nan_to_num(band["values"]), wanted, atol=1e-6)
    red, infrared = (
        tile.bands[:, row, column, tile.band_names.index(b)].astype(float) for b in ("B04", "B08")
    )
    ndvi = np.array(page.js("explore.ndvi"), float)
    np.testing.assert_allclose(ndvi[clear], ((infrared - red) / (infrared + red))[clear], atol=1e-6)
    shown = page.page.inner_text("#pixelFacts")
    a, _, c, _, e, f = tile.info["transform"]
    x, y = a * (column + 0.5) + c, e * (row + 0.5) + f
    lon, lat = reproject(tile.info["crs"], "EPSG:4326", [x], [y])
    assert f"{row}, {column}" in shown
    assert f"{x:.1f}, {y:.1f}" in shown
    assert f"{lat[0]:.5f}° N, {lon[0]:.5f}° E" in shown
    name = tile.info["classes"][str(tile.labels[row, column])]["name"]
    confidence = np.load(place / "confidence.npy")[row, column]
    assert shown.count(name) == 2
    assert f"({100 * confidence:.0f} %)" in shown or abs(confidence * 100 % 1 - 0.5) < 0.25
    assert f"Clear dates\n{clear.sum()}" in shown


def cosines(x, number):
    """Cosine of one row of x (N, D) to all."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x[number]


def test_similarity_equals_numpys_cosine(page, place):
    """Of the embeddings themselves; or, about their mean, of their principal components."""
    representations, _ = truth(place)
    valid = np.isfinite(representations).all(-1)
    x = representations[valid].astype(np.float64)
    pca = PCA(page.js("explore.facts.embedding.dimensions"), random_state=0).fit(x)
    for number in (100, 2000):
        row, column = np.argwhere(valid)[number].tolist()
        for centred, y in ((False, x), (True, pca.transform(x))):
            page.js(f"explore.view.centred = {str(centred).lower()}")
            page.look(row, column)
            found = page.array("explore.found.similarity").reshape(valid.shape)
            assert np.abs(found[valid] - cosines(y, number)).max() < 0.02
            assert np.isnan(found[~valid]).all()
    assert "have a cosine similarity of" in page.page.inner_text("#similarFacts")


@pytest.mark.parametrize("method", ["softmax", "nearest"])
def test_ten_labels_a_class_map_like_scikit_learn(page, place, method):
    representations, tile = truth(place)
    clicks = draw_clicks(place, 10)
    page.js("explore.view.auto = false")
    page.label(clicks)
    assert page.js("explore.labels.byPixel.size") == len(clicks)
    page.page.check(f"input[name=method][value={method}]", force=True)
    page.page.click("#learn")
    page.learned()
    page.page.click("#tabFiles")
    _, content = page.download("#saveMap")
    found = np.load(io.BytesIO(content), allow_pickle=False)
    valid = np.isfinite(representations).all(-1)
    x = representations[valid] / np.sqrt(representations[valid].var(0).mean())
    codes = np.zeros(valid.shape, int)
    for row, column, code in clicks:
        codes[row, column] = code
    labelled = codes[valid] > 0
    model = LogisticRegression(max_iter=2000) if method == "softmax" else KNeighborsClassifier(5)
    predicted = model.fit(x[labelled], codes[valid][labelled]).predict(x)
    assert (found[valid] == predicted).mean() > 0.97
    assert (found[~valid] == 0).all()
    if method == "softmax":
        sure = page.array("explore.found.prediction.confidence").reshape(valid.shape)[valid]
        logits = model.decision_function(x) / page.js("explore.score.temperature")
        assert np.abs(sure / 255 - softmax(logits, 1).max(1)).mean() < 0.03
    score = page.js("explore.score")
    assert score["clicks"] == len(clicks)
    names = np.unique(tile.labels)
    wanted = (names[predicted - 1] == tile.labels[valid]).mean()
    assert score["right"] / score["clicks"] == pytest.approx(wanted, abs=0.2)


def test_clicks_are_scored_by_models_that_did_not_see_them(opened, tmp_path):
    """With classes at random, a model that has seen the click would be right every time."""
    rng = np.random.default_rng(0)
    page = opened(make_page(representation_path=save_map(tmp_path, rng.normal(size=(20, 30, 6)))))
    page.js("explore.view.method = 'nearest'; explore.view.k = 1")
    pixels = rng.permutation(600)[:80].tolist()
    page.js("explore.labels.addClass(); explore.labels.addClass()")
    codes = rng.integers(1, 3, 80).tolist()
    labels = [{"pixel": pixel, "code": code} for pixel, code in zip(pixels, codes, strict=True)]
    page.js("labels => explore.labels.setMany(labels)", labels)
    page.learned()
    score = page.js("explore.score")
    assert score["clicks"] == 80
    assert 0.25 < score["right"] / 80 < 0.75
    assert [one["clicks"] for one in score["perClass"]] == [codes.count(1), codes.count(2)]
    found = page.array("explore.found.prediction.classes")
    assert (found[pixels] + 1 == codes).all()


def test_several_maps_share_colours_labels_and_classifier(opened, tmp_path):
    values = random_map((24, 30, 6))
    paths = [
        save_map(tmp_path / name, part, tile=f"year {name}")
        for name, part in (("2020", values), ("2021", values[:, ::-1]))
    ]
    page = opened(make_page(representation_path=f"{paths[0]},{paths[1]}"))
    page.label([(5, 5, 1), (15, 25, 2), (20, 3, 2)])
    page.learned()
    first = page.array("explore.found.prediction.classes.subarray(0, 720)").reshape(24, 30)
    second = page.array("explore.found.prediction.classes.subarray(720)").reshape(24, 30)
    np.testing.assert_array_equal(first, second[:, ::-1])
    page.page.select_option("#scene", label="year 2021")
    assert page.js("explore.map.marks.length") == 0
    page.page.keyboard.press("v")
    page.look(5, 24)
    assert page.page.inner_text("#pixelFacts").startswith("Row, column\n5, 24")
    assert page.page.is_visible("#noYear")
    similar = page.array("explore.found.similarity")
    assert similar[5 * 30 + 5] == pytest.approx(1, abs=1e-3)
    page.page.keyboard.press("l")
    page.click(7, 9)
    assert page.js("[...explore.labels.byPixel.keys()].at(-1)") == 720 + 7 * 30 + 9
    assert page.js("explore.map.marks.length") == 1


YEARS = ("2020", "2021")
DASHES = """(() => { const [kind, found] = [CanvasRenderingContext2D.prototype, new Set()];
    const { stroke } = kind;
    kind.stroke = function () { found.add(String(this.getLineDash())); stroke.call(this); };
    explore.drawYear();
    kind.stroke = stroke;
    return [...found].sort(); })()"""  # of the lines of the plot


def two_years(tmp_path, **info):
    """The tiles of one place in two years and, beside each, its map: [(tile, path of the map)]."""
    made = []
    for seed, year in enumerate(YEARS):
        folder = tmp_path / year / "MGRS-0"
        about = {"bands": ["B02", "B04", "B08", "X"], **GEO, **info}
        tile = make_tile(folder, (20, 20, 30, 4), seed=seed, **about)
        first = np.datetime64(f"{year}-01-01")
        dates = [str(first + int(day) - 1) for day in np.load(tile / "doys.npy")]
        (tile / "tile.json").write_text(json.dumps({**about, "dates": dates}))
        values = random_map(seed=seed)
        made.append(
            (tile, save_map(tmp_path / "out" / year / "MGRS-0", values, tile_path=str(tile)))
        )
    return made


def test_two_years_of_one_place(opened, tmp_path):
    """They have their own names, keep pixel and view, and the plot has the series of both."""
    (old, first), (new, second) = two_years(tmp_path)
    screen = {"width": 1280, "height": 720}
    page = opened(make_page(representation_path=f"{first},{second}"), viewport=screen)
    names = [f"MGRS-0 {year}" for year in YEARS]
    assert page.page.locator("#scene option").all_inner_texts() == names
    assert page.page.inner_text("#title") == ", ".join(names)
    page.page.keyboard.press("+")
    page.look(5, 7)
    page.label([(6, 8, 1)])
    page.page.keyboard.press("v")
    view, before = "[explore.map.x, explore.map.y, explore.map.zoom]", {}
    for name, tile, other in ((names[0], old, new), (names[1], new, old)):
        before[name] = page.js(view)
        page.page.select_option("#scene", label=name)
        assert page.js("explore.map.pixel") == {"row": 5, "column": 7}
        for series, where in (("series", tile), ("others[0].series", other)):
            wanted = np.load(where / "bands.npy")[:, 5, 7, 1] / 10000
            found = np.nan_to_num(page.js(f"explore.{series}.bands[1].values"))
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert page.js(view) == before[names[0]]
    assert page.js("explore.map.marks.length") == 0  # the label is of the other year
    page.page.click("#tabPixel")
    assert page.page.inner_text("#years").split("\n") == names[::-1]
    style = "name => getComputedStyle(document.querySelector('#years i.' + name)).borderTopStyle"
    assert [page.js(style, one) for one in ("solid", "dashed")] == ["solid", "dashed"]
    page.until("explore.found.similarity[600 + 5 * 30 + 7] > .999")  # like this year's pixel
    assert page.js(DASHES) == ["", "6,4"]
    assert in_view(page, "#year", screen)
    page.page.click("#tabFiles")
    page.page.select_option("#scene", label=names[0])
    assert page.download("#saveLabels")[0] == "labels_MGRS-0_2020.npy"


def test_maps_of_two_places_share_no_pixel(opened, tmp_path):
    east = {"transform": [20, 0, 400600, 0, -20, 7500000]}
    (_, first), (tile, second) = two_years(tmp_path)
    about = json.loads((tile / "tile.json").read_text())
    (tile / "tile.json").write_text(json.dumps(about | east))
    page = opened(make_page(representation_path=f"{first},{second}"))
    page.look(5, 7)
    assert page.js("explore.others") == []
    assert page.page.is_hidden("#years")
    page.page.select_option("#scene", label="MGRS-0 2021")
    assert page.js("explore.pixel") is None
    assert page.page.is_visible("#pixelEmpty")


def in_view(page, selector, screen):
    """Whether an element is on the screen as a whole, and the panel has not been scrolled."""
    box = page.page.locator(selector).bounding_box()
    low, far = box["y"] + box["height"], box["x"] + box["width"]
    inside = box["y"] >= 48 and low <= screen["height"] and far <= screen["width"]
    return inside and page.js("document.querySelector('aside').scrollTop") == 0


@pytest.mark.parametrize("size", [(1280, 720), (1366, 768)])
def test_the_year_fits_the_screen_of_a_laptop(opened, place, size):
    screen = dict(zip(("width", "height"), size, strict=True))
    page = opened(place / "explore.html", viewport=screen)
    page.js("explore.view.auto = false")
    page.label([(3, 5, 1), (40, 60, 2)])
    page.page.click("#learn")
    page.learned()
    page.page.keyboard.press("v")
    page.look(20, 20)
    assert page.js("explore.view.background") == "falseColor"
    for selector in ("#falseColorHint", "#overlays", "#year", "#curves", "#yearNote"):
        assert in_view(page, selector, screen), selector
    assert page.page.locator("#year").bounding_box()["height"] >= 170


def test_false_colour_says_what_it_means(page):
    assert "first three principal components" in page.page.inner_text("#falseColorHint")
    page.js("explore.setBackground('median')")
    assert page.page.is_hidden("#falseColorHint")


def test_the_contrast_of_confidence_can_be_stretched(page, place):
    confidence = np.load(place / "confidence.npy")
    valid = np.isfinite(np.load(place / "representation_map.npy")).all(-1)
    painted = """[...explore.map.layers[1].image.getContext('2d')
        .getImageData(0, 0, 64, 64).data.filter((_, i) => i % 4 === 2)]"""
    assert page.page.is_hidden("#fromBox")
    page.js("explore.setOverlay('confidence')")
    assert page.page.inner_text("#legend .ends").split() == ["0", "%", "100", "%"]
    page.page.fill("#from", "90")
    assert page.page.inner_text("#legend .ends").split() == ["≤", "90", "%", "100", "%"]
    blue = np.reshape(page.js(painted), confidence.shape)
    assert set(blue[valid & (confidence < 0.89)].tolist()) == {0x4E}  # the darkest of cividis
    assert len(np.unique(blue[valid & (confidence > 0.91)])) > 15
    page.reload()
    assert page.page.input_value("#from") == "90"
    page.js("explore.setOverlay('classes')")
    assert page.page.is_hidden("#fromBox")


@pytest.mark.parametrize(
    ("info", "stride"),
    [
        (GEO, 1),
        (GEO, 3),
        ({"crs": "EPSG:4326", "transform": [0.01, 0.002, 14, 0.003, -0.01, 48]}, 1),
    ],
)
def test_the_map_as_a_geotiff(opened, tmp_path, info, stride):
    page = opened(
        make_page(representation_path=save_map(tmp_path, random_map(), **info), stride=stride)
    )
    page.label([(2, 3, 1), (5, 8, 2), (6, 1, 3)])
    page.learned()
    page.page.click("#tabFiles")
    codes = np.load(io.BytesIO(page.download("#saveMap")[1]), allow_pickle=False)
    name, content = page.download("#saveGeotiff")
    assert name == "map.tif"
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        assert file.crs == rasterio.CRS.from_user_input(info["crs"])
        a, b, c, d, e, f = info["transform"]
        wanted = [stride * a, stride * b, c, stride * d, stride * e, f]
        np.testing.assert_allclose(list(file.transform)[:6], wanted, rtol=1e-12)
        np.testing.assert_array_equal(file.read(1), codes)
        assert (file.dtypes, file.nodata) == (("uint8",), 0)
        table = file.colormap(1)
    for one in page.js("explore.labels.classes"):
        assert "#" + bytes(table[one["code"]][:3]).hex() == one["color"]


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({}, "the place of this map is not known"),
        ({"crs": WKT, "transform": [1, 0, 0, 0, -1, 0]}, "has no EPSG code"),
    ],
)
def test_no_geotiff_without_a_place_or_a_code_of_it(opened, tmp_path, info, why):
    page = opened(make_page(representation_path=save_map(tmp_path, random_map(), **info)))
    assert page.page.is_disabled("#saveGeotiff")
    page.label([(2, 3, 1), (5, 8, 2)])
    page.learned()
    page.page.click("#tabFiles")
    page.page.click("#saveGeotiff")
    assert why in page.page.inner_text("#status")


def test_a_class_of_the_tiles_name_has_its_colour(opened, tmp_path):
    classes = {"7": {"name": "maize", "color": "#123456"}}
    page = opened(make_page(representation_path=save_map(tmp_path, random_map(), classes=classes)))
    page.label([(2, 3, 1)])
    page.page.fill("#classes li input[type=text]", "maize")
    page.page.keyboard.press("Tab")
    assert page.js("explore.labels.classes") == [{"code": 1, **classes["7"]}]


def test_a_thinned_page_exports_labels_on_the_tiles_own_pixels(opened, tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (20, 41, 50, 4), labels=False, **GEO)
    path = save_map(tmp_path / "out", random_map((41, 50, 6)), tile_path=str(tile))
    page = opened(make_page(representation_path=path, stride=3))
    assert "one of 3 rows and columns of 41 x 50" in page.page.inner_text("#facts")
    page.look(2, 4)
    wanted = np.load(tile / "bands.npy")[:, 6, 12, 2] / 10000
    found = np.nan_to_num(page.js("explore.series.bands[2].values"))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert "6, 12" in page.page.inner_text("#pixelFacts")
    x, y = 400000 + 20 * 12.5, 7500000 - 20 * 6.5
    assert f"{x:.1f}, {y:.1f}" in page.page.inner_text("#pixelFacts")
    page.label([(2, 4, 1)])
    page.page.click("#tabFiles")
    labels = np.load(io.BytesIO(page.download("#saveLabels")[1]), allow_pickle=False)
    assert labels.shape == (41, 50)
    assert np.argwhere(labels).tolist() == [[6, 12]]


def test_pixels_without_data_say_so(opened, tmp_path):
    values = random_map()
    values[3:6] = np.nan
    page = opened(make_page(representation_path=save_map(tmp_path, values)))
    page.click(4, 4)
    page.until("document.getElementById('status').textContent.includes('No data here')")
    page.label([(4, 10, 1), (10, 10, 1)])
    assert label_count(page) == 1


def test_the_map_of_a_quantity_has_its_values_and_unit(opened, tmp_path):
    values = np.linspace(-5, 300, 600, dtype=np.float32).reshape(20, 30)
    values[:2] = np.nan
    target = {"name": "height", "unit": "m"}
    path = save_map(tmp_path, random_map(), target=target)
    np.save(tmp_path / "regression_map.npy", values)
    page = opened(make_page(representation_path=path))
    page.js("explore.setOverlay('quantity')")
    low, high = np.nanpercentile(values, (2, 98))
    ends = page.page.inner_text("#legend .ends").replace("\n", " ").split()
    assert [float(ends[1]), float(ends[3])] == pytest.approx([low, high], rel=1e-2)
    assert "height [m]" in page.page.inner_text("#legend")
    page.look(10, 7)
    shown = page.page.inner_text("#pixelFacts").splitlines()
    assert float(shown[shown.index("height [m]") + 1]) == pytest.approx(values[10, 7], rel=1e-3)
    page.look(1, 7)
    assert "height" not in page.page.inner_text("#pixelFacts")


@pytest.mark.parametrize(
    "name", ["flanders_2018/processed/MGRS-31UDS", "arkansas_2021/processed/MGRS-ARDJ"]
)
def test_real_tiles(opened, shared, tmp_path, name):
    """Means over the clear dates of each season stand for an encoder."""
    tile = Tile(shared / "data" / name)
    seasons = np.array_split(np.arange(tile.shape[0]), 4)
    clear = np.asarray(tile.masks) > 0
    parts = []
    for dates in seasons:
        total = (tile.bands[dates] * clear[dates][..., None]).sum(0, dtype=np.float64)
        parts.append(total / np.maximum(clear[dates].sum(0), 1)[..., None] / 1000)
    path = save_map(tmp_path, np.concatenate(parts, -1), tile_path=str(tile.path))
    page = opened(make_page(representation_path=path))
    page.look(20, 30)
    assert page.js("explore.series.clear.filter(Boolean).length") == clear[:, 20, 30].sum()
    page.page.click("#tabLabels")
    page.page.click("#drawTen")
    page.learned()
    labels = np.asarray(tile.labels).ravel()
    table = np.array([*page.js("explore.found.prediction.codes"), *[0] * 256])
    found = table[page.array("explore.found.prediction.classes").astype(int)]
    shares = [(found == code)[labels == code].mean() for code in np.unique(labels[labels > 0])]
    assert np.mean(shares) > 1.5 / len(shares)  # far above chance
    score = page.js("explore.score")
    assert score["right"] / score["clicks"] > 1.5 / len(shares)


def test_the_benchmark_runs(browser, tmp_path):
    """In a process of its own: one process drives one browser at a time."""
    command = [sys.executable, str(ROOT / "benchmarks/bench_explore.py"), f"output_dir={tmp_path}"]
    done = subprocess.run(
        [*command, "size=60", "num_dates=4", "clicks=2", "labels=10"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "explore.json").read_text())["click, ms"] < 5000
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
