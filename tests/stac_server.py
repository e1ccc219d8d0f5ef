"""A catalogue of simulated scenes on loopback: `rustac serve` and a server that answers ranges.

The reflectance of every pixel is known first; the scenes' digital numbers are made from it, as the
providers make theirs, and written as cloud-optimised GeoTIFFs.
"""

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import rasterio
from rasterio.warp import transform_bounds
from scipy.ndimage import gaussian_filter

SIZE = 240  # pixels of 10 m along an edge of the simulated tiles
CRS = "EPSG:32633"
LEFT, TOP = {"33UUP": 300000, "33UVP": 300000 + 10 * (SIZE - 24)}, 5400000  # they overlap
PIXEL = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60}  # metres; others 20
NAMES = {  # of earth-search
    "B02": "blue",
    "B03": "green",
    "B04": "red",
    "B05": "rededge1",
    "B06": "rededge2",
    "B07": "rededge3",
    "B08": "nir",
    "B8A": "nir08",
    "B09": "nir09",
    "B11": "swir16",
    "B12": "swir22",
    "SCL": "scl",
}
BANDS = [name for name in NAMES if name != "SCL"]


def pixel_size(band):
    return PIXEL.get(band, 20)


def true_reflectance(day, band, tile="33UUP"):
    """Reflectance x 10000 of a day, (h, w) uint16 in the band's own pixels; 1 or more."""
    size = SIZE * 10 // pixel_size(band)
    seed = [BANDS.index(band), *day.encode(), *tile.encode()]
    noise = np.random.default_rng(seed).normal(size=(size, size))
    smooth = gaussian_filter(noise, 2, mode="wrap")
    return (900 + 40 * BANDS.index(band) + 2500 * np.abs(smooth)).clip(1).astype(np.uint16)


def true_classes(day, tile="33UUP"):
    """SCL of a day in 20 m pixels: vegetation 4, bare 5, cloud 9, shadow 3."""
    size = SIZE // 2
    noise = np.random.default_rng([99, *day.encode(), *tile.encode()]).normal(size=(size, size))
    smooth = gaussian_filter(noise, 6, mode="wrap")
    cuts = np.quantile(smooth, (0.2, 0.3, 0.6))
    return np.array([9, 3, 4, 5], np.uint8)[np.digitize(smooth, cuts)]


def write_cog(path, array, pixel, tile="33UUP", **options):
    profile = {
        "driver": "COG",
        "height": array.shape[0],
        "width": array.shape[1],
        "count": 1,
        "dtype": array.dtype,
        "crs": CRS,
        "transform": rasterio.Affine(pixel, 0, LEFT[tile], 0, -pixel, TOP),
        "nodata": 0,
        "compress": "deflate",
    }
    with rasterio.open(path, "w", **profile | options) as file:
        file.write(array, 1)


def make_scene(
    folder, base_url, name, day, *, shifted, tile="33UUP", covers=None, shows="", **properties
):
    """Write the images of a scene and return its STAC item.

    shifted: whether its numbers carry the offset of 1000. covers: of a scene that does not fill its
    tile, the columns (first, last + 1) that it fills, in 10 m pixels, multiples of 6. shows: the
    day whose truth it shows, if not its own. properties: by name, with __ for a colon
    (s2__processing_baseline). Its assets have Element 84's names if these hold
    `earthsearch__boa_offset_applied`, else Planetary Computer's.
    """
    (folder / name).mkdir(parents=True)
    first, last = covers or (0, SIZE)
    left = LEFT[tile]
    bounds = (left + 10 * first, TOP - 10 * SIZE, left + 10 * last, TOP)
    west, south, east, north = transform_bounds(CRS, "EPSG:4326", *bounds)
    assets, at_element84 = {}, "earthsearch__boa_offset_applied" in properties
    for band in NAMES:
        pixel = pixel_size(band)
        if band == "SCL":
            array = true_classes(shows or day, tile)
        else:
            array = true_reflectance(shows or day, band, tile) + np.uint16(1000 * shifted)
        edges = [edge * 10 // pixel for edge in (first, last)]
        array[:, : edges[0]] = array[:, edges[1] :] = 0
        write_cog(folder / name / f"{band}.tif", array, pixel, tile)
        key = NAMES[band] if at_element84 else band
        assets[key] = {"href": f"{base_url}/{name}/{band}.tif", "roles": ["data"]}
        assets[key]["type"] = "image/tiff; application=geotiff; profile=cloud-optimized"
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    moment = datetime.fromisoformat(day) + timedelta(hours=10, minutes=10)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "sentinel-2-l2a",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [west, south, east, north],
        "properties": {
            "datetime": f"{moment.isoformat()}Z",
            "grid:code": f"MGRS-{tile}",
            "eo:cloud_cover": 20,
            **{key.replace("__", ":"): value for key, value in properties.items()},
        },
        "links": [],
        "assets": assets,
    }


class RangeHandler(BaseHTTPRequestHandler):
    """Serves files below server.folder, ranges of them too.

    server.faults: {path: N}, of whose requests the first N fail with status 500. server.denied:
    {path: N}, of whose requests all but the first N fail with status 403. server.expired: a text,
    as a signature, all requests with which fail with status 403.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.seen[path] += self.command == "GET"
        time.sleep(self.server.delay)
        file = self.server.folder / path.lstrip("/")
        if self.server.faults[path] > 0:
            self.server.faults[path] -= 1
            return self._answer(500, b"")
        denied = self.server.seen[path] > self.server.denied.get(path, math.inf)
        if denied or self.server.expired in self.path:
            return self._answer(403, b"")
        if not file.is_file():
            return self._answer(404, b"")
        content, wanted = file.read_bytes(), self.headers.get("Range")
        if not wanted:
            return self._answer(200, content)
        first, last = wanted.removeprefix("bytes=").split("-")
        last = min(int(last or len(content) - 1), len(content) - 1)
        if int(first) > last:
            return self._answer(416, b"")
        part = content[int(first) : last + 1]
        headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._answer(206, part, headers)

    def _answer(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {**dict(headers), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


class FileServer(ThreadingHTTPServer):
    """A server of a folder's files on a free port."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.folder, self.faults, self.seen, self.delay = Path(folder), Counter(), Counter(), 0
        self.denied, self.expired = {}, "never"
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def write_collection(path, items, name="sentinel-2-l2a"):
    collection = {
        "type": "Collection",
        "stac_version": "1.0.0",
        "id": name,
        "description": "Simulated scenes",
        "license": "other",
        "extent": {
            "spatial": {"bbox": [[-180, -90, 180, 90]]},
            "temporal": {"interval": [[None, None]]},
        },
        "links": [],
    }
    path.write_text(json.dumps(collection))
    items_path = path.with_name("items.json")
    items_path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return items_path


class Catalogue:
    """`rustac serve` of some items. url: of the API; stop() ends it."""

    def __init__(self, folder, items):
        collection = folder / "collection.json"
        items_path = write_collection(collection, items)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        program = Path(sys.executable).with_name("rustac")
        program = str(program) if program.exists() else shutil.which("rustac")
        self.process = subprocess.Popen(
            [program, "serve", "-a", address, str(collection), str(items_path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(100):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise RuntimeError("rustac serve did not start")

    def stop(self):
        self.process.terminate()
        self.process.wait()
