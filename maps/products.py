"""The maps that infer.py makes of a tile: one row each; arrays, GeoTIFFs and file names follow."""

from typing import NamedTuple

from running.config import CHOICES

import numpy as np

from maps.geotiff import remove_sidecars


class Product(NamedTuple):
    """A map (H, W), written as <name>.npy.

    no_data: what pixels without data hold, also the GeoTIFF's nodata; None: all pixels have data.
    geotiff: whether <name>.tif is written too, where the tile is georeferenced.
    when: (key, value) of `made_by`, what infer.json says of the maps; (): the map is always made.
    """

    name: str
    dtype: str
    no_data: float | None
    geotiff: bool = True
    when: tuple = ()


# A new map is a row here, and a line that fills it in `map_blocks` of infer.py.
PRODUCTS = [
    Product("valid_count", "uint16", None),
    # (H, W, D), on the disk as representation_format says; representation_tif writes its GeoTIFF
    Product("representation_map", "float32", np.nan, geotiff=False),
    Product(
        "representation_map_scales",
        "float32",
        np.nan,
        geotiff=False,
        when=("representation_format", "int8"),
    ),
    Product("classification_map", "uint8", 0, when=("classify", True)),
    Product("confidence", "float32", np.nan, when=("classify", True)),
    Product("regression_map", "float32", np.nan, when=("estimate", True)),
    Product("applicability", "float32", np.nan, when=("applicability", True)),
]
PICTURES = ("classification_map", "confidence", "regression_map", "false_color", "inference_map")
OTHER_FILES = [  # that infer.py and the readers of maps write beside them
    *(f"{name}.{kind}" for name in PICTURES for kind in CHOICES["format"]),
    "false_color.tif",
    "inference_map.json",
    "agreement.png",
    "areas.json",
    "areas.csv",
    "areas.png",
    "explore.html",
    "item.json",
]


def made_products(made_by):
    """The products of a run. made_by: as in infer.json, with representation_format and so on."""
    return [one for one in PRODUCTS if not one.when or made_by.get(one.when[0]) == one.when[1]]


def map_arrays(shape, made_by, size):
    """{name: (dtype, shape)} of the maps of a tile on the disk. shape: (H, W); size: D."""
    arrays = {one.name: (one.dtype, shape) for one in made_products(made_by)}
    arrays["representation_map"] = (made_by["representation_format"], (*shape, size))
    return arrays


def empty_maps(shape, made_by, size):
    """{name: array without data} of some rows of a tile; representations are float32."""
    maps = {one.name: np.full(shape, one.no_data or 0, one.dtype) for one in made_products(made_by)}
    maps["representation_map"] = np.full((*shape, size), np.nan, np.float32)
    return maps


def product_files():
    """The names of all files that are written beside the maps of a tile, GDAL's sidecars aside."""
    return [f"{one.name}.{ending}" for one in PRODUCTS for ending in ("npy", "tif")] + OTHER_FILES


def remove_products(folder, kept=()):
    """Remove all that is written beside the maps of a tile, except the file names in `kept`."""
    for name in product_files():
        if name not in kept:
            (folder / name).unlink(missing_ok=True)
            remove_sidecars(folder / name)
