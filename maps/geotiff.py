"""Maps as GeoTIFFs, written block of rows by block of rows."""

import errno
from pathlib import Path
from xml.etree import ElementTree

from running.files import atomic_write

import numpy as np
import rasterio
import rasterio.shutil
from matplotlib.colors import to_rgba
from rasterio.errors import RasterioError
from rasterio.windows import Window

ROWS = 256  # of a file's own blocks, which are square; as many rows are in memory at a time
INT8_NODATA = -128  # which no value of an int8 map has
COG_OPTIONS = {
    "compress": "deflate",
    "bigtiff": "if_safer",
    "blocksize": ROWS,
    "overview_resampling": "nearest",  # a mean of several representations represents nothing
}


def write_geotiff(path, array, georeference, nodata, legend=None, band_names=None, about=None):
    """Write a tiled, compressed GeoTIFF; with band names, a cloud-optimised one with overviews.

    array: (H, W) or (H, W, bands), or what gives shape, dtype and slices of rows as an array does.
    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and the class names in the .aux.xml beside the file.
    about: {"name", "unit"} of a quantity; they become the band's description and unit, and tags.
    """
    shape = (*array.shape, 1)[:3]
    profile = _profile(array.dtype, shape, georeference, nodata)
    if band_names:
        profile |= {"compress": "lzw", "BIGTIFF": "YES"}
    elif shape[2] == 4:
        profile |= {"photometric": "RGB", "ALPHA": "YES"}
    with atomic_write(path) as part:
        # the driver of cloud-optimised files can only copy a whole file
        file_path = part.with_suffix(".scratch.tif") if band_names else part
        try:
            with rasterio.open(file_path, "w", **profile) as file:
                if band_names:
                    file.descriptions = band_names
                for first in range(0, shape[0], ROWS):
                    block = array[first : first + ROWS].reshape(-1, *shape[1:])
                    window = Window(0, first, shape[1], len(block))
                    file.write(np.moveaxis(block, -1, 0), window=window)
                if about:
                    file.descriptions, file.units = (about["name"],), (about["unit"],)
                    file.update_tags(quantity=about["name"], unit=about["unit"])
                if legend:
                    file.write_colormap(1, _color_table(legend))
            if band_names:
                rasterio.shutil.copy(file_path, part, driver="COG", **COG_OPTIONS)
        finally:
            if band_names:
                file_path.unlink(missing_ok=True)
        _check_written(part)
    remove_sidecars(path)
    if legend:
        _write_category_names(path, legend)


def _profile(dtype, shape, georeference, nodata):
    """How rasterio creates a GeoTIFF of a shape (H, W, bands)."""
    return {
        "driver": "GTiff",
        "height": shape[0],
        "width": shape[1],
        "count": shape[2],
        "dtype": dtype,
        "crs": georeference["crs"],
        "transform": rasterio.Affine(*georeference["transform"]),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": ROWS,
        "blockysize": ROWS,
        "compress": "deflate",
    }


def _color_table(legend):
    """{code: (red, green, blue, alpha)} in 0 .. 255; 0, no data, is transparent."""
    colors = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
    table = {code: tuple(round(255 * part) for part in rgba) for code, rgba in colors.items()}
    return {0: (0, 0, 0, 0)} | table


def _check_written(path):
    """Read a GeoTIFF through: GDAL reports no error where the disk was full; OSError for that."""
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


# ---- representation maps -------------------------------------------------------------------------


class _Representations:
    """A map on disk as `write_geotiff` takes it: float32, or int8 with a value for no data.

    It is opened again for each block of rows, so that the memory of rows already read is freed.
    """

    def __init__(self, read, is_int8):
        self.read, self.is_int8 = read, is_int8
        self.shape = read("representation_map").shape
        self.dtype = np.dtype("int8" if is_int8 else "float32")

    def __getitem__(self, rows):
        block = np.array(self.read("representation_map")[rows], self.dtype)
        if self.is_int8:
            block[np.isnan(self.read("representation_map_scales")[rows])] = INT8_NODATA
        return block


def write_representation_tif(output_dir, read, is_int8, georeference):
    """representation_map.tif of a map; of int8, representation_map_scales.tif too.

    read: opens an array by name as a memory map: representation_map (H, W, D) float32, float16 or
    int8, and of int8 representation_map_scales (H, W), NaN where there is no data. georeference:
    as of `write_geotiff`. Bands are named by dimension; nodata is NaN, of int8 -128; value = int8 *
    scale.
    """
    array = _Representations(read, is_int8)
    names = [f"dimension {number}" for number in range(array.shape[2])]
    nodata = INT8_NODATA if is_int8 else np.nan
    path = output_dir / "representation_map.tif"
    write_geotiff(path, array, georeference, nodata, band_names=names)
    if is_int8:
        path = output_dir / "representation_map_scales.tif"
        scales = read("representation_map_scales")
        write_geotiff(path, scales, georeference, np.nan, band_names=["scale"])
