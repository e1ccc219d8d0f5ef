"""explore.py and its page, in a real browser: what it shows is what numpy and scikit-learn say."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import ENVIRONMENT, ROOT, make_tile, tiny
from helpers import run as run_any
from rasterio.warp import transform as reproject
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import explore
import infer
import make_demo_data
import pages
import train
import train_classification
from maps import quantise
from runtime import InputError
from tiles import Tile

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = "</script ><!--<script ></script><script>window.hacked = 1</script>"
HOSTILE += "<img src=x onerror='window.hacked = 1'>"
GEO = {"crs": "EPSG:32733", "transform": [20, 0, 400000, 0, -20, 7500000]}
WKT = """LOCAL_CS["</script ><script>window.hacked = 1</script>",UNIT["metre",1]]"""
SIZE = 64


def run(**keywords):
    return run_any(explore, **keywords)


def save_map(folder, representations, **info):
    """Write a representation map (H, W, D) as infer.py does; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "representation_map.npy", representations.astype(np.float32))
    (folder / "infer.json").write_text(json.dumps(info))
    return folder / "representation_map.npy"


def random_map(shape=(20, 30, 6), seed=0):
    return np.random.default_rng(seed).normal(size=shape) * np.linspace(2, 0.5, shape[2])


def facts_of(path):
    """The facts that explore.py put into a page."""
    text = re.search(r'id="facts-json">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    return json.loads(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A simulated tile, the map of an encoder that was trained for a moment, and the page of it."""
    path = tmp_path_factory.mktemp("explore")
    run_any(make_demo_data, base_path=path, num_tiles=1, size=SIZE)
    few = {"dataset_name": "simulated", "max_steps": 40, "sample_size": 12, "block_size": 16}
    train.main(tiny(path, path / "encoder", **few))
    tile = path / "data/simulated/processed/MGRS-SIM1"
    checkpoint = path / "encoder/last.pt"
    run_any(infer, checkpoint_path=checkpoint, tile_path=tile, output_dir=path)
    rng = np.random.default_rng(0)
    np.save(path / "classification_map.npy", np.load(tile / "labels.npy"))
    np.save(path / "confidence.npy", rng.random((SIZE, SIZE), np.float32))
    run(representation_path=path / "representation_map.npy")
    return path


# ---- without a browser ---------------------------------------------------------------------------


def test_pca_keeps_the_variance_it_says(tmp_path):
    values = random_map((40, 50, 12), seed=1) @ np.diag([9, 6, 4, 2, 1, *[0.05] * 7])
    path = save_map(tmp_path, values)
    facts = facts_of(run(representation_path=path))["embedding"]
    share = np.linalg.eigvalsh(np.cov(values.reshape(-1, 12).T))[::-1]
    share = np.cumsum(share) / share.sum()
    assert facts["dimensions"] == 1 + np.searchsorted(share, 0.999)
    assert facts["variance"] == pytest.approx(share[facts["dimensions"] - 1], abs=1e-6)
    for keywords, wanted in (
        ({"dimensions": 2}, 2),
        ({"variance": 0.9}, 3),
        ({"variance": 1.0}, 12),
    ):
        found = facts_of(run(representation_path=path, **keywords))["embedding"]["dimensions"]
        assert found == wanted, keywords


def test_int8_maps_and_basis_path(tmp_path):
    values = random_map()
    path = save_map(tmp_path / "a", values)
    small, scales = quantise(values.astype(np.float32))
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b/representation_map.npy", small)
    np.save(tmp_path / "b/representation_map_scales.npy", scales)
    basis = tmp_path / "basis.npz"
    np.savez(
        basis,
        mean=np.zeros(6, np.float32),
        components=np.eye(6, dtype=np.float32)[:3],
        low=np.full(3, -3, np.float32),
        high=np.full(3, 3, np.float32),
    )
    pages = [
        run(representation_path=one, basis_path=basis)
        for one in (path, tmp_path / "b/representation_map.npy")
    ]
    colors = [
        read_blob(page, facts_of(page)["scenes"][0]["layers"]["falseColor"]) for page in pages
    ]
    wanted = ((values[..., :3] + 3) / 6).clip(0, 1) * 255
    np.testing.assert_allclose(colors[0].reshape(20, 30, 3), wanted.round(), atol=1)
    np.testing.assert_allclose(colors[1].astype(int), colors[0].astype(int), atol=3)


def read_blob(page, where):
    text = re.search(rf'id="blob-{where["blob"]}">(.*?)<', page.read_text())[1]
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), where["type"])


