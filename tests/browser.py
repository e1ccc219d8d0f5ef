"""Pages of explore.py in a real browser: fixtures, and what the tests of the page share."""

import base64
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest
from helpers import run, tiny

import explore
import infer
import make_demo_data
import train
from tiles import Tile

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = "</script ><!--<script ></script><script>window.hacked = 1</script>"
HOSTILE += "<img src=x onerror='window.hacked = 1'>"
GEO = {"crs": "EPSG:32733", "transform": [20, 0, 400000, 0, -20, 7500000]}
WKT = """LOCAL_CS["</script ><script>window.hacked = 1</script>",UNIT["metre",1]]"""
SIZE = 64


def make_page(**keywords):
    """Run explore.py; returns the path of the page."""
    return run(explore, **keywords)


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


def read_blob(page, where):
    text = re.search(rf'id="blob-{where["blob"]}">(.*?)<', page.read_text())[1]
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), where["type"])


def label_count(page):
    return page.js("explore.labels.byPixel.size")


@pytest.fixture(scope="session")
def chromium():
    """The path of a browser; without one, or without Playwright, its tests are skipped."""
    pytest.importorskip("playwright.sync_api", reason="no Playwright is installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    if program := next(filter(None, map(shutil.which, names)), None):
        return program
    pytest.skip("no Chromium is installed")


@pytest.fixture(scope="session")
def place(chromium, tmp_path_factory):
    """A simulated tile, the map of an encoder that was trained for a moment, and the page of it."""
    path = tmp_path_factory.mktemp("explore")
    run(make_demo_data, base_path=path, num_tiles=1, size=SIZE)
    few = {"dataset_name": "simulated", "max_steps": 40, "sample_size": 12, "block_size": 16}
    train.main(tiny(path, path / "encoder", **few))
    tile = path / "data/simulated/processed/MGRS-SIM1"
    checkpoint = path / "encoder/last.pt"
    run(infer, checkpoint_path=checkpoint, tile_path=tile, output_dir=path)
    rng = np.random.default_rng(0)
    np.save(path / "classification_map.npy", np.load(tile / "labels.npy"))
    np.save(path / "confidence.npy", rng.random((SIZE, SIZE), np.float32))
    make_page(representation_path=path / "representation_map.npy")
    return path


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS)
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

    def reload(self):
        """Open the page again with its session.

        A busy Chromium may give a new page's process what localStorage held before the last write
        (11 of 600 reloads), so a reload that lacks the labels is repeated.
        """
        self.js("explore.storage.flush()")
        count = label_count(self)
        for _ in range(10):
            self.open()
            if label_count(self) == count:
                return
            time.sleep(0.1)
        raise AssertionError(f"{label_count(self)} of {count} labels came back")

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
