"""Maps as GeoTIFFs, block of rows by block of rows."""

import errno
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from matplotlib.colors import to_rgba
from rasterio.errors import RasterioError
from rasterio.windows import Window

from running.files import atomic_write


def write_geotiff(path, array, georeference, nodata, legend=None):
    """Write (H, W) or (H, W, bands) as a tiled, compressed GeoTIFF.

    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and the class names in the .aux.xml beside the file.
    """
    bands = array[..., None] if array.ndim == 2 else array
    height, width, count = bands.shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": bands.dtype,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
    }
    if count == 4:
        profile |= {"photometric": "RGB", "ALPHA": "YES"}
    with atomic_write(path) as part:
        with rasterio.open(part, "w", **profile) as file:
            for first in range(0, height, 256):  # a row of blocks at a time
                block = np.moveaxis(bands[first : first + 256], -1, 0)
                file.write(block, window=Window(0, first, width, block.shape[1]))
            if legend:
                rgba = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
                colors = {code: tuple(round(255 * c) for c in rgb) for code, rgb in rgba.items()}
                file.write_colormap(1, {0: (0, 0, 0, 0)} | colors)
        _check_written(part)
    remove_sidecars(path)
    if legend:
        _write_category_names(path, legend)


def _check_written(path):
    """Read a GeoTIFF through; OSError where it is not whole, of which GDAL says nothing."""
    try:
        with rasterio.open(path) as file:
            for _, window in file.block_windows():
                file.read(window=window)
    except RasterioError:
        raise OSError(errno.EIO, "GDAL wrote no whole file; is the disk full?") from None


def _write_category_names(path, legend):
    """Class names where GDAL and QGIS look for them: <path>.aux.xml, one name a code from 0 up."""
    dataset = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(dataset, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for code in range(max(legend) + 1):
        entry = ElementTree.SubElement(names, "Category")
        entry.text = legend[code]["name"] if code in legend else "no data" if code == 0 else ""
    with atomic_write(f"{path}.aux.xml") as part:
        ElementTree.ElementTree(dataset).write(part)


def remove_sidecars(path):
    """Remove what GDAL and QGIS keep beside a picture: names, statistics and smaller copies."""
    for suffix in (".aux.xml", ".ovr", ".msk"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


ROWS = 256  # of a file's own blocks: so many rows are in memory at a time
INT8_NODATA = -128  # which no value of an int8 map has


def write_representation_tif(output_dir, read, is_int8, georeference):
    """representation_map.tif of a map; of int8, representation_map_scales.tif too.

    read: opens an array by name as a memory map: representation_map (H, W, D) float32, float16 or
    int8, and of int8 representation_map_scales (H, W), NaN where there is no data. georeference:
    with crs and transform (a, b, c, d, e, f), as in tile.json.
    Bands are named by dimension; nodata is NaN, of int8 -128. value = int8 * scale.
    """
    names = [f"dimension {number}" for number in range(read("representation_map").shape[2])]

    def representations(rows):
        block = np.array(read("representation_map")[rows], "int8" if is_int8 else "float32")
        if is_int8:
            block[np.isnan(read("representation_map_scales")[rows])] = INT8_NODATA
        return block

    def scales(rows):
        return np.asarray(read("representation_map_scales")[rows])[..., None]

    shape = read("representation_map").shape
    path = output_dir / "representation_map.tif"
    if not is_int8:
        write_cog(path, representations, shape, "float32", np.nan, georeference, names)
        return
    write_cog(path, representations, shape, "int8", INT8_NODATA, georeference, names)
    path = output_dir / "representation_map_scales.tif"
    write_cog(path, scales, (*shape[:2], 1), "float32", np.nan, georeference, ["scale"])


def write_cog(path, read_rows, shape, dtype, nodata, georeference, names):
    """Write a cloud-optimised GeoTIFF with named bands.

    read_rows: gives the rows of a slice, (rows, W, bands); it opens its memory map anew, so that
    pages read before no longer count as this process's memory. shape: (H, W, bands).
    Overviews are of single pixels: the mean of several representations represents nothing.
    """
    height, width, count = shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": dtype,
        "nodata": nodata,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "tiled": True,
        "blockxsize": ROWS,
        "blockysize": ROWS,
        "compress": "lzw",
        "BIGTIFF": "YES",
    }
    with atomic_write(path) as part:
        scratch = part.with_suffix(".scratch.tif")  # the COG driver only copies whole files
        try:
            with rasterio.open(scratch, "w", **profile) as file:
                file.descriptions = names
                for first in range(0, height, ROWS):
                    block = read_rows(slice(first, first + ROWS))
                    window = Window(0, first, width, len(block))
                    file.write(np.moveaxis(block, -1, 0), window=window)
            options = {"compress": "deflate", "bigtiff": "if_safer", "blocksize": ROWS}
            options["overview_resampling"] = "nearest"
            rasterio.shutil.copy(scratch, part, driver="COG", **options)
        finally:
            scratch.unlink(missing_ok=True)