def test_the_page_stays_within_max_mb_and_says_how(tmp_path, capsys):
    tile = make_tile(tmp_path / "MGRS-0", (20, 60, 50, 10), **GEO)
    path = save_map(tmp_path / "out", random_map((60, 50, 16)), tile_path=str(tile))
    page = run(representation_path=path, max_mb=2.8)
    assert page.stat().st_size <= 2.8e6
    assert facts_of(page)["scenes"][0]["stride"] == 1
    assert facts_of(page)["scenes"][0]["series"]["step"] > 1
    big = save_map(tmp_path / "big", random_map((300, 400, 16)), **GEO)
    page = run(representation_path=big, max_mb=4)
    scene = facts_of(page)["scenes"][0]
    assert page.stat().st_size <= 4e6
    assert scene["stride"] > 1
    assert (scene["height"], scene["fullHeight"]) == (-(-300 // scene["stride"]), 300)
    assert "thinned to every" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"max_mb=4: found maps that need .* MB at stride=1"):
        run(representation_path=big, max_mb=4, stride=1)


def test_a_full_tile_is_thinned_before_it_is_read(tmp_path):
    """10980 x 10980 pixels of 64 dimensions, a file with holes: no block of it is read in full."""
    path = tmp_path / "representation_map.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (10980, 10980, 64))
    scenes = explore.open_scenes({"representation_path": str(path), "tile_path": ""})
    config = {**explore.run_config, "max_mb": 200.0}
    left = explore.choose_stride(scenes, config)
    assert scenes[0].stride == 7  # 16 + 32 bytes a pixel
    assert left >= 0
    block = next(scenes[0].blocks())
    assert block.nbytes <= explore.BLOCK_BYTES
    with pytest.raises(InputError, match="wanted so much, or stride=7"):
        explore.choose_stride(scenes, {**config, "stride": 2})


@pytest.mark.parametrize("crs", ["EPSG:32733", "EPSG:32631", "EPSG:32601", "EPSG:3035"])
def test_places_agree_with_rasterio(crs):
    """On a full tile, in the middle of every cell, where interpolation is farthest off."""
    a, b, c, d, e, f = transform = [10, 0, 199980, 0, -10, 5900040]
    info = {"crs": crs, "transform": transform}
    grid = explore.place(explore.Scene(Path("map"), (10980, 10980, 3), info, None))["grid"]
    shape = grid["rows"], grid["columns"]
    corners = (np.array(grid[key]).reshape(shape) for key in ("lon", "lat"))
    lon, lat = ((one[1:, 1:] + one[1:, :-1] + one[:-1, 1:] + one[:-1, :-1]) / 4 for one in corners)
    assert np.abs(np.diff(lon, axis=1)).max() < 1  # no jump at the date line
    row, column = ((np.indices(lon.shape) + 0.5).T * 10980 / (np.array(shape) - 1)).T
    x, y = (a * column + b * row + c).ravel(), (d * column + e * row + f).ravel()
    true_lon, true_lat = (np.reshape(v, lon.shape) for v in reproject(crs, "EPSG:4326", x, y))
    east = ((lon - true_lon + 180) % 360 - 180) * np.cos(np.radians(lat))
    assert 111_320 * np.hypot(east, lat - true_lat).max() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representation_path": ""}, "representation_path: found none"),
        ({"tile_path": "a,b"}, "found 2 tiles, wanted 1"),
        ({"max_mb": 0.0}, "max_mb=0.0: wanted 1"),
        ({"dimensions": 0}, "dimensions=0: wanted 1"),
        ({"basis_path": "MAP"}, "found no basis"),
        ({"bands": "B04,X"}, "found no B04, wanted of X0"),
        ({"stride": -1}, "stride=-1: wanted 0"),
    ],
)
def test_mistakes_end_in_one_line_and_no_page(tmp_path, change, message):
    tile = make_tile(tmp_path / "MGRS-0", (20, 20, 30, 4))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile))
    change = {key: path if value == "MAP" else value for key, value in change.items()}
    with pytest.raises(InputError, match=message) as error:
        run(**{"representation_path": path, **change})
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*explore*"))


def test_files_that_do_not_fit_are_refused(tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (20, 21, 30, 4))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile))
    with pytest.raises(InputError, match="found 20 x 30 pixels, wanted 21 x 30"):
        run(representation_path=path)
    other = save_map(tmp_path / "other", random_map((5, 5, 3)))
    path = save_map(tmp_path / "out", random_map())
    with pytest.raises(InputError, match=r"found 3 dimensions, wanted 6"):
        run(representation_path=f"{path},{other}")
    save_map(tmp_path / "out", np.full((20, 30, 6), np.nan))
    with pytest.raises(InputError, match="found 0 valid pixels"):
        run(representation_path=path)
    save_map(tmp_path / "out", random_map(), classes={"1": {"name": "a", "color": "red; x"}})
    with pytest.raises(InputError, match="found classes that cannot be read"):
        run(representation_path=path)
    (tmp_path / "out/infer.json").write_text("{")
    with pytest.raises(InputError, match=r"infer.json: found no readable JSON"):
        run(representation_path=path)


