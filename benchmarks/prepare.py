"""How fast and in how much memory prepare_tiles.py makes tiles, beside a plain copy.

    python benchmarks/prepare.py                     # under two minutes on two CPU cores

The plain copy reads the same windows of the same files through rasterio, with as many threads, and
writes them to a .npy file of the same layout: no mask, no offset, no statistics, no resampling but
GDAL's own. Both read files on the local disk, so the network plays no part: what is compared is
what this project adds to reading and writing. Peak memory is that of a process for one tile.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from running.config import check  # noqa: E402
from running.script import run_script  # noqa: E402

import prepare_tiles  # noqa: E402
from preparation import sentinel2  # noqa: E402
from preparation.builder import build_tile  # noqa: E402
from preparation.items import find_items  # noqa: E402
from preparation.pixels import NETWORK, set_up_reading  # noqa: E402
from preparation.plan import BLOCK, choose_items, make_plans, parse_request  # noqa: E402

run_config = {
    "sizes": "1024,2048,4096",  # pixels along an edge of the tiles
    "rate_size": 2048,  # of the tile whose rate is measured
    "dates": 6,
    "threads": 2,
    "rounds": 5,  # of both ways in turn; the median counts
    "output": "bench_prepare.json",
    "scenes": "",  # set by the benchmark itself: measure one tile of this folder and print it
}
PIXEL = dict.fromkeys(sentinel2.NATIVE_10M, 10)  # metres; other bands have 20


def make_scene(folder, size):
    """One scene as cloud-optimised GeoTIFFs that compress about as real ones do."""
    rng = np.random.default_rng(0)
    for band in [*sentinel2.TESSERA_BANDS, "SCL"]:
        pixel = PIXEL.get(band, 20)
        edge = size * 10 // pixel
        smooth = gaussian_filter(rng.normal(size=(edge // 8, edge // 8)), 4).repeat(8, 0)
        smooth = smooth.repeat(8, 1) / smooth.std()
        array = 3000 + 600 * smooth + rng.normal(0, 60, smooth.shape)
        if band == "SCL":
            array = np.where(smooth > 0.5, 9, 4)
        profile = {"driver": "COG", "count": 1, "height": edge, "width": edge, "nodata": 0}
        profile |= {"dtype": "uint8" if band == "SCL" else "uint16", "crs": "EPSG:32633"}
        profile |= {"transform": rasterio.Affine(pixel, 0, 300000, 0, -pixel, 5400000)}
        profile |= {"compress": "deflate", "blocksize": 1024 if pixel == 10 else 512}
        with rasterio.open(folder / f"{band}.tif", "w", **profile) as file:
            file.write(array.astype(profile["dtype"]), 1)


def make_items(folder, dates):
    """A saved search of `dates` dates, all of which show the one scene."""
    features = []
    for number in range(dates):
        name = f"S2A_33UUP_2021{number // 28 + 1:02d}{number % 28 + 1:02d}_0_L2A"
        known = {"datetime": f"{name[10:14]}-{name[14:16]}-{name[16:18]}T10:00:00Z"}
        known |= {"grid:code": "MGRS-33UUP", "s2:processing_baseline": "05.00"}
        assets = {p.stem: {"href": str(p.resolve())} for p in sorted(folder.glob("*.tif"))}
        feature = {"type": "Feature", "stac_version": "1.0.0", "id": name, "properties": known}
        feature |= {"geometry": None, "links": [], "assets": assets}
        features.append(feature)
    content = {"type": "FeatureCollection", "features": features}
    (folder / "items.json").write_text(json.dumps(content))


def plain_copy(folder, dates, threads):
    """Copy the bands and SCL of all dates, window by window. Returns `clocks`."""
    bands = [*sentinel2.TESSERA_BANDS, "SCL"]
    with rasterio.open(folder / "B02.tif") as file:
        size = file.height
    path, block = folder / "copy.npy", BLOCK
    np.lib.format.open_memmap(path, "w+", np.uint16, (dates, size, size, len(bands)))

    def copy_date(index):
        with rasterio.Env(**NETWORK):
            for row in range(0, size, block):
                for column in range(0, size, block):
                    shape = min(block, size - row), min(block, size - column)
                    found = np.empty((*shape, len(bands)), np.uint16)
                    for number, band in enumerate(bands):
                        found[..., number] = read_window(folder, band, row, column, shape)
                    array = np.load(path, mmap_mode="r+", allow_pickle=False)
                    array[index, row : row + shape[0], column : column + shape[1]] = found
        with open(path, "r+b") as file:
            os.fdatasync(file.fileno())

    start = clocks()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy_date, range(dates)))
    seconds = clocks() - start
    path.unlink()
    return seconds


def clocks():
    """Seconds that have passed, and seconds that this process has computed, of all its threads."""
    return np.array([time.perf_counter(), time.process_time()])


def read_window(folder, band, row, column, shape):
    factor = PIXEL.get(band, 20) // 10
    places = (column // factor, row // factor, shape[1] // factor, shape[0] // factor)
    with rasterio.open(folder / f"{band}.tif") as file:
        window = rasterio.windows.Window(*places)
        return file.read(1, window=window, out_shape=shape)


def prepare(folder, threads):
    """Make the tile of a folder's items. Returns `clocks` of the tile alone."""
    config = prepare_tiles.run_config | {"items_path": str(folder / "items.json")}
    config |= {"base_path": str(folder), "mgrs_tile": "33UUP", "threads": threads}
    request = parse_request(config)
    set_up_reading()
    (plan,) = make_plans(choose_items(find_items(request), request), request)
    start = clocks()
    build_tile(plan, folder / plan.name)
    seconds = clocks() - start
    shutil.rmtree(folder / plan.name)
    return seconds


