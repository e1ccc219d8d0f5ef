"""The scenes of one tile and year that the tests of prepare_tiles.py serve, and their truth."""

import numpy as np
from stac_server import SIZE, true_classes, true_reflectance

import prepare_tiles
from preparation import sentinel2
from tiles import Tile

WEST, EAST = (0, 150), (120, SIZE)  # columns of two scenes of one datatake
OLD = {"s2__processing_baseline": "02.14", "earthsearch__boa_offset_applied": False}
RAW = {"s2__processing_baseline": "04.00", "earthsearch__boa_offset_applied": False}
DONE = {"s2__processing_baseline": "04.00", "earthsearch__boa_offset_applied": True}
SCENES = {  # id: day, whether its numbers are shifted, and what make_scene takes
    "S2A_33UUP_20210110_0_L2A": ("2021-01-10", False, OLD),
    "S2A_33UUP_20210311_0_L2A": ("2021-03-11", True, RAW),
    "S2A_33UUP_20210410_0_L2A": ("2021-04-10", False, DONE),
    "S2B_MSIL2A_20210505T101031_R022_T33UUP_20210505T1": (  # named as by Planetary Computer
        "2021-05-05",
        True,
        {"s2__processing_baseline": "05.00"},
    ),
    "S2A_33UUP_20210606_0_L2A": (
        "2021-06-06",
        False,
        DONE | {"s2__processing_baseline": "05.00"},
    ),
    "S2A_33UUP_20210701_0_L2A": ("2021-07-01", True, RAW | {"covers": WEST}),
    "S2A_33UUP_20210701_1_L2A": ("2021-07-01", True, RAW | {"covers": EAST}),
    "S2A_33UUP_20210805_0_L2A": ("2021-08-05", False, DONE | {"covers": (0, 120)}),
    # reprocessed: the older baseline shows another day, so that a test sees which is used
    "S2A_33UUP_20210907_0_L2A": ("2021-09-07", False, OLD | {"shows": "2021-09-08"}),
    "S2A_33UUP_20210907_1_L2A": ("2021-09-07", True, RAW | {"s2__processing_baseline": "05.00"}),
    "S2A_33UUP_20211002_0_L2A": ("2021-10-02", True, RAW | {"eo__cloud_cover": 95}),
    "S2A_33UUP_20211231_0_L2A": ("2021-12-31", True, RAW),
    "S2A_33UUP_20220104_0_L2A": ("2022-01-04", True, RAW),
    "S2A_33UVP_20210311_0_L2A": ("2021-03-11", True, RAW | {"tile": "33UVP"}),
    "S2A_33UVP_20210606_0_L2A": ("2021-06-06", False, DONE | {"tile": "33UVP"}),
}
DAYS = ["2021-01-10", "2021-03-11", "2021-04-10", "2021-05-05", "2021-06-06"]
DAYS += ["2021-07-01", "2021-08-05", "2021-09-07", "2021-12-31"]


def settings(base_path, world=None, **changes):
    config = prepare_tiles.run_config | {"base_path": str(base_path), "mgrs_tile": "33UUP"}
    config |= {"stac_url": world.url} if world else {}
    return config | {"retries": 2, "threads": 2} | changes


def prepare(base_path, world=None, **changes):
    """Run prepare_tiles.py; returns the tiles."""
    return [Tile(folder) for folder in prepare_tiles.main(settings(base_path, world, **changes))]


def fill(array):
    """An array of a band's own pixels in 10 m pixels."""
    return np.kron(array, np.ones((SIZE // len(array),) * 2, array.dtype))


def truth(day, bands=sentinel2.TESSERA_BANDS, tile="33UUP"):
    """Bands and mask of a day at 10 m, as they should come out."""
    covered = np.ones((SIZE, SIZE), bool)
    if day == "2021-08-05":
        covered[:, 120:] = False
    values = np.stack([fill(true_reflectance(day, band, tile)) for band in bands], -1)
    clear = np.isin(fill(true_classes(day, tile)), (4, 5)) & covered
    return values * covered[..., None].astype(np.uint16), clear