def test_the_same_maps_make_the_same_page(tmp_path):
    path = save_map(tmp_path, random_map())
    assert run(representation_path=path).read_bytes() == run(representation_path=path).read_bytes()


def test_the_page_s_modules_fit_together():
    """They share one scope, so each top-level name is one module's; lines and files are short."""
    names = {}
    for name in {*pages.PAGE_MODULES, *pages.WORKER_MODULES}:
        text = (pages.FOLDER / name).read_text()
        assert len(text.splitlines()) <= 500, name
        assert max(map(len, text.splitlines())) <= 100, name
        found = re.findall(
            r"^(?:export )?(?:async )?(?:const|let|function|class) (\w+)", text, re.M
        )
        for one in found:
            assert names.setdefault(one, name) == name, f"{one}: in {names[one]} and {name}"
        for imported in re.findall(r'^import [^;]* from "./(.*?)";', text, re.M):
            assert (pages.FOLDER / imported).exists()
    listed = {*pages.PAGE_MODULES, *pages.WORKER_MODULES}
    assert {path.name for path in pages.FOLDER.glob("*.js")} == listed


def test_median_colour_is_numpys(tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (21, 30, 20, 4), bands=["B08", "B04", "B02", "B03"])
    path = save_map(tmp_path / "out", random_map((30, 20, 6)), tile_path=str(tile))
    for stride in (1, 3):
        page = run(representation_path=path, stride=stride)
        found = read_blob(page, facts_of(page)["scenes"][0]["layers"]["median"])
        thin = slice(None), slice(None, None, stride), slice(None, None, stride)
        clear = np.load(tile / "masks.npy")[thin] > 0
        bands = np.load(tile / "bands.npy")[thin][..., [1, 3, 2]].astype(float)
        bands[~clear] = np.nan
        wanted = np.nanquantile(bands, 0.5, axis=0, method="lower")
        low, high = np.percentile(wanted.reshape(-1, 3), (2, 98), axis=0)
        wanted = ((wanted - low) / (high - low)).clip(0, 1) * 254 + 1
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1)


# ---- the browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright is installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """An open page, and what it asked for or complained about."""

    def __init__(self, browser, path, **options):
        options = {"viewport": {"width": 1200, "height": 820}, "accept_downloads": True, **options}
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: self.complaints.append(line.text))
        self.path = path
        self.open()

    def open(self):
        self.page.goto(self.path.resolve().as_uri())
        self.until("window.explore?.times.open")

    def js(self, expression, argument=None):
        return self.page.evaluate(expression, argument)

    def until(self, expression, seconds=20):
        """What an expression gives as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression}: {self.complaints}"
            time.sleep(0.01)
        return value

    def click(self, row, column):
        """Click a pixel of the map with the mouse."""
        where = "([row, column]) => explore.map.toScreen(column + 0.5, row + 0.5)"
        left, top = self.js(where, [row, column])
        box = self.page.locator("#map").bounding_box()
        self.page.mouse.click(box["x"] + left, box["y"] + top)

    def look(self, row, column):
        self.js("explore.times.look = 0")
        self.click(row, column)
        self.until("explore.times.look")

    def array(self, expression):
        """A typed array of the page as numpy's float32."""
        code = f"""(() => {{ const bytes = new Uint8Array(Float32Array.from({expression}).buffer);
        let text = ''; for (const byte of bytes) text += String.fromCharCode(byte);
        return btoa(text); }})()"""
        return np.frombuffer(base64.b64decode(self.js(code)), np.float32)

    def label(self, labels):
        """Make the classes 1, 2, .. of labels [(row, column, code)] and click them."""
        self.page.click("#tabLabels")
        for _ in range(max(code for *_, code in labels)):
            self.page.click("#addClass")
        for row, column, code in labels:
            self.js("code => explore.chooseClass(code)", code)
            self.click(row, column)

    def learned(self):
        """Wait until the page's map knows all labels and the clicks are scored."""
        version = "explore.learnedVersion === explore.labels.version"
        self.until(f"{version} && !explore.learning && explore.found.prediction && explore.score")

    def download(self, selector):
        with self.page.expect_download() as waiting:
            self.page.click(selector)
        return waiting.value.suggested_filename, waiting.value.path().read_bytes()


@pytest.fixture
def opened(browser):
    """A function that opens a page; all are closed at the end, and none may have complained."""
    pages = []

    def open_page(path, **options):
        pages.append(Page(browser, path, **options))
        return pages[-1]

    yield open_page
    for one in pages:
        one.context.close()
        assert one.complaints == []


@pytest.fixture
def page(opened, place):
    return opened(place / "explore.html")


