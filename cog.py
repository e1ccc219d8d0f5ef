"""Representation maps as cloud-optimised GeoTIFFs, block of rows by block of rows."""

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from files import atomic_write

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
