"""Maps as cloud-optimised GeoTIFFs, written block of rows by block of rows."""

import errno
from pathlib import Path
from xml.etree import ElementTree

from running.files import atomic_write

import numpy as np
import rasterio
import rasterio.shutil
from matplotlib.colors import to_rgba
from rasterio._err import CPLE_BaseError  # GDAL's, without a public name
from rasterio.errors import RasterioError
from rasterio.windows import Window

ROWS = 256  # of a file's own blocks, which are square; as many rows are in memory at a time
INT8_NODATA = -128  # which no value of an int8 map has
COG_OPTIONS = {"compress": "deflate", "bigtiff": "if_safer", "blocksize": ROWS}
# columns of a class map's attribute table: name, GDAL's type (0 whole number, 2 text) and usage
TABLE = [("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8)]


def write_geotiff(path, array, georeference, nodata, legend=None, band_names=None, about=None):
    """Write a cloud-optimised GeoTIFF: tiled, compressed, a large one with overviews.

    array: (H, W) or (H, W, bands), or what gives shape, dtype and slices of rows as an array does.
    georeference: dict with "crs" and "transform" (a, b, c, d, e, f), as in tile.json. legend: of
    class codes; becomes the colour table, and class names and colours in the .aux.xml beside the
    file. about: {"name", "unit"} of a quantity; they become the band's description and unit, and
    tags. band_names: of representations.
    """
    shape = (*array.shape, 1)[:3]
    profile = _profile(array.dtype, shape, georeference, nodata)
    # a mean of several classes, or of several representations, represents nothing
    resampling = "nearest" if legend or band_names else "average"
    with atomic_write(path) as part:
        # the driver of cloud-optimised files can only copy a whole file
        scratch = part.with_suffix(".scratch.tif")
        try:
            with rasterio.open(scratch, "w", **profile) as file:
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
            _copy_as_cog(scratch, part, resampling)
        finally:
            scratch.unlink(missing_ok=True)
    remove_sidecars(path)
    if legend:
        _write_class_table(path, legend)


def _profile(dtype, shape, georeference, nodata):
    """How rasterio creates the scratch file of a shape (H, W, bands)."""
    colors = {"photometric": "RGB", "ALPHA": "YES"} if shape[2] == 4 else {}
    return colors | {
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
        "compress": "lzw",
        "BIGTIFF": "YES",
    }


def _color_table(legend):
    """{code: (red, green, blue, alpha)} in 0 .. 255; 0, no data, is transparent."""
    colors = {code: to_rgba(entry["color"]) for code, entry in legend.items()}
    table = {code: tuple(round(255 * part) for part in rgba) for code, rgba in colors.items()}
    return {0: (0, 0, 0, 0)} | table


def _copy_as_cog(source, path, resampling):
    """Copy a GeoTIFF to a cloud-optimised one, and read that through; OSError for a full disk.

    GDAL may report no error where the disk was full.
    """
    try:
        options = COG_OPTIONS | {"overview_resampling": resampling}
        rasterio.shutil.copy(source, path, driver="COG", **options)
        with rasterio.open(path) as file:
            for _, window in file.block_windows():
                file.read(window=window)
    except (RasterioError, CPLE_BaseError):
        raise OSError(errno.EIO, "GDAL wrote no whole file; is the disk full?") from None


def _write_class_table(path, legend):
    """Names and colours of classes where GDAL and QGIS look for them: <path>.aux.xml.

    As category names, one a code from 0 up, and as an attribute table, from which QGIS (3.30 and
    later) lists the classes of the legend alone and not all 256 codes.
    """
    dataset = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(dataset, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for code in range(max(legend) + 1):
        entry = ElementTree.SubElement(names, "Category")
        entry.text = legend[code]["name"] if code in legend else "no data" if code == 0 else ""
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(TABLE):
        field = ElementTree.SubElement(table, "FieldDefn", index=str(index))
        for tag, value in (("Name", name), ("Type", kind), ("Usage", usage)):
            ElementTree.SubElement(field, tag).text = str(value)
    colors = _color_table(legend)
    for index, (code, entry) in enumerate(legend.items()):
        row = ElementTree.SubElement(table, "Row", index=str(index))
        for value in (code, entry["name"], *colors[code][:3]):
            ElementTree.SubElement(row, "F").text = str(value)
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
