"""Representation maps as cloud-optimised GeoTIFFs, block of rows by block of rows."""

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from files import atomic_write

ROWS = 256  # of a file's own blocks: so many rows are in memory at a time
INT8_NODATA = -128  # which no value of an int8 map has


def write_representation_tif(output_dir, array, scales, georeference):
    """representation_map.tif of a map; of int8, representation_map_scales.tif too.

    array: (H, W, D) float32, float16 or int8, a memory map; scales: (H, W) of int8, NaN where there
    is no data, or None. georeference: with crs and transform (a, b, c, d, e, f), as in tile.json.
    Bands are named by dimension; nodata is NaN, of int8 -128. value = int8 * scale.
    """
    names = [f"dimension {number}" for number in range(array.shape[2])]
    path = output_dir / "representation_map.tif"
    if scales is None:
        write_cog(path, array, "float32", np.nan, georeference, names)
        return
    write_cog(path, array, "int8", INT8_NODATA, georeference, names, np.asarray(scales))
    path = output_dir / "representation_map_scales.tif"
    write_cog(path, scales[..., None], "float32", np.nan, georeference, ["scale"])


def write_cog(path, array, dtype, nodata, georeference, names, scales=None):
    """Write (H, W, bands) as a cloud-optimised GeoTIFF with named bands; NaN scales: no data.

    Its overviews are of single pixels: the mean of several representations represents nothing.
    """
    height, width, count = array.shape
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
                    block = np.array(array[first : first + ROWS], dtype)  # a copy
                    if scales is not None:
                        block[np.isnan(scales[first : first + ROWS])] = nodata
                    window = Window(0, first, width, len(block))
                    file.write(np.moveaxis(block, -1, 0), window=window)
            options = {"compress": "deflate", "bigtiff": "if_safer", "blocksize": ROWS}
            options["overview_resampling"] = "nearest"
            rasterio.shutil.copy(scratch, part, driver="COG", **options)
        finally:
            scratch.unlink(missing_ok=True)