def peak_memory():
    """Peak memory of this process in GB; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def measure_memory(folder, threads):
    """Peak memory in GB, and seconds, of a process that makes the tile of a folder."""
    command = [sys.executable, __file__, f"scenes={folder}", f"threads={threads}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main(config):
    """Measure all; returns the figures, which are also printed and written."""
    config = check(config, rate_size=(64, 10_980), dates=(1, 366), threads=(1, 64), rounds=(1, 100))
    if config["scenes"]:
        seconds, _ = prepare(Path(config["scenes"]), config["threads"])
        print(json.dumps({"peak_gb": round(peak_memory(), 2), "seconds": round(seconds, 1)}))
        return None
    figures = {"memory": [], "rate": {}}
    sizes = [int(size) for size in config["sizes"].split(",")]
    with tempfile.TemporaryDirectory(dir=".") as base:
        for size in sorted({*sizes, config["rate_size"]}):
            folder = Path(base) / str(size)
            folder.mkdir()
            make_scene(folder, size)
            make_items(folder, config["dates"])
            measured = measure_memory(folder, config["threads"])
            figures["memory"].append({"size": size, "dates": config["dates"]} | measured)
            print(figures["memory"][-1], flush=True)
            if size == config["rate_size"]:
                figures["rate"] = measure_rate(folder, size, config)
                print(figures["rate"], flush=True)
            shutil.rmtree(folder)
    Path(config["output"]).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def measure_rate(folder, size, config):
    """Megapixels (of all bands of a date) a second of both ways, and their ratio by round.

    cpu_ratio compares the time that both compute: other work on the machine does not change it.
    """
    megapixels = config["dates"] * size * size / 1e6
    ways = (plain_copy, config["dates"]), (prepare,)
    plain_copy(folder, config["dates"], config["threads"])  # warms the disk's cache
    seconds = np.array(
        [
            [way(folder, *keys, config["threads"]) for way, *keys in ways]
            for _ in range(config["rounds"])
        ]
    )  # (rounds, ways, clocks)
    rates = megapixels / seconds
    ratios = rates[:, 1] / rates[:, 0]
    copied, prepared = np.median(rates[:, :, 0], 0).round(2).tolist()
    return {
        "size": size,
        "copied": copied,
        "prepared": prepared,
        "ratios": ratios[:, 0].round(2).tolist(),
        "ratio": round(float(np.median(ratios[:, 0])), 2),
        "cpu_ratio": round(float(np.median(ratios[:, 1])), 2),
    }


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