def truth(place):
    """Representations (H, W, D) and their tile."""
    representations = np.load(place / "representation_map.npy")
    return representations, Tile(place / "data/simulated/processed/MGRS-SIM1")


def draw_clicks(place, each, seed=0, among=None):
    """[(row, column, code 1, 2, ..)] of `each` pixels of each of the tile's classes."""
    representations, tile = truth(place)
    rng = np.random.default_rng(seed)
    clicks = []
    for code, label in enumerate(np.unique(tile.labels), 1):
        found = (tile.labels == label) & np.isfinite(representations).all(-1)
        chosen = rng.permutation(np.argwhere(found))[:each]
        clicks += [(int(row), int(column), code) for row, column in chosen]
    return clicks


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
    assert page.js("explore.times.open") < 5000


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
    """Of the embeddings themselves; or about their mean, of what the principal components hold."""
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
        assert np.abs(sure / 255 - model.predict_proba(x).max(1)).mean() < 0.03
    score = page.js("explore.score")
    assert score["clicks"] == len(clicks)
    names = np.unique(tile.labels)
    wanted = (names[predicted - 1] == tile.labels[valid]).mean()
    assert score["right"] / score["clicks"] == pytest.approx(wanted, abs=0.2)


def test_clicks_are_scored_by_models_that_did_not_see_them(opened, tmp_path):
    """Two classes drawn by lot: a neighbour told from itself would be right every time."""
    rng = np.random.default_rng(0)
    page = opened(run(representation_path=save_map(tmp_path, rng.normal(size=(20, 30, 6)))))
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


# ---- labels, sessions, files ---------------------------------------------------------------------


def label_count(page):
    return page.js("explore.labels.byPixel.size")


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


def test_sessions_stay_in_the_browser_and_in_files(page, opened, place, tmp_path):
    page.label([(5, 5, 1), (8, 40, 2)])
    page.page.fill("#classes li:nth-child(1) input[type=text]", "Maïs <b>")
    page.page.keyboard.press("Tab")
    page.until("localStorage.getItem(explore.storage.key)?.includes('Maïs')")
    page.open()
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
    scores = run_any(
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


def test_hostile_names_do_not_run(opened, tmp_path):
    legend = {"1": {"name": HOSTILE, "color": "#ff0000"}, "2": {"name": "{{SCRIPT}}{{BLOBS}}"}}
    tile = make_tile(
        tmp_path / "MGRS-<img src=x onerror=hacked=1>", (20, 20, 30, 4), classes=legend
    )
    info = json.loads((tile / "tile.json").read_text())
    hostile = {"bands": ["B04", "B08", HOSTILE, "X"], "dates": [HOSTILE] * 20, "crs": WKT}
    (tile / "tile.json").write_text(
        json.dumps({**info, **hostile, "transform": [1, 0, 0, 0, -1, 0]})
    )
    np.save(tile / "labels.npy", np.random.default_rng(0).integers(1, 3, (20, 30), np.uint8))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile), tile=HOSTILE)
    page = opened(run(representation_path=path, title=HOSTILE, bands=f"B04,B08,{HOSTILE}"))
    page.look(5, 5)
    page.js("explore.setOverlay('labels')")
    page.page.mouse.move(0, 0)
    page.js("explore.date = 3; explore.drawYear()")
    page.page.click("#tabLabels")
    page.page.click("#drawTen")
    page.page.fill("#classes li:nth-child(2) input[type=text]", HOSTILE)
    page.page.keyboard.press("Tab")
    page.learned()
    page.open()
    assert page.js("typeof hacked") == "undefined"
    assert page.js("document.querySelectorAll('img, aside script, header script').length") == 0
    assert page.page.inner_text("#title") == HOSTILE
    assert HOSTILE[:60] in page.js("explore.labels.classes.map(one => one.name)")


def test_several_maps_share_colours_labels_and_classifier(opened, tmp_path):
    values = random_map((24, 30, 6))
    paths = [
        save_map(tmp_path / name, part, tile=f"year {name}")
        for name, part in (("2020", values), ("2021", values[:, ::-1]))
    ]
    page = opened(run(representation_path=f"{paths[0]},{paths[1]}"))
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


def test_a_thinned_page_exports_labels_on_the_tiles_own_pixels(opened, tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (20, 41, 50, 4), labels=False, **GEO)
    path = save_map(tmp_path / "out", random_map((41, 50, 6)), tile_path=str(tile))
    page = opened(run(representation_path=path, stride=3))
    assert "every 3. row and column of 41 x 50" in page.page.inner_text("#facts")
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
    page = opened(run(representation_path=save_map(tmp_path, values)))
    page.click(4, 4)
    page.until("document.getElementById('status').textContent.includes('No data here')")
    page.label([(4, 10, 1), (10, 10, 1)])
    assert label_count(page) == 1


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
    page = opened(run(representation_path=path))
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
