"""How fast the page of explore.py opens, answers a click and learns, in a real browser.

    python benchmarks/bench_explore.py
    python benchmarks/bench_explore.py size=2000 num_dates=0

A simulated map: smooth fields of 32 dimensions and noise, with a tile of num_dates dates beside it.
Writes explore.json. Wants Chromium and `pip install -r requirements-dev.txt`.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import zoom

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from running.config import check
from running.errors import InputError
from running.files import make_output_dir, write_json
from running.script import run_script

import explore as script

run_config = {
    "size": 1098,  # pixels along a side
    "dimensions": 32,  # of the map, all kept
    "num_dates": 24,  # of the tile beside the map; 0: no tile
    "clicks": 10,  # whose times are measured
    "labels": 50,  # of five classes
    "max_mb": 200.0,  # of the page
    "seed": 0,
    "output_dir": "outputs/benchmark_explore",  # receives the page and explore.json
}

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def make_map(folder, config):
    """Write representation_map.npy (H, W, D) float32, and a tile where dates are wanted."""
    rng = np.random.default_rng(config["seed"])
    size, depth = config["size"], config["dimensions"]
    shape = (size, size, depth)
    array = np.lib.format.open_memmap(folder / "representation_map.npy", "w+", np.float32, shape)
    for k in range(depth):
        coarse = rng.normal(size=(size // 24 + 2, size // 24 + 2))
        array[..., k] = zoom(coarse, 24, order=1)[:size, :size] * 0.97**k
        array[..., k] += rng.normal(0, 0.15, (size, size))
    info = {"tile": "simulated"}
    if config["num_dates"]:
        info["tile_path"] = str(make_tile(folder / "MGRS-SIM", size, config["num_dates"], rng))
    write_json(folder / "infer.json", info)


def make_tile(folder, size, num_dates, rng):
    """Write a tile of six bands, a date at a time; returns its folder."""
    folder.mkdir()
    names = ["B02", "B03", "B04", "B08", "B11", "B12"]
    shape = (num_dates, size, size, len(names))
    bands = np.lib.format.open_memmap(folder / "bands.npy", "w+", np.uint16, shape)
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, shape[:3])
    for date in range(num_dates):
        bands[date] = rng.integers(300, 4000, shape[1:], np.uint16)
        masks[date] = rng.random(shape[1:3]) < 0.6
    np.save(folder / "doys.npy", np.linspace(3, 360, num_dates).astype(np.int16))
    np.save(folder / "band_mean.npy", np.full(len(names), 2000, np.float32))
    np.save(folder / "band_std.npy", np.full(len(names), 1000, np.float32))
    place = {"crs": "EPSG:32633", "transform": [10, 0, 500000, 0, -10, 5400000]}
    (folder / "tile.json").write_text(json.dumps({"bands": names, **place}))
    return folder


def until(page, expression, seconds=120):
    """What a JavaScript expression gives as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := page.evaluate(expression):
            return value
        time.sleep(0.01)
    raise InputError(f"the page: waited {seconds} s for {expression}")


def measure_click(page, row, column):
    """Milliseconds from a click to the pixel's year and all that is like it."""
    page.evaluate("explore.times.look = 0")
    left, top = page.evaluate(f"explore.map.toScreen({column}.5, {row}.5)")
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + left, box["y"] + top)
    return until(page, "explore.times.look")


def measure_learning(page, method):
    """Milliseconds from the wish to the map of all pixels."""
    page.evaluate(f"explore.times.learn = 0, explore.view.method = '{method}', explore.learn()")
    took = until(page, "explore.times.learn")
    until(page, "!explore.learning")
    return took


def measure_page(page, path, config):
    """Open the page and use it; returns milliseconds."""
    page.goto(path.resolve().as_uri())
    result = {"open": until(page, "window.explore?.times.open")}
    rng = np.random.default_rng(config["seed"])
    inside = config["size"] // 8, config["size"] * 5 // 8  # away from the legend
    pixels = rng.integers(*inside, (config["clicks"] + 1, 2)).tolist()
    first, *rest = (measure_click(page, *pixel) for pixel in pixels)
    result |= {"first click": first, "click": statistics.median(rest), "slowest click": max(rest)}
    labels = [
        [int(pixel), 1 + number % 5]
        for number, pixel in enumerate(rng.integers(0, config["size"] ** 2, config["labels"]))
    ]
    page.evaluate(
        """labels => { explore.view.auto = false;
        for (let i = 0; i < 5; i++) explore.labels.addClass();
        explore.labels.setMany(labels.map(([pixel, code]) => ({pixel, code}))); }""",
        labels,
    )
    for method in ("softmax", "nearest"):
        result[method] = statistics.median(measure_learning(page, method) for _ in range(3))
    return result


def main(config):
    """Measure; returns the figures of explore.json."""
    from playwright.sync_api import sync_playwright

    limits = {"size": (48, 5000), "num_dates": (0, 366), "clicks": (1, 1000), "labels": (10, 4000)}
    config = check(config, dimensions=(4, 1024), max_mb=(1, 1e6), **limits)
    folder = make_output_dir(config["output_dir"])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_map(Path(place), config)
        start = time.monotonic()
        keys = {key: config[key] for key in ("dimensions", "max_mb")}
        keys |= {"representation_path": f"{place}/representation_map.npy", "wandb_mode": "disabled"}
        path = script.main({**script.run_config, **keys, "output_dir": str(folder)})
        result = {"make the page, s": time.monotonic() - start, "MB": path.stat().st_size / 1e6}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        result |= {f"{key}, ms": took for key, took in measure_page(page, path, config).items()}
        browser.close()
    write_json(folder / "explore.json", result)
    for key, value in result.items():
        print(f"{key:20s} {value:8.1f}")
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
